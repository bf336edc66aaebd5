"""A backbone of your own: stages by name, and all of jaxft works with it: freezing, features, Grad-CAM, runs."""

import flax.linen as nn
import jax
import numpy as np

from examples import drawn
from jaxft import gradcam, model, optim, task
from jaxft.data import Inputs
from jaxft.finetune import finetune
from jaxft.model import Model
from jaxft.nets.common import fold
from jaxft.phase import Phase
from jaxft.runs import Run


class Small(nn.Module):
    """Two stages of convolutions, pooling and a head."""

    num_classes: int = 3
    frozen: frozenset[str] = frozenset()  # names of layers; jaxft sets it

    def layers(self):
        """Stage → its layers, in order."""
        return {"stem": ("conv1",), "body": ("conv2",), "pool": (), "predictions": ("predictions",)}

    def head_layers(self):
        """The layers that are new to a task."""
        return ("predictions",)

    @nn.compact
    def __call__(self, images, *, train=False, start=None):
        stages = [
            ("stem", lambda x: nn.relu(nn.Conv(16, (3, 3), strides=2, name="conv1")(x))),
            ("body", lambda x: nn.relu(nn.Conv(32, (3, 3), strides=2, name="conv2")(x))),
            ("pool", lambda x: x.mean((1, 2))),
            ("predictions", nn.Dense(self.num_classes, name="predictions")),
        ]
        return fold(stages, images, start)  # (logits, outputs of every stage by name)


def main(folder: str = "runs/own_backbone") -> float:
    """Returns the accuracy on the held-out images."""
    data, goal = drawn.shapes(96), task.classification()
    variables = Small().init(jax.random.key(0), np.zeros((1, *drawn.SIZE, 3), np.float32))
    start = Model(Small(), variables, "tf")
    sides = (Inputs(data, part, drawn.SIZE, batch_size=8) for part in (np.arange(72), np.arange(72, 96)))
    phase = Phase(6, optim.Constant(3e-3), optim.AdamW())
    trained, predictions = finetune(start, goal, *sides, [phase], Run(folder))
    opened = model.open(folder, net=Small())  # a folder holds data and no code: give the module again
    heat = gradcam.heatmaps(opened, np.stack(data.images[:2]), "body", [0, 1])
    print(f"{len(trained.variables['params'])} layers; Grad-CAM {heat.shape}")
    return goal.metrics(predictions)["accuracy"]


if __name__ == "__main__":
    print(f"accuracy {main():.0%}")
