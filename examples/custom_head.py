"""A head of your own: hidden layers by an option, and anything else by a Flax module around the backbone."""

import flax.linen as nn
import jax
import numpy as np

from examples import drawn
from jaxft import model, nets, optim, task
from jaxft.data import Inputs
from jaxft.finetune import finetune
from jaxft.model import Model
from jaxft.phase import Phase
from jaxft.runs import Run


class Normed(nn.Module):
    """VGG16 without its head, then pooling, a layer normalisation, and the classes."""

    num_classes: int = 3
    frozen: frozenset[str] = frozenset()

    def layers(self):
        return {**nets.create("vgg16", None).layers(), "head": ("head_norm", "predictions")}

    def head_layers(self):
        return ("head_norm", "predictions")

    @nn.compact
    def __call__(self, images, *, train=False, start=None):
        if start == "head":
            return images, {"head": images}
        backbone = nets.create("vgg16", None, frozen=self.frozen)
        nn.share_scope(self, backbone)  # its layers keep their names, flat beside those of the head
        x, outputs = backbone(images, train=train, start=start)
        x = nn.LayerNorm(name="head_norm")(x.mean((1, 2)))
        logits = nn.Dense(self.num_classes, name="predictions")(x)
        return logits, {**outputs, "head": logits}


def main(folder: str = "runs/custom_head") -> int:
    """Returns the number of layers that were trained."""
    data = drawn.shapes()
    simple = model.load("vgg16", 3, weights="none", fc=False, hidden=(64,), dropout=0.5)  # often this is enough
    fresh = Normed().init(jax.random.key(0), np.zeros((1, *drawn.SIZE, 3), np.float32))
    params = {**fresh["params"], **{k: v for k, v in simple.variables["params"].items() if k.startswith("block")}}
    start = Model(Normed(), {"params": params}, simple.preprocessing)
    sides = (Inputs(data, part, drawn.SIZE, batch_size=4) for part in (np.arange(36), np.arange(36, 48)))
    phase = Phase(1, optim.Constant(1e-2), frozen="all-but-head")
    trained, _ = finetune(start, task.classification(), *sides, [phase], Run(folder))
    return len(trained.variables["params"]) - len(trained.net.frozen)


if __name__ == "__main__":
    print(main(), "layers were trained")
