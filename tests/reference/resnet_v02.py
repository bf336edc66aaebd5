"""ResNet-50 as in `resnet50.py` of fchollet/deep-learning-models, release v0.2 (He et al. 2015, arXiv:1512.03385).

The script names only layers with weights and `avg_pool`; the rest have the names of He's Caffe model here (`pool1`,
`res2a`, `res2a_relu`, …). The classifier returns logits, and its 7×7 average pooling is global.
"""

from keras import Input, Model, layers


def _conv_bn(x, filters, size, suffix, strides=1, padding="valid"):
    x = layers.Conv2D(filters, size, strides=strides, padding=padding, name=f"res{suffix}")(x)
    return layers.BatchNormalization(epsilon=1e-3, name=f"bn{suffix}")(x)


def _bottleneck(x, filters, block, project, strides):
    branch = f"{block}_branch"
    y = _conv_bn(x, filters, 1, f"{branch}2a", strides)
    y = layers.ReLU(name=f"res{branch}2a_relu")(y)
    y = _conv_bn(y, filters, 3, f"{branch}2b", padding="same")
    y = layers.ReLU(name=f"res{branch}2b_relu")(y)
    y = _conv_bn(y, 4 * filters, 1, f"{branch}2c")
    if project:
        x = _conv_bn(x, 4 * filters, 1, f"{branch}1", strides)
    y = layers.Add(name=f"res{block}")([y, x])
    return layers.ReLU(name=f"res{block}_relu")(y)


def resnet50_v02(input_shape=(224, 224, 3), classes=1000, padded=False) -> Model:
    """The net up to the logits, or up to `res5c_relu` where `classes` is None.

    With `padded` it is that of Keras 2.1 and 2.2, where zeros come before pool1.
    """
    image = Input(input_shape, name="data")
    x = layers.ZeroPadding2D(3, name="conv1_zeropadding")(image)
    x = layers.Conv2D(64, 7, strides=2, name="conv1")(x)
    x = layers.BatchNormalization(epsilon=1e-3, name="bn_conv1")(x)
    x = layers.ReLU(name="conv1_relu")(x)
    x = layers.ZeroPadding2D(1, name="pool1_pad")(x) if padded else x
    x = layers.MaxPooling2D(3, strides=2, name="pool1")(x)
    for stage, count in enumerate((3, 4, 6, 3), start=2):
        for k in range(count):
            strides = 2 if k == 0 and stage > 2 else 1
            x = _bottleneck(x, 2 ** (stage + 4), f"{stage}{'abcdef'[k]}", k == 0, strides)
    if classes is not None:
        x = layers.GlobalAveragePooling2D(name="avg_pool")(x)
        x = layers.Dense(classes, name="fc1000")(x)
    return Model(image, x, name="resnet50_v02")
