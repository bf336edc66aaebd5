import numpy as np
import pytest

from jaxft import preprocess


@pytest.mark.parametrize("mode", ["caffe", "tf", "torch"])
def test_agrees_with_keras(mode):
    """Bug: channels not reversed, means in the wrong order, or a wrong range."""
    from keras.applications import imagenet_utils

    images = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3), dtype=np.uint8)
    expected = imagenet_utils.preprocess_input(images.astype(np.float32), mode=mode, data_format="channels_last")
    ours = preprocess.get(mode)(images)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["imagenet", "", None, ["caffe"]])
def test_unknown_name(name):
    """Bug: a KeyError that does not list what there is."""
    with pytest.raises(ValueError, match="must be one of caffe, caffe_017, tf, tf_128, torch, unit, not .*nets.spec"):
        preprocess.get(name)
