"""A training loop of your own: jaxft gives the net, the state and the compiled step, and you call it."""

import jax.numpy as jnp
import numpy as np

from examples import drawn
from jaxft import feed, masking, model, optim, task, train, train_state
from jaxft.data import Inputs, loader
from jaxft.phase import Phase


def main(steps: int = 8) -> float:
    """Trains the last layer for some steps; returns the last loss."""
    data = drawn.shapes()
    start = model.load("vgg16", 3, weights="none", fc=False)
    phase = Phase(1, optim.Constant(1e-3), optim.AdamW(), frozen="all-but-head")
    frozen = masking.frozen_layers(start.net, phase.frozen, start.variables["params"])
    state = train_state.create(start.net.clone(frozen=frozen), start.variables, phase)
    inputs = Inputs(data, np.arange(len(data)), drawn.SIZE, batch_size=8)
    step = train.make_train_step(task.classification(), 3, feed.prepare(inputs, start.preprocessing))
    figures = {}
    for batch in loader.train_batches(inputs, data.images, seed=0, num_steps=steps):
        state, figures = step(state, {name: jnp.asarray(value) for name, value in batch.items()})
        print(int(state.step), {name: round(float(value), 4) for name, value in figures.items()})
    return float(figures["loss"])


if __name__ == "__main__":
    main()
