"""One fine-tuning run in a folder: phase after phase, to a model, its predictions, pictures and a summary."""

import dataclasses
import math
import pathlib
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

import jax
import numpy as np

from jaxft import devices, diverged, feed, fetch, files, masking, memory, report, runs, train_state, watch
from jaxft import task as tasks
from jaxft.checkpoint import LAST, Checkpoints
from jaxft.data import Inputs, decode, overlap
from jaxft.diverged import Diverged
from jaxft.model import Model
from jaxft.phase import Phase
from jaxft.predict import Predictions
from jaxft.runs import Run
from jaxft.task import Task
from jaxft.train import OutOfMemory, Plan, Progress, fit, judged
from jaxft.train_state import TrainState

SHOWN = 320  # pixels of the longer side of the images in the pictures of a run


def keep_programs() -> pathlib.Path:
    """Turns on JAX's cache of compiled programs, so that the second run of a command need not compile; → its folder.

    That is `$JAX_COMPILATION_CACHE_DIR` if it is set, else `compiled` in the folder of fetched files.
    """
    set_already: str | None = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    folder = pathlib.Path(set_already or fetch.cache_folder() / "compiled")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # JAX keeps by itself only what took a second; of building a state there are dozens that take milliseconds each.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return folder


def finetune(
    model: Model,
    task: Task,
    train: Inputs,
    held_out: Inputs,
    phases: Sequence[Phase],
    run: Run,
    *,
    config: Mapping[str, Any] | None = None,
) -> tuple[Model, Predictions]:
    """Trains, or goes on training, and leaves everything about the run in its folder.

    That is `config.json` (all that the result depends on), `history.csv` and `.jsonl`, `checkpoints/`, `model.json`
    (`model.open` reads the folder), `predictions.csv` of the held-out images, `summary.json`, and the pictures of
    `report`.

    Args:
        model: where training starts; it stays as it is, and can be used again.
        task: what a label is, what is minimised and measured.
        train: the images to train on.
        held_out: the images to judge by, which are never trained on.
        phases: one after another; each says what is frozen, the optimizer, its rates and its epochs.
        run: the folder, the seed, and which state the run ends with.
        config: settings of the caller, JSON values, for the record.

    Returns:
        (the trained model: the best or the last state, by `run.keep`; its predictions on the held-out images).

    Raises:
        ValueError: what was given does not fit together; the folder belongs to a run of other settings, or is in use.
        OSError, CheckpointError: the folder cannot be written to, or has no room.
        train.Diverged, train.Stopped, train.OutOfMemory: as `train.fit`.
    """
    began = time.perf_counter()
    config = {} if config is None else config
    _check_kinds(model, task, train, held_out, run, config)
    nets = _check(model, task, train, held_out, phases)
    runs.require_writable(run.folder)
    record = runs.record(model, task, train, held_out, phases, run, config)
    keep_programs()
    memory.give_back_after_compiling()
    goal = dataclasses.replace(
        model,
        task=task,
        classes=held_out.dataset.classes,
        image_size=held_out.image_size,
        batch_size=held_out.batch_size,
        decode=held_out.decode,
    )
    with runs.only_writer(run.folder):
        with closing(Checkpoints(run.folder / "checkpoints", record)) as checkpoints:
            progress = _resume(run, record, checkpoints, phases)
            if checkpoints.latest() is not None:  # what lies beside may be lost or damaged, or hold more than was saved
                runs.write_record(run.folder, record=record, model=goal.trained(run.keep))
            runs.write_history(run.folder, progress.history)
            with watch.watching(run.watch, run.folder, record, progress.history) as tell:
                try:
                    kept = _train(goal, nets, (train, held_out), phases, run, checkpoints, progress, tell)
                except Diverged as error:
                    raise _explained(error, train, run) from error
                except OutOfMemory as error:
                    raise _fitting(error, goal, task, train, phases[progress.phase]) from error
            ended, predictions, row, which = _end(goal, nets, held_out, run, checkpoints, progress, kept)
        if devices.is_writer():
            report.write_predictions(run.folder / "predictions.csv", predictions, held_out.dataset)
            if run.pictures:
                _pictures(run, task, train, held_out, predictions, progress.history)
            summary = _summary(task, predictions, progress, row, (train, held_out), record)
            summary["kept"] = {"which": which, "epoch": row["epoch"], "step": row["step"]}
            summary["seconds_in_this_process"] = round(time.perf_counter() - began, 1)
            files.write_json(run.folder / "summary.json", summary)
            files.write_json(run.folder / "model.json", goal.trained(run.keep))  # which may be another now
    devices.barrier("the run is written")
    return ended, predictions


