"""Images of one, two, four or more channels in nets that learned from three."""

import jax
import numpy as np
import pytest
import thin
import tiny

from jaxft import model, nets, optim, preprocess, task
from jaxft.data import Dataset, Inputs
from jaxft.data.decode import Decode
from jaxft.finetune import finetune
from jaxft.model import Model
from jaxft.phase import Phase
from jaxft.runs import Run

KERNEL = np.random.default_rng(0).normal(size=(3, 3, 3, 5)).astype(np.float32)


@pytest.mark.parametrize("name", ["caffe", "caffe_017", "tf", "torch"])
def test_a_grey_image_gives_what_three_equal_channels_gave(name):
    """Bug: the kernels of blue and red are exchanged, or the sum over channels is another one."""
    grey = np.random.default_rng(1).integers(0, 256, (4, 3, 3, 1)).astype(np.float32)
    one = (np.asarray(preprocess.get(name)(grey)) * preprocess.adapt(KERNEL, 1, name)[None, ..., 0]).sum((1, 2, 3))
    three = np.einsum("bhwc,hwc->b", np.asarray(preprocess.get(name)(grey.repeat(3, -1))), KERNEL[..., 0])
    if name == "tf":  # whose constants are the same for each channel
        np.testing.assert_allclose(one, three, rtol=1e-4)
    shift = (one - three)[0]
    if name != "torch":  # which also scales each channel by its own deviation
        np.testing.assert_allclose(one - three, shift, atol=2e-2 if name == "caffe" else 1e-3)


@pytest.mark.parametrize("channels", [2, 4, 6, 7])
def test_more_channels_repeat_red_green_and_blue(channels):
    """Bug: a fourth channel gets the kernel of another colour, or the responses grow with the number of channels."""
    found = preprocess.adapt(KERNEL, channels, "tf")
    for channel in range(channels):
        np.testing.assert_allclose(found[:, :, channel], KERNEL[:, :, channel % 3] * 3 / channels, rtol=1e-6)
    images = np.full((1, 2, 2, channels), 100, np.uint8)
    assert preprocess.get("caffe")(images).shape == images.shape


def test_caffe_keeps_the_order_of_more_channels():
    """Bug: with four channels, opacity is subtracted the mean of blue and multiplied by the kernel of blue."""
    images = np.zeros((1, 1, 1, 4), np.float32)
    red, green, blue = 123.68, 116.779, 103.939
    np.testing.assert_allclose(preprocess.get("caffe")(images)[0, 0, 0], [-red, -green, -blue, -red], rtol=1e-6)
    np.testing.assert_allclose(preprocess.adapt(KERNEL, 4, "caffe")[:, :, 0], KERNEL[:, :, 2] * 0.75, rtol=1e-6)


@pytest.mark.parametrize("name", thin.ZOO)
@pytest.mark.parametrize("channels", [1, 4])
def test_every_net_takes_them(name, channels):
    """Bug: one family has its three channels written into its code, or its first kernel is not found."""
    net = nets.create(name, 2, **nets.any_size(name))
    side = max(75, min(nets.spec(name).native_size) // 2)
    shapes = jax.eval_shape(net.init, jax.random.key(0), jax.ShapeDtypeStruct((1, side, side, channels), np.float32))
    layer = model.first_layer(net, shapes["params"])
    assert shapes["params"][layer]["kernel"].shape[2] == channels


def test_load_adapts_the_first_kernel():
    """Bug: a net for grey images has random first kernels, or three channels."""
    three = model.load("googlenet", 2, weights="none", auxiliary=False)
    grey = model.load("googlenet", 2, weights="none", auxiliary=False, channels=1)
    layer = model.first_layer(grey.net, grey.variables["params"])
    kernels = [made.variables["params"][layer]["kernel"] for made in (three, grey)]
    np.testing.assert_allclose(kernels[1], np.asarray(kernels[0]).sum(2, keepdims=True), atol=1e-7)
    assert (three.channels, grey.channels) == (3, 1)
    with pytest.raises(ValueError, match="channels"):
        model.load("googlenet", 2, weights="none", channels=0)


def five_channels():
    net = tiny.Tiny()
    variables = jax.tree.map(np.asarray, dict(net.init(jax.random.key(0), np.zeros((1, 8, 8, 5), np.float32))))
    images = [np.random.default_rng(i).integers(0, 256, (9, 9, 5), dtype=np.uint8) for i in range(24)]
    names = tuple(map(str, range(24)))
    return Model(net, variables, "tf"), Dataset("five", images, np.arange(24) % 3, names, names, tiny.CLASSES)


def test_a_run_on_five_channels(tmp_path):
    """Bug: training, pictures, prediction or the opened model fails on images that are not RGB."""
    start, data = five_channels()
    decode = Decode(channels=5)
    sides = [Inputs(data, part, (8, 8), 4, decode=decode) for part in (np.arange(16), np.arange(16, 24))]
    _, predictions = finetune(
        start, task.classification(), *sides, [Phase(1, optim.Constant(1e-2))], Run(tmp_path / "run")
    )
    opened = model.open(tmp_path / "run", net=tiny.Tiny())
    assert opened.decode == decode and opened.channels == 5
    np.testing.assert_array_equal(opened.predict(data, np.arange(16, 24)).outputs, predictions.outputs)
    assert (tmp_path / "run" / "augmentation.png").exists()


def test_channels_that_disagree_are_refused(tmp_path):
    """Bug: an error of shapes from inside of a convolution, after the images were decoded."""
    start, data = five_channels()
    sides = [Inputs(data, part, (8, 8), 4) for part in (np.arange(16), np.arange(16, 24))]
    with pytest.raises(ValueError, match=r"images of train have 3 channels, and the net takes 5.*Decode\(channels=5\)"):
        finetune(start, task.classification(), *sides, [Phase(1, optim.Constant(1e-2))], Run(tmp_path / "run"))
