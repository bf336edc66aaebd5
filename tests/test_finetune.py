import csv
import dataclasses
import functools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from PIL import Image
from tiny import cache, kept_programs, no_pictures  # noqa: F401

from jaxft import finetune, memory, model, optim, task, train
from jaxft.checkpoint import CheckpointError, Checkpoints
from jaxft.data import Inputs, augment, loader, mix, order
from jaxft.phase import Phase
from jaxft.runs import Run

pytestmark = pytest.mark.usefixtures("kept_programs")
quick = pytest.mark.usefixtures("no_pictures")

ONE = Phase(2, optim.InverseTime(0.05, 1e-3))


def read_json(file):
    return json.loads(file.read_text(encoding="utf-8"), parse_constant=lambda word: pytest.fail(f"{file} has {word}"))


def read_csv(file):
    return list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))


def require_strict_json(folder):
    """Every JSON file of a run, those of its checkpoints too; → how many there are."""
    files = [
        *folder.glob("*.json"),
        *folder.glob("checkpoints/*/run/metadata"),
    ]
    for file in files:
        read_json(file)
    return len(files)


def test_a_run_leaves_everything_in_its_folder(tmp_path):
    """Bug: a file is missing, a picture cannot be read, or predictions lose or repeat an image."""
    folder = tmp_path / "deep" / "run"
    config = {"lr": 0.1, "size": (8, 8)}
    trained, predictions = tiny.run(folder, config=config, inputs={"augment": augment.Warp(rotation=5.0)})
    for picture in ("learning_curves", "confusion_matrix", "worst_mistakes", "augmentation"):
        assert Image.open(folder / f"{picture}.png").convert("RGB").getextrema() != ((255, 255),) * 3
    record = read_json(folder / "config.json")
    assert record["config"] == {"lr": 0.1, "size": [8, 8]} and record["train"]["augment"]["rotation"] == 5.0
    summary = read_json(folder / "summary.json")
    assert summary["record"] == {name: record[name] for name in summary["record"]}
    assert summary["images"] == {"train": 23, "held_out": 7} and summary["steps"] == 4 and summary["epochs"] == 2
    rows = read_csv(folder / "history.csv")
    assert [row["epoch"] for row in rows] == ["1", "2"] and rows[-1]["step"] == "4"
    rows = read_csv(folder / "predictions.csv")
    assert [row["img"] for row in rows] == [f"img_{i}.png" for i in range(23, 30)]
    probabilities = np.array([[float(row[name]) for name in ("red", "green", "blue")] for row in rows])
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-4)
    np.testing.assert_allclose(probabilities, predictions.outputs, rtol=1e-4)
    right = [row["label"] == ("red", "green", "blue")[p.argmax()] for row, p in zip(rows, probabilities, strict=True)]
    assert summary["metrics"]["accuracy"] == pytest.approx(np.mean(right))
    assert not list(folder.rglob("*.part")) and not (folder / "probe").exists()
    assert trained.task.name == "classification" and trained.classes == tiny.CLASSES
    assert require_strict_json(folder) >= 4


@quick
def test_running_again_gives_the_same_result_and_trains_no_more(tmp_path, capsys):
    """Bug: a finished run is trained on, its history or summary is lost, or nothing says that nothing is left to do."""
    _, predictions = tiny.run(tmp_path / "run")
    summary, arrays = read_json(tmp_path / "run" / "summary.json"), tiny.saved(tmp_path / "run")
    lost = {name: (tmp_path / "run" / name).read_bytes() for name in ("history.csv", "history.jsonl")}
    (tmp_path / "run" / "history.csv").unlink()
    (tmp_path / "run" / "history.jsonl").write_text("damaged")
    capsys.readouterr()
    _, again = tiny.run(tmp_path / "run")
    said = capsys.readouterr().out
    assert {name: (tmp_path / "run" / name).read_bytes() for name in lost} == lost
    assert "nothing is left to train: all 2 epochs are done" in said and "epoch   1" not in said
    np.testing.assert_array_equal(again.outputs, predictions.outputs)
    assert read_json(tmp_path / "run" / "summary.json")["metrics"] == summary["metrics"]
    tiny.assert_same(tiny.saved(tmp_path / "run"), arrays)


@quick
@pytest.mark.parametrize(
    "options",
    [{"inputs": {"augment": tiny.Noise()}}, {"inputs": {"augment": tiny.Noise(), "views": 2}, "cache_features": "on"}],
    ids=["anew", "cached"],
)
def test_images_that_are_held_on_the_device_or_nowhere_train_the_same(tmp_path, monkeypatch, options):
    """Bug: a batch takes other rows from the device, or a full disk changes the result."""
    phases = [dataclasses.replace(ONE, frozen="conv1|bn1")]
    found = []

    def once(where):
        monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / where / "cache"))  # no run may read what another has made
        found.append(tiny.run(tmp_path / where, phases, **options)[1].outputs)

    once("disk")
    with monkeypatch.context() as changed:
        changed.setattr("jaxft.data.rows.to_device", jax.device_put)
        once("device")
    monkeypatch.setattr("jaxft.data.loader.decode_once", lambda *args, **options: None)
    once("nowhere")
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


