"""ResNet-101 and -152 as in `resnet_101.py` and `resnet_152.py` of flyyufelix/cnn_finetune.

He et al. 2015, arXiv:1512.03385. Caffe's split of batch normalisation is kept, though the BatchNormalization has a
gamma and beta of its own before Scale. The classifier returns logits, and its 7×7 average pooling is global.
"""

from keras import Input, Model, layers

EPSILON = 1.1e-5


class Scale(layers.Layer):
    """x · gamma + beta per channel, the channels last."""

    def build(self, input_shape):
        self.gamma = self.add_weight(shape=(input_shape[-1],), initializer="ones", name="gamma")
        self.beta = self.add_weight(shape=(input_shape[-1],), initializer="zeros", name="beta")

    def call(self, x):
        return x * self.gamma + self.beta


def _conv_bn_scale(x, filters, size, suffix, strides=1):
    x = layers.Conv2D(filters, size, strides=strides, use_bias=False, name=f"res{suffix}")(x)
    x = layers.BatchNormalization(epsilon=EPSILON, name=f"bn{suffix}")(x)
    return Scale(name=f"scale{suffix}")(x)


def _bottleneck(x, filters, block, project, strides):
    branch = f"{block}_branch"
    y = _conv_bn_scale(x, filters, 1, f"{branch}2a", strides)
    y = layers.ReLU(name=f"res{branch}2a_relu")(y)
    y = layers.ZeroPadding2D(1, name=f"res{branch}2b_zeropadding")(y)
    y = _conv_bn_scale(y, filters, 3, f"{branch}2b")
    y = layers.ReLU(name=f"res{branch}2b_relu")(y)
    y = _conv_bn_scale(y, 4 * filters, 1, f"{branch}2c")
    if project:
        x = _conv_bn_scale(x, 4 * filters, 1, f"{branch}1", strides)
    y = layers.Add(name=f"res{block}")([y, x])
    return layers.ReLU(name=f"res{block}_relu")(y)


def _label(stage, k):
    """Stages 2 and 5 count a, b, c; stages 3 and 4 a, b1, b2, …"""
    return f"{stage}b{k}" if k and stage in (3, 4) else f"{stage}{chr(ord('a') + k)}"


def resnet_scale(blocks=(3, 4, 23, 3), input_shape=(224, 224, 3), classes=1000) -> Model:
    """The net up to the logits, or up to the last block's ReLU where `classes` is None."""
    image = Input(input_shape, name="data")
    x = layers.ZeroPadding2D(3, name="conv1_zeropadding")(image)
    x = layers.Conv2D(64, 7, strides=2, use_bias=False, name="conv1")(x)
    x = layers.BatchNormalization(epsilon=EPSILON, name="bn_conv1")(x)
    x = Scale(name="scale_conv1")(x)
    x = layers.ReLU(name="conv1_relu")(x)
    x = layers.MaxPooling2D(3, strides=2, name="pool1")(x)
    for stage, count in enumerate(blocks, start=2):
        for k in range(count):
            x = _bottleneck(x, 2 ** (stage + 4), _label(stage, k), k == 0, 2 if k == 0 and stage > 2 else 1)
    if classes is not None:
        x = layers.GlobalAveragePooling2D(name="avg_pool")(x)
        x = layers.Dense(classes, name="fc1000")(x)
    return Model(image, x, name="resnet_scale")


def resnet101_scale(input_shape=(224, 224, 3), classes=1000) -> Model:
    return resnet_scale((3, 4, 23, 3), input_shape, classes)


def resnet152_scale(input_shape=(224, 224, 3), classes=1000) -> Model:
    return resnet_scale((3, 8, 36, 3), input_shape, classes)
