"""A Keras model's graph as plain PyTorch modules, so that the peer computes the same function from the same weights."""

import itertools
from collections import Counter, OrderedDict
from collections.abc import Collection
from typing import Any

import keras
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class Graph(nn.Module):
    """The layers of a functional Keras model, one torch module each, run in topological order.

    Takes images [B, 3, H, W]; returns the outputs of the model in a list.
    """

    def __init__(self, model: keras.Model):
        super().__init__()
        self.steps: list[tuple[str, list[str]]] = []  # (layer, the layers whose outputs it takes)
        produced = {id(model.inputs[0]): "images"}
        self.layers = nn.ModuleDict()
        for layer in model.operations[1:]:  # layers, and additions that are none
            node = layer._inbound_nodes[0]
            inputs = [produced[id(x)] for x in node.arguments.keras_tensors]
            constants = [x for x in node.arguments.args if isinstance(x, float)]
            self.layers[layer.name] = _Constant(type(layer).__name__, constants[0]) if constants else convert(layer)
            alone = len(node.arguments.keras_tensors[0]._keras_history.operation._outbound_nodes) == 1
            if alone and inputs[0] in self.layers and absorbs(self.layers[layer.name], self.layers[inputs[0]]):
                self.layers[inputs[0]] = nn.Identity()
            produced[id(node.outputs[0])] = layer.name
            self.steps.append((layer.name, inputs))
        self.results = [produced[id(x)] for x in model.outputs]
        read = Counter(source for _, inputs in self.steps for source in inputs)
        for name, inputs in self.steps:
            for module in self.layers[name].modules():
                if hasattr(module, "inplace"):  # what others read must stay
                    module.inplace = module.inplace and read[inputs[0]] == 1

    def freeze(self, names: Collection[str]) -> None:
        """The layers of these names take no gradient, and their BatchNorm uses its running statistics."""
        for name, module in self.layers.named_modules():
            if name.rpartition(".")[2] in names:
                module.requires_grad_(False).eval()

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        values = {"images": images}
        for name, inputs in self.steps:
            values[name] = self.layers[name](*(values[x] for x in inputs))
        return [values[name].float() for name in self.results]


def _array(variable: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(keras.ops.convert_to_numpy(variable)))


class _Add(nn.Module):
    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        return sum(values[1:], values[0])


class _Concatenate(nn.Module):
    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        return torch.cat(values, 1)


class _Constant(nn.Module):
    """x plus or times a number."""

    def __init__(self, kind: str, value: float):
        super().__init__()
        self.add, self.value = kind == "Add", value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.value if self.add else x * self.value


