"""The command `jaxft` from end to end, on drawn images and a small net."""

import csv
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from PIL import Image

import jaxft
from jaxft import settings, verbs

ROOT = pathlib.Path(__file__).parents[1]
SMALL = ["--net", "googlenet", "--weights", "none", "--image-size", "32", "--batch-size", "4", "--dtype", "float32"]


def draw(folder, count=12, classes=("blue", "red")):
    for number in range(count):
        name = classes[number % len(classes)]
        noise = np.random.default_rng(number).integers(0, 60, (40, 48, 3), dtype=np.uint8)
        noise[..., number % 3 if len(classes) > 2 else 2 * (name == "blue")] += 150
        path = folder / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise).save(path)
    return folder


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """Calls the command in this process; returns (exit status, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["jaxft", *map(str, words)])
        status = 0
        try:
            verbs.main()
        except SystemExit as done:
            status = done.code if isinstance(done.code, int) or done.code is None else 1
            if isinstance(done.code, str):
                print(done.code, file=sys.stderr)
        out = capsys.readouterr()
        return status or 0, out.out, out.err

    return call


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A finished run by the real command in a process of its own, and what it printed."""
    folder = tmp_path_factory.mktemp("command")
    draw(folder / "photos")
    words = ["finetune", "photos", *SMALL, "--head-epochs", "1", "--epochs", "1", "--val", "0.34", "--folder", "run"]
    environment = os.environ | {"JAXFT_CACHE": str(folder / "cache"), "COLUMNS": "120"}
    command = [sys.executable, "-m", "jaxft", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, encoding="utf-8", timeout=550)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_a_run_leaves_what_it_promises(ran):
    """Bug: a choice is made in silence, or a file is missing."""
    folder, out = ran
    for words in ("12 images, 2 classes", "8 train, 4 judge", "32×32 pixels (squash), 4 a step", "phase 2", "--freeze"):
        assert words in out, words
    left = {path.name for path in (folder / "run").iterdir()}
    assert {"settings.yaml", "report.html", "report.md", "history.jsonl", "model.json", "predictions.csv"} <= left
    assert list((folder / "run" / "tensorboard").glob("events.*"))


def test_the_settings_repeat_the_run(ran, command, monkeypatch):
    """Bug: the file lacks a setting, so that the run that it repeats is another one."""
    folder, _ = ran
    monkeypatch.setenv("JAXFT_CACHE", str(folder / "cache"))
    found = settings.read(folder / "run" / "settings.yaml")
    assert found["data"] == str(folder / "photos") and found["image-size"] == 32 and found["net"] == "googlenet"
    status, out, err = command("finetune", "--config", folder / "run" / "settings.yaml", "--folder", folder / "run")
    assert status == 0, err
    assert "nothing is left to train" in out


def test_from_a_run_comes_the_same_run(ran, command, monkeypatch):
    """Bug: a setting or a seed is not in the record; or nobody looks whether the run was the same."""
    folder, _ = ran
    monkeypatch.setenv("JAXFT_CACHE", str(folder / "cache"))
    status, out, err = command("finetune", "--from", folder / "run")
    assert status == 0, err
    assert f"{folder / 'run-again'} is {folder / 'run'} once more: record, history and predictions are the same" in out
    assert "repeats" not in settings.read(folder / "run-again" / "settings.yaml")
    for words, message in (
        (["finetune", "--from", folder], "holds no settings.yaml"),
        (["finetune", "--from", folder / "run", "--config", "x.yaml"], "give one of them"),
        (["predict", "--from", folder / "run"], "--from RUN is of `jaxft finetune`"),
    ):
        status, _, err = command(*words)
        assert status == 1 and message in err