@quick
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {"lr": 0.2}}, r"config.lr: 0.1 → 0.2"),
        ({"batch_size": 4}, r"train.batch_size: 8 → 4"),
        ({"seed": 1}, r"seed: 0 → 1"),
        ({"phases": [dataclasses.replace(ONE, epochs=1)]}, r"phases.1.epochs: 2 → 1"),
        ({"phases": [ONE, ONE]}, r"phases.2.epochs: \(absent\) → 2"),
        ({"start": tiny.model(seed=4)}, r"model.variables: "),
        ({"data": "another pixel"}, r"train.data.sha256: "),
    ],
)
def test_another_run_in_the_same_folder_is_refused_with_its_differences(folder_of_a_run, changes, message):
    """Bug: a run goes on under other settings or data, its history counts epochs twice, or config.json is lost."""
    before = {path.name: path.read_bytes() for path in folder_of_a_run.iterdir() if path.is_file()}
    if changes.get("data"):
        data = tiny.dataset()
        data.images[2][0, 0, 0] ^= 1
        changes = {"data": data}
    with pytest.raises(ValueError, match=message):
        tiny.run(folder_of_a_run, **{"phases": [ONE], "config": {"lr": 0.1}, **changes})
    assert {path.name: path.read_bytes() for path in folder_of_a_run.iterdir() if path.is_file()} == before


@pytest.fixture(scope="module")
def folder_of_a_run(tmp_path_factory):
    """A finished run of the phase ONE; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(finetune, "_pictures", lambda *args: None)
        patched.setenv("JAXFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        tiny.run(folder, [ONE], config={"lr": 0.1})
    return folder


def test_a_folder_that_cannot_be_written_to(tmp_path):
    """Bug: the run trains for an hour and fails at its first save, without naming the folder."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    for folder in (tmp_path / "file" / "run", tmp_path / "file"):
        with pytest.raises(OSError, match=f"the folder {folder} cannot be written to"):
            tiny.run(folder)


def test_a_full_disk_is_refused_before_training(tmp_path, monkeypatch):
    """Bug: the first epoch is trained before the lack of room is noticed."""
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    monkeypatch.setattr(finetune, "fit", lambda *args: pytest.fail("training began"))
    with pytest.raises(CheckpointError, match="MB free"):
        tiny.run(tmp_path / "run")


def test_a_corrupt_image_is_named(tmp_path):
    """Bug: a decoder's message from a worker thread, without the file."""
    data = tiny.dataset()
    data.images[3] = b"\xff\xd8\xff\xe0 not a jpeg"
    with pytest.raises(ValueError, match="img_3.png"):
        tiny.run(tmp_path / "run", data=data)


def never(*_):
    pytest.fail("a step was taken")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: {"batch_size": 24}, "batch_size 24"),
        (
            lambda: {"start": tiny.model(tiny.Tiny(num_classes=5))},
            "5 outputs, .* 3 classes; make the net with num_classes=3",
        ),
        (lambda: {"goal": task.multilabel()}, "multilabel takes labels of the kind 'labels'"),
        (lambda: {"data": tiny.dataset(target="values"), "goal": task.classification()}, "use task.regression"),
        (lambda: {"phases": [Phase(1, optim.Constant(0.1), frozen="conv9")]}, "freeze='conv9' matches no layer"),
        (lambda: {"phases": []}, "must be one Phase or more"),
        (lambda: {"phases": ONE}, "must be one Phase or more"),
        (lambda: {"phases": [0.1]}, "must be one Phase or more"),
        (lambda: {"goal": task.classification}, "task is a function, expected a jaxft.task.Task"),
        (lambda: {"start": tiny.Tiny()}, "model is a Tiny, expected a jaxft.model.Model"),
        (lambda: {"data": tiny.dataset(labels=np.full(30, -1))}, "no label of .* is known"),
        (
            lambda: {"data": tiny.dataset(labels=np.array([0] * 23 + [-1] * 7))},
            "no label of the images of held_out is known",
        ),
        (lambda: {"cache_features": "on"}, "cache_features=on needs"),
    ],
)
def test_what_does_not_fit_together_is_refused_before_the_first_step_and_claims_nothing(
    tmp_path, monkeypatch, change, message
):
    """Bug: an IndexError at the first evaluation; or a failed attempt after which the right one is refused."""
    changes = change()
    with monkeypatch.context() as patched, pytest.raises(ValueError, match=message):
        patched.setattr(finetune, "fit", never)
        if changes.get("phases") is ONE or changes.get("phases") == []:
            data = tiny.dataset()
            sides = [Inputs(data, indices, (8, 8), 8) for indices in (np.arange(23), np.arange(23, 30))]
            finetune.finetune(
                tiny.model(), task.classification(), *sides, changes["phases"], tiny.Run(tmp_path / "run")
            )
        tiny.run(tmp_path / "run", **changes)
    monkeypatch.setattr(finetune, "fit", lambda *args: (_ for _ in ()).throw(InterruptedError("it may begin")))
    with pytest.raises(InterruptedError):
        tiny.run(tmp_path / "run")


def test_a_batch_larger_than_the_set_leaves_no_folder(tmp_path):
    """Bug: a folder that is claimed by a run that cannot be."""
    with pytest.raises(ValueError, match="batch"):
        tiny.run(tmp_path / "w", batch_size=24)
    assert not (tmp_path / "w").exists()


