"""ConvNeXt, tiny to extra large (Liu et al., 2022, arXiv:2201.03545, section 3)."""

import dataclasses
from collections.abc import Iterator
from functools import partial

import jax

from jaxft.nets.common import Spec, Stage, weight_files
from jaxft.nets.functional import (
    Functional,
    Layer,
    LayerNorm,
    activation,
    add,
    conv2d,
    dense,
    drop,
    layer_norm,
    layer_scale,
    nothing,
)


class ConvNeXt(Functional):
    """ConvNeXt: depthwise convolutions of 7×7, LayerNorm, and dense layers for each pixel.

    The head's LayerNorm comes after the pooling. Without a classifier it normalises the last feature map, as in Keras,
    whose files without classifier hold it too.

    Attributes:
        name_of_model: Keras's, with which the names of its layers begin.
        depths: blocks in each of the four stages.
        widths: of the stages.
        drop_path: rate of stochastic depth of the last block; it grows from 0 at the first one. Keras has 0.

    The others are those of `Functional`. Source: the paper; `keras.applications.convnext`.
    """

    name_of_model: str = "convnext_tiny"
    depths: tuple[int, ...] = (3, 3, 9, 3)
    widths: tuple[int, ...] = (96, 192, 384, 768)
    drop_path: float = 0.0

    @property
    def last(self) -> str:
        """The name of the last layer."""
        return f"{self.name_of_model}_head_dense"

    @property
    def head_norm(self) -> str:
        """The name of the head's LayerNorm."""
        return f"{self.name_of_model}_head_layernorm"

    def plan(self, x: Layer) -> Iterator[tuple[str, Layer]]:
        """See `Functional`."""
        model = self.name_of_model
        x, number, total = nothing(x, f"{model}_prestem_normalization"), 0, sum(self.depths)
        for i, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True)):
            within = f"sequential_{i}" if i else "sequential"  # Keras's class and number
            if i == 0:
                x = _within(conv2d(x, f"{model}_stem_conv", width, 4, 4, "VALID", bias=True), within)
                x = _within(layer_norm(x, f"{model}_stem_layernorm"), within)
                yield "stem", x
            else:
                x = _within(layer_norm(x, f"{model}_downsampling_layernorm_{i - 1}"), within)
                x = conv2d(x, f"{model}_downsampling_conv_{i - 1}", width, 2, 2, "VALID", bias=True)
                x = _within(x, within)
                yield f"downsampling_{i - 1}", x
            for j in range(depth):
                block, rate = f"{model}_stage_{i}_block_{j}", self.drop_path * number / max(total - 1, 1)
                y = conv2d(x, f"{block}_depthwise_conv", width, 7, bias=True, groups=width)
                y = dense(layer_norm(y, f"{block}_layernorm"), f"{block}_pointwise_conv_1", 4 * width)
                y = dense(activation(y, "gelu", f"{block}_gelu"), f"{block}_pointwise_conv_2", width)
                y = layer_scale(y, f"{block}_layer_scale")
                y = drop(y, f"{block}_stochastic_depth", rate) if rate else nothing(y, f"{block}_identity")
                x = add([x, y], None)
                number += 1
                yield f"stage_{i}_block_{j}", x
        if self.num_classes is None:
            yield "head_layernorm", layer_norm(x, self.head_norm)

    def layers(self) -> dict[str, tuple[str, ...]]:
        """Stage name → its layers in the order of Keras's `model.layers`, those without weights included."""
        table = super().layers()
        if self.num_classes is None:
            return table
        return {stage: (*layers, self.head_norm) if stage == "avg_pool" else layers for stage, layers in table.items()}

    def keras_kinds(self) -> dict[str, str]:
        """Layer with weights → its Keras class in snake case; those of the head are dense."""
        return super().keras_kinds() | {self.head_norm: "layer_normalization"}

    def head_plan(self) -> list[tuple[str, str, int | None]]:
        """(kind, name, width) of what follows the pooling, in order: `dense`, `layer_norm` or an activation."""
        return [("layer_norm", self.head_norm, None), *super().head_plan()]

    def _head_stages(self, train: bool) -> list[Stage]:
        stages = super()._head_stages(train)

        def pooled(x: jax.Array) -> jax.Array:
            return LayerNorm(self.dtype, name=self.head_norm)(x.mean((1, 2)))

        return [("avg_pool", pooled), *stages[1:]] if stages else []


def _within(layer: Layer, model: str) -> Layer:
    return dataclasses.replace(layer, within=model)


# Of each size: depths and widths of the stages.
SIZES = {
    "tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "small": ((3, 3, 27, 3), (96, 192, 384, 768)),
    "base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
    "xlarge": ((3, 3, 27, 3), (256, 512, 1024, 2048)),
}


def spec(size: str, num_params: int, gmac: float, sha256: str, notop_sha256: str) -> Spec:
    """The zoo's row of a ConvNeXt. Source of URL and hashes: `keras.applications.convnext`."""
    name, (depths, widths) = f"convnext_{size}", SIZES[size]
    url = f"https://storage.googleapis.com/tensorflow/keras-applications/convnext/{name}"
    return Spec(
        net=partial(ConvNeXt, name_of_model=name, depths=depths, widths=widths),
        about=f"depthwise 7×7 convolutions and LayerNorm, widths {widths[0]} to {widths[-1]}",
        native_size=(224, 224),
        preprocessing="torch",
        head=f"{name}_head_dense",
        classifier=(f"{name}_head_dense",),
        num_params=num_params,
        gmac=gmac,
        weights=weight_files((f"{url}.h5", sha256), (f"{url}_notop.h5", notop_sha256)),
    )
