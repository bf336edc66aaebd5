import dataclasses
import functools
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from tiny import no_pictures  # noqa: F401

import jaxft
from jaxft import files, model, optim, provenance, runs, task
from jaxft.data import Inputs, augment, mix, order
from jaxft.phase import Phase
from jaxft.provenance import describe, digest
from jaxft.runs import Run

RATE = 0.1


def closure(rate):
    def schedule(count):
        return rate / (1 + count)

    return schedule


def with_default(count, rate=0.1, *, power=1):
    return rate / (1 + count) ** power


class Callable:
    def __init__(self, rate):
        self.rate = rate

    def __call__(self, count):
        return self.rate

    def method(self, count):
        return self.rate


def keyword(power):
    def schedule(count, *, power=power):
        return power

    return schedule


@jax.jit
def jitted(count):
    return 0.1


DIFFERENT = {
    "schedules": [optim.Constant(0.1), optim.Constant(0.2), optim.InverseTime(0.1, 0.0), optim.InverseTime(0.1, 0.1)],
    "one-cycle": [optim.OneCycle(0.1, 100), optim.OneCycle(0.1, 100, shape="linear"), optim.OneCycle(0.1, 99)],
    "scaled": [optim.Scaled(optim.Constant(0.1), 0.5), optim.Scaled(optim.Constant(0.2), 0.5)],
    "optimizers": [optim.NesterovSGD(), optim.NesterovSGD(l2=1e-4), optim.SGD(), optim.AdamW(), optax.adam, optax.sgd],
    "partials": [functools.partial(optax.adam, b1=0.8), functools.partial(optax.adam, b1=0.9), optax.adam],
    "positional": [functools.partial(optax.chain, 1), functools.partial(optax.chain, 2)],
    "closures": [closure(0.1), closure(0.2)],
    "defaults": [keyword(1), keyword(2), with_default],
    "callables": [Callable(0.1), Callable(0.2)],
    "methods": [Callable(0.1).method, Callable(0.2).method],
    "lambdas": [lambda count: 0.1, lambda count: 0.2, lambda s: optax.adam(s), lambda s: optax.sgd(s)],
    "nested": [lambda s: lambda count: 0.1, lambda s: lambda count: 0.2, lambda s: [x * 2 for x in s]],
    "globals": [lambda count: RATE, lambda count: RATE * 2],
    "augmentations": [
        augment.Warp(rotation=5.0),
        augment.Warp(rotation=6.0),
        augment.Warp(shift=0.1),
        augment.Chain((augment.Warp(rotation=5.0), augment.Blur(1.0))),
        augment.Chain((augment.Blur(1.0), augment.Warp(rotation=5.0))),
    ],
    "mixing": [mix.Mixup(0.2), mix.Mixup(0.3), mix.CutMix(0.2)],
    "orders": [order.shuffled, order.balanced],
    "arrays": [np.arange(3), np.arange(4), np.arange(100), np.arange(100) + 1, jnp.arange(100.0)],
    "tasks": [task.classification(focal=x, label_smoothing=y).losses for x in (0.0, 2.0) for y in (0.0, 0.1)],
}


def everything():
    return {kind: [describe(value) for value in values] for kind, values in DIFFERENT.items()}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_different_settings_have_different_records(kind):
    """Bug: a run goes on under another rate, because the record saw only the name of what gives it."""
    said = [json.dumps(described) for described in everything()[kind]]
    assert len(set(said)) == len(said), said
    assert not any(" at 0x" in text for text in said)  # an address is another one in every process


def test_equal_settings_have_equal_records_in_every_process():
    """Bug: an address, the order of a set or a hash in the record: no run could ever go on."""
    script = "import json, test_runs; print(json.dumps(test_runs.everything(), sort_keys=True))"
    here = pathlib.Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent)])
    environment = os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": "12"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == json.dumps(everything(), sort_keys=True)