class _Multiply(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x * (y if y.ndim == 4 else y[:, :, None, None])


class _ScaledAdd(nn.Module):
    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.add(x, y, alpha=self.factor)


class _Affine(nn.Module):
    """A rescaling or a normalisation by constants of each channel."""

    def __init__(self, factor: Any, offset: Any):
        super().__init__()
        self.factor, self.offset = (
            torch.tensor(np.reshape(x, (-1, 1, 1)), dtype=torch.float32) for x in (factor, offset)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor + self.offset


class _Rows(nn.Module):
    """What works on channels that come last, such as a LayerNorm."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) if x.ndim == 2 else self.inner(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _Crop(nn.Module):
    def __init__(self, ends: tuple[tuple[int, int], tuple[int, int]]):
        super().__init__()
        (self.above, _), (self.left, _) = ends

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :, self.above :, self.left :]


class _Flatten(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 2, 3, 1).flatten(1)  # Keras flattens rows, columns, channels


class _GlobalPool(nn.Module):
    def __init__(self, keepdims: bool):
        super().__init__()
        self.keepdims = keepdims

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3), keepdim=self.keepdims)


class _Reshape(nn.Module):
    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.shape = shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(len(x), self.shape[-1], *self.shape[:-1])


class _Scale(nn.Module):
    def __init__(self, layer: Any):
        super().__init__()
        self.weight = nn.Parameter(_array(layer.gamma)[:, None, None])
        self.bias = nn.Parameter(_array(layer.beta)[:, None, None]) if hasattr(layer, "beta") else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight if self.bias is None else x * self.weight + self.bias


class _Same(nn.Module):
    """Pads as Keras's "same" does at a stride, the odd pixel at the end, then runs `inner`."""

    def __init__(self, inner: nn.Module, size: tuple[int, int], strides: tuple[int, int], value: float):
        super().__init__()
        self.inner, self.size, self.strides, self.value = inner, size, strides, value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = [
            max((-(-side // s) - 1) * s + k - side, 0)
            for side, k, s in zip(x.shape[2:], self.size, self.strides, strict=True)
        ]
        ends = [(t // 2, t - t // 2) for t in reversed(total)]
        return self.inner(F.pad(x, tuple(itertools.chain(*ends)), value=self.value))


class _Known(nn.Module):
    """A mean that leaves the padding out: over that of ones."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) / self.inner(torch.ones_like(x[:1, :1]))


def _dense(layer: Any) -> nn.Module:
    linear = nn.Linear(*layer.kernel.shape)
    linear.weight.data = _array(layer.kernel).T.contiguous()
    linear.bias.data = _array(layer.bias)
    return linear


def _window(layer: Any, kernel: torch.Tensor, groups: int, bias: Any) -> nn.Module:
    """A convolution with the kernel [h, w, C / groups, D], at the strides and with the padding of the Keras layer."""
    size, strides = layer.kernel_size, layer.strides
    same = layer.padding == "same"
    symmetric = same and strides == (1, 1) and all(k % 2 for k in size)
    padding = tuple(k // 2 for k in size) if symmetric else 0
    fan_in, fan_out = kernel.shape[2] * groups, kernel.shape[3]
    conv = nn.Conv2d(fan_in, fan_out, size, strides, padding, groups=groups, bias=bias is not None)
    conv.weight.data = kernel.permute(3, 2, 0, 1).contiguous()
    if bias is not None:
        conv.bias.data = _array(bias)
    return _Same(conv, size, strides, 0.0) if same and not symmetric else conv


def _conv(layer: Any) -> nn.Module:
    return _window(layer, _array(layer.kernel), getattr(layer, "groups", 1), layer.bias if layer.use_bias else None)


def _depthwise(layer: Any, kernel: Any) -> nn.Module:
    return _window(layer, _array(kernel).transpose(2, 3), kernel.shape[2], layer.bias if layer.use_bias else None)


def _separable(layer: Any) -> nn.Module:
    pointwise = nn.Conv2d(layer.pointwise_kernel.shape[2], layer.filters, 1, bias=False)
    pointwise.weight.data = _array(layer.pointwise_kernel).permute(3, 2, 0, 1).contiguous()
    return nn.Sequential(_depthwise(layer, layer.depthwise_kernel), pointwise)


def _layer_norm(layer: Any) -> nn.Module:
    norm = nn.LayerNorm(layer.gamma.shape[0], layer.epsilon)
    norm.weight.data, norm.bias.data = _array(layer.gamma), _array(layer.beta)
    return _Rows(norm)


ACTIVATIONS = {
    **{"linear": nn.Identity, "silu": nn.SiLU, "swish": nn.SiLU, "hard_silu": nn.Hardswish, "hard_swish": nn.Hardswish},
    **{"sigmoid": nn.Sigmoid, "gelu": nn.GELU},
}


def _relu(layer: Any) -> nn.Module:
    return nn.ReLU(inplace=True) if layer.max_value is None else nn.ReLU6(inplace=True)


def _batch_norm(layer: Any) -> nn.Module:
    norm = nn.BatchNorm2d(layer.moving_mean.shape[0], layer.epsilon, 1 - layer.momentum)
    norm.running_mean, norm.running_var = _array(layer.moving_mean), _array(layer.moving_variance)
    norm.bias.data = _array(layer.beta)
    if layer.scale:
        norm.weight.data = _array(layer.gamma)
    else:
        norm.weight.requires_grad_(False)
    return norm


def _pool(layer: Any, kind: type[nn.Module], value: float) -> nn.Module:
    size, strides = layer.pool_size, layer.strides
    if layer.padding == "valid":
        return kind(size, strides)
    if kind is nn.AvgPool2d and strides == (1, 1):  # Keras leaves the padding out of the mean
        return nn.AvgPool2d(size, strides, size[0] // 2, count_include_pad=False)
    same = _Same(kind(size, strides), size, strides, value)
    return _Known(same) if kind is nn.AvgPool2d else same


def absorbs(module: nn.Module, before: nn.Module) -> bool:
    """Lets a convolution or max pooling pad for itself what the layer of zeros before it pads, if it does.

    A max pooling pads -∞: in the zoo all of these follow a ReLU, where that is the same.
    """
    inner = module[0] if isinstance(module, nn.Sequential) else module
    if not isinstance(before, nn.ZeroPad2d) or not isinstance(inner, nn.Conv2d | nn.MaxPool2d):
        return False
    left, right, top, bottom = before.padding
    if inner.padding not in (0, (0, 0)) or left != right or top != bottom:
        return False
    inner.padding = (top, left)
    return True


def convert(layer: Any) -> nn.Module:
    """One Keras layer with its weights, and the activation that follows.

    Raises:
        NotImplementedError: the layer is of a kind that no net of the zoo uses.
    """
    match type(layer).__name__:
        case "Conv2D":
            module = _conv(layer)
        case "DepthwiseConv2D":
            module = _depthwise(layer, layer.kernel)
        case "SeparableConv2D":
            module = _separable(layer)
        case "Sequential":
            return nn.Sequential(OrderedDict((inner.name, convert(inner)) for inner in layer.layers))
        case "LayerNormalization":
            module = _layer_norm(layer)
        case "LayerScale":
            module = _Scale(layer)
        case "Rescaling":
            module = _Affine(layer.scale, layer.offset)
        case "Normalization":
            mean, deviation = np.array(layer.mean).ravel(), np.sqrt(np.array(layer.variance).ravel())
            module = _Affine(1 / deviation, -mean / deviation)
        case "Multiply" | "CustomScaleLayer" | "Cropping2D" | "Reshape":
            kinds = {
                "Multiply": lambda: _Multiply(),
                "CustomScaleLayer": lambda: _ScaledAdd(layer.scale),
                "Cropping2D": lambda: _Crop(layer.cropping),
                "Reshape": lambda: _Reshape(layer.target_shape),
            }
            return kinds[type(layer).__name__]()
        case "Dense":
            module = _dense(layer) if len(layer.input.shape) == 2 else _Rows(_dense(layer))
        case "BatchNormalization":
            module = _batch_norm(layer)
        case "Scale":
            module = _Scale(layer)
        case "LRN":
            module = nn.LocalResponseNorm(5, 1e-4, 0.75, 1.0)
        case "MaxPooling2D":
            module = _pool(layer, nn.MaxPool2d, -torch.inf)
        case "AveragePooling2D":
            module = _pool(layer, nn.AvgPool2d, 0.0)
        case "GlobalAveragePooling2D":
            module = _GlobalPool(layer.keepdims)
        case "ZeroPadding2D":
            (top, bottom), (left, right) = layer.padding
            module = nn.ZeroPad2d((left, right, top, bottom))
        case "ReLU":
            return _relu(layer)
        case "Add":
            module = _Add()
        case "Concatenate":
            module = _Concatenate()
        case "Flatten":
            module = _Flatten()
        case "Activation" | "Dropout":  # dropout is off on every side
            module = nn.Identity()
        case kind:
            raise NotImplementedError(f"{layer.name}: no torch module for {kind}")
    name = getattr(getattr(layer, "activation", None), "__name__", "linear")
    if name == "linear":
        return module
    return nn.Sequential(module, nn.ReLU(inplace=True) if name == "relu" else ACTIVATIONS[name]())
