"""Inception-V4 as in `inception_v4.py` of kentsommer/keras-inceptionV4, release 2.1 (arXiv:1602.07261).

The classifier returns logits, and its 8×8 average pooling is global; the script leaves every layer without a name.
"""

from unittest import mock

from keras import Input, Model, layers


def _unit(x, filters, rows, columns, padding="same", strides=1):
    x = layers.Conv2D(filters, (rows, columns), strides=strides, padding=padding, use_bias=False)(x)
    x = layers.BatchNormalization(momentum=0.9997, scale=False)(x)
    return layers.Activation("relu")(x)


def _units(x, *shapes):
    for shape in shapes:
        x = _unit(x, *shape)
    return x


def _join(name, *ways):
    return layers.Concatenate(name=name)(list(ways))


def _max(x):
    return layers.MaxPooling2D(3, strides=2, padding="valid")(x)


def _average(x, filters):
    return _unit(layers.AveragePooling2D(3, strides=1, padding="same")(x), filters, 1, 1)


def _stem(image):
    x = _units(image, (32, 3, 3, "valid", 2), (32, 3, 3, "valid"), (64, 3, 3))
    x = _join("stem1", _max(x), _unit(x, 96, 3, 3, "valid", 2))
    short = _units(x, (64, 1, 1), (96, 3, 3, "valid"))
    x = _join("stem2", short, _units(x, (64, 1, 1), (64, 1, 7), (64, 7, 1), (96, 3, 3, "valid")))
    return _join("stem", _unit(x, 192, 3, 3, "valid", 2), _max(x))


def _a(x, name):
    ways = [_unit(x, 96, 1, 1), _units(x, (64, 1, 1), (96, 3, 3)), _units(x, (64, 1, 1), (96, 3, 3), (96, 3, 3))]
    return _join(name, *ways, _average(x, 96))


def _b(x, name):
    ways = [_unit(x, 384, 1, 1), _units(x, (192, 1, 1), (224, 1, 7), (256, 7, 1))]
    ways.append(_units(x, (192, 1, 1), (192, 7, 1), (224, 1, 7), (224, 7, 1), (256, 1, 7)))
    return _join(name, *ways, _average(x, 128))


def _c(x, name):
    ways = [_unit(x, 256, 1, 1)]
    for entry in (((384, 1, 1),), ((384, 1, 1), (448, 3, 1), (512, 1, 3))):
        y = _units(x, *entry)
        ways.append(layers.Concatenate()([_unit(y, 256, 1, 3), _unit(y, 256, 3, 1)]))
    return _join(name, *ways, _average(x, 256))


def inception_v4(input_shape=(299, 299, 3), classes=1001, blocks=(4, 7, 3)) -> Model:
    """The net up to the logits, or up to the last block where `classes` is None."""
    image = Input(input_shape)
    x = _stem(image)
    for i in range(blocks[0]):
        x = _a(x, f"inception_a{i + 1}")
    ways = [_unit(x, 384, 3, 3, "valid", 2), _units(x, (192, 1, 1), (224, 3, 3), (256, 3, 3, "valid", 2)), _max(x)]
    x = _join("reduction_a", *ways)
    for i in range(blocks[1]):
        x = _b(x, f"inception_b{i + 1}")
    ways = [_units(x, (192, 1, 1), (192, 3, 3, "valid", 2))]
    ways.append(_units(x, (256, 1, 1), (256, 1, 7), (320, 7, 1), (320, 3, 3, "valid", 2)))
    x = _join("reduction_b", *ways, _max(x))
    for i in range(blocks[2]):
        x = _c(x, f"inception_c{i + 1}")
    if classes is not None:
        x = layers.GlobalAveragePooling2D()(x)
        x = layers.Dropout(0.2)(x)
        x = layers.Dense(classes)(x)
    return Model(image, x, name="inception_v4")


def inception_v4_gamma(**options) -> Model:
    """The same with a gamma in each BatchNorm."""
    norm = layers.BatchNormalization
    with mock.patch.object(layers, "BatchNormalization", lambda momentum, scale: norm(momentum=momentum)):
        return inception_v4(**options)
