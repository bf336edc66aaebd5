import jax
import numpy as np
import pytest
import tiny

from jaxft import devices, predict
from jaxft.predict import Predictions


def eval_batches(n, size=4, unknown=()):
    """n images in batches of `size`, the last one padded, as the loader gives them."""
    whole = tiny.batch(0, size=n)
    for first in range(0, n, size):
        places = np.arange(first, first + size)
        real = places < n
        batch = {name: column[places.clip(max=n - 1)] for name, column in whole.items()}
        known = real & ~np.isin(places, unknown)
        index = np.where(real, batch["index"], -1).astype(np.int32)
        yield batch | {"index": index, "label": np.where(known, batch["label"], 0), "known": known, "real": real}


def make_eval_step(start=None):
    net = tiny.Tiny()
    prepare = (lambda images: tiny.prepare(None, images)) if start is None else lambda features: features
    return predict.make_eval_step(net.apply, jax.nn.softmax, prepare, start), tiny.variables(net)


def test_evaluation_counts_each_image_once():
    """Bug: the padding of the last batch is scored, the batch is dropped, or rows lose their order."""
    (eval_step, variables), mesh = make_eval_step(), devices.mesh()
    whole = predict.evaluate(eval_step, variables, eval_batches(10, size=10), mesh)
    parts = predict.evaluate(eval_step, variables, eval_batches(10, size=4, unknown=(2, 9)), mesh, total=10)
    np.testing.assert_array_equal(parts.index, np.arange(10))
    np.testing.assert_array_equal(np.flatnonzero(~parts.known), [2, 9])
    np.testing.assert_array_equal(parts.label[parts.known], tiny.batch(0, size=10)["label"][parts.known])
    np.testing.assert_allclose(parts.outputs, whole.outputs, rtol=1e-5)
    np.testing.assert_allclose(parts.outputs.sum(1), 1, rtol=1e-5)
    assert parts.outputs.dtype == np.float32


def test_an_eval_step_can_start_after_a_stage():
    """Bug: with cached features, the whole net is run on them, or `prepare` normalises them."""
    net = tiny.Tiny()
    (whole, variables), (rest, _) = make_eval_step(), make_eval_step("stem")
    images = tiny.batch(0)["image"]
    features = net.apply(variables, tiny.prepare(None, images))[1]["stem"]
    np.testing.assert_allclose(rest(variables, features), whole(variables, images), rtol=1e-5)


def test_an_empty_evaluation_is_refused():
    """Bug: the error is NumPy's, which says that there is nothing to concatenate."""
    eval_step, variables = make_eval_step()
    with pytest.raises(ValueError, match="no batch to evaluate"):
        predict.evaluate(eval_step, variables, [], devices.mesh())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"index": np.arange(2)}, "differ in length"),
        ({"outputs": np.zeros(3, np.float32)}, r"expected \[n, C\]"),
        ({"known": np.ones(3, int)}, "a boolean for each label"),
        ({"known": np.ones((3, 2), bool)}, "a boolean for each label"),
        ({"label": np.zeros((3, 5)), "known": np.ones((3, 5), bool)}, "must be equal"),
    ],
)
def test_columns_that_do_not_fit_each_other(change, says):
    """Bug: three labels beside two outputs are scored row by row until one is missing."""
    columns = {
        "index": np.arange(3),
        "label": np.zeros(3, int),
        "known": np.ones(3, bool),
        "outputs": np.zeros((3, 2), np.float32),
    }
    assert len(Predictions(**columns)) == 3
    with pytest.raises(ValueError, match=says):
        Predictions(**(columns | change))
