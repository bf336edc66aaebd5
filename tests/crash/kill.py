"""Runs that are killed at random again and again, against the same runs left alone: `python tests/crash/kill.py`."""

import argparse
import collections
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import program
from served import free_port

SAVING = "saving"


def alone(name: str, base: pathlib.Path) -> tuple[dict[str, Any], float]:
    """What a run leaves that nobody kills, and the seconds of a second one, whose programs are compiled already."""
    for turn in ("first", "second"):
        folder, log = base / f"{name}-{turn}", base / f"{name}.log"
        began = time.monotonic()
        wait(program.start(program.KINDS[name], folder, base / f"{name}-{turn}-cache", log, free_port()), log)
        seconds = time.monotonic() - began
    found = [program.left(base / f"{name}-{turn}") for turn in ("first", "second")]
    if found[0] != found[1]:
        raise AssertionError(f"{name}: two runs that nobody killed differ")
    return found[1], seconds


def wait(numbers: list[int], log: pathlib.Path) -> None:
    """Waits for processes that are to end well."""
    for number in numbers:
        status = os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
        if status != 0:
            raise AssertionError(f"a run ended with status {status}:\n{log.read_text(encoding='utf-8')[-4000:]}")


def chain(name: str, base: pathlib.Path, seconds: float, chance: random.Random, most: int) -> tuple[dict, list[str]]:
    """A run that is killed at random, at most so many times, and started again until it ends.

    Returns:
        (what it leaves, the stage at each kill, with a + where a save was under way).
    """
    kind, folder, log, kills = program.KINDS[name], base / name, base / "log", []
    while True:
        numbers = program.start(kind, folder, base / "cache", log, free_port())
        if len(kills) < most:
            pause(numbers[0], seconds, chance)
        else:
            os.waitid(os.P_PID, numbers[0], os.WEXITED | os.WNOWAIT)
        if ended(numbers[0]):
            wait(numbers, log)
            return program.left(folder), kills
        chance.shuffle(numbers)
        for turn, number in enumerate(numbers):  # of several, the others as a scheduler does: soon, or a while after
            if turn:
                time.sleep(chance.choice((0, 0.01, 0.3)))
            os.kill(number, signal.SIGKILL)
        kills.append(program.STAGES[program.BOARD[0]] + ("+" if program.BOARD[1] else ""))
        for number in numbers:
            os.waitpid(number, 0)


def pause(number: int, seconds: float, chance: random.Random) -> None:
    """Waits for the moment of a kill: any moment of the run, or one in or soon after a stage or a save."""
    until, stage = time.monotonic() + seconds, chance.choice((None, SAVING, *range(len(program.STAGES))))
    if stage is None:
        until = time.monotonic() + chance.uniform(0, seconds)
    while time.monotonic() < until and not ended(number):
        if program.BOARD[1] if stage == SAVING else program.BOARD[0] == stage:
            until, stage = time.monotonic() + chance.choice((0.0, 0.01, 0.1, 0.5)) * chance.random(), None
        time.sleep(0.0005)


def ended(number: int) -> bool:
    """Whether a process has ended; its status is left for `wait`."""
    return os.waitid(os.P_PID, number, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def work(names: list[str], kills: int, seed: int, base: pathlib.Path, whole: dict[str, Any], out: Any) -> None:
    """Chains of each kind in turn until there were so many kills of each; a line of JSON for each chain."""
    chance, left = random.Random(seed), dict.fromkeys(names, kills)
    while any(count > 0 for count in left.values()):
        for name in names:
            if left[name] <= 0:
                continue
            folder = pathlib.Path(tempfile.mkdtemp(dir=base))
            expected, seconds = whole[name]
            try:
                found, stages = chain(name, folder, seconds, chance, min(left[name], 12))
                wrong = sorted(part for part in expected if found[part] != expected[part])
            except AssertionError as error:
                stages, wrong = ["?"], [str(error)]
            log = (folder / "log").read_text(encoding="utf-8", errors="replace")
            if "Traceback" in log:
                wrong.append(log[log.index("Traceback") :][:3000])
            left[name] -= len(stages)
            aside = log.count("It is set aside")
            out.write(json.dumps({"kind": name, "kills": stages, "wrong": wrong, "aside": aside}) + "\n")
            out.flush()
            if not wrong:
                shutil.rmtree(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="+", default=list(program.KINDS), choices=list(program.KINDS))
    parser.add_argument("--kills", type=int, default=1000, help="of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("kills.jsonl"))
    parser.add_argument("--without", choices=("seed",), help="to see that it is missed")
    given = parser.parse_args()
    base = pathlib.Path(tempfile.mkdtemp(prefix="kills-"))
    program.keep_programs(base / "compiled")
    program.watch()
    whole = {}
    for name in given.kinds:
        whole[name] = alone(name, base)
        print(f"{name}: {whole[name][1]:.1f} s when nobody kills it", flush=True)
    if given.without:
        program.forget_seed()
    each = -(-given.kills // (len(given.kinds) * given.jobs))
    workers = []
    for job in range(given.jobs):
        if number := os.fork():
            workers.append(number)
            continue
        with given.out.with_suffix(f".{job}").open("w", encoding="utf-8") as out:
            program.BOARD = program.mmap.mmap(-1, 16)  # of its own
            work(given.kinds, each, given.seed * given.jobs + job, base, whole, out)
        os._exit(0)
    statuses = [os.waitpid(number, 0)[1] for number in workers]
    parts = [given.out.with_suffix(f".{job}") for job in range(given.jobs)]
    lines = [line for part in parts for line in part.read_text(encoding="utf-8").splitlines()]
    given.out.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    for part in parts:
        part.unlink()
    return show([json.loads(line) for line in lines]) or int(any(statuses))


def show(chains: list[dict[str, Any]]) -> int:
    """Prints a table, and what went wrong; → the exit status."""
    stages = [*program.STAGES, "of these, while saving"]
    print("| run | chains | kills | " + " | ".join(stages) + " | set aside | mismatches |")
    print("| --- |" + " ---: |" * (len(stages) + 4))
    total: collections.Counter[str] = collections.Counter()
    for name in dict.fromkeys(chain["kind"] for chain in chains):
        own = [chain for chain in chains if chain["kind"] == name]
        kills = [stage for chain in own for stage in chain["kills"]]
        counts = collections.Counter(stage.rstrip("+") for stage in kills)
        counts |= {"chains": len(own), "kills": len(kills), "wrong": sum(bool(chain["wrong"]) for chain in own)}
        counts |= {
            stages[-1]: sum(stage.endswith("+") for stage in kills),
            "aside": sum(chain["aside"] for chain in own),
        }
        total += counts
        print(row(program.KINDS[name].what, counts, stages))
    print(row("all", total, stages))
    for chain in chains:
        for text in chain["wrong"]:
            print(f"\n{chain['kind']} after {chain['kills']}: {text}")
    return int(total["wrong"] > 0 or not total["kills"])


def row(what: str, counts: collections.Counter[str], stages: list[str]) -> str:
    cells = [what, *(str(counts[column]) for column in ("chains", "kills", *stages, "aside", "wrong"))]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
