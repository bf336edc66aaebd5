import csv
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

from jaxft import finetune, optim, train
from jaxft.checkpoint import CheckpointError
from jaxft.data import Dataset


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path_factory.mktemp("cache")))


def dataset(n=30):
    whole = tiny.batch(0, size=n)
    return Dataset(
        name="bright channels",
        images=list(whole["image"]),
        labels=whole["label"],
        groups=tuple(f"g{i % 3}" for i in range(n)),
        names=tuple(f"img_{i}.png" for i in range(n)),
        classes=("red", "green", "blue"),
        fingerprint="0" * 64,
    )


def run(workdir, config=None, data=None, net=None, **changes):
    net = net or tiny.Tiny()
    schedule = optim.inverse_time(0.1, 1e-6)
    settings = dict(
        workdir=workdir,
        config=config or {"lr": 0.1, "size": (8, 8)},
        frozen=frozenset(),
        preprocessing="torch",
        augmentation={"rotation": 5.0},
        tx=optim.nesterov_sgd(schedule),
        schedule=schedule,
        epochs=2,
        batch_size=8,
        image_size=(8, 8),
    )
    data = data or dataset()
    indices = np.arange(len(data))
    test = indices[-7:]
    return finetune.finetune(net, tiny.variables(net), data, indices[:-7], test, **{**settings, **changes})


def test_a_run_leaves_everything_in_its_folder(tmp_path):
    """Bug: a file is missing, a picture cannot be read, or predictions lose or repeat an image."""
    _, summary = run(tmp_path / "deep" / "workdir")
    folder = tmp_path / "deep" / "workdir"
    for picture in ("learning_curves", "confusion_matrix", "worst_mistakes", "augmentation"):
        assert Image.open(folder / f"{picture}.png").convert("RGB").getextrema() != ((255, 255),) * 3
    assert json.loads((folder / "config.json").read_text()) == {"lr": 0.1, "size": [8, 8]}
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary))
    history = list(csv.DictReader((folder / "history.csv").read_text().splitlines()))
    assert [row["epoch"] for row in history] == ["1", "2"] and history[-1]["step"] == "4"
    rows = list(csv.DictReader((folder / "predictions.csv").read_text().splitlines()))
    assert [row["img"] for row in rows] == [f"img_{i}.png" for i in range(23, 30)]
    probabilities = np.array([[float(row[name]) for name in ("red", "green", "blue")] for row in rows])
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-4)
    right = [row["label"] == ("red", "green", "blue")[p.argmax()] for row, p in zip(rows, probabilities, strict=True)]
    assert summary["accuracy"] == pytest.approx(np.mean(right))
    assert not list(folder.glob("*.part"))


def test_running_again_gives_the_same_result_and_trains_no_more(tmp_path):
    """Bug: a finished run is trained on, or its summary is lost."""
    state, summary = run(tmp_path)
    again, summary_again = run(tmp_path)
    assert int(again.step) == int(state.step) == 4
    assert summary_again["log_loss"] == summary["log_loss"]


@pytest.mark.parametrize("options", [{}, {"views": 2, "cache_features": "on"}], ids=["anew", "cached"])
def test_images_that_are_held_on_the_device_or_nowhere_train_the_same(tmp_path, monkeypatch, options):
    """Bug: a batch takes other rows from the device, or a full disk changes the result."""
    net = tiny.Tiny(frozen=frozenset({"conv1", "bn1"}))
    options = {**options, "net": net, "frozen": net.frozen}
    losses = []

    def once(where):
        monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / where / "cache"))  # no run may read what another has made
        losses.append(run(tmp_path / where, **options)[1]["log_loss"])

    once("disk")
    with monkeypatch.context() as changed:
        changed.setattr("jaxft.data.cache.to_device", jax.device_put)
        once("device")
    monkeypatch.setattr("jaxft.data.loader.decode_once", lambda *args, **options: None)
    once("nowhere")
    assert losses[0] == losses[1] == losses[2]


def test_another_configuration_is_refused_with_its_differences(tmp_path):
    """Bug: a run goes on under other settings, or its config.json is overwritten."""
    run(tmp_path)
    with pytest.raises(ValueError, match=r"lr: 0.1 → 0.2"):
        run(tmp_path, {"lr": 0.2, "size": (8, 8)})
    assert json.loads((tmp_path / "config.json").read_text())["lr"] == 0.1


def test_a_workdir_that_cannot_be_written_to(tmp_path):
    """Bug: the run trains for an hour and fails at its first save, without naming the folder."""
    (tmp_path / "file").write_text("")
    for workdir in (tmp_path / "file" / "run", tmp_path / "file"):
        with pytest.raises(OSError, match=f"the workdir {workdir} cannot be written to"):
            run(workdir)


def test_a_full_disk_is_refused_before_training(tmp_path, monkeypatch):
    """Bug: the first epoch is trained before the lack of room is noticed."""
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    monkeypatch.setattr(train, "fit", lambda *args, **kwargs: pytest.fail("training began"))
    with pytest.raises(CheckpointError, match="MB free"):
        run(tmp_path)


def test_a_batch_larger_than_the_set(tmp_path):
    """Bug: an epoch of no steps, which ends at once with a nan; or a folder that is claimed by a run that cannot be."""
    with pytest.raises(ValueError, match="batch"):
        run(tmp_path / "w", batch_size=24)
    assert not (tmp_path / "w").exists()


def test_a_corrupt_image_is_named(tmp_path):
    """Bug: a decoder's message from a worker thread, without the file."""
    data = dataset()
    data.images[3] = b"\xff\xd8\xff\xe0 not a jpeg"
    with pytest.raises(ValueError, match="img_3.png"):
        run(tmp_path, data=data)


def test_compute_dtype(monkeypatch):
    """Bug: bfloat16 on a CPU, where it is emulated, or float32 on a GPU."""
    for platform, expected in {"cpu": jnp.float32, "gpu": jnp.bfloat16, "tpu": jnp.bfloat16}.items():
        monkeypatch.setattr(jax, "default_backend", lambda platform=platform: platform)
        assert finetune.compute_dtype("auto") == expected
    assert finetune.compute_dtype("float32") == jnp.float32 and finetune.compute_dtype("bfloat16") == jnp.bfloat16


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
