import hashlib
import json
import math
import shutil
import subprocess
import sys
import tarfile
import textwrap
import time
from contextlib import closing
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import tiny
from tiny import kept_programs  # noqa: F401

from jaxft import optim, task, train, train_state
from jaxft.checkpoint import CheckpointError, Checkpoints, differences
from jaxft.phase import Phase

pytestmark = pytest.mark.usefixtures("kept_programs")


@pytest.fixture
def checkpoints(tmp_path):
    opened = Checkpoints(tmp_path / "checkpoints", {"net": "tiny", "sizes": (1, 2)})
    yield opened
    opened.close()


def make_state(num_classes=3, step=0, optimizer=None, average=None, seed=0):
    net = tiny.Tiny(num_classes=num_classes)
    phase = Phase(1, optim.Constant(0.1), optimizer or optim.SGD(0.9), average=average)
    state = train_state.create(net, tiny.variables(net), phase, seed=seed)
    return state.replace(step=jnp.asarray(step, jnp.int32))


def arrays(state):
    return tiny.leaves((state.params, state.batch_stats, state.opt_state, state.average, state.step, state.lr_scale))


@pytest.mark.parametrize("average", [None, 0.9], ids=["raw", "average"])
def test_restores_what_was_saved_while_training_went_on(checkpoints, average):
    """Bug: the asynchronous save reads buffers that the next, donated steps have overwritten, or loses the average."""
    step = train.make_train_step(task.classification(), 3, tiny.prepare_labelled)
    state = make_state(average=average, seed=5).replace(lr_scale=jnp.float32(0.25))
    state, _ = step(state, tiny.batch(0))
    expected = arrays(state)
    checkpoints.save(state, {"history": [1.5]})
    for t in range(1, 6):
        state, _ = step(state, tiny.batch(t))
    checkpoints.wait()
    restored = checkpoints.restore(make_state(average=average))
    assert checkpoints.run()["progress"] == {"history": [1.5]}
    tiny.assert_same(arrays(restored), expected)
    assert jax.random.key_data(restored.rng).tolist() == jax.random.key_data(jax.random.key(5)).tolist()
    raw, found = checkpoints.variables(1, average=False), checkpoints.variables(1)
    tiny.assert_same(tiny.leaves(raw), tiny.leaves(restored.variables()))
    tiny.assert_same(tiny.leaves(found), tiny.leaves(restored.variables(average is not None)))


@pytest.mark.parametrize(
    ("saved_as_best", "expected"),
    [([True, True, False, False, False], 2), ([True, False, False, True, False], 4), ([False, False, False], None)],
)
def test_keeps_the_best_and_the_last_two(checkpoints, saved_as_best, expected):
    """Bug: retention drops the best, keeps every save and fills the disk, or another process takes another for best."""
    for step, best in enumerate(saved_as_best, 1):
        checkpoints.save(make_state(step=step), {}, best)
    checkpoints.wait()
    kept = sorted(int(path.name) for path in checkpoints.folder.iterdir() if path.is_dir())
    assert checkpoints.best() == expected and checkpoints.latest() == len(saved_as_best)
    assert kept == sorted({expected, len(saved_as_best) - 1, len(saved_as_best)} - {None})
    reader = Checkpoints(checkpoints.folder)  # as another process sees it
    assert reader.best() == expected
    reader.close()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (lambda: make_state(num_classes=4), r"params.predictions.bias: float32\[3\] → float32\[4\]"),
        (lambda: make_state(optimizer=optim.SGD()), r"trace.conv1.kernel: .* → \(absent\)"),
        (lambda: _half(make_state()), r"params.conv1.kernel: float32.* → bfloat16"),
        (lambda: make_state(average=0.9), r"average.params.conv1.kernel: \(absent\) → float32"),
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


def test_the_record_comes_back(checkpoints):
    """Bug: a checkpoint does not say which run it is of, or NaN in it is no strict JSON."""
    history = [{"val_loss": math.nan, "rate": math.inf}]
    checkpoints.save(make_state(), {"history": history})
    checkpoints.wait()
    found = Checkpoints(checkpoints.folder).run()
    assert found["record"] == {"net": "tiny", "sizes": [1, 2]}
    assert found["progress"] == {"history": [{"val_loss": None, "rate": None}]}
    for file in checkpoints.folder.rglob("*"):
        if file.suffix == "" and file.parent.name == "run":
            json.loads(file.read_text(encoding="utf-8"), parse_constant=pytest.fail)


