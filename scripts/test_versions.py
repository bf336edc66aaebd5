"""Tests jaxft on other versions of Python, and on the oldest and newest packages that it claims to work with.

    python scripts/test_versions.py --python python3.11 python3.12 python3.13 --packages oldest tested newest

Each combination gets a fresh environment and runs the tests of `CORE`. The table at the end is what CONTRIBUTING asks
for.
"""

import os
import pathlib
import re
import shutil
import subprocess
import tempfile
import tomllib
from typing import Literal

import tyro

ROOT = pathlib.Path(__file__).parents[1]
CORE = (  # imports, steps, checkpoints, weight files, images, sources and the command
    "structure decode folder table model task train train_state checkpoint port_weights vgg settings recipe watch page "
    "gradcam serve"
).split()

Packages = Literal["oldest", "tested", "newest"]


def lower_bounds() -> list[str]:
    """Each dependency that has a lower bound, at that bound."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    wanted = [
        *project["dependencies"],
        *(each for extra in ("export", "serve") for each in project["optional-dependencies"][extra]),
    ]
    found = [re.match(r"([\w.-]+)(?:\[\w+\])?>=([\w.]+)", each) for each in wanted]
    return [f"{match[1]}=={match[2]}" for match in found if match]


def test(python: str, packages: Packages, folder: pathlib.Path) -> str:
    """Installs into a fresh environment and runs the tests; what to say of it."""
    said = subprocess.run([python, "--version"], capture_output=True, encoding="utf-8", check=True).stdout
    environment = folder / f"{said.strip().replace(' ', '-')}-{packages}"
    subprocess.run([python, "-m", "venv", environment], check=True)
    own, options = environment / "bin" / "python", []
    if packages == "tested":
        options = ["-c", str(ROOT / "constraints.txt")]
    elif packages == "oldest":
        bounds = environment / "oldest.txt"
        bounds.write_text("\n".join(lower_bounds()), encoding="utf-8")
        options = ["-c", str(bounds)]
    install = [own, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *options, "-e", f"{ROOT}[test]"]
    done = subprocess.run(install, capture_output=True, encoding="utf-8")
    if done.returncode:
        return "cannot be installed: " + done.stderr.strip().splitlines()[-1]
    files = [f"tests/test_{name}.py" for name in CORE]
    # Warnings are errors for the tested versions alone: others may warn of what is to come.
    kind = [] if packages == "tested" else ["-W", "default"]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [own, "-m", "pytest", "-q", "-p", "no:cacheprovider", *kind, *files]
    done = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, encoding="utf-8")
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    (folder / f"{environment.name}.log").write_text(done.stdout + done.stderr, encoding="utf-8")
    last = (done.stdout.strip().splitlines() or ["nothing was printed"])[-1]
    return " ".join([last, *failed[:5]])


def main(
    python: tuple[str, ...] = ("python3.11", "python3.12", "python3.13"),
    packages: tuple[Packages, ...] = ("tested",),
    logs: pathlib.Path = pathlib.Path("version-logs"),
) -> None:
    """Test jaxft on other versions.

    Args:
        python: interpreters, by name or path.
        packages: oldest (the lower bounds of pyproject.toml), tested (constraints.txt), newest (of the index).
        logs: the folder for what the tests print.
    """
    logs.mkdir(exist_ok=True)
    for each in python:
        for kind in packages:
            with tempfile.TemporaryDirectory() as scratch:
                said = test(shutil.which(each) or each, kind, pathlib.Path(scratch))
                for log in pathlib.Path(scratch).glob("*.log"):
                    shutil.copy(log, logs)
            print(f"{each} {kind}: {said}", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