def test_training_and_held_out_images_that_overlap(tmp_path, capsys, monkeypatch):
    """Bug: a run trains on what it is judged by, and scores high."""
    data = tiny.dataset()
    sides = [Inputs(data, indices, (8, 8), 4) for indices in (np.arange(23), np.arange(20, 30))]
    values = (*sides, [ONE], tiny.Run(tmp_path / "run"))
    with pytest.raises(ValueError, match="3 of the 10 held-out examples are trained on as well: img_20.png"):
        finetune.finetune(tiny.model(), task.classification(), *values)
    monkeypatch.setattr(finetune, "fit", lambda *args: (_ for _ in ()).throw(InterruptedError))
    images = [*data.images[:29], data.images[0]]
    with pytest.raises(InterruptedError):
        tiny.run(tmp_path / "doubles", data=tiny.dataset(images=images, groups=("one",) * 30))
    said = capsys.readouterr().out
    assert "WARNING: 1 groups are trained on and held out: one" in said
    assert "WARNING: 1 held-out images equal one that is trained on, byte for byte: img_29.png" in said


def test_the_classes_of_both_sides_agree(tmp_path):
    """Bug: the held-out set names its classes in another order, and every prediction is scored as another class."""
    one, two = tiny.dataset(), tiny.dataset(classes=("green", "red", "blue"))
    sides = Inputs(one, np.arange(23), (8, 8), 8), Inputs(two, np.arange(23, 30), (8, 8), 8)
    with pytest.raises(ValueError, match="the classes of train, red, green, blue, are not those of held_out"):
        finetune.finetune(tiny.model(), task.classification(), *sides, [ONE], tiny.Run(tmp_path / "run"))


def test_compiled_programs_lie_in_the_cache_folder_or_where_jax_was_told(tmp_path, monkeypatch):
    """Bug: a folder that the user set for JAX is overruled, nothing is kept, or only programs that took a second."""
    before = jax.config.jax_compilation_cache_dir
    shortest = jax.config.jax_persistent_cache_min_compile_time_secs
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path))
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        assert finetune.keep_programs() == tmp_path / "compiled"
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "compiled")
        assert jax.config.jax_persistent_cache_min_compile_time_secs == 0
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
        assert finetune.keep_programs() == tmp_path / "mine"
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", shortest)


@pytest.mark.parametrize("target", ["class", "labels", "values"])
def test_unknown_labels_enter_nothing(tmp_path, target):
    """Bug: −1 is learnt, scored, drawn or printed as the last class, in a batch or in a file."""
    whole = tiny.dataset(target=target)
    hidden = [1, 5, 24, 27]
    labels = whole.labels.copy()
    labels[hidden] = np.nan if target == "values" else -1
    data = tiny.dataset(target=target, labels=labels)
    _, predictions = tiny.run(tmp_path / "run", [ONE], data=data)
    assert predictions.index.tolist() == list(range(23, 30))
    known = predictions.known.reshape(7, -1)[:, 0]
    assert known.tolist() == [True, False, True, True, False, True, True]
    goal = tiny.TASKS[target]()
    kept = dataclasses.replace(
        predictions, **{name: getattr(predictions, name)[known] for name in ("index", "label", "known", "outputs")}
    )
    summary = read_json(tmp_path / "run" / "summary.json")
    expected = {name: None if math.isnan(x) else x for name, x in goal.metrics(kept).items()}
    assert summary["metrics"] == pytest.approx(expected, rel=1e-6)
    printed = read_csv(tmp_path / "run" / "predictions.csv")
    columns = ["label"] if target == "class" else [f"label_{name}" for name in tiny.CLASSES]
    for place, row in enumerate(printed):
        assert all((row[column] == "") == (not known[place]) for column in columns)
    pictures = {"class": "confusion_matrix", "labels": "labels", "values": "values"}
    assert (tmp_path / "run" / f"{pictures[target]}.png").exists()
    assert (tmp_path / "run" / "worst_mistakes.png").exists()


@quick
def test_frozen_layers_stay_to_the_bit_though_the_net_was_made_without_them(tmp_path):
    """Bug: what is frozen is said twice; statistics of layers that the phase freezes move, as the net was not told."""
    start = tiny.model()
    trained, _ = tiny.run(tmp_path / "run", [Phase(2, optim.Constant(0.1), frozen="conv1|bn1")], start=start)
    before, after = tiny.leaves(dict(start.variables)), tiny.leaves(dict(trained.variables))
    for name in before:
        assert np.array_equal(before[name], after[name]) == ("1']" in name), name
    assert trained.net.frozen == {"conv1", "bn1"} and start.net.frozen == frozenset()


@quick
def test_a_model_can_be_used_again_and_again(tmp_path):
    """Bug: training donates the buffers of the model it was given, or of the one it returned."""
    variables = jax.tree.map(jax.numpy.asarray, tiny.variables(tiny.Tiny()))  # on the device, as a user may have them
    first = model.Model(tiny.Tiny(), variables, "torch")
    once, predictions = tiny.run(tmp_path / "once", [ONE], start=first)
    on_device = dataclasses.replace(once, variables=jax.tree.map(jax.numpy.asarray, once.variables))
    second, _ = tiny.run(tmp_path / "second", [ONE], start=on_device)
    _, again = tiny.run(tmp_path / "again", [ONE], start=first)
    np.testing.assert_array_equal(again.outputs, predictions.outputs)
    np.testing.assert_array_equal(once.predict(tiny.dataset(), np.arange(23, 30)).outputs, predictions.outputs)
    assert (
        second.task is not None
        and np.isfinite(tiny.leaves(dict(on_device.variables))["['params']['conv1']['bias']"]).all()
    )


