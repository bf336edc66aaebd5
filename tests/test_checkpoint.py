import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from jaxft import train, train_state
from jaxft.checkpoint import CheckpointError, Checkpoints


@pytest.fixture
def checkpoints(tmp_path):
    opened = Checkpoints(tmp_path / "checkpoints", {"net": "tiny", "sizes": (1, 2)})
    yield opened
    opened.close()


def make_state(num_classes=3, step=0, tx=None):
    net = tiny.Tiny(num_classes=num_classes)
    state = train_state.create(net, tiny.variables(net), tx or optax.sgd(0.1, 0.9))
    return state.replace(step=jnp.asarray(step, jnp.int32))


def host(tree):
    return [np.array(leaf) for leaf in jax.tree.leaves(tree)]


def test_restores_what_was_saved_while_training_went_on(checkpoints):
    """Bug: the asynchronous save reads buffers that the next, donated steps have overwritten."""
    step, state = train.make_train_step(tiny.prepare), make_state()
    state, _ = step(state, tiny.batch(0))
    expected = host((state.params, state.batch_stats, state.opt_state))
    checkpoints.save(state, {"history": [1.5]})
    for t in range(1, 6):
        state, _ = step(state, tiny.batch(t))
    checkpoints.wait()
    restored, progress = checkpoints.restore(make_state())
    assert int(restored.step) == 1 and progress == {"history": [1.5]}
    found = host((restored.params, restored.batch_stats, restored.opt_state))
    for left, right in zip(found, expected, strict=True):
        np.testing.assert_array_equal(left, right)
    assert jax.random.key_data(restored.rng).tolist() == jax.random.key_data(make_state().rng).tolist()


def test_keeps_the_best_and_the_last(checkpoints):
    """Bug: retention drops the best, or keeps every save that had no metric and fills the disk."""
    for step, metric in [(1, 0.5), (2, 0.2), (3, None), (4, 0.4), (5, None)]:
        checkpoints.save(make_state(step=step), {}, metric)
    checkpoints.wait()
    assert (checkpoints.best(), checkpoints.latest()) == (2, 5)
    kept = sorted(int(path.name) for path in checkpoints.folder.iterdir() if path.is_dir())
    assert kept == [2, 5]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (lambda: make_state(num_classes=4), r"params.predictions.bias: float32\[3\] → float32\[4\]"),
        (lambda: make_state(tx=optax.sgd(0.1)), r"trace.conv1.kernel: .* → \(absent\)"),
        (lambda: _half(make_state()), r"params.conv1.kernel: float32.* → bfloat16"),
    ],
)
def test_a_state_of_another_tree_shape_or_dtype_is_refused(checkpoints, template, message):
    """Bug: Orbax pads, truncates or casts silently to fit the template."""
    checkpoints.save(make_state(), {})
    checkpoints.wait()
    with pytest.raises(CheckpointError, match=message):
        checkpoints.restore(template())


def _half(state):
    return state.replace(params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.params))


def test_another_configuration_is_refused(checkpoints):
    """Bug: the checkpoint of one run is taken up by another; or a tuple, a list in JSON, counts as a difference."""
    checkpoints.save(make_state(), {})
    checkpoints.wait()
    same = Checkpoints(checkpoints.folder, {"net": "tiny", "sizes": (1, 2)})
    same.restore(make_state())
    same.close()
    other = Checkpoints(checkpoints.folder, {"net": "small", "sizes": (1, 2)})
    with pytest.raises(CheckpointError, match="net: tiny → small"):
        other.restore(make_state())
    other.close()


def test_nothing_to_restore(checkpoints):
    """Bug: an empty folder restores random weights silently."""
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        checkpoints.restore(make_state())


def test_a_disk_without_room(checkpoints, monkeypatch):
    """Bug: the save starts, fails halfway, and says so in tensorstore's words."""
    checkpoints.save(make_state(step=1), {})
    checkpoints.wait()
    usage = shutil.disk_usage(checkpoints.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(CheckpointError, match="checkpoint of step 1 is intact"):
        checkpoints.save(make_state(step=2), {})


def test_a_write_that_fails_leaves_the_checkpoint_before_it(tmp_path):
    """Bug: a failed background write is swallowed, or becomes visible. (Files may not pass 8 kB.)"""
    script = f"""
        import resource, signal, sys
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import jax.numpy as jnp, optax, tiny
        from jaxft import train_state
        from jaxft.checkpoint import CheckpointError, Checkpoints
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        net = tiny.Tiny(num_classes=4000)
        state = train_state.create(net, tiny.variables(net), optax.sgd(0.1))
        checkpoints = Checkpoints(Path({str(tmp_path)!r}), {{}})
        checkpoints.save(state.replace(step=jnp.asarray(1, jnp.int32)), {{}})
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
        try:
            checkpoints.save(state.replace(step=jnp.asarray(2, jnp.int32)), {{}})
            checkpoints.wait()
        except CheckpointError as error:
            print("refused:", error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        again = Checkpoints(Path({str(tmp_path)!r}), {{}})
        print("latest:", again.latest(), int(again.restore(state)[0].step))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120)
    assert "refused: " in done.stdout and "step 1 is intact" in done.stdout, done.stderr
    assert "latest: 1 1" in done.stdout, done.stderr
