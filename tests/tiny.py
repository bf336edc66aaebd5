"""A net of four layers that keeps the backbone contract, BatchNorm included: what the tests train in seconds."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxft.nets.common import fold


class Tiny(nn.Module):
    """conv1 → bn1 → pool (stage stem), conv2 (stage body), average (stage mean) and predictions."""

    num_classes: int = 3
    frozen: frozenset[str] = frozenset()
    dropout: float = 0.0

    def layers(self):
        stem = ("conv1_pad", "conv1", "bn1", "pool1")
        return {"stem": stem, "body": ("conv2",), "mean": ("mean",), "predictions": ("predictions",)}

    def head_layers(self):
        return ("predictions",)

    @nn.compact
    def __call__(self, images, *, train=False, start=None):
        def stem(x):
            x = nn.Conv(4, (3, 3), name="conv1")(x)
            x = nn.BatchNorm(use_running_average=not train or "bn1" in self.frozen, momentum=0.9, name="bn1")(x)
            return nn.max_pool(nn.relu(x), (2, 2), (2, 2))

        def body(x):
            return nn.relu(nn.Conv(8, (3, 3), name="conv2")(x))

        def predictions(x):
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
            return nn.Dense(self.num_classes, name="predictions")(x)

        return fold(
            [("stem", stem), ("body", body), ("mean", lambda x: x.mean((1, 2))), ("predictions", predictions)],
            images,
            start,
        )


def variables(net: Tiny, seed: int = 0):
    """Random variables with batch statistics away from their defaults of 0 and 1."""
    values = net.init(jax.random.key(seed), jnp.zeros((1, 8, 8, 3)))
    key = jax.random.key(seed + 1)
    stats = jax.tree.map(lambda x: x + jax.random.uniform(key, x.shape), values["batch_stats"])
    return {"params": values["params"], "batch_stats": stats}


def prepare(_key, images):
    """The simplest preprocessing: 0 to 255 → 0 to 1."""
    return images.astype(jnp.float32) / 255.0


def batch(step: int, size: int = 8, num_classes: int = 3):
    """A learnable batch that is a function of the step: the class is the brightest channel."""
    rng = np.random.default_rng(step)
    label = rng.integers(0, num_classes, size)
    image = rng.integers(0, 100, (size, 8, 8, 3), dtype=np.uint8)
    image[np.arange(size), :, :, label] += 120
    return {"image": image, "label": label.astype(np.int32), "index": np.arange(size, dtype=np.int32)}