def _check_kinds(model: Any, task: Any, train: Any, held_out: Any, run: Any, config: Any) -> None:
    for name, value, kind in (
        ("model", model, Model),
        ("task", task, Task),
        ("train", train, Inputs),
        ("held_out", held_out, Inputs),
        ("run", run, Run),
        ("config", config, Mapping),
    ):
        if not isinstance(value, kind):
            raise ValueError(f"{name} is a {type(value).__name__}, expected a {kind.__module__}.{kind.__qualname__}")


def _check(model: Model, task: Task, train: Inputs, held_out: Inputs, phases: Sequence[Phase]) -> list[Any]:
    """The net of each phase, its frozen layers named; refuses what does not fit together before anything is done."""
    if not isinstance(phases, Sequence) or not phases or not all(isinstance(phase, Phase) for phase in phases):
        raise ValueError(f"phases={phases!r} must be one Phase or more, in a list")
    for inputs, name in ((train, "train"), (held_out, "held_out")):
        tasks.check(task, inputs.dataset, model.net.num_classes)
        if not inputs.known[inputs.indices].any():
            raise ValueError(f"no label of the images of {name} is known; give images with labels")
        if model.channels not in (None, inputs.decode.channels):
            raise ValueError(
                f"the images of {name} have {inputs.decode.channels} channels, and the net takes {model.channels}; say "
                f"decode=Decode(channels={model.channels}), or model.load(channels={inputs.decode.channels})"
            )
        if inputs.batch_size % jax.device_count():
            raise ValueError(
                f"the batch_size of {name}, {inputs.batch_size}, does not divide over {jax.device_count()} devices; "
                f"use a multiple of {jax.device_count()}"
            )
    if train.dataset.classes != held_out.dataset.classes:
        raise ValueError(
            f"the classes of train, {', '.join(train.dataset.classes)}, are not those of held_out, "
            f"{', '.join(held_out.dataset.classes)}; give both the same, in the same order"
        )
    if changes := [name for name in ("augment", "mix", "views", "targets") if getattr(held_out, name) is not None]:
        raise ValueError(f"held_out has {', '.join(changes)}: it is judged as it is; give them to train alone")
    train.steps_per_epoch  # noqa: B018 - raises for a batch that is larger than the set
    for warning in overlap(train, held_out):
        devices.say(f"WARNING: {warning}")
    if model.task is None and model.net.frozen and phases[0].frozen == "none":
        raise ValueError(
            f"the net is frozen in {len(model.net.frozen)} layers, but the first phase freezes none; say it "
            "in the phases alone: Phase(frozen=...)"
        )
    params = model.variables["params"]
    nets = [model.net.clone(frozen=masking.frozen_layers(model.net, phase.frozen, params)) for phase in phases]
    state: Any = None
    for number, (phase, net) in enumerate(zip(phases, nets, strict=True), 1):  # as shapes alone
        try:
            if state is None:
                state = jax.eval_shape(lambda variables: train_state.create(net, variables, phase), model.variables)  # noqa: B023
            else:
                state = jax.eval_shape(lambda before: train_state.next_phase(before, net, phase), state)  # noqa: B023
        except ValueError as error:
            raise ValueError(f"phase {number}: {error}" if len(phases) > 1 else str(error)) from error
    return nets


def _resume(run: Run, record: dict[str, Any], checkpoints: Checkpoints, phases: Sequence[Phase]) -> Progress:
    """Where the run is; refuses a folder of another run."""
    step = checkpoints.latest()
    if step is None:
        return Progress()
    saved = checkpoints.run(step)
    progress = Progress(**saved["progress"])
    last = sum(row["phase"] == len(phases) for row in progress.history)
    if progress.phase + 1 == len(phases) and not (progress.history and progress.history[-1]["step"] == step):
        last += 1  # an epoch that is under way
    runs.require_same(run.folder, saved["record"], record, last)
    devices.say(
        f"{run.folder} holds this run up to step {step} ({len(progress.history)} whole epochs); it goes on from there"
    )
    return progress


