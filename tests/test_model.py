import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import cache, kept_programs, no_pictures  # noqa: F401

from jaxft import model, nets, optim, task
from jaxft.checkpoint import CheckpointError
from jaxft.data.decode import Decode
from jaxft.model import Model
from jaxft.phase import Phase

pytestmark = pytest.mark.usefixtures("kept_programs", "no_pictures")

HERE = Path(__file__).parent


def elsewhere(script, *arguments, expect=0, **variables):
    """What a script prints in a process of its own."""
    path = os.pathsep.join([str(HERE), str(HERE.parent)])
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": path} | variables
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, timeout=300)
    assert done.returncode == expect, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run whose second of three epochs is the best, with averaged weights; → (folder, its predictions, its model)."""
    patched = pytest.MonkeyPatch()
    patched.setattr(tiny.finetune_module, "_pictures", lambda *args: None)
    patched.setenv("JAXFT_CACHE", str(tmp_path_factory.mktemp("cache")))
    folder = tmp_path_factory.mktemp("run") / "run"
    goal = tiny.scored([9.0, 2.0, 9.0, 1.0, 9.0, 3.0, 0.5])  # raw and averaged, of each epoch
    phases = [Phase(3, optim.Constant(0.05), frozen="conv1|bn1", average=0.5)]
    trained, predictions = tiny.run(folder, phases, goal=goal)
    patched.undo()
    return folder, predictions, trained


def test_a_folder_opens_in_another_process_without_its_experiment(whole, tmp_path):
    """Bug: predictions need the optimizer, the freeze and the caller's settings again, or round otherwise."""
    folder, predictions, _ = whole
    script = """
        import sys, numpy as np, tiny
        from jaxft import model
        opened = model.open(sys.argv[1], net=tiny.Tiny())
        assert opened.task.name == "classification" and opened.classes == tiny.CLASSES and opened.image_size == (8, 8)
        data = tiny.dataset()
        found = opened.predict([data.images[i] for i in range(23, 30)])
        assert not found.known.any() and found.index.tolist() == list(range(7))
        np.save(sys.argv[2], found.outputs)
    """
    elsewhere(script, folder, tmp_path / "outputs.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "outputs.npy"), predictions.outputs)


def test_best_last_and_average(whole):
    """Bug: open gives the last state where the best is wanted, raw weights for averaged ones, or ignores the choice."""
    folder, predictions, trained = whole
    data = tiny.dataset()

    def outputs(**options):
        return model.open(folder, net=tiny.Tiny(), **options).predict(data, np.arange(23, 30)).outputs

    np.testing.assert_array_equal(outputs(), predictions.outputs)
    np.testing.assert_array_equal(outputs(which="best"), predictions.outputs)
    np.testing.assert_array_equal(trained.predict(data, np.arange(23, 30)).outputs, predictions.outputs)
    others = [outputs(which="last"), outputs(average=False), outputs(which="last", average=False)]
    for place, other in enumerate(others):
        assert not np.array_equal(other, predictions.outputs)
        assert not any(np.array_equal(other, another) for another in others[:place])
    steps = sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.is_dir())
    assert steps == [4, 6]
    assert model.open(folder, net=tiny.Tiny()).net.frozen == {"conv1", "bn1"}
    with pytest.raises(ValueError, match="which='first' of open must be"):
        model.open(folder, "first", net=tiny.Tiny())


def test_a_run_that_is_asked_for_its_last_state_opens_with_that(tmp_path):
    """Bug: model.json goes on saying "best" after the run ended with the last state by choice."""
    tiny.run(tmp_path / "run")
    tiny.run(tmp_path / "run", keep="last")
    assert json.loads((tmp_path / "run" / "model.json").read_text(encoding="utf-8"))["keep"] == "last"


@pytest.mark.parametrize("net", [tiny.Tiny, tiny.WithoutNorm], ids=["norm", "no norm"])
def test_save_and_open(whole, tmp_path, net):
    """Bug: what `save` writes cannot be opened, loses a field, or rounds; a net without statistics cannot be saved."""
    plain = tiny.model(net())
    variables = plain.variables if net is tiny.Tiny else {"params": plain.variables["params"]}
    values = ("caffe", None, {"file": "mine"}, task.multilabel(0.25), tiny.CLASSES, (8, 6), 5, Decode("pad"))
    made = Model(net(frozen=frozenset({"conv1"})), variables, *values)
    made.save(tmp_path / "deep" / "saved")
    opened = model.open(str(tmp_path / "deep" / "saved"), net=net())
    tiny.assert_same(tiny.leaves(dict(opened.variables)), tiny.leaves({"batch_stats": {}, **variables}))
    assert opened.net.frozen == {"conv1"}
    for field in ("preprocessing", "name", "source", "classes", "image_size", "batch_size", "decode"):
        assert getattr(opened, field) == getattr(made, field), field
    assert opened.task.name == "multilabel" and opened.task.options == made.task.options
    images = [np.full((9, 9, 3), 10 * k, np.uint8) for k in range(7)]
    np.testing.assert_array_equal(opened.predict(images).outputs, made.predict(images).outputs)
    with pytest.raises(ValueError, match="exists already"):
        made.save(tmp_path / "deep" / "saved")


