"""Inception-V3 as in `inception_v3.py` of fchollet/deep-learning-models, release v0.2 (arXiv:1512.00567).

Every unit is a convolution with bias and ReLU, then BatchNormalization. The classifier returns logits, and its 8×8
average pooling is global.
"""

from keras import Input, Model, layers


def _unit(x, filters, rows, columns, padding="same", strides=1):
    x = layers.Conv2D(filters, (rows, columns), strides=strides, padding=padding, activation="relu")(x)
    return layers.BatchNormalization(epsilon=1e-3)(x)


def _average(x, filters):
    return _unit(layers.AveragePooling2D(3, strides=1, padding="same")(x), filters, 1, 1)


def _units(x, *shapes):
    for shape in shapes:
        x = _unit(x, *shape)
    return x


def inception_v3_v02(input_shape=(299, 299, 3), classes=1000) -> Model:
    """The net up to the logits, or up to `mixed10` where `classes` is None."""
    image = Input(input_shape)
    x = _unit(image, 32, 3, 3, "valid", 2)
    x = _unit(x, 32, 3, 3, "valid")
    x = layers.MaxPooling2D(3, strides=2)(_unit(x, 64, 3, 3))
    x = _units(x, (80, 1, 1, "valid"), (192, 3, 3, "valid"))
    x = layers.MaxPooling2D(3, strides=2)(x)
    for i in range(3):
        ways = [_unit(x, 64, 1, 1), _units(x, (48, 1, 1), (64, 5, 5))]
        ways += [_units(x, (64, 1, 1), (96, 3, 3), (96, 3, 3)), _average(x, 32)]
        x = layers.Concatenate(name=f"mixed{i}")(ways)
    ways = [_unit(x, 384, 3, 3, "valid", 2), _units(x, (64, 1, 1), (96, 3, 3), (96, 3, 3, "valid", 2))]
    x = layers.Concatenate(name="mixed3")([*ways, layers.MaxPooling2D(3, strides=2)(x)])
    for i, (n, entry) in enumerate(((128, 128), (160, 160), (160, 160), (192, 160)), start=4):
        ways = [_unit(x, 192, 1, 1), _units(x, (n, 1, 1), (n, 1, 7), (192, 7, 1))]
        ways.append(_units(x, (entry, 1, 1), (n, 7, 1), (n, 1, 7), (n, 7, 1), (192, 1, 7)))
        x = layers.Concatenate(name=f"mixed{i}")([*ways, _average(x, 192)])
    ways = [_units(x, (192, 1, 1), (320, 3, 3, "valid", 2))]
    ways.append(_units(x, (192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3, "valid", 2)))
    x = layers.Concatenate(name="mixed8")([*ways, layers.AveragePooling2D(3, strides=2)(x)])
    for i in (9, 10):
        ways = [_unit(x, 320, 1, 1)]
        for entry in (((384, 1, 1),), ((448, 1, 1), (384, 3, 3))):
            y = _units(x, *entry)
            ways.append(layers.Concatenate()([_unit(y, 384, 1, 3), _unit(y, 384, 3, 1)]))
        x = layers.Concatenate(name=f"mixed{i}")([*ways, _average(x, 192)])
    if classes is not None:
        x = layers.GlobalAveragePooling2D(name="avg_pool")(x)
        x = layers.Dense(classes, name="predictions")(x)
    return Model(image, x, name="inception_v3_v02")
