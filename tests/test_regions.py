"""One trunk over regions: shapes, one set of weights, stages, freezing, and a round trip by its options."""

import jax
import numpy as np
import pytest

from jaxft import gradcam, model, nets
from jaxft.model import Model

REGIONS = (("whole", 0, 0, 1, 1), ("head", 0.0, 0.25, 0.5, 0.5), ("corner", 0.5, 0.5, 0.5, 0.5))


@pytest.fixture(scope="module")
def small() -> Model:
    return model.load("vgg16", 4, weights="none", regions=REGIONS, region_size=(32, 32))


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).normal(0, 50, (2, 64, 64, 3)).astype(np.float32)


def softmax(x):
    return np.exp(x - x.max(-1, keepdims=True)) / np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)


def test_each_region_has_its_output_and_the_prediction_is_their_mean(small, images):
    """Bug: regions are mixed up, or logits are averaged where probabilities are meant."""
    each, _ = small.net.apply(small.variables, images, train=True, mutable=["batch_stats"])[0]
    logits, out = small.net.apply(small.variables, images)
    assert each.shape == (3, 2, 4) and logits.shape == (2, 4) and out["block5"].shape == (2, 3, 1, 1, 512)
    np.testing.assert_allclose(np.exp(logits), softmax(np.asarray(each)).mean(0), rtol=1e-4)
    trunk = nets.create("vgg16", None, fc=False)
    params = {layer: small.variables["params"][layer] for layer in small.variables["params"] if "block" in layer}
    alone, _ = trunk.apply({"params": params}, images[:, :32, 16:48])
    np.testing.assert_allclose(out["block5"][:, 1], alone, rtol=1e-5, atol=1e-5)


def test_any_stage_can_be_the_start(small, images):
    """Bug: a cut for cached features gives other logits."""
    logits, out = small.net.apply(small.variables, images)
    for stage in small.net.layers():
        np.testing.assert_array_equal(small.net.apply(small.variables, out[stage], start=stage)[0], logits)
    with pytest.raises(ValueError, match="not a stage of this net"):
        small.net.apply(small.variables, images, start="block9")


def test_it_is_made_again_from_its_options(small):
    """Bug: model.json of a run with regions cannot be opened."""
    made = nets.from_options("vgg16", nets.options("vgg16", small.net))
    assert made == small.net
    with pytest.raises(ValueError, match="regions of another net"):
        nets.options("resnet50", small.net)


def test_a_frozen_trunk_keeps_its_statistics():
    """Bug: the set of frozen layers does not reach the trunk, whose BatchNorm moves."""
    start = model.load("resnet50", 3, weights="none", regions=REGIONS[:2], region_size=(32, 32))
    frozen = frozenset(layer for layer in start.variables["params"] if not layer.startswith("predictions"))
    images = np.random.default_rng(0).normal(0, 50, (4, 32, 32, 3)).astype(np.float32)
    for names, moves in ((frozen, False), (frozenset(), True)):
        net = start.net.clone(frozen=names)
        _, updated = jax.jit(lambda v, x, net=net: net.apply(v, x, train=True, mutable=["batch_stats"]))(
            start.variables, images
        )
        moved = updated["batch_stats"]["conv1_bn"]["mean"] - start.variables["batch_stats"]["conv1_bn"]["mean"]
        assert bool(np.abs(moved).max() > 0) is moves


@pytest.mark.parametrize(
    "regions, size, match",
    [
        ((), (32, 32), "is not a tuple"),
        ((("a", 0, 0, 1),), (32, 32), "is not \\(name"),
        ((("a", 0.6, 0, 0.5, 1),), (32, 32), "'a' does not lie within"),
        ((("a", 0, 0, 1, 1), ("a", 0, 0, 1, 1)), (32, 32), "two regions have one name: a, a"),
        (REGIONS, 32, "region_size=32"),
    ],
)
def test_regions_that_cannot_be(regions, size, match):
    """Bug: a crop of no pixels, or two output layers of one name."""
    with pytest.raises(ValueError, match=match):
        nets.create("vgg16", 3, regions=regions, region_size=size)
    with pytest.raises(ValueError, match="no option 'fcc'"):
        nets.create("vgg16", 3, regions=REGIONS, region_size=(32, 32), fcc=True)


def test_maps_of_regions_lie_where_the_regions_are(small):
    """Bug: the heat of the lower right quarter is drawn over the whole image."""
    corner = model.load("vgg16", 4, weights="none", regions=REGIONS[2:], region_size=(64, 64))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 128, 128, 3), np.uint8)
    heat = gradcam.heatmaps(corner, pixels, "block3", [0, 1])
    assert heat.shape == (2, 32, 32) and heat[:, :16].max() == 0 and heat[:, :, :16].max() == 0 < heat.max()


def test_a_box_holds_most_of_the_heat():
    """Bug: rows and columns are exchanged."""
    maps = np.zeros((3, 8, 8), np.float32)
    maps[:, 5:7, 1:3] = 1
    top, left, height, width = gradcam.box(maps, 0.5, 0.25)
    assert (height, width) == (0.5, 0.25)
    assert top <= 5 / 8 and top + height >= 6.8 / 8 and left <= 1.3 / 8 and left + width >= 2.7 / 8
    with pytest.raises(ValueError, match="within an image"):
        gradcam.box(maps, 1.5)