def test_what_is_part_of_itself_ends():
    """Bug: a function that closes over itself, a module or a net takes the description round and round."""
    import optax as module

    def one(count):
        return two(count)

    def two(count):
        return one(count) + module.__dict__["x"]

    found = describe(one)
    assert found["two"]["one"] == "what this is a part of"
    assert found["two"]["module"] == "optax"
    cyclic = {}
    cyclic["self"] = cyclic
    assert describe(cyclic) == {"self": "what this is a part of"}
    same = [optim.Constant(0.1)] * 2
    assert describe(same)[0] == describe(same)[1]  # twice beside each other is no circle


def test_a_global_number_is_a_setting(monkeypatch):
    """Bug: `RATE = 0.2` at the top of a script, read by its schedule, is the run of `RATE = 0.1`."""

    def schedule(count):
        return RATE

    before = describe(schedule)
    monkeypatch.setitem(globals(), "RATE", 0.2)
    assert describe(schedule) != before
    jitted_ = describe(jitted)
    assert jitted_ == "test_runs.jitted"


def make(**changes):
    data = changes.pop("data", None) or tiny.dataset()
    sides = {"weights": None, "order": order.shuffled, "augment": None, "mix": None, "batch_size": 8}
    sides |= {name: changes.pop(name) for name in list(changes) if name in sides}
    values = dict(
        model=tiny.model(),
        task=task.classification(),
        train=Inputs(data, np.arange(23), (8, 8), **sides),
        held_out=Inputs(data, np.arange(23, 30), (8, 8)),
        phases=[Phase(2, optim.Constant(0.1))],
        run=Run("somewhere"),
        config={},
    )
    return runs.record(**{**values, **changes})


def darker(data):
    images = [image.copy() for image in data.images]
    images[5][0, 0, 0] ^= 1
    return dataclasses.replace(data, images=images)


@pytest.mark.parametrize(
    "change",
    [
        lambda: {"batch_size": 4},
        lambda: {"weights": np.linspace(0.5, 1, 30)},
        lambda: {"order": order.balanced},
        lambda: {"augment": tiny.Noise(1.0)},
        lambda: {"mix": mix.Mixup(0.1)},
        lambda: {"model": tiny.model(seed=1)},
        lambda: {"model": tiny.model(tiny.Tiny(dropout=0.1))},
        lambda: {"model": dataclasses.replace(tiny.model(), preprocessing="caffe")},
        lambda: {"task": task.classification(label_smoothing=0.1)},
        lambda: {"task": dataclasses.replace(task.classification(), monitor="accuracy", best="highest")},
        lambda: {"phases": [Phase(2, optim.Constant(0.2))]},
        lambda: {"phases": [Phase(2, optim.Constant(0.1), frozen="conv1")]},
        lambda: {"phases": [Phase(2, optim.Constant(0.1), clip_norm=1.0)]},
        lambda: {"phases": [Phase(2, optim.Constant(0.1))] * 2},
        lambda: {"run": Run("somewhere", seed=1)},
        lambda: {"config": {"fold": 1}},
        lambda: {"data": darker(tiny.dataset())},
        lambda: {"data": tiny.dataset(classes=("red", "green", "grey"))},
    ],
)
def test_all_that_the_result_depends_on_is_recorded(change):
    """Bug: a setting that changes the result is no part of the record, and a run goes on under another."""
    there, asked = make(), make(**change())
    with pytest.raises(ValueError, match="holds a run of other settings"):
        runs.require_same(pathlib.Path("somewhere"), there, asked, 0)


def test_what_changes_no_result_does_not_stand_in_the_way():
    """Bug: a finished run is refused because it asks for other saves, another cache, or the last state."""
    there = make()
    asked = make(run=Run("elsewhere", save_every=3, cache_features="off", keep="last"))
    runs.require_same(pathlib.Path("somewhere"), there, asked, 0)


def test_the_record_is_strict_json_that_is_equal_after_reading():
    """Bug: NaN or a path in the caller's settings: config.json cannot be read, or the run refuses itself."""
    config = {"threshold": math.nan, "largest": np.float32(math.inf), "folder": pathlib.Path("a"), "rate": tiny.Noise()}
    there = make(config=config)
    written = json.dumps(files.strict(there), allow_nan=False)
    runs.require_same(pathlib.Path("somewhere"), json.loads(written), make(config=config), 0)
    assert there["config"]["threshold"] is None and there["config"]["folder"] == "a"


