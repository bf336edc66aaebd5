"""RGB → what a weight file was trained on. Runs on the device, inside the step, after augmentation.

Images of another number of channels go to a first kernel that `model.load(channels=)` has adapted to them: they stay in
their order, channel i with the constants of red, green or blue by i modulo 3; one channel alone, with their means.

Source: `keras.applications.imagenet_utils.preprocess_input`, modes of the same names.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.nets.common import IMAGENET_STD, of_channels

CAFFE_MEAN_BGR = (103.939, 116.779, 123.68)
CAFFE_MEAN_BGR_ROUNDED = (103.94, 116.78, 123.68)
TORCH_MEAN_RGB = (0.485, 0.456, 0.406)


def caffe(images: jax.Array) -> jax.Array:
    """RGB [..., 3] in 0 to 255, any dtype → float32 BGR minus the mean of ImageNet, about -124 to 152."""
    return _caffe(images, CAFFE_MEAN_BGR)


def _caffe(images: jax.Array, mean_bgr: tuple[float, ...]) -> jax.Array:
    images = images.astype(jnp.float32)
    if images.shape[-1] == 3:
        return images[..., ::-1] - jnp.asarray(mean_bgr)
    return images - jnp.asarray(of_channels(mean_bgr[::-1], images.shape[-1]), jnp.float32)


def caffe_017(images: jax.Array) -> jax.Array:
    """RGB [..., 3] in 0 to 255, any dtype → float32 BGR minus the mean of ImageNet, times 0.017: about -2.1 to 2.6.

    Source: the scripts of DenseNet-Keras, which write the mean with two decimals.
    """
    return _caffe(images, CAFFE_MEAN_BGR_ROUNDED) * 0.017


def tf(images: jax.Array) -> jax.Array:
    """RGB [..., 3] in 0 to 255, any dtype → float32 RGB in -1 to 1."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def tf_128(images: jax.Array) -> jax.Array:
    """RGB [..., 3] in 0 to 255, any dtype → float32 RGB in -1 to 0.992: EfficientNetV2's, S to L."""
    return images.astype(jnp.float32) / 128 - 1.0


def unit(images: jax.Array) -> jax.Array:
    """RGB [..., 3] in 0 to 255, any dtype → float32 RGB in 0 to 1, for nets that normalise their images themselves."""
    return images.astype(jnp.float32) / 255.0


def torch(images: jax.Array) -> jax.Array:
    """RGB [..., 3] in 0 to 255, any dtype → float32 RGB, each channel standardised by ImageNet's mean and deviation."""
    mean, deviation = (
        jnp.asarray(of_channels(rgb, images.shape[-1]), jnp.float32) for rgb in (TORCH_MEAN_RGB, IMAGENET_STD)
    )
    return (images.astype(jnp.float32) / 255.0 - mean) / deviation


PREPROCESSING: dict[str, Callable[[jax.Array], jax.Array]] = {
    "caffe": caffe,
    "caffe_017": caffe_017,
    "tf": tf,
    "tf_128": tf_128,
    "torch": torch,
    "unit": unit,
}


def get(name: str) -> Callable[[jax.Array], jax.Array]:
    """The function of that name.

    Raises:
        ValueError: there is none; the message lists the names.
    """
    if not isinstance(name, str) or name not in PREPROCESSING:
        raise ValueError(
            f"preprocessing must be one of {', '.join(PREPROCESSING)}, not {name!r}; "
            "a net's own is nets.spec(NAME).preprocessing"
        )
    return PREPROCESSING[name]


def adapt(kernel: np.ndarray, channels: int, name: str) -> np.ndarray:
    """The first kernel of a pretrained net for images of another number of channels.

    For one channel the three are added up: a grey image gives what three equal channels gave, but for the constants of
    the preprocessing. For more, the kernels of red, green and blue are repeated in this order and weighted by 3 / C, so
    that the sum over channels stays what it was.

    Args:
        kernel: float32 [h, w, 3, F], in the order of the file.
        channels: how many the images have, at least 1.
        name: of the preprocessing, which says whether the file wants blue first.

    Returns:
        float32 [h, w, channels, F], for channels in the order of the images; the kernel itself for 3.
    """
    if channels == 3:
        return kernel
    rgb = kernel[:, :, ::-1] if name.startswith("caffe") else kernel
    if channels == 1:
        return rgb.sum(2, keepdims=True)
    return rgb[:, :, np.arange(channels) % 3] * np.float32(3 / channels)