def damages(file):
    """Ways in which a file is not what was written: bytes, or None where it is gone."""
    whole = file.read_bytes()
    yield from (b"", whole[: len(whole) // 2], None)
    for place in {0, len(whole) // 3, len(whole) // 2, len(whole) - 1}:
        yield whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :]


def test_damage_is_found(checkpoints, tmp_path, capsys):
    """Bug: a flipped bit, a file that is cut off, or one that is gone, is restored as if it were what was saved."""
    for step in (1, 2):
        checkpoints.save(make_state(step=step, seed=step, average=0.9), {"step": step}, best=step == 1)
    checkpoints.wait()
    expected = arrays(make_state(step=1, seed=1, average=0.9))
    held = [path.relative_to(checkpoints.folder) for path in checkpoints.folder.rglob("*") if path.is_file()]
    ours = sorted(path for path in held if path.parts[0].startswith("2"))
    assert Path("2.sha256") in ours and len(ours) > 8
    for turn, file in enumerate(ours):
        for number, content in enumerate(damages(checkpoints.folder / file)):
            if number != turn % 7 and file.name != "2.sha256":  # each file in one way, and each way for some files
                continue
            folder = tmp_path / "copy"
            shutil.copytree(checkpoints.folder, folder)
            (folder / file).unlink() if content is None else (folder / file).write_bytes(content)
            cut_off = content is None and file.name == "2.sha256"  # killed before they were written
            if cut_off:
                assert Checkpoints(folder).latest() == 1
            else:
                with pytest.raises(CheckpointError, match="step 2 in .* is damaged: .* is not what was saved"):
                    Checkpoints(folder)
            again = Checkpoints(folder, {"net": "tiny", "sizes": (1, 2)})
            out = capsys.readouterr().out
            assert ("is not whole" if cut_off else "is damaged") in out
            assert "aside as 2.damaged; the last one is now that of step 1" in out
            tiny.assert_same(arrays(again.restore(make_state(average=0.9))), expected)
            assert again.run()["progress"] == {"step": 1} and again.best() == 1
            assert (folder / "2.damaged").exists()
            again.close()
            shutil.rmtree(folder)


def test_a_checkpoint_that_was_renamed_in_part(checkpoints, capsys):
    """Bug: what a kill leaves on a file system that renames file by file is taken as whole."""
    for step in (1, 2):
        checkpoints.save(make_state(step=step, seed=step), {"step": step})
    checkpoints.wait()
    for file in ("2.sha256", "2/run/metadata"):
        (checkpoints.folder / file).unlink()
    assert Checkpoints(checkpoints.folder).latest() == 1
    again = Checkpoints(checkpoints.folder, {})
    assert (
        "the checkpoint of step 2 in" in (said := capsys.readouterr().out)
        and "2.sha256 is missing. It is set aside" in said
    )
    again.save(make_state(step=2, seed=5), {})
    again.close()
    assert again.steps() == [1, 2]
    tiny.assert_same(arrays(again.restore(make_state())), arrays(make_state(step=2, seed=5)))


def test_digests_are_those_of_sha256sum(checkpoints):
    """Bug: no other tool can check a run, or the digests of what is no longer kept stay."""
    for step in range(4):
        checkpoints.save(make_state(step=step), {}, best=step == 1)
    checkpoints.wait()
    assert sorted(path.name for path in checkpoints.folder.glob("*.sha256")) == [f"{step}.sha256" for step in (1, 2, 3)]
    checkpoints.save(make_state(step=4), {})
    for _ in range(200):  # without `wait`: at once, and not with the next save, which may be an epoch later
        time.sleep(0.05)
        if (checkpoints.folder / "4.sha256").exists():
            break
    for line in (checkpoints.folder / "4.sha256").read_text(encoding="utf-8").splitlines():
        digest, name = line.split("  ", 1)
        assert hashlib.sha256((checkpoints.folder / name).read_bytes()).hexdigest() == digest


def test_the_best_is_lost(checkpoints):
    """Bug: a best checkpoint that was set aside is still called the best."""
    for step in (1, 2):
        checkpoints.save(make_state(step=step), {}, best=step == 1)
    checkpoints.wait()
    for file in (checkpoints.folder / "1" / "variables").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    again = Checkpoints(checkpoints.folder, {"net": "tiny", "sizes": (1, 2)})
    assert (again.latest(), again.best(), again.steps()) == (2, None, [2])
    again.save(make_state(step=3), {}, best=True)
    again.close()
    assert Checkpoints(checkpoints.folder).best() == 3


def test_differences_name_the_place():
    """Bug: two records differ, and the message shows all of both; or lists of dicts are compared as a whole."""
    there = {"a": {"b": 1, "c": None}, "phases": [{"lr": 0.1}, {"lr": 0.2}]}
    asked = {"a": {"b": 2}, "phases": [{"lr": 0.1}, {"lr": 0.3}]}
    assert differences(there, asked) == ["a.b: 1 → 2", "a.c: None → (absent)", "phases.2.lr: 0.2 → 0.3"]
    many = differences({}, {f"k{i:02}": i for i in range(15)}, limit=12)
    assert len(many) == 13 and many[-1] == "… and 3 more"


@pytest.fixture
def kept(tmp_path):
    """Number of a format → a folder of checkpoints that the version of its time wrote (momentum; then an average)."""

    def unpack(number):
        with tarfile.open(Path(__file__).parent / "formats" / f"{number}.tar.gz") as archive:
            archive.extractall(tmp_path / str(number), filter="data")
        return tmp_path / str(number)

    return unpack


def digest_of(folder):
    """Of the state of its checkpoint."""
    with closing(Checkpoints(folder)) as opened:
        found = arrays(opened.restore(make_state(average=0.9)))
    return hashlib.sha256(b"".join(name.encode() + found[name].tobytes() for name in sorted(found))).hexdigest()


STATE = "bed9728f9a6211213be924fe90cb2286491982295ce06cb20a0ec7c9fa2ffaff"


def test_a_checkpoint_of_this_format_stays_readable(kept):
    """Bug: a new version of jaxft, or of Orbax, reads what an earlier one wrote otherwise, or no more."""
    folder = kept(3)
    with closing(Checkpoints(folder, {})) as opened:
        assert opened.run()["progress"] == {"history": [1.5]} and opened.best() == 1
    assert digest_of(folder) == STATE


@pytest.mark.parametrize("record", [None, {}], ids=["read", "written"])
@pytest.mark.parametrize(("number", "words"), [(1, "without phases"), (2, "without digests")])
def test_a_checkpoint_of_an_earlier_format_is_named_and_stays(kept, number, words, record):
    """Bug: a KeyError of a field that earlier versions did not write; or the run begins anew over it."""
    folder = kept(number)
    with pytest.raises(CheckpointError, match=f"step 1 .* was written by a version of jaxft {words}"):
        Checkpoints(folder, record).run()
    assert (folder / "1" / "run" / "metadata").exists()


def test_a_checkpoint_of_the_second_format_is_adopted(kept):
    """Bug: the command that the message gives is not one that helps."""
    folder = kept(2)
    with pytest.raises(CheckpointError) as caught:
        Checkpoints(folder).run()
    command = str(caught.value).partition("adopt it with: cd checkpoints && ")[2]
    subprocess.run(["sh", "-c", command], cwd=folder, check=True)
    assert digest_of(folder) == STATE


def test_a_reader_changes_nothing(tmp_path):
    """Bug: looking into a folder makes it, or clears away a save that another process is writing."""
    reader = Checkpoints(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        reader.run()
    assert reader.best() is None and reader.latest() is None
    reader.close()
    assert not (tmp_path / "nowhere").exists()


def test_nothing_to_restore(checkpoints):
    """Bug: an empty folder restores random weights silently."""
    for read in (checkpoints.run, lambda: checkpoints.restore(make_state())):
        with pytest.raises(CheckpointError, match="holds no checkpoint"):
            read()
    with pytest.raises(CheckpointError, match="holds no checkpoint of step 7"):
        checkpoints.variables(7)


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
        import jax.numpy as jnp, tiny
        from jaxft import optim, train_state
        from jaxft.phase import Phase
        from jaxft.checkpoint import CheckpointError, Checkpoints
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        net = tiny.Tiny(num_classes=4000)
        state = train_state.create(net, tiny.variables(net), Phase(1, optim.Constant(0.1), optim.SGD()))
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
        print("latest:", again.latest(), int(again.restore(state).step))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=300)
    assert "refused: " in done.stdout and "step 1 is intact" in done.stdout, done.stderr
    assert "latest: 1 1" in done.stdout, done.stderr
