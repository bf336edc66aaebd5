"""GoogLeNet as in `googlenet.py` of joelouismarino/googlenet-keras, from the Caffe model (arXiv:1409.4842).

Names have _ for the script's /. The classifiers return logits, and the last 7×7 average pooling is global.
"""

from keras import Input, Model, layers, ops

WIDTHS = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}


class LRN(layers.Layer):
    """Divides by (1 + α/n · the sum of the squares of n = 5 neighbouring channels) ** 0.75, α = 1e-4."""

    def call(self, x):
        channels = x.shape[-1]
        squares = ops.pad(ops.square(x), ((0, 0), (0, 0), (0, 0), (2, 2)))
        total = sum(squares[..., i : i + channels] for i in range(5))
        return x / ops.power(1.0 + 1e-4 / 5 * total, 0.75)


def _conv(x, filters, size, name, strides=1, padding="same"):
    return layers.Conv2D(filters, size, strides=strides, padding=padding, activation="relu", name=name)(x)


def _halve(x, name):
    x = layers.ZeroPadding2D(((0, 1), (0, 1)))(x)
    return layers.MaxPooling2D(3, strides=2, name=f"{name}_3x3_s2")(x)


def _module(x, key):
    name = f"inception_{key}"
    one, reduce3, three, reduce5, five, projection = WIDTHS[key]
    ways = [_conv(x, one, 1, f"{name}_1x1")]
    ways.append(_conv(_conv(x, reduce3, 1, f"{name}_3x3_reduce"), three, 3, f"{name}_3x3"))
    ways.append(_conv(_conv(x, reduce5, 1, f"{name}_5x5_reduce"), five, 5, f"{name}_5x5"))
    pooled = layers.MaxPooling2D(3, strides=1, padding="same", name=f"{name}_pool")(x)
    ways.append(_conv(pooled, projection, 1, f"{name}_pool_proj"))
    return layers.Concatenate(name=f"{name}_output")(ways)


def _auxiliary(x, name, classes):
    x = layers.AveragePooling2D(5, strides=3, name=f"{name}_ave_pool")(x)
    x = layers.Flatten(name=f"{name}_flat")(_conv(x, 128, 1, f"{name}_conv"))
    x = layers.Dense(1024, activation="relu", name=f"{name}_fc")(x)
    return layers.Dense(classes, name=f"{name}_classifier")(layers.Dropout(0.7)(x))


def googlenet(input_shape=(224, 224, 3), classes=1000, hidden=()) -> Model:
    """The net up to the logits of loss1, loss2 and loss3, or up to `inception_5b` where `classes` is None.

    `hidden` are widths of dense layers of one's own before the last one.
    """
    image = Input(input_shape)
    x = _conv(layers.ZeroPadding2D(3)(image), 64, 7, "conv1_7x7_s2", 2, "valid")
    x = LRN(name="pool1_norm1")(_halve(x, "pool1"))
    x = _conv(_conv(x, 64, 1, "conv2_3x3_reduce"), 192, 3, "conv2_3x3")
    x = _halve(LRN(name="conv2_norm2")(x), "pool2")
    x = _halve(_module(_module(x, "3a"), "3b"), "pool3")
    outputs = []
    for key in ("4a", "4b", "4c", "4d", "4e"):
        x = _module(x, key)
        if classes is not None and key in ("4a", "4d"):
            outputs.append(_auxiliary(x, f"loss{len(outputs) + 1}", classes))
    x = _module(_module(_halve(x, "pool4"), "5a"), "5b")
    if classes is None:
        return Model(image, x, name="googlenet")
    x = layers.GlobalAveragePooling2D()(x)
    for i, width in enumerate(hidden, 1):
        x = layers.Dense(width, activation="relu", name=f"hidden{i}")(x if i == 1 else layers.Dropout(0.4)(x))
    x = layers.Dropout(0.4)(x)
    return Model(image, [*outputs, layers.Dense(classes, name="loss3_classifier")(x)], name="googlenet")
