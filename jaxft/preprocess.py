"""RGB → what a weight file was trained on. Runs on the device, inside the step, after augmentation.

Source: `keras.applications.imagenet_utils.preprocess_input`, modes of the same names.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

CAFFE_MEAN_BGR = (103.939, 116.779, 123.68)
CAFFE_MEAN_BGR_ROUNDED = (103.94, 116.78, 123.68)
TORCH_MEAN_RGB = (0.485, 0.456, 0.406)
TORCH_STD_RGB = (0.229, 0.224, 0.225)


def caffe(images: jax.Array) -> jax.Array:
    """RGB [..., 3] in 0 to 255, any dtype → float32 BGR minus the mean of ImageNet, about -124 to 152."""
    return images.astype(jnp.float32)[..., ::-1] - jnp.asarray(CAFFE_MEAN_BGR)


def caffe_017(images: jax.Array) -> jax.Array:
    """RGB [..., 3] in 0 to 255, any dtype → float32 BGR minus the mean of ImageNet, times 0.017: about -2.1 to 2.6.

    Source: the scripts of DenseNet-Keras, which write the mean with two decimals.
    """
    return (images.astype(jnp.float32)[..., ::-1] - jnp.asarray(CAFFE_MEAN_BGR_ROUNDED)) * 0.017


def tf(images: jax.Array) -> jax.Array:
    """RGB [..., 3] in 0 to 255, any dtype → float32 RGB in -1 to 1."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def torch(images: jax.Array) -> jax.Array:
    """RGB [..., 3] in 0 to 255, any dtype → float32 RGB, each channel standardised by ImageNet's mean and deviation."""
    return (images.astype(jnp.float32) / 255.0 - jnp.asarray(TORCH_MEAN_RGB)) / jnp.asarray(TORCH_STD_RGB)


PREPROCESSING: dict[str, Callable[[jax.Array], jax.Array]] = {
    "caffe": caffe,
    "caffe_017": caffe_017,
    "tf": tf,
    "torch": torch,
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
