"""Grad-CAM against what is known of small nets, and on every net of the zoo."""

import jax
import numpy as np
import pytest
import tiny

from jaxft import gradcam, model, nets, preprocess

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
TARGETS = [2, 0, 1]


def test_after_global_pooling_it_is_the_class_activation_map():
    """Bug: the weights are not those of the gradient: with a head of one dense layer both maps agree."""
    made = tiny.model()
    heat = gradcam.heatmaps(made, IMAGES, "body", TARGETS)
    _, outputs = made.net.apply(made.variables, preprocess.get(made.preprocessing)(IMAGES))
    kernel = np.asarray(made.variables["params"]["predictions"]["kernel"])
    expected = np.maximum(np.einsum("bhwc,cb->bhw", outputs["body"], kernel[:, TARGETS]), 0)
    expected /= np.maximum(expected.max((1, 2), keepdims=True), 1e-30)
    np.testing.assert_allclose(heat, expected, atol=1e-5)
    assert np.isclose(heat.max(), 1)


def test_the_weights_are_finite_differences():
    """Bug: an inner stage is differentiated with regard to the image, or with preprocessing twice."""
    made = tiny.model()
    _, outputs = made.net.apply(made.variables, preprocess.get(made.preprocessing)(IMAGES[:1]))
    output = np.asarray(outputs["stem"], np.float64)
    places = output.shape[1] * output.shape[2]

    def logit(change):
        return float(made.net.apply(made.variables, np.float32(output + change), start="stem")[0][0, 2])

    weights = [(logit(1e-2 * np.eye(output.shape[3])[c]) - logit(-1e-2 * np.eye(output.shape[3])[c])) / 2e-2 / places
               for c in range(output.shape[3])]  # fmt: skip
    expected = np.maximum((output * weights).sum(-1), 0)
    heat = gradcam.heatmaps(made, IMAGES[:1], "stem", [2])
    np.testing.assert_allclose(heat, expected / max(expected.max(), 1e-30), atol=2e-2)


def test_stages_without_places_are_refused():
    """Bug: a vector is drawn as a picture, or the error does not say which stages there are."""
    made = tiny.model()
    assert gradcam.stages(made, (8, 8, 3)) == ["stem", "body"]
    with pytest.raises(ValueError, match="'mean' is no stage whose output has places; these are stem, body"):
        gradcam.heatmaps(made, IMAGES, "mean", TARGETS)


def test_nothing_speaks_for_an_output():
    """Bug: 0 / 0 paints an image that has no reason."""
    made = tiny.model()
    zeros = jax.tree.map(np.zeros_like, made.variables["params"]["predictions"])
    params = {**made.variables["params"], "predictions": zeros}
    flat = model.Model(made.net, {**made.variables, "params": params}, made.preprocessing)
    assert (gradcam.heatmaps(flat, IMAGES, None, TARGETS) == 0).all()


def test_overlay_brightens_what_speaks():
    """Bug: the map is upside down, or drawn at the size of the stage."""
    image = np.full((32, 40, 3), 100, np.uint8)
    heat = np.zeros((4, 5), np.float32)
    heat[0, 0] = 1
    found = gradcam.overlay(image, heat).astype(int)
    assert found.shape == (32, 40, 3)
    assert np.ptp(found[2, 2]) > 40 and np.ptp(found[-2, -2]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", list(nets.ZOO))
def test_every_net_at_every_stage(name):
    """Bug: one family cannot start at one of its stages, or gives no gradient there."""
    made = model.load(name, 3, weights="none", dtype="float32", **nets.any_size(name))
    images = np.random.default_rng(0).integers(0, 256, (1, 75, 75, 3), dtype=np.uint8)
    known = gradcam.stages(made, (75, 75, 3))
    for stage in {known[0], known[len(known) // 2], known[-1]}:
        heat = gradcam.heatmaps(made, images, stage, [1])
        assert heat.shape[0] == 1 and np.isfinite(heat).all() and (heat.max() == 0 or np.isclose(heat.max(), 1))
