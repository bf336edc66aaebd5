"""A command around a function: its arguments come from the command line, and what a user can cause ends in one line."""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import tyro

from jaxft import devices, fetch
from jaxft.checkpoint import CheckpointError
from jaxft.train import Diverged, Stopped

ALIASES = {"--workdir": "--folder", "--learning-rate": "--lr"}  # words that people try

PROCESSES = """\
One run over several processes: start each with --coordinator HOST:PORT --processes N --process INDEX; under Slurm, Open
MPI or Kubernetes they find each other."""


def run(main: Callable[..., Any]) -> None:
    """Calls `main` with the arguments of the command line, which tyro reads off its signature and docstring.

    Exit statuses: 0 done; 1 an error, in one message on standard error; 2 a bad command line; 128 + N stopped by
    signal N, with the state saved where there was one.
    """
    several = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    several.add_argument("--coordinator")
    several.add_argument("--processes", type=int)
    several.add_argument("--process", type=int)
    joined, rest = several.parse_known_args()
    rest = _renamed(main, rest)
    summary = (main.__doc__ or "").partition("\n")[0]
    with exits():
        try:
            devices.initialise(joined.coordinator, joined.processes, joined.process)
        except RuntimeError as error:
            raise OSError(f"the processes of this run do not find each other: {error}") from error
        tyro.cli(main, args=rest, description=f"{summary}\n\n{PROCESSES}")


def _renamed(main: Callable[..., Any], words: list[str]) -> list[str]:
    """The command line with the flags of `main` in place of the words that people try for them."""
    pairs = [word.partition("=") for word in words]
    if not set(ALIASES) & {flag for flag, _, _ in pairs}:
        return words
    known = tyro.extras.get_parser(main).format_help()
    names = {flag: name for flag, name in ALIASES.items() if f"{name} " in known}
    return ["".join((names.get(flag, flag), equals, value)) for flag, equals, value in pairs]


@contextmanager
def exits() -> Iterator[None]:
    """Turns what a user can cause into one message and an exit status, around the body of a command."""
    try:
        yield
    except Stopped as stopped:
        print(f"{stopped}; run the same command again to go on", file=sys.stderr)
        sys.exit(128 + stopped.signum)
    except KeyboardInterrupt:
        print("stopped before the next save; run the same command again to go on from the last one", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, CheckpointError, fetch.Unavailable, Diverged) as error:
        sys.exit(f"error: {error}")