def test_a_net_of_the_zoo_needs_no_code(tmp_path):
    """Bug: the options of the net, its dtype among them, are lost, and the folder needs the caller to know them."""
    made = model.load("vgg16", 3, weights="none", fc=False, hidden=(4,), dropout=0.25)
    made.save(tmp_path / "saved")
    opened = model.open(tmp_path / "saved")
    assert opened.name == "vgg16" and opened.net == made.net
    tiny.assert_same(tiny.leaves(dict(opened.variables)), tiny.leaves(dict(made.variables)))
    json.loads((tmp_path / "saved" / "model.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)


def changed(folder, target, **values):
    import shutil

    shutil.copytree(folder, target)
    file = target / "model.json"
    saved = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(saved | values), encoding="utf-8")
    return target


def test_folders_that_cannot_be_opened(whole, tmp_path):
    """Bug: a traceback of a missing key or file, which names no folder and no way out."""
    folder, _, _ = whole
    (tmp_path / "empty").mkdir()
    for nothing in (tmp_path / "empty", tmp_path / "absent"):
        with pytest.raises(FileNotFoundError, match=f"{nothing} holds no model.json"):
            model.open(nothing)
    with pytest.raises(ValueError, match="holds a Tiny, which is not of the zoo: give it as net="):
        model.open(folder)
    with pytest.raises(ValueError, match="alexnet77"):
        model.open(changed(folder, tmp_path / "net", net="alexnet77", zoo=True))
    with pytest.raises(ValueError, match="names the task 'ranking'; known are classification"):
        model.open(changed(folder, tmp_path / "task", task={"name": "ranking"}), net=tiny.Tiny())
    with pytest.raises(ValueError, match="is not of this version of jaxft"):
        model.open(changed(folder, tmp_path / "format", format=77))
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "model.json").write_text("[1, 2", encoding="utf-8")
    with pytest.raises(ValueError, match="words/model.json is not JSON"):
        model.open(tmp_path / "words")
    begun = tmp_path / "begun"  # a run that was stopped before its first save
    begun.mkdir()
    (begun / "model.json").write_text((folder / "model.json").read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        model.open(begun, net=tiny.Tiny())
    assert not (begun / "checkpoints").exists()


@pytest.mark.parametrize("target", ["class", "labels", "values"])
def test_unlabelled_images(target):
    """Bug: images without labels are scored as the first or the last class."""
    data = model.unlabelled([np.zeros((8, 8, 3), np.uint8)] * 3, tiny.CLASSES, target)
    assert not data.known.any() and len(set(data.names)) == 3 and data.target == target


def test_a_model_without_a_task_does_not_predict():
    """Bug: an image size of None, or softmax for whatever the net was made for."""
    with pytest.raises(ValueError, match="this model has no task yet"):
        tiny.model().predict([np.zeros((8, 8, 3), np.uint8)])


def test_what_is_no_model():
    """Bug: a wrong preprocessing or a net's name is noticed at the first batch."""
    good = tiny.model()
    for values, message in (
        (("vgg16", good.variables, "torch"), "is not a Flax module; make one with nets.create"),
        ((good.net, good.variables["params"], "torch"), "variables hold"),
        ((good.net, good.variables, "imagenet"), "imagenet"),
    ):
        with pytest.raises(ValueError, match=message):
            Model(*values)


def test_load_prepares_what_finetune_takes(tmp_path):
    """Bug: the seed does nothing, or `num_classes=None` loses the published head."""
    made = model.load("vgg16", 5, weights="none", fc=False, seed=3)
    assert made.net.num_classes == 5 and made.name == "vgg16" and made.task is None
    other = model.load("vgg16", weights="none", fc=False)
    assert other.net.num_classes == nets.spec("vgg16").num_classes
    kernels = [side.variables["params"]["block1_conv1"]["kernel"] for side in (made, other)]
    assert not np.array_equal(*kernels)  # of another seed


def test_compute_dtype(monkeypatch):
    """Bug: bfloat16 on a CPU without being asked for, or float32 on a GPU."""
    for platform, expected in {"cpu": jnp.float32, "gpu": jnp.bfloat16, "tpu": jnp.bfloat16}.items():
        monkeypatch.setattr(jax, "default_backend", lambda platform=platform: platform)
        assert model.compute_dtype("auto") == expected
    for name in ("float32", "bfloat16"):
        assert jnp.dtype(model.compute_dtype(name)) == jnp.dtype(name)
    with pytest.raises(ValueError, match="float16"):
        model.load("vgg16", 3, weights="none", dtype="float16")