LOSSES = [2.0, 1.0, 3.0, 4.0]


@quick
@pytest.mark.parametrize("keep", ["best", "last"])
def test_a_run_ends_with_the_best_or_the_last_state_by_choice(tmp_path, keep):
    """Bug: the best checkpoint is kept and read by nobody; the summary does not say which state it is of; or a resumed
    process, which has no predictions of the best epoch, gives those of the last."""
    phases = [Phase(4, optim.Constant(0.05))]
    goal = tiny.scored([*LOSSES, 9.0])
    trained, predictions = tiny.run(tmp_path / "run", phases, goal=goal, keep=keep)
    summary = read_json(tmp_path / "run" / "summary.json")
    epoch = 2 if keep == "best" else 4
    assert summary["kept"] == {"which": keep, "epoch": epoch, "step": 2 * epoch}
    assert summary["kept_epoch"]["val_loss"] == LOSSES[epoch - 1] and summary["last_epoch"]["epoch"] == 4
    accuracies = [float(row["val_accuracy"]) for row in tiny.history(tmp_path / "run")]
    assert task.classification().metrics(predictions)["accuracy"] == accuracies[epoch - 1]
    printed = (tmp_path / "run" / "predictions.csv").read_bytes()
    again, resumed = tiny.run(
        tmp_path / "run", phases, goal=tiny.scored([9.0]), keep=keep
    )  # reads them back from the disk
    np.testing.assert_array_equal(resumed.outputs, predictions.outputs)
    tiny.assert_same(tiny.leaves(dict(again.variables)), tiny.leaves(dict(trained.variables)))
    assert (tmp_path / "run" / "predictions.csv").read_bytes() == printed
    other, others = tiny.run(
        tmp_path / "run", phases, goal=tiny.scored([9.0]), keep="last" if keep == "best" else "best"
    )
    assert not np.array_equal(others.outputs, predictions.outputs)
    opened = model.open(tmp_path / "run", net=tiny.Tiny())
    tiny.assert_same(tiny.leaves(dict(opened.variables)), tiny.leaves(dict(other.variables)))


@quick
def test_predictions_of_two_epochs_are_held_at_most(tmp_path, monkeypatch):
    """Bug: every epoch's predictions stay in memory: of a hundred epochs, a hundred copies."""
    import gc

    from jaxft.predict import Predictions

    held = []

    def watch(state, plan, counted=finetune.epoch_line):
        gc.collect()
        held.append(sum(isinstance(thing, Predictions) for thing in gc.get_objects()))
        return counted(state, plan)

    monkeypatch.setattr(finetune, "epoch_line", watch)
    before = sum(isinstance(thing, Predictions) for thing in gc.get_objects())
    tiny.run(tmp_path / "run", [Phase(6, optim.Constant(0.05))], goal=tiny.scored([3.0, 1.0, 4.0, 5.0, 6.0, 7.0, 0.0]))
    assert max(held) - before <= 2


@quick
@pytest.mark.parametrize("values", [[math.nan, 1.0, 2.0], [1.0, math.nan, 2.0], [math.nan] * 3], ids=str)
def test_figures_that_are_no_numbers(tmp_path, values):
    """Bug: NaN is the best value; it ends the run, or is written as a word that no strict JSON reader takes."""
    goal = tiny.scored([*values, 0.5])
    _, predictions = tiny.run(tmp_path / "run", [Phase(3, optim.Plateau(0.05, patience=1), patience=2)], goal=goal)
    summary = read_json(tmp_path / "run" / "summary.json")
    best = [place for place, value in enumerate(values, 1) if value == 1.0]
    assert summary["kept"]["epoch"] == (best or [3])[0] and summary["kept"]["which"] == ("best" if best else "last")
    assert require_strict_json(tmp_path / "run") >= 4
    losses = [row["val_loss"] for row in tiny.history(tmp_path / "run")]
    assert losses == ["" if math.isnan(value) else str(value) for value in values]
    _, again = tiny.run(
        tmp_path / "run", [Phase(3, optim.Plateau(0.05, patience=1), patience=2)], goal=tiny.scored([0.5])
    )
    np.testing.assert_array_equal(again.outputs, predictions.outputs)


@quick
def test_a_phase_that_ends_early_is_followed_by_the_next(tmp_path):
    """Bug: patience ends the run, or the next phase begins at the step where the first would have ended."""
    phases = [Phase(9, optim.Constant(0.05), patience=1, frozen="all-but-head"), Phase(2, optim.Constant(0.01))]
    goal = tiny.scored([3.0, 2.0, 2.5, 1.0, 0.5, 9.0])
    tiny.run(tmp_path / "run", phases, goal=goal)
    rows = tiny.history(tmp_path / "run")
    assert [(row["phase"], row["epoch"], row["step"]) for row in rows] == [
        ("1", "1", "2"),
        ("1", "2", "4"),
        ("1", "3", "6"),
        ("2", "4", "8"),
        ("2", "5", "10"),
    ]
    assert [row["lr"] for row in rows] == ["0.05"] * 3 + ["0.01"] * 2


def plateau_of_optax(schedule):
    return optax.chain(
        optax.sgd(schedule), optax.contrib.reduce_on_plateau(factor=0.5, patience=1, accumulation_size=2)
    )


