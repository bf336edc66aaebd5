"""What the pages say works: their Python runs, their commands are commands, their YAML is settings, the site builds."""

import ast
import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny import cache, kept_programs, no_pictures  # noqa: F401

from jaxft import command, model, recipe, verbs

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(kind):
    found = []
    for page in PAGES:
        for number, (language, text) in enumerate(BLOCK.findall(page.read_text(encoding="utf-8"))):
            if language == kind:
                found.append(pytest.param(text, id=f"{page.stem}-{number}"))
    return found


def commands():
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = [line.strip() for block in BLOCK.findall(text) if block[0] == "bash" for line in block[1].splitlines()]
        found += [pytest.param(line, id=f"{page.stem}: {line}") for line in lines if line]
    return found


@pytest.mark.parametrize("line", commands())
def test_a_command_is_one(line, monkeypatch, tmp_path):
    """Bug: a verb or a flag of the pages does not exist."""
    name, verb, *words = shlex.split(line)
    assert name == "jaxft"
    called = []

    def noted(function):
        import functools

        @functools.wraps(function)
        def call(*arguments, **keywords):
            called.append(function.__name__)

        return call

    for function in ("finetune", "predict", "evaluate", "report", "export", "serve", "check", "lr_find", "list_nets"):
        monkeypatch.setattr(verbs, function, noted(getattr(verbs, function)))
    if "--config" in words:  # of a run that is not here
        (tmp_path / "settings.yaml").write_text("data: photos\n", encoding="utf-8")
        words[words.index("--config") + 1] = str(tmp_path / "settings.yaml")
    monkeypatch.setattr(sys, "argv", ["jaxft", verb, *words])
    verbs.main()
    assert called == [{"nets": "list_nets"}.get(verb, verb.replace("-", "_"))]


@pytest.mark.parametrize("text", blocks("yaml"))
def test_settings_are_settings(text, monkeypatch, tmp_path):
    """Bug: a setting of the pages is none."""
    from jaxft import command

    assert yaml.safe_load(text)
    (tmp_path / "file.yaml").write_text(text, encoding="utf-8")
    command.configured(verbs.finetune, tmp_path / "file.yaml")


def launches():
    """The commands of job scripts, in which lines that end in a backslash, and folded lines of YAML, are one."""
    found = []
    for param in (*blocks("sh"), *blocks("yml")):
        (text,) = param.values
        joined = re.sub(r" *\\\\?\n +(?=--)", " ", text)
        lines = re.findall(r"jaxft finetune .*", joined)
        found += [pytest.param(line, id=f"{param.id} {number}") for number, line in enumerate(lines)]
    return found


@pytest.mark.parametrize("line", launches())
def test_a_launch_is_one(line, monkeypatch):
    """Bug: a job script of the pages starts nothing, or does not tell the processes of each other."""
    joined, called = [], []

    def finetune(data: verbs.Positional[str], start: verbs.Flat[recipe.Start], batches: verbs.Flat[recipe.Batches],
                 run: verbs.Flat[verbs.Run] = verbs.RUN) -> None:  # fmt: skip
        called.append((data, batches.batch_size, run.folder.name))

    monkeypatch.setattr(command.devices, "initialise", lambda *words: joined.append(words))
    monkeypatch.setattr(verbs, "finetune", finetune)
    monkeypatch.setattr(sys, "argv", shlex.split(line.replace("$JOB_COMPLETION_INDEX", "1")))
    verbs.main()
    assert called and called[0][1:] == (256, "photos")
    assert joined[0] in ((None, None, None), ("photos-workers-0-0.photos:3389", 2, 1))


def test_the_manifest_is_yaml():
    """Bug: Kubernetes refuses the manifest, or each pod runs another number of processes."""
    (param,) = blocks("yml")
    job = yaml.safe_load(param.values[0])["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["completions"] == job["parallelism"] == 2 and job["completionMode"] == "Indexed"
    (argument,) = job["template"]["spec"]["containers"][0]["args"]
    assert "--processes 2" in argument and argument.startswith("exec jaxft finetune")


def pages_with_python():
    found = []
    for page in PAGES:
        parts = [text for language, text in BLOCK.findall(page.read_text(encoding="utf-8")) if language == "python"]
        if parts:
            slow = () if page.stem == "data" else pytest.mark.slow
            found.append(pytest.param("\n".join(parts), id=page.stem, marks=slow))
    return found


@pytest.mark.parametrize("program", pages_with_python())
def test_python_runs(program, monkeypatch, tmp_path, no_pictures, cache):  # noqa: F811
    """Bug: the first thing that people copy does not run. Weights are random here, as there is no network."""
    monkeypatch.chdir(tmp_path)
    for number in range(16):
        noise = np.random.default_rng(number).integers(0, 256, (40, 48, 3), dtype=np.uint8)
        path = tmp_path / "photos" / ("cats" if number % 2 else "dogs") / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise).save(path)
    load = model.load
    monkeypatch.setattr(model, "load", lambda *words, **options: load(*words, **{**options, "weights": "none"}))
    exec(compile(program, "page", "exec"), {"__name__": "page"})


def test_every_link_leads_somewhere():
    """Bug: a page or a picture that was moved."""
    missing = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target and not (page.parent / target).exists():
                missing.append(f"{page.name}: {target}")
    assert not missing, missing


def test_every_page_is_in_the_site():
    """Bug: a page that nobody finds."""
    listed = set((ROOT / "docs" / "index.md").read_text(encoding="utf-8").split())
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"} <= listed


def test_every_module_of_the_api_is_there():
    """Bug: the reference names a module that is gone."""
    import importlib

    for name in re.findall(r"automodule:: (\S+)", (ROOT / "docs" / "api.md").read_text(encoding="utf-8")):
        assert importlib.import_module(name).__doc__, name


def test_readmes_python_is_short():
    """Bug: the front page becomes a manual."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (program,) = [text for language, text in BLOCK.findall(text) if language == "python"]
    body = [node for node in ast.parse(program).body if not isinstance(node, ast.ImportFrom)]
    assert len(body) <= 10 and len(text.splitlines()) <= 120


@pytest.mark.slow
def test_the_site_builds(tmp_path):
    """Bug: a warning of Sphinx: a page without a link, a docstring that is no markup."""
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "docs", tmp_path / "site"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "site" / "api.html").stat().st_size > 100_000