def _train(
    goal: Model,
    nets: Sequence[Any],
    inputs: tuple[Inputs, Inputs],
    phases: Sequence[Phase],
    run: Run,
    checkpoints: Checkpoints,
    progress: Progress,
    tell: watch.Told,
) -> dict[int, Predictions]:
    """Trains what is left of every phase; → step → held-out predictions of this process's best and last epoch."""
    mesh, sides = devices.mesh(), None
    state: TrainState | None = None
    kept: dict[int, Predictions] = {}
    task, per_epoch = goal.task, inputs[0].steps_per_epoch
    assert task is not None
    for number, (phase, net) in enumerate(zip(phases, nets, strict=True)):
        plan = Plan(
            phase,
            number,
            per_epoch,
            inputs[0].batch_size,
            task.monitor,
            task.best,
            run.save_every,
            mesh,
        )
        if number < progress.phase or (net is nets[-1] and plan.over(progress.history)):
            continue
        if sides is None:
            sides = feed.decode(*inputs)
            if checkpoints.latest() is None:  # else it was written as the run went on
                runs.write_record(run.folder, record=checkpoints.record or {}, model=goal.trained(run.keep))
        if number > progress.phase:
            progress.phase, progress.sums = number, {}
        progress.frozen = sorted(net.frozen)
        state = _start(goal, net, phase, state, run, checkpoints, mesh)
        first = plan.first_step(progress.history) // per_epoch
        epochs = range(first, first + phase.epochs)
        fed = feed.make(net, goal.preprocessing, task, state, sides, run, epochs, mesh)
        if len(phases) > 1:
            frozen = f"{phase.frozen} frozen, " if net.frozen else ""
            devices.say(f"phase {number + 1} of {len(phases)}: {frozen}{phase.duration}")

        def judge(state: TrainState, row: dict[str, Any], fed: feed.Feed = fed) -> None:
            found = None
            for column, average in (("val", False), ("average", True))[: 1 if state.average is None else 2]:
                found = fed.evaluate(state.variables(average))
                row |= {f"{column}_{name}": value for name, value in task.metrics(found).items()}
            assert found is not None
            for step in set(kept) - {checkpoints.best()}:  # the run ends with the best or the last
                del kept[step]
            kept[row["step"]] = found
            runs.write_history(run.folder, [*progress.history, row])
            tell(row)
            devices.say(epoch_line(row, task))

        state = fit(state, fed.train_step, fed.dispatches, plan, progress, checkpoints, judge)
    if state is None:
        devices.say(f"nothing is left to train: all {len(progress.history)} epochs are done")
    return kept


def _start(
    goal: Model, net: Any, phase: Phase, state: TrainState | None, run: Run, checkpoints: Checkpoints, mesh: Any
) -> TrainState:
    """The state before the next step: of the phase before, of the last checkpoint, or of the model."""
    if state is not None:
        return devices.replicate(train_state.next_phase(state, net, phase), mesh, split=run.split_state)
    state = train_state.create(net, goal.variables, phase, seed=run.seed)
    state = devices.replicate(state, mesh, split=run.split_state)
    if checkpoints.latest() is not None:
        return checkpoints.restore(state)
    checkpoints.require_room(state, LAST + 2)  # with the best, and the one being written
    return state


def _end(
    goal: Model,
    nets: Sequence[Any],
    held_out: Inputs,
    run: Run,
    checkpoints: Checkpoints,
    progress: Progress,
    kept: Mapping[int, Predictions],
) -> tuple[Model, Predictions, dict[str, Any], str]:
    """The model that the run ends with, its predictions, the row of its epoch, and which state it is."""
    best = checkpoints.best() if run.keep == "best" else None
    if run.keep == "best" and best is None:
        assert goal.task is not None
        a_number = any(not math.isnan(judged(row, goal.task.monitor)) for row in progress.history)
        why = "the checkpoint of the best state is lost" if a_number else "the monitored figure was never a number"
        devices.say(f"WARNING: {why}, so the last state is kept, not the best")
    step = checkpoints.latest() if best is None else best
    assert step is not None
    row = next(row for row in progress.history if row["step"] == step)
    net = nets[row["phase"] - 1]
    ended = dataclasses.replace(goal, net=net, variables=checkpoints.variables(step))
    predictions = kept[step] if step in kept else ended.predict(held_out.dataset, held_out.indices)
    return ended, predictions, row, "last" if best is None else "best"