def two(first, second, **inputs):
    return [first, second], inputs


GROUPS, SCHEDULES = optim.by_depth(tiny.Tiny(), optim.Cosine(0.05, total=4, warmup=1), 0.5)
CASES = {
    "momentum": two(
        Phase(2, optim.Constant(0.05), frozen="all-but-head"),
        Phase(2, optim.InverseTime(0.05, 1e-2), frozen="conv1|bn1", momentum="carry"),
        augment=tiny.Noise(),
    ),
    "average": two(Phase(2, optim.Constant(0.05), average=0.5), Phase(2, optim.Constant(0.02), average=0.8)),
    "mixup and balanced": two(
        Phase(2, optim.Constant(0.05), optax.adam),
        Phase(2, optim.Constant(0.02), optim.AdamW(), momentum="anew"),
        mix=mix.Mixup(0.4),
        order=order.balanced,
        weights=np.linspace(0.5, 1.5, 30),
    ),
    "groups": two(
        Phase(2, SCHEDULES, groups=GROUPS, clip_norm=0.5), Phase(2, SCHEDULES, groups=GROUPS, momentum="carry")
    ),
    "plateau": two(
        Phase(2, optim.Plateau(0.05, factor=0.5, patience=1, min_delta=9.0), patience=5),
        Phase(2, optim.Plateau(0.05, factor=0.5, patience=1, min_delta=9.0), plateau_of_optax),
    ),
    "patience": two(Phase(9, optim.Constant(1e-9), patience=1, frozen="bn1"), Phase(2, optim.Constant(0.05))),
    "views": two(
        Phase(2, optim.Constant(0.05), frozen="all-but-head"),
        Phase(2, optim.Constant(0.05), frozen="conv1|bn1", momentum="carry"),
        augment=tiny.Noise(),
        views=2,
    ),
    "prodigy": two(Phase(2, optim.Constant(1.0), optax.contrib.prodigy), Phase(2, optim.Constant(0.05))),
}


SOME = ("its last step", "killed")
HOWS = {
    "momentum": ("in phase 1", "its last step", "its evaluation", "in phase 2", "killed"),
    "average": ("its evaluation", "killed"),
    "plateau": ("its evaluation", "in phase 2"),
    "views": ("in phase 1", "its last step", "in phase 2"),
}


@functools.cache
def whole_run(base, case):
    """A run that nothing interrupts; → its arrays, history and predictions."""
    return once(base / case, case)


def once(folder, case):
    phases, inputs = CASES[case]
    trained, predictions = tiny.run(folder, phases, start=tiny.model(tiny.Tiny(dropout=0.3)), inputs=inputs)
    return tiny.saved(folder), tiny.history(folder), (folder / "predictions.csv").read_bytes(), predictions.outputs


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("whole")


@quick
@pytest.mark.parametrize(("case", "how"), [(case, how) for case in CASES for how in HOWS.get(case, SOME)])
def test_an_interrupted_run_ends_as_one_that_is_not(tmp_path, base, monkeypatch, case, how):
    """Bug: anything of a run's state is outside its checkpoint, or is begun anew at a phase's border."""
    expected = whole_run(base, case)
    folder = tmp_path / "parts"
    with monkeypatch.context() as patched:
        if how == "its evaluation":
            write = finetune.runs.write_history

            def stopped(file, history):
                write(file, history)
                if len(history) == 2:
                    tiny.stop(signal.SIGINT)

            patched.setattr(finetune.runs, "write_history", stopped)
        elif how == "killed":
            patched.setattr(Checkpoints, "close", lambda self: None)  # a killed process closes nothing
            tiny.at_step(patched, 5, kill)
        else:
            tiny.at_step(patched, {"in phase 1": 0, "its last step": 3, "in phase 2": 4}[how], tiny.stop)
        with pytest.raises(Killed if how == "killed" else train.Stopped):
            once(folder, case)
    found = once(folder, case)
    tiny.assert_same(found[0], expected[0])
    assert found[1:3] == expected[1:3]
    np.testing.assert_array_equal(found[3], expected[3])


class Killed(BaseException):
    pass


def kill():
    raise Killed


@quick
@pytest.mark.parametrize("case", ["plateau", "average", "views"])
def test_a_finished_run_that_is_given_more_epochs_ends_as_one_that_had_them_at_once(tmp_path, monkeypatch, case):
    """Bug: more epochs are refused, begin from other momenta, or take other batches and views than they would have."""
    phases, inputs = CASES[case]
    longer = [phases[0], dataclasses.replace(phases[1], epochs=4)]
    tiny.run(tmp_path / "parts", phases, inputs=inputs)
    for folder in ("parts", "whole"):
        tiny.run(tmp_path / folder, longer, inputs=inputs)
    tiny.assert_same(tiny.saved(tmp_path / "parts"), tiny.saved(tmp_path / "whole"))
    assert tiny.history(tmp_path / "parts") == tiny.history(tmp_path / "whole")
    assert len(tiny.history(tmp_path / "parts")) == 6
    assert (tmp_path / "parts" / "predictions.csv").read_bytes() == (
        tmp_path / "whole" / "predictions.csv"
    ).read_bytes()
    with pytest.raises(ValueError, match="phases.2.epochs: 4 → 3"):
        tiny.run(tmp_path / "parts", [phases[0], dataclasses.replace(phases[1], epochs=3)], inputs=inputs)