def test_predict(ran, command, tmp_path):
    """Bug: predictions without names, or in another order than the images."""
    folder, _ = ran
    photos = folder / "photos"
    status, _, err = command("predict", folder / "run", photos, "--out", tmp_path / "p.csv")
    assert status == 0, err
    with (tmp_path / "p.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["img"] for row in rows] == sorted(str(path) for path in photos.rglob("*.png"))
    assert all(abs(float(row["blue"]) + float(row["red"]) - 1) < 1e-5 and row["label"] == "" for row in rows)
    status, out, _ = command("predict", folder / "run", photos / "red" / "1.png", "--tta")
    assert status == 0 and "red" in out and "%" in out


def test_evaluate(ran, command):
    """Bug: the classes of other data are numbered anew."""
    folder, _ = ran
    status, out, err = command("evaluate", folder / "run", folder / "photos")
    assert status == 0 and "accuracy" in out, err
    status, _, err = command("evaluate", folder / "run", folder / "photos", "--part", "test")
    assert status == 1 and "no image of" in err


def test_report_and_export(ran, command, tmp_path):
    """Bug: the images of a run are not found again, or a file is written over."""
    folder, _ = ran
    (folder / "run" / "report.html").unlink()
    status, _, err = command("report", folder / "run")
    assert status == 0 and (folder / "run" / "report.html").is_file(), err
    status, _, err = command("export", folder / "run", "--to", "safetensors", "--out", tmp_path / "m.safetensors")
    assert status == 0 and (tmp_path / "m.safetensors").is_file(), err
    status, _, err = command("export", folder / "run", "--to", "safetensors", "--out", tmp_path / "m.safetensors")
    assert status == 1 and "exists already" in err and err.count("\n") == 1


def test_check(command, tmp_path):
    """Bug: exit status 0 for data that spoil a run."""
    draw(tmp_path / "photos", 20)
    status, out, err = command("check", "photos")
    assert status == 0 and "nothing found" in out, (out, err)
    (tmp_path / "photos" / "red" / "broken.png").write_bytes(b"no image")
    status, out, err = command("check", "photos")
    assert status == 1 and "broken.png" in out and "1 serious finding" in err


def test_check_of_a_run(ran, command, tmp_path):
    """Bug: there is no way to know whether a run is still what was saved."""
    folder = tmp_path / "run"
    shutil.copytree(ran[0] / "run", folder)
    status, out, err = command("check", str(folder))
    assert status == 0 and "are what was saved: step" in out and "without" not in out, err
    file = max(
        (folder / "checkpoints").glob("*/variables/**/*"), key=lambda path: path.is_file() and path.stat().st_size
    )
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    status, out, err = command("check", str(folder))
    assert status == 1 and re.search(r"error: the checkpoint of step \d+ .* is damaged: \S+ is not what was saved", err)


def test_lr_find(command, tmp_path, monkeypatch):
    """Bug: the curve is of another net than finetune trains, or nobody is told the flag."""
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "cache"))
    draw(tmp_path / "photos", 20)
    status, out, err = command("lr-find", "photos", *SMALL, "--out", "lr.png")
    assert status == 0 and "suggestion for --head-lr" in out and (tmp_path / "lr.png").is_file(), err


def test_nets(command):
    """Bug: a net is missing, or nobody can tell whose weights are at hand."""
    from jaxft.nets import ZOO

    status, out, _ = command("nets")
    assert status == 0 and all(name in out for name in ZOO) and "hed-bsds500" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("finetune", "absent"), "there is no absent"),
        (("finetune", "empty"), "holds no images; expected class folders"),
        (("finetune", "one"), "holds images of 'red' alone: there is nothing to tell apart"),
        (("finetune", "alone"), "holds one image of c: it cannot both train the net and judge it"),
        (("finetune", "missing.csv"), "names 1 of 1 files that are not there"),
        (("finetune", "unlabelled.csv"), "has the columns file: expected a column file and one of label"),
        (("finetune", "good", "--net", "resnet51"), "did you mean 'resnet50'?"),
        (("finetune", "good", "--weights", "absent.h5"), "there is no such file"),
        (("finetune", "good", "--freeze", "through:nowhere", "--weights", "none"), "does not name a stage"),
        (("finetune", "good", "--lr", "-1"), "--lr"),
        (("predict", "good", "good"), "holds no model.json; give the folder of a run"),
        (("report", "absent"), "holds no model.json"),
        (("export", "good", "--to", "onnx"), "holds no model.json"),
    ],
)
def test_an_error_is_one_line_with_the_way_out(command, tmp_path, words, message):
    """Bug: a traceback, or a line that does not say what to do."""
    (tmp_path / "empty").mkdir()
    draw(tmp_path / "one", 3, ("red",))
    draw(tmp_path / "good", 8)
    draw(tmp_path / "alone", 5, ("a", "b", "c"))
    (tmp_path / "alone" / "c" / "2.png").rename(tmp_path / "alone" / "c" / "x.png")
    (tmp_path / "missing.csv").write_text("file,label\nx.png,a\n", encoding="utf-8")
    (tmp_path / "unlabelled.csv").write_text("file\nx.png\n", encoding="utf-8")
    status, _, err = command(*words)
    assert status in (1, 2) and message in " ".join(err.split()), err
    assert "Traceback" not in err


