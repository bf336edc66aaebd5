"""A command around functions: arguments come from the command line, and what a user can cause ends in one line."""

import argparse
import errno
import functools
import inspect
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import tyro

import jaxft
from jaxft import devices, fetch, settings
from jaxft.checkpoint import CheckpointError
from jaxft.train import Diverged, Stopped, heeded

ALIASES = {"--workdir": "--folder", "--run": "--folder", "--learning-rate": "--lr"}  # words that people try

REMEDIES = {
    errno.ENOSPC: "; make room (bytes and, by `df -i`, inodes), and run the same command again to go on",
    errno.EDQUOT: "; your quota is used up: make room, and run the same command again to go on",
    errno.EROFS: "; the disk takes no writes: mend that, and run the same command again to go on",
}
PROCESSES = """\
One run over several processes: start each with --coordinator HOST:PORT --processes N --process INDEX; under Slurm, Open
MPI or Kubernetes they find each other."""
MORE = f"""\
Fine-tune pretrained convolutional networks on your own images.

jaxft VERB --help shows the settings of each. For every verb: --config FILE takes settings from a YAML file, of which
those on the command line are stronger; --debug shows where an error comes from; --version. jaxft finetune --from RUN
repeats a run, and says whether it ended the same. Exit statuses: 0 done; 1 an error; 2 a bad command line; 128 + N
stopped by signal N. Shell completion: jaxft --tyro-print-completion bash (or zsh).

{PROCESSES}"""


def run(main: Callable[..., Any] | Mapping[str, Callable[..., Any]]) -> None:
    """Calls `main` with the arguments of the command line, which tyro reads off its signature and docstring.

    Args:
        main: a function, or verb → function.

    Exit statuses: 0 done; 1 an error, in one message on standard error; 2 a bad command line; 128 + N stopped by
    signal N, with the state saved where there was one.
    """
    several = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    several.add_argument("--coordinator")
    several.add_argument("--processes", type=int)
    several.add_argument("--process", type=int)
    several.add_argument("--debug", action="store_true")
    several.add_argument("--config", type=pathlib.Path)
    several.add_argument("--from", type=pathlib.Path, dest="repeated")
    several.add_argument("--version", action="version", version=f"jaxft {jaxft.__version__}")
    found, rest = several.parse_known_args()
    with exits(found.debug):
        verbs = main if isinstance(main, Mapping) else {}
        one = main if not isinstance(main, Mapping) else verbs.get(next(iter(rest), ""))
        if one is not None:
            rest = _renamed(one, rest)
            if found.repeated is not None:
                if found.config is not None:
                    raise ValueError("--from takes all settings from a run, and --config from a file: give one of them")
                if "repeats" not in inspect.signature(one).parameters:
                    raise ValueError("--from RUN is of `jaxft finetune`; other verbs take the run itself")
                one = repeating(one, found.repeated.expanduser())
            elif found.config is not None:
                one = configured(one, found.config.expanduser())
        try:
            devices.initialise(found.coordinator, found.processes, found.process)
        except RuntimeError as error:
            raise OSError(f"the processes of this run do not find each other: {error}") from error
        if one is None or verbs:
            verbs = verbs if one is None else {**verbs, rest[0]: one}
            tyro.extras.subcommand_cli_from_dict(dict(verbs), prog="jaxft", description=MORE, args=rest)
        else:
            documented = one.func if isinstance(one, functools.partial) else one
            summary = (documented.__doc__ or "").partition("\n")[0]
            tyro.cli(one, args=rest, description=f"{summary}\n\n{PROCESSES}")


def repeating(main: Callable[..., Any], run: pathlib.Path) -> Callable[..., Any]:
    """`main` with the settings of a run as its defaults, but for its folder: RUN-again.

    Raises:
        FileNotFoundError: it holds no settings.
    """
    if not (run / "settings.yaml").is_file():
        raise FileNotFoundError(f"{run} holds no settings.yaml; give the folder of a run that `jaxft finetune` made")
    again = {"folder": f"{run.with_name(run.name + '-again')}", "repeats": str(run)}
    return configured(main, run / "settings.yaml", again)