@quick
def test_fewer_epochs_than_are_begun_are_refused(tmp_path, monkeypatch):
    """Bug: a run that was stopped in its second epoch is told to have one; its last state is of no epoch at all."""
    with monkeypatch.context() as patched, pytest.raises(train.Stopped):
        tiny.at_step(patched, 2, tiny.stop)
        tiny.run(tmp_path / "run", [ONE], keep="last")
    with pytest.raises(ValueError, match="phases.1.epochs: 2 → 1"):
        tiny.run(tmp_path / "run", [dataclasses.replace(ONE, epochs=1)], keep="last")


@quick
def test_training_from_a_thread(tmp_path):
    """Bug: signal handlers, which only the main thread may set, keep servers and notebooks out."""
    found = []
    thread = threading.Thread(target=lambda: found.append(tiny.run(tmp_path / "thread", [ONE])[1].outputs))
    thread.start()
    thread.join()
    np.testing.assert_array_equal(found[0], tiny.run(tmp_path / "main", [ONE])[1].outputs)


def with_umlauts(folder):
    names = ("größer →", "grün", "blau…")
    files = tuple(f"straße_{i}_→.png" for i in range(30))
    data = tiny.dataset(classes=names, names=files, groups=tuple(f"grüppe {i % 2}" for i in range(30)))
    phases = [Phase(2, optim.Constant(0.05), frozen="conv1|bn1"), Phase(1, optim.Constant(0.05))]
    tiny.run(folder, phases, data=data, config={"title": "naïve → ✓"})


SCRIPT = """
    import os, pathlib, signal, sys, pytest, test_finetune, tiny
    if sys.argv[2] == "kill":
        test_finetune.finetune._pictures = lambda *args: None
        tiny.at_step(pytest.MonkeyPatch(), 5, lambda: os.kill(os.getpid(), signal.SIGKILL))
    test_finetune.with_umlauts(pathlib.Path(sys.argv[1]))
"""


def elsewhere(folder, what, cache_folder, **variables):
    here = Path(__file__).parent
    script = folder.parent / "script.py"
    script.write_text(textwrap.dedent(SCRIPT), encoding="utf-8")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]),
        "JAXFT_CACHE": str(cache_folder),
    }
    return subprocess.run(
        [sys.executable, str(script), str(folder), what],
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
        env=environment | variables,
        timeout=300,
    )


@quick
def test_another_locale_and_a_kill_in_it(tmp_path):
    """Bug: a text file of the run is written in the locale's encoding, which has no umlauts and no arrows; or what is
    printed is; or a process that is killed without a word leaves a run that cannot go on."""
    ascii_only = {
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONWARNDEFAULTENCODING": "1",
    }
    done = elsewhere(tmp_path / "run", "kill", tmp_path / "cache", **ascii_only)
    assert done.returncode == -signal.SIGKILL, done.stderr
    done = elsewhere(tmp_path / "run", "pictures", tmp_path / "cache", **ascii_only)
    assert done.returncode == 0, done.stderr
    assert not re.search(r"^/\S*/jaxft/\S*EncodingWarning|jaxft/\w+(/\w+)?\.py:\d+: EncodingWarning", done.stderr, re.M)
    rows = read_csv(tmp_path / "run" / "predictions.csv")
    assert list(rows[0]) == ["img", "label", "größer →", "grün", "blau…"] and rows[0]["img"] == "straße_23_→.png"
    assert read_json(tmp_path / "run" / "config.json")["config"] == {"title": "naïve → ✓"}
    opened = model.open(tmp_path / "run", net=tiny.Tiny())
    assert opened.classes == ("größer →", "grün", "blau…")
    with_umlauts(tmp_path / "whole")
    tiny.assert_same(tiny.saved(tmp_path / "run"), tiny.saved(tmp_path / "whole"))
    assert tiny.history(tmp_path / "run") == tiny.history(tmp_path / "whole")