def test_help_teaches():
    """Bug: a verb without an example, or --help that waits for what only a run needs."""
    code = (
        "import sys; from jaxft import verbs\nsys.argv = ['jaxft', '--help']\n"
        "try: verbs.main()\nexcept SystemExit: pass\n"
        "heavy = {'matplotlib', 'sklearn', 'tensorflow_datasets', 'keras', 'onnx', 'pyarrow', 'starlette'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", cwd=ROOT)
    assert done.returncode == 0 and done.stdout.rstrip().endswith("[]"), done.stdout[-300:] + done.stderr
    for verb in ("finetune", "predict", "evaluate", "report", "export", "serve", "check", "lr-find", "nets", "port"):
        assert verb in done.stdout
        function = verbs.list_nets if verb == "nets" else getattr(verbs, verb.replace("-", "_"))
        assert f"Example: jaxft {verb}" in function.__doc__
    assert "Exit statuses" in done.stdout and "--tyro-print-completion" in done.stdout


def test_a_reader_that_has_enough():
    """Bug: `jaxft finetune --help | head` ends in a word about a broken pipe."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "jaxft", "finetune", "--help"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, encoding="utf-8", cwd=ROOT)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_where_nothing_is_trained(number):
    """Bug: a run that is stopped while it reads weights, or writes its report, dies in silence or in a traceback."""
    code = textwrap.dedent(
        """
        import signal, time
        signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the tests were started to ignore
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        from jaxft import command
        command.run(lambda: print("go", flush=True) or time.sleep(60))
        """
    )
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", cwd=ROOT)
    assert process.stdout is not None and process.stdout.readline() == "go\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number and err.count("\n") == 1 and "run the same command again" in err


def test_ctrl_c_while_an_experiment_is_imported(tmp_path):
    """Bug: a traceback through the imports of libraries."""
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "experiments.vgg16_statefarm", "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    for line in process.stderr:
        if " jax." in line:  # the first part of JAX is there, and hundreds are not
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT and "Traceback" not in err


def test_memory_that_is_used_up():
    """Bug: a traceback of whatever asked for the last bytes."""
    code = "from jaxft import command; command.run(lambda: bytearray(1 << 62))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", cwd=ROOT)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "try a smaller batch" in done.stderr


def test_nohup():
    """Bug: a run that `nohup` shields from the end of a terminal ends with it."""
    code = "import os, signal; from jaxft import command; command.run(lambda: os.kill(os.getpid(), signal.SIGHUP))"
    command = ["nohup", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=ROOT, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr


def test_completion():
    """Bug: the shell completes nothing."""
    command = [sys.executable, "-m", "jaxft", "--tyro-print-completion", "bash"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=ROOT)
    assert done.returncode == 0 and "finetune" in done.stdout and "--image-size" in done.stdout


def test_the_entry_point():
    """Bug: the script that pip installs names a function that is not there."""
    import tomllib

    with (ROOT / "pyproject.toml").open("rb") as file:
        assert tomllib.load(file)["project"]["scripts"]["jaxft"] == "jaxft.__main__:main"
    done = subprocess.run([sys.executable, "-m", "jaxft", "--version"], capture_output=True, encoding="utf-8", cwd=ROOT)
    assert done.stdout.strip() == f"jaxft {jaxft.__version__}"


def test_the_summary_is_the_reports(ran):
    """Bug: the table in the terminal and the report tell different figures."""
    folder, out = ran
    metrics = json.loads((folder / "run" / "summary.json").read_text(encoding="utf-8"))["metrics"]
    assert f"{metrics['accuracy']:.2%}" in out
    assert f"{metrics['accuracy']:.2%}" in (folder / "run" / "report.html").read_text(encoding="utf-8")
