"""DenseNet-121, -161, -169 as in `densenet121.py`, `densenet161.py`, `densenet169.py` of flyyufelix/DenseNet-Keras.

Huang et al. 2016, arXiv:1608.06993. `compression` is 1 − the scripts' `reduction`, which their `test_inference.py`
sets to 0.5. Without dropout; the classifier returns logits (`prob`, the softmax, is left out).
"""

from keras import Input, Model, layers

from .resnet_scale import EPSILON, Scale


def _bn_scale_relu(x, base, relu):
    x = layers.BatchNormalization(epsilon=EPSILON, name=f"{base}_bn")(x)
    x = Scale(name=f"{base}_scale")(x)
    return layers.ReLU(name=relu)(x)


def _conv(x, filters, size, name, strides=1):
    return layers.Conv2D(filters, size, strides=strides, use_bias=False, name=name)(x)


def _dense_layer(features, growth, stage, branch):
    base = f"{stage}_{branch}"
    x = _bn_scale_relu(features, f"conv{base}_x1", f"relu{base}_x1")
    x = _conv(x, 4 * growth, 1, f"conv{base}_x1")
    x = _bn_scale_relu(x, f"conv{base}_x2", f"relu{base}_x2")
    x = layers.ZeroPadding2D(1, name=f"conv{base}_x2_zeropadding")(x)
    x = _conv(x, growth, 3, f"conv{base}_x2")
    return layers.Concatenate(name=f"concat_{base}")([features, x])


def densenet_scale(blocks, growth, stem_width, input_shape=(224, 224, 3), classes=1000, compression=0.5) -> Model:
    """The net up to the logits, or up to the last block's ReLU (`relu5_blk`) where `classes` is None."""
    image = Input(input_shape, name="data")
    x = layers.ZeroPadding2D(3, name="conv1_zeropadding")(image)
    x = _conv(x, stem_width, 7, "conv1", strides=2)
    x = _bn_scale_relu(x, "conv1", "relu1")
    x = layers.ZeroPadding2D(1, name="pool1_zeropadding")(x)
    x = layers.MaxPooling2D(3, strides=2, name="pool1")(x)
    last = len(blocks) + 1
    for stage, count in enumerate(blocks, start=2):
        for branch in range(1, count + 1):
            x = _dense_layer(x, growth, stage, branch)
        x = _bn_scale_relu(x, f"conv{stage}_blk", f"relu{stage}_blk")
        if stage < last:
            x = _conv(x, int(x.shape[-1] * compression), 1, f"conv{stage}_blk")
            x = layers.AveragePooling2D(2, strides=2, name=f"pool{stage}")(x)
    if classes is not None:
        x = layers.GlobalAveragePooling2D(name=f"pool{last}")(x)
        x = layers.Dense(classes, name="fc6")(x)
    return Model(image, x, name="densenet")


def densenet121_scale(input_shape=(224, 224, 3), classes=1000) -> Model:
    return densenet_scale((6, 12, 24, 16), 32, 64, input_shape, classes)


def densenet161_scale(input_shape=(224, 224, 3), classes=1000) -> Model:
    return densenet_scale((6, 12, 36, 24), 48, 96, input_shape, classes)


def densenet169_scale(input_shape=(224, 224, 3), classes=1000) -> Model:
    return densenet_scale((6, 12, 32, 32), 32, 64, input_shape, classes)