@quick
def test_a_home_folder_as_the_folder_of_a_run(tmp_path, monkeypatch):
    """Bug: a folder called `~` in the current one."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    tiny.run("~/runs/first", [dataclasses.replace(ONE, epochs=1)])
    assert (tmp_path / "home" / "runs" / "first" / "summary.json").exists()
    assert model.open("~/runs/first", net=tiny.Tiny()).classes == tiny.CLASSES
    assert not (tmp_path / "~").exists()


CONSTANT = optim.Constant(0.05)


@quick
@pytest.mark.parametrize(
    ("second", "message"),
    [
        (Phase(1, CONSTANT, groups={"top": "from:foo"}), "phase 2: .*foo"),
        (Phase(1, CONSTANT, groups={"a": "from:stem", "b": "stage:body"}), "phase 2: .*conv2"),
        (Phase(1, CONSTANT, frozen=".*"), "phase 2: .*nothing to train"),
        (Phase(1, lambda count: float(count)), "phase 2: .*"),
        (Phase(1, CONSTANT, optax.adam, momentum="carry"), "phase 2: .*carr"),
    ],
)
def test_a_later_phase_that_cannot_be_is_refused_before_the_first_is_trained(tmp_path, second, message):
    """Bug: hours of the first phase are trained, and the second, once corrected, is refused as another run."""
    with pytest.raises(ValueError, match=message):
        tiny.run(tmp_path / "run", [Phase(1, CONSTANT), second])
    assert not (tmp_path / "run").exists()


@quick
def test_the_first_of_equal_best_values_is_the_best(tmp_path):
    """Bug: checkpoints take the last of equal values for the best, patience and pictures the first."""
    tiny.run(tmp_path / "run", [Phase(4, CONSTANT)], goal=tiny.scored([2.0, 1.0, 1.0, 1.0, 9.0]))
    assert read_json(tmp_path / "run" / "summary.json")["kept"] == {"which": "best", "epoch": 2, "step": 4}


@quick
def test_the_last_state_is_not_called_the_best(tmp_path, capsys):
    """Bug: the monitored figure was never a number, and the summary says that the best state was kept."""
    tiny.run(tmp_path / "run", [Phase(2, CONSTANT)], goal=tiny.scored([math.nan] * 3))
    assert "WARNING: the monitored figure was never a number" in capsys.readouterr().out
    assert read_json(tmp_path / "run" / "summary.json")["kept"] == {"which": "last", "epoch": 2, "step": 4}


@quick
def test_a_group_that_is_wholly_frozen_has_no_rate(tmp_path):
    """Bug: the history shows a rate of layers that nothing trains."""
    groups, schedules = {"below": "stage:stem"}, {"trainable": CONSTANT, "below": optim.Constant(0.01)}
    tiny.run(tmp_path / "run", [Phase(1, schedules, groups=groups, frozen="through:stem")])
    assert {name for name in tiny.history(tmp_path / "run")[0] if name.startswith("lr")} == {"lr"}


@quick
def test_what_is_said_twice_or_to_the_wrong_side_is_refused(tmp_path):
    """Bug: the net's own frozen layers, or the augmentation of held-out images, are dropped without a word."""
    with pytest.raises(ValueError, match="say it in the phases alone"):
        tiny.run(tmp_path / "a", [ONE], start=tiny.model(tiny.Tiny(frozen=frozenset({"conv1", "bn1"}))))
    data, indices = tiny.dataset(), np.arange(30)
    sides = Inputs(data, indices[:20], (8, 8), 4), Inputs(data, indices[20:], (8, 8), 4, augment=tiny.Noise())
    with pytest.raises(ValueError, match="held_out has augment"):
        finetune.finetune(tiny.model(), task.classification(), *sides, [ONE], Run(tmp_path / "b"))
    with pytest.raises(ValueError, match="run is a str, expected a jaxft.runs.Run"):
        finetune.finetune(tiny.model(), task.classification(), sides[0], sides[0], [ONE], "runs/x")


@quick
def test_a_task_with_functions_of_its_own_is_another_run_and_is_asked_for(tmp_path):
    """Bug: a folder opens with the usual outputs, and predicts something else than the run did."""

    def sharper(logits):
        return jax.nn.softmax(2 * logits)

    goal = dataclasses.replace(task.classification(), outputs=sharper)
    _, predictions = tiny.run(tmp_path / "run", [ONE], goal=goal)
    with pytest.raises(ValueError, match=r"functions of its own \(outputs\): give it as task="):
        model.open(tmp_path / "run", net=tiny.Tiny())
    opened = model.open(tmp_path / "run", net=tiny.Tiny(), task=goal)
    np.testing.assert_array_equal(opened.predict(tiny.dataset(), np.arange(23, 30)).outputs, predictions.outputs)
    with pytest.raises(ValueError, match="(?s)other settings.*task.outputs"):
        tiny.run(tmp_path / "run", [ONE])


@quick
def test_a_run_that_diverges_names_the_checkpoint_that_is_really_there(tmp_path):
    """Bug: a save that is under way is not counted, and the remedy is one that the folder refuses."""
    with pytest.raises(train.Diverged, match=r"the checkpoint of step [12] is intact.*in another folder"):
        tiny.run(tmp_path / "run", [Phase(2, optim.Constant(1e30))], save_every=1)


@quick
@pytest.mark.parametrize("options", [{}, {"cache_features": "on"}], ids=["plain", "several at once"])
def test_a_run_that_diverges_is_explained(tmp_path, options):
    """Bug: which step, images and layer it was is not known, or a step too late; the report itself is not JSON."""
    rate = lambda count: jnp.where(count < 4, 0.01, jnp.inf)  # noqa: E731 - update 4 spoils the loss of step 5
    frozen = "all-but-head" if options else "none"
    with pytest.raises(
        train.Diverged, match=r"the loss of step 5 is not finite; .*diverged.json has the images"
    ) as caught:
        tiny.run(tmp_path / "run", [Phase(3, rate, frozen=frozen)], save_every=3, **options)
    report = read_json(tmp_path / "run" / "diverged.json")
    assert [step["step"] for step in report["steps"]] == list(range(6))
    *finite, last = report["steps"]
    assert last["loss"] is None and all(math.isfinite(step["loss"]) for step in finite)
    data = tiny.dataset()
    stream = loader.train_batches(
        Inputs(data, np.arange(23), (8, 8), 8), data.images, seed=0, start_step=5, num_steps=1
    )
    assert last["images"] == [data.names[i] for i in next(iter(stream))["index"]]
    layers = {"predictions"} if options else {"conv1", "bn1", "conv2", "predictions"}
    assert set(last["largest_gradients"]) == layers
    largest = list(finite[0]["largest_gradients"].values())
    assert largest == sorted(largest, reverse=True) and largest[-1] > 0
    assert report["replay"] == shlex.join(sys.orig_argv) and str(caught.value).endswith(report["replay"])
    steps = report["steps"]
    with pytest.raises(train.Diverged):
        tiny.run(tmp_path / "run", [Phase(3, rate, frozen=frozen)], save_every=3, **options)
    again = read_json(tmp_path / "run" / "diverged.json")["steps"]
    assert again == steps[-len(again) :] and len(again) < len(steps)  # to the bit, from the last checkpoint on