def _explained(error: Diverged, train: Inputs, run: Run) -> Diverged:
    """The error with a report of it in the run's folder."""
    command, file = diverged.replay(), run.folder / "diverged.json"
    steps = [
        {**step, "images": [train.dataset.names[i] for i in step["images"] if i >= 0]} if "images" in step else step
        for step in error.steps
    ]
    if devices.is_writer():
        report = {"what": str(error), "steps": steps, "replay": command, "versions": devices.versions()}
        files.write_json(file, report)
    return Diverged(
        f"{error}. {file} has the images and the largest gradients of the last steps. What leads to it, the same steps "
        f"with the same images, is done again by: {command}",
        steps,
    )


def _fitting(error: OutOfMemory, goal: Model, task: Task, train: Inputs, phase: Phase) -> OutOfMemory:
    """The error with the largest batch that fits, by estimate."""
    try:
        size = memory.largest_batch(goal, task, phase, train, max(jax.device_count(), train.batch_size // 2))
    except ValueError as too_large:
        return OutOfMemory(f"{error}; by estimate, {too_large}")
    return OutOfMemory(f"{error}; by estimate a batch of {size} fits")


def _pictures(
    run: Run, task: Task, train: Inputs, held_out: Inputs, predictions: Predictions, history: list[dict[str, Any]]
) -> None:
    dataset = held_out.dataset
    report.pictures(
        run.folder,
        predictions,
        dataset,
        task,
        history,
        lambda index: decode.thumbnail(dataset.images[index], SHOWN, dataset.names[index], held_out.decode),
    )
    shown = train.indices[np.linspace(0, len(train.indices) - 1, min(len(train.indices), report.COLUMNS), dtype=int)]
    originals = [
        decode.pixels(train.dataset.images[i], train.image_size, train.dataset.names[i], train.decode) for i in shown
    ]

    @jax.jit  # one program that is kept, in place of dozens of operations
    def change(key: jax.Array, images: jax.Array) -> jax.Array:
        for changes in (train.augment, train.mix):
            if changes is not None:
                images, _ = changes(key, images, {})
        return images

    report.augmentations(
        run.folder / "augmentation.png",
        np.stack(originals),
        None if train.augment is None and train.mix is None else change,
        run.seed,
    )


def _summary(
    task: Task,
    predictions: Predictions,
    progress: Progress,
    row: Mapping[str, Any],
    inputs: tuple[Inputs, Inputs],
    record: Mapping[str, Any],
) -> dict[str, Any]:
    phase = progress.history[-1]["phase"]  # as one on cached vectors is a thousand times faster than the next
    rates = [row["images_per_second"] for row in progress.history if row["images_per_second"] and row["phase"] == phase]
    return {
        "metrics": task.metrics(predictions),
        "last_epoch": progress.history[-1],
        "kept_epoch": dict(row),
        "images": {"train": len(inputs[0].indices), "held_out": len(inputs[1].indices)},
        "epochs": len(progress.history),
        "steps": progress.history[-1]["step"],
        "images_per_second": statistics.median(rates) if rates else None,
        "peak_memory_mb": devices.peak_memory_mb(),
        "record": record,
        "versions": devices.versions(),
    }


def epoch_line(row: Mapping[str, Any], task: Task) -> str:
    """One line for an epoch of the history."""
    score = task.score[0]
    rates = [f"{name.replace('_', ' ')} {value:.2e}" for name, value in row.items() if name.startswith("lr")]
    parts = [f"epoch {row['epoch']:3d}", f"step {row['step']:6d}", *rates]
    for column, words in (("train", "train"), ("val", "held out"), ("average", "averaged")):
        if f"{column}_loss" in row:
            shown = row.get(f"{column}_{score}")
            percent = (
                "" if shown is None else f" {score} {shown:.1%}" if score == "accuracy" else f" {score} {shown:.4f}"
            )
            parts.append(f"{words} loss {row[f'{column}_loss']:.4f}{percent}")
    if row["images_per_second"]:
        parts.append(f"{row['images_per_second']:.1f} images/s")
    return "  ".join(parts)