def configured(
    main: Callable[..., Any], file: pathlib.Path, changes: Mapping[str, str] | None = None
) -> Callable[..., Any]:
    """`main` with the settings of a YAML file as its defaults: flag without dashes → value, as `settings.write` does.

    Args:
        main: the function.
        file: with the settings.
        changes: settings in place of those, or beside them.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not such a file, or a setting is not one of `main`.
    """
    found = settings.read(file) | dict(changes or {})
    positional = [name for name in ("data",) if name in inspect.signature(main).parameters]
    given = {name for name in positional if name in found}
    words = [str(found.pop(name, "none")) for name in positional]
    words += [word for name, value in found.items() for word in _words(name, value)]

    @functools.wraps(main)
    def record(**values: Any) -> dict[str, Any]:
        return values

    try:
        values = tyro.cli(record, args=words, prog=str(file))
    except SystemExit as error:
        if error.code == 0:  # the file asks for help
            raise
        raise ValueError(f"{file} holds a setting that cannot be; see above") from None
    return functools.partial(
        main, **{name: value for name, value in values.items() if name not in set(positional) - given}
    )


def _words(name: str, value: Any) -> list[str]:
    """The words of the command line that give a setting its value."""
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    if isinstance(value, dict):
        raise ValueError(f"the setting {name} holds {value}; give one value, or a list of them")
    return [f"--{name}", str(value)]


def _renamed(main: Callable[..., Any], words: list[str]) -> list[str]:
    """The command line with the flags of `main` in place of the words that people try for them."""
    pairs = [word.partition("=") for word in words]
    if not set(ALIASES) & {flag for flag, _, _ in pairs}:
        return words
    known = tyro.extras.get_parser(main).format_help()
    names = {flag: name for flag, name in ALIASES.items() if f"{name} " in known}
    return ["".join((names.get(flag, flag), equals, value)) for flag, equals, value in pairs]


@contextmanager
def exits(debug: bool = False) -> Iterator[None]:
    """Turns what a user can cause into one message and an exit status, around the body of a command.

    Args:
        debug: let errors pass, so that Python shows where they come from.
    """
    usual = {}
    if threading.current_thread() is threading.main_thread():
        usual = {number: signal.signal(number, _stop) for number in heeded() if number != signal.SIGINT}
        if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # as `experiments` has it while it is imported
            signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except Stopped as stopped:
        print(f"{stopped}; run the same command again to go on", file=sys.stderr)
        sys.exit(128 + stopped.signum)
    except MemoryError as error:
        if debug:
            raise
        sys.exit(
            f"error: the memory of this machine is used up ({error or 'it does not say by what'}); try a smaller "
            "batch or smaller images, and run the same command again to go on"
        )
    except BrokenPipeError:  # who read the output, `head` say, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + 13)  # SIGPIPE
    except KeyboardInterrupt:
        print("stopped before the next save; run the same command again to go on from the last one", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, CheckpointError, fetch.Unavailable, Diverged) as error:
        if debug:
            raise
        remedy = REMEDIES.get(getattr(error, "errno", None) or 0, "")
        sys.exit(f"error: {error}{remedy}")
    except jax.errors.JaxRuntimeError as error:
        if debug or jax.process_count() == 1:
            raise
        reason = str(error).partition("\n")[0]
        sys.exit(
            f"error: the processes of this run have lost each other, as one of them has ended ({reason}); what it says "
            "is the cause. Start all of them again with the same command to go on from the last checkpoint"
        )
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def _stop(number: int, _frame: Any) -> None:
    """Outside of training, where there is nothing to save; `train.stop_signal` takes its place there."""
    raise Stopped(f"stopped by {signal.Signals(number).name}", number)