def test_more_epochs_of_the_last_phase_are_the_same_run_and_fewer_than_done_are_not():
    """Bug: a finished run cannot be given more epochs; or fewer than it has had."""
    phases = [Phase(2, optim.Constant(0.1)), Phase(3, optim.Constant(0.1))]
    longer = [phases[0], dataclasses.replace(phases[1], epochs=5)]
    first = [dataclasses.replace(phases[0], epochs=3), phases[1]]
    there = make(phases=phases, config={"epochs": 3})
    folder = pathlib.Path("somewhere")
    runs.require_same(folder, there, make(phases=longer, config={"epochs": 5}), 3)
    with pytest.raises(ValueError, match=r"phases\.1\.epochs: 2 → 3"):
        runs.require_same(folder, there, make(phases=first, config={"epochs": 3}), 3)
    shorter = [phases[0], dataclasses.replace(phases[1], epochs=1)]
    runs.require_same(folder, there, make(phases=shorter, config={"epochs": 1}), 1)
    with pytest.raises(ValueError, match=r"phases\.2\.epochs: 3 → 1"):
        runs.require_same(folder, there, make(phases=shorter, config={"epochs": 1}), 2)


def test_the_folder_of_a_run(monkeypatch, tmp_path):
    """Bug: `~` becomes a folder of that name; a relative path, a string or a path is refused."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Run("~/runs/a").folder == tmp_path / "runs" / "a"
    assert Run(pathlib.Path("~/runs")).folder == tmp_path / "runs"
    assert Run("here").folder == pathlib.Path("here")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"folder": None}, "folder=None is not a path"),
        ({"folder": 3}, "folder=3 is not a path"),
        ({"folder": "gs://bucket/run"}, "is an address; mount it"),
        ({"seed": -1}, "seed=-1 of the run"),
        ({"seed": 1.5}, "seed=1.5"),
        ({"seed": True}, "seed=True"),
        ({"save_every": 0}, "save_every=0"),
        ({"cache_features": True}, "cache_features=True is not one of auto, on, off"),
        ({"keep": "first"}, "keep='first' is not one of best, last"),
    ],
)
def test_settings_of_a_run_that_cannot_be(settings, message):
    """Bug: the mistake shows hours later, as a traceback of something else."""
    with pytest.raises(ValueError, match=message):
        Run(**{"folder": "x", **settings})
    assert Run("x", seed=np.int64(3)).seed == 3


def test_a_folder_is_tried_without_a_trace(tmp_path):
    """Bug: asking whether a folder can be written to makes it, or takes away what is in it."""
    runs.require_writable(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "probe.txt").write_text("mine", encoding="utf-8")
    runs.require_writable(tmp_path / "c")
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["probe.txt"]


def test_a_history_keeps_the_columns_of_every_phase(tmp_path):
    """Bug: a phase without groups drops the rates of the one before it, or NaN is written as a word."""
    rows = [{"epoch": 1, "lr_head": 0.1, "val_loss": math.nan}, {"epoch": 2, "lr": 0.2, "val_loss": 1 / 3}]
    runs.write_history(tmp_path, rows)
    lines = (tmp_path / "history.csv").read_text(encoding="utf-8").splitlines()
    assert lines == ["epoch,lr_head,val_loss,lr", "1,0.1,,", f"2,,{1 / 3!r},0.2"]


def test_the_digest_of_arrays():
    """Bug: two sets of weights that differ in a place, a shape or a type have one digest."""
    tree = {"a": np.arange(6, dtype=np.float32), "b": np.zeros(2, np.float32)}
    others = [
        {"a": tree["b"], "b": tree["a"]},
        {"a": tree["a"].reshape(2, 3), "b": tree["b"]},
        {"a": tree["a"], "b": np.zeros(2, np.int32)},
        {"a": tree["a"], "c": tree["b"]},
    ]
    assert digest(dict(reversed(tree.items()))) == digest(tree) == digest(jax.tree.map(jnp.asarray, tree))
    assert len({digest(other) for other in [tree, *others]}) == 5


def test_a_description_of_an_own_net_has_its_settings():
    """Bug: two nets of one class with other settings share a record; or its frozen set is part of it."""
    wide, thin = (model.Model(tiny.Tiny(dropout=x), tiny.variables(tiny.Tiny()), "torch") for x in (0.0, 0.5))
    assert wide.description() != thin.description()
    assert tiny.model(tiny.Tiny(frozen=frozenset({"conv1"}))).description() == tiny.model().description()
    assert wide.description()["net"] == "Tiny"


def test_a_folder_has_one_writer(tmp_path):
    """Bug: two processes that are started on one folder write into each other's files."""
    code = (
        "import pathlib, sys\nfrom jaxft import runs\n"
        "with runs.only_writer(pathlib.Path(sys.argv[1])):\n    print('in', flush=True)\n    sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "encoding": "utf-8"}
    first = subprocess.Popen(command, **options)
    assert first.stdout is not None and first.stdout.readline() == "in\n"
    with pytest.raises(ValueError, match=f"is in use by process {first.pid} on .*: wait until it ends"):
        with runs.only_writer(tmp_path / "run"):
            pytest.fail("two are in")
    first.kill()
    first.communicate()
    assert (tmp_path / "run" / "lock").exists()  # of a dead process
    with runs.only_writer(tmp_path / "run"):
        with pytest.raises(ValueError, match=f"in use by process {os.getpid()}"), runs.only_writer(tmp_path / "run"):
            pytest.fail("two are in")
    assert not (tmp_path / "run" / "lock").exists()
    with runs.only_writer(tmp_path / "run"):
        pass


def test_two_runs_are_compared(tmp_path, monkeypatch, no_pictures):  # noqa: F811
    """Bug: a difference of the record, the versions, a figure or a prediction is not seen; rates of images are one."""
    for name, options in (("one", {}), ("same", {}), ("other", {"seed": 5})):
        tiny.run(tmp_path / name, **options)
    assert runs.compare(tmp_path / "same", tmp_path / "one") == []
    lines = runs.compare(tmp_path / "other", tmp_path / "one")
    assert lines == ["seed: 0 → 5", "history.jsonl: from row 1 on", "predictions.csv: other bytes"]
    saved = files.read_json(tmp_path / "same" / "config.json")
    assert saved["code"]["jaxft"] == jaxft.__version__
    files.write_json(tmp_path / "same" / "config.json", saved | {"versions": saved["versions"] | {"jax": "0.1"}})
    assert runs.compare(tmp_path / "same", tmp_path / "one") == [f"versions.jax: {saved['versions']['jax']} → 0.1"]
    with pytest.raises(FileNotFoundError):
        runs.compare(tmp_path / "same", tmp_path / "nothing")


def test_the_commit_of_a_folder(tmp_path, monkeypatch):
    """Bug: a run does not say by which code it was made, or says a commit that the code differs from."""
    for name in ("GIT_AUTHOR", "GIT_COMMITTER"):
        monkeypatch.setenv(f"{name}_NAME", "somebody")
        monkeypatch.setenv(f"{name}_EMAIL", "somebody@example.org")
    assert provenance.revision(tmp_path) is None
    (tmp_path / "code.py").write_text("1", encoding="utf-8")

    def git(*words):
        return subprocess.run(["git", "-C", tmp_path, *words], check=True, capture_output=True, encoding="utf-8").stdout

    git("init", "--quiet")
    git("add", "code.py")
    git("commit", "--quiet", "-m", "first")
    commit = git("rev-parse", "HEAD").strip()
    assert len(commit) == 40 and provenance.revision(tmp_path) == commit
    (tmp_path / "notes").write_text("untracked", encoding="utf-8")
    assert provenance.revision(tmp_path) == commit
    (tmp_path / "code.py").write_text("2", encoding="utf-8")
    assert provenance.revision(tmp_path) == f"{commit}+changes"
    monkeypatch.setenv("PATH", "")
    assert provenance.revision(tmp_path) is None
