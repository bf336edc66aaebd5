"""What a run tells others: read back, whole, and no fault of theirs ends a run."""

import csv
import json
import struct
import sys
import types

import pytest
import tiny
from tiny import cache, kept_programs, no_pictures  # noqa: F401

from jaxft import optim, watch
from jaxft.phase import Phase

PHASES = [Phase(3, optim.Constant(0.05))]


def events(folder):
    """(tag, step) → value, of TensorBoard's event files: records framed by length, read with their own protobuf."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            for value in event.summary.value:
                assert (value.tag, event.step) not in found, "told twice"
                found[value.tag, event.step] = value.simple_value
    return found


def rows(folder):
    with (folder / "history.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(autouse=True)
def quick(no_pictures, cache):  # noqa: F811
    """Without pictures."""


def assert_told(folder):
    found, history = events(folder / "tensorboard"), rows(folder)
    for row in history:
        step = int(row["step"])
        for tag, column in (("loss/train", "train_loss"), ("loss/held_out", "val_loss"), ("rate/all", "lr")):
            assert found[tag, step] == pytest.approx(float(row[column]), rel=1e-5)
    assert len({step for _, step in found}) == len(history)


def test_tensorboard_says_what_the_history_says(tmp_path):
    """Bug: a figure is missing or of another epoch."""
    tiny.run(tmp_path, PHASES, watch=("tensorboard",))
    assert_told(tmp_path)


def test_a_resumed_run_tells_each_epoch_once(tmp_path, monkeypatch):
    """Bug: epochs before the stop are told twice, or lost."""
    from jaxft.train import Stopped

    tiny.at_step(monkeypatch, 4, tiny.stop)
    with pytest.raises(Stopped):
        tiny.run(tmp_path, PHASES, watch=("tensorboard",))
    monkeypatch.undo()
    tiny.run(tmp_path, PHASES, watch=("tensorboard",))
    assert_told(tmp_path)
    assert len(rows(tmp_path)) == 3


def test_json_lines_are_strict(tmp_path):
    """Bug: NaN, which no strict reader takes; or a line a step, doubled on resuming."""
    tiny.run(tmp_path, PHASES)

    def refuse(word):
        raise AssertionError(word)

    lines = (tmp_path / "history.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [row["step"] for row in found] == [int(row["step"]) for row in rows(tmp_path)]
    assert found[-1]["val_loss"] == float(rows(tmp_path)[-1]["val_loss"])


def test_watchers_change_no_result(tmp_path):
    """Bug: a watched run is another run, so that its folder refuses to go on without."""
    tiny.run(tmp_path, PHASES, watch=("tensorboard",))
    assert "watch" not in json.dumps(json.loads((tmp_path / "config.json").read_text(encoding="utf-8")))
    tiny.run(tmp_path, PHASES)  # nothing is left to train, and nothing refused


def test_a_watcher_that_fails_ends_nothing(tmp_path, monkeypatch, capsys):
    """Bug: a full disk of TensorBoard's, or a lost network, ends a run of two days."""

    def failing(folder, record, history):
        def tell(row):
            raise ConnectionError("the network is away")

        return tell, lambda: None

    monkeypatch.setitem(watch.WATCHERS, "tensorboard", failing)
    tiny.run(tmp_path, PHASES, watch=("tensorboard",))
    said = capsys.readouterr().out
    assert said.count("tensorboard is told no more of this run (ConnectionError: the network is away)") == 1
    assert len(rows(tmp_path)) == 3


def test_unknown_and_missing_watchers(tmp_path, monkeypatch):
    """Bug: a run of two days is not watched, as a package is not there."""
    with pytest.raises(ValueError, match="is not a tuple of tensorboard, wandb and mlflow"):
        tiny.run(tmp_path, PHASES, watch=("tensorbord",))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install wandb"):
        tiny.run(tmp_path, PHASES, watch=("wandb",))
    assert not (tmp_path / "config.json").exists()


def test_weights_and_biases(tmp_path, monkeypatch):
    """Bug: figures go to no step, or a resumed run is a second one."""
    told, inits = [], []

    class Remote:
        id = "abc"

        def log(self, values, step):
            told.append((step, values["loss/held_out"]))

        def finish(self):
            told.append("finished")

    fake = types.SimpleNamespace(init=lambda **settings: inits.append(settings) or Remote())
    monkeypatch.setitem(sys.modules, "wandb", fake)
    tiny.run(tmp_path, PHASES, watch=("wandb",))
    assert told == [(int(r["step"]), float(r["val_loss"])) for r in rows(tmp_path)] + ["finished"]
    assert inits[0]["id"] is None and inits[0]["config"]["seed"] == 0
    tiny.run(tmp_path, [Phase(4, optim.Constant(0.05))], watch=("wandb",))
    assert inits[1]["id"] == "abc" and len(told) == 6


def test_mlflow(tmp_path, monkeypatch):
    """Bug: names that MLflow refuses, or a resumed run is a second one."""
    told, starts = [], []
    run = types.SimpleNamespace(info=types.SimpleNamespace(run_id="xyz"))
    fake = types.SimpleNamespace(
        start_run=lambda **settings: starts.append(settings) or run,
        log_dict=lambda values, name: told.append(name),
        log_metrics=lambda values, step: told.append((step, values["loss.held_out"])),
        end_run=lambda: told.append("ended"),
    )
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    tiny.run(tmp_path, PHASES, watch=("mlflow",))
    tiny.run(tmp_path, [Phase(4, optim.Constant(0.05))], watch=("mlflow",))
    assert told[0] == "config.json" and told.count("ended") == 2 and len(told) == 7
    assert [start["run_id"] for start in starts] == [None, "xyz"]
