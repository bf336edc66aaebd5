"""Each test looks at the starts of real processes: `sitecustomize` writes a line at each start of an interpreter."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
EXPERIMENTS = sorted(
    path.stem
    for path in (ROOT / "experiments").glob("*.py")
    if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in ast.parse(path.read_bytes()).body)
)
ASKING = "glibc.malloc.hugetlb=1"
COMMAND = """
if __name__ == "__main__":
    from jaxft.large_pages import restart

    restart()

import os, sys

print(sys.argv[1:], sys.flags.utf8_mode, sys.warnoptions, os.environ.get("JAXFT_RESTARTED"), "jax" in sys.modules)
"""

linux = pytest.mark.skipif(sys.platform != "linux", reason="asks glibc for large pages")


@pytest.fixture
def start(tmp_path):
    """Runs Python with arguments; returns (what it printed, GLIBC_TUNABLES at each start)."""
    log = tmp_path / "starts"
    (tmp_path / "command.py").write_text(COMMAND, encoding="utf-8")

    def call(*arguments, at_start="", **variables):
        (tmp_path / "sitecustomize.py").write_text(
            "import os, sys\n"
            "def note(text):\n"
            f"    with open({str(log)!r}, 'a', encoding='utf-8') as file:\n"
            "        print(text, file=file)\n"
            "def hook(event, arguments):\n"
            "    if event == 'os.exec' and 'jax' in sys.modules: note('JAX came first')\n"
            "note(os.environ.get('GLIBC_TUNABLES', ''))\n"
            "sys.addaudithook(hook)\n" + at_start,
            encoding="utf-8",
        )
        environment = {
            name: value for name, value in os.environ.items() if name not in ("GLIBC_TUNABLES", "JAXFT_RESTARTED")
        }
        done = subprocess.run(
            [sys.executable, *arguments],
            env=environment | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])} | variables,
            cwd=tmp_path,
            capture_output=True,
            encoding="utf-8",
        )
        assert done.returncode == 0, done.stderr
        return done.stdout, log.read_text(encoding="utf-8").splitlines()

    return call


@linux
@pytest.mark.parametrize("way", [["-m", "command"], ["command.py"], ["./command.py"]])
def test_a_command_starts_again_once_with_all_its_arguments(start, way):
    """Bug: the command starts itself forever or never, or loses an argument or an option of Python."""
    printed, starts = start("-X", "utf8", "-W", "ignore::UserWarning", *way, "--lr", "0.1 0.2", "-m", "x")
    assert starts == ["", ASKING]
    assert printed == "['--lr', '0.1 0.2', '-m', 'x'] 1 ['ignore::UserWarning'] 1 False\n"


@linux
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_asks(start, experiment):
    """Bug: an experiment's command runs with small pages, or imports JAX before it starts again."""
    printed, starts = start("-m", f"experiments.{experiment}", "--help")
    assert "usage: " in printed
    assert starts == ["", ASKING]


@linux
def test_the_user_has_the_last_word(start):
    """Bug: a setting of the user's own is overridden."""
    assert start("-m", "command", GLIBC_TUNABLES="glibc.malloc.check=0")[1] == ["glibc.malloc.check=0"]


def test_other_systems_are_left_alone(start):
    """Bug: on Windows the command leaves its shell, as `exec` does there, or macOS pays for a second start."""
    printed, starts = start("-m", "command", at_start="sys.platform = 'darwin'\n")
    assert starts == [""] and " None " in printed


def test_what_others_run_does_not_restart_them(start):
    """Bug: `%run` in a notebook, or `runpy` in a program, ends that notebook or program."""
    printed, starts = start(
        "-c", "import runpy; runpy.run_path('command.py', run_name='__main__'); print('still here')"
    )
    assert starts == [""] and "still here" in printed


def test_an_import_never_restarts(start):
    """Bug: a library's import of an experiment starts the program again, from its beginning."""
    imports = (
        "import importlib, pkgutil, experiments, os\n"
        "def refuse(*arguments): raise AssertionError('restarted')\n"
        "os.execv = os.execve = refuse\n"
        "found = [module.name for module in pkgutil.walk_packages(experiments.__path__, 'experiments.')]\n"
        "for name in found:\n"
        "    if not name.endswith('__main__'): importlib.import_module(name)\n"
        "assert len(found) > 4, found\n"
    )
    assert start("-c", imports)[1] == [""]
    assert start("-m", "timeit", "-n1", "-r1", "import jaxft.large_pages")[1] == ["", ""]