def damage(folder, step):
    """Flips one bit of the largest file of a checkpoint."""
    file = max((folder / "checkpoints" / str(step)).rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 8
    file.write_bytes(content)


@quick
def test_a_damaged_checkpoint_changes_no_result(tmp_path, capsys):
    """Bug: one flipped bit is restored, and the run ends differently and without a word."""
    values = [1.0, 2.0, 3.0, 0.5]
    whole, _ = tiny.run(tmp_path / "whole", [Phase(4, CONSTANT)], goal=tiny.scored([*values, 9.0]))
    tiny.run(tmp_path / "run", [Phase(3, CONSTANT)], goal=tiny.scored([*values[:3], 9.0]))
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("*.sha256")) == [
        f"{step}.sha256" for step in (2, 4, 6)
    ]
    for step in (4, 6):
        damage(tmp_path / "run", step)
    with pytest.raises(CheckpointError, match=r"step 6 .* is damaged: 6/\S+ is not what was saved"):
        model.open(tmp_path / "run", net=tiny.Tiny(), which="last")
    capsys.readouterr()
    trained, _ = tiny.run(tmp_path / "run", [Phase(4, CONSTANT)], goal=tiny.scored([*values[1:], 9.0]))
    out = capsys.readouterr().out
    assert "It is set aside as 6.damaged; the last one is now that of step 4" in out
    assert "It is set aside as 4.damaged; the last one is now that of step 2" in out and "up to step 2" in out
    tiny.assert_same(tiny.leaves(dict(trained.variables)), tiny.leaves(dict(whole.variables)))
    for name in ("predictions.csv", "history.jsonl"):
        ours, theirs = ((tmp_path / each / name).read_text() for each in ("run", "whole"))
        assert re.sub(r'"images_per_second": [^,}]*', "", ours) == re.sub(r'"images_per_second": [^,}]*', "", theirs)


@quick
def test_a_best_state_that_is_lost(tmp_path, capsys):
    """Bug: the run fails for ever, or what comes later is never the best, as the lost one was better."""
    phases = [Phase(3, CONSTANT)]
    tiny.run(tmp_path / "run", phases, goal=tiny.scored([1.0, 3.0, 2.5, 9.0]))
    damage(tmp_path / "run", 2)
    tiny.run(tmp_path / "run", phases, goal=tiny.scored([9.0]))
    out = capsys.readouterr().out
    assert "set aside as 2.damaged" in out and "the checkpoint of the best state is lost, so the last" in out
    tiny.run(tmp_path / "run", [Phase(5, CONSTANT)], goal=tiny.scored([2.0, 2.2, 9.0]))
    assert read_json(tmp_path / "run" / "summary.json")["kept"] == {"which": "best", "epoch": 4, "step": 8}


@quick
@pytest.mark.parametrize("content", [b"", b'{"a":', b"[]", b"null", None], ids=["empty", "cut", "list", "null", "gone"])
def test_what_lies_beside_the_checkpoints_may_be_damaged(tmp_path, content):
    """Bug: a record that a crash emptied stops the run, names no file, or is never written again."""
    for epochs in (1, 2, 2):  # one that goes on, and one that has nothing left to train
        tiny.run(tmp_path / "run", [Phase(epochs, CONSTANT)])
        for name in ("config.json", "model.json", "history.csv", "history.jsonl", "summary.json"):
            file = tmp_path / "run" / name
            before = file.read_bytes()
            file.unlink() if content is None else file.write_bytes(content)
    tiny.run(tmp_path / "run", [Phase(2, CONSTANT)])
    for name in ("config.json", "model.json", "summary.json"):
        assert read_json(tmp_path / "run" / name)
    assert len(tiny.history(tmp_path / "run")) == 2 and before
    assert model.open(tmp_path / "run", net=tiny.Tiny()).classes == tiny.CLASSES


@quick
@pytest.mark.parametrize(("free", "words"), [(2**33, "a batch of 4 fits"), (2**20, "GiB can be had; take smaller")])
def test_a_step_that_does_not_fit_says_which_batch_does(tmp_path, monkeypatch, free, words):
    """Bug: the user halves the batch until it fits, or is told a number that does not fit either."""

    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes")

    monkeypatch.setattr(train, "make_train_step", lambda *args, **options: full)
    monkeypatch.setattr(memory, "free_bytes", lambda: free)
    with pytest.raises(train.OutOfMemory, match=f"a step of 8 images does not fit .*by estimate.*{words}"):
        tiny.run(tmp_path / "run", [ONE])


@quick
def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """Bug: NaN in the last update of an epoch, whose loss was still a number, ends in NaN predictions and status 0."""
    with pytest.raises(
        train.Diverged, match="the weights are not finite after the update of step 1; no checkpoint was saved"
    ):
        tiny.run(tmp_path / "run", [Phase(1, lambda count: jnp.where(count < 1, 0.01, jnp.inf))])
