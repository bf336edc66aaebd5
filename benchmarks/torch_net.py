"""A Keras model's graph as plain PyTorch modules, so that the peer computes the same function from the same weights."""

import itertools
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
        for layer in model.layers[1:]:
            node = layer._inbound_nodes[0]
            inputs = [produced[id(x)] for x in node.arguments.keras_tensors]
            self.layers[layer.name] = convert(layer)
            if inputs[0] in self.layers and absorbs(self.layers[layer.name], self.layers[inputs[0]]):
                self.layers[inputs[0]] = nn.Identity()
            produced[id(node.outputs[0])] = layer.name
            self.steps.append((layer.name, inputs))
        self.results = [produced[id(x)] for x in model.outputs]

    def freeze(self, names: Collection[str]) -> None:
        """The layers of these names take no gradient, and their BatchNorm uses its running statistics."""
        for name in names:
            self.layers[name].requires_grad_(False).eval()

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


class _Flatten(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 2, 3, 1).flatten(1)  # Keras flattens rows, columns, channels


class _GlobalPool(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))


class _Scale(nn.Module):
    def __init__(self, layer: Any):
        super().__init__()
        self.weight, self.bias = (nn.Parameter(_array(v)[:, None, None]) for v in (layer.gamma, layer.beta))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight + self.bias


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


def _dense(layer: Any) -> nn.Module:
    linear = nn.Linear(*layer.kernel.shape)
    linear.weight.data = _array(layer.kernel).T.contiguous()
    linear.bias.data = _array(layer.bias)
    return linear


def _conv(layer: Any) -> nn.Module:
    fan_in, fan_out = layer.kernel.shape[2:]
    size, strides = layer.kernel_size, layer.strides
    same = layer.padding == "same"
    symmetric = same and strides == (1, 1) and all(k % 2 for k in size)
    padding = tuple(k // 2 for k in size) if symmetric else 0
    conv = nn.Conv2d(fan_in, fan_out, size, strides, padding, bias=layer.use_bias)
    conv.weight.data = _array(layer.kernel).permute(3, 2, 0, 1).contiguous()
    if layer.use_bias:
        conv.bias.data = _array(layer.bias)
    return _Same(conv, size, strides, 0.0) if same and not symmetric else conv


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
    if kind is nn.AvgPool2d:  # Keras leaves the padding out of the mean; all "same" ones of the zoo are 3×3 at stride 1
        return nn.AvgPool2d(size, strides, size[0] // 2, count_include_pad=False)
    return _Same(kind(size, strides), size, strides, value)


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
        case "Dense":
            module = _dense(layer)
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
            module = _GlobalPool()
        case "ZeroPadding2D":
            (top, bottom), (left, right) = layer.padding
            module = nn.ZeroPad2d((left, right, top, bottom))
        case "ReLU":
            return nn.ReLU(inplace=True)
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
    activation = getattr(layer, "activation", None)
    relu = activation is not None and activation.__name__ == "relu"
    return nn.Sequential(module, nn.ReLU(inplace=True)) if relu else module
