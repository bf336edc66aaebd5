# ruff: noqa: E402
"""Every operation on a file of one save, one cache fill and one record fails in turn: `python tests/crash/faults.py`.

As SQLite tests itself: the n-th open, write, sync, rename or removal is where the process is killed, where the machine
loses its power (what was not synced is gone), where the disk gives an error, or from where on it is full; for each n.
`faults.c`, preloaded, does it.
"""

import argparse
import collections
import ctypes
import errno
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import jax.numpy as jnp
import numpy as np
import program
import tiny

from jaxft import files, optim, train_state
from jaxft.checkpoint import Checkpoints
from jaxft.data import rows
from jaxft.phase import Phase

HERE = pathlib.Path(__file__).parent
FAILURES = {"kill": 0, "power cut": 0, "error": errno.EIO, "full disk": -errno.ENOSPC}


def state(step: int) -> train_state.TrainState:
    """A state of its own for each step."""
    net = tiny.Tiny()
    made = train_state.create(
        net, tiny.variables(net, seed=step), Phase(1, optim.Constant(0.1), average=0.9), seed=step
    )
    return made.replace(step=jnp.asarray(step, jnp.int32))


def leaves(found: train_state.TrainState) -> dict[str, np.ndarray]:
    return tiny.leaves((found.params, found.batch_stats, found.opt_state, found.average, found.step))


class Save:
    """The third checkpoint of a run; the first is its best."""

    def prepare(self, folder: pathlib.Path) -> None:
        with closing(Checkpoints(folder, {})) as checkpoints:
            for step in (1, 2):
                checkpoints.save(state(step), {"step": step}, best=step == 1)

    def act(self, folder: pathlib.Path) -> Callable[[], None]:
        checkpoints, third = Checkpoints(folder, {}), state(3)

        def body() -> None:
            with closing(checkpoints):
                checkpoints.save(third, {"step": 3})

        return body

    def check(self, folder: pathlib.Path, finished: bool) -> None:
        """The last one or the one before is there to the bit, with the best; the run goes on."""
        with closing(Checkpoints(folder, {})) as checkpoints:
            latest = checkpoints.latest()
            assert latest == 3 if finished else latest in (2, 3), f"the latest is {latest}"
            tiny.assert_same(leaves(checkpoints.restore(state(0))), leaves(state(latest)))
            assert checkpoints.run()["progress"] == {"step": latest}
            assert checkpoints.best() == 1, "the best is lost"
            tiny.assert_same(tiny.leaves(checkpoints.variables(1, average=False)), tiny.leaves(state(1).variables()))
            checkpoints.save(state(4), {"step": 4})
        again = Checkpoints(folder)
        assert again.latest() == 4
        tiny.assert_same(leaves(again.restore(state(0))), leaves(state(4)))
        again.close()


class Fill:
    """A cache of 40 rows in blocks of 8, of which two blocks were there."""

    WHOLE = np.arange(40 * 32, dtype=np.float32).reshape(40, 32)
    computed = 0

    def cache(self, folder: pathlib.Path) -> rows.Rows:
        os.environ["JAXFT_CACHE"] = str(folder)
        rows.BLOCK_BYTES, rows.SPARE_BYTES = 8 * 32 * 4, 0
        return rows.Rows("features", "whole", {"id": 1}, np.arange(40), (32,), np.float32)

    def fill(self, cache: rows.Rows, most: int = 40) -> None:
        def compute(indices: np.ndarray) -> Any:
            for first in range(0, len(indices), 4):
                if indices[first] >= most:
                    raise KeyboardInterrupt
                self.computed += 4
                yield self.WHOLE[indices[first : first + 4]]

        cache.fill(compute)

    def prepare(self, folder: pathlib.Path) -> None:
        try:
            self.fill(self.cache(folder), 20)
        except KeyboardInterrupt:
            pass

    def act(self, folder: pathlib.Path) -> Callable[[], None]:
        cache = self.cache(folder)
        return lambda: self.fill(cache)

    def check(self, folder: pathlib.Path, finished: bool) -> None:
        cache, before = self.cache(folder), self.computed
        self.fill(cache)
        np.testing.assert_array_equal(cache.take(np.arange(40)), self.WHOLE)
        again = self.computed - before
        assert again <= (0 if finished else 24), f"{again} rows are computed again"


class Record:
    """Two JSON files that are written over others."""

    def write(self, folder: pathlib.Path, number: int) -> None:
        folder.mkdir(exist_ok=True)
        for name in ("config.json", "summary.json"):
            files.write_json(folder / name, {"number": number, "text": "x" * 5000})

    def prepare(self, folder: pathlib.Path) -> None:
        self.write(folder, 1)

    def act(self, folder: pathlib.Path) -> Callable[[], None]:
        return lambda: self.write(folder, 2)

    def check(self, folder: pathlib.Path, finished: bool) -> None:
        found = [files.read_json(folder / name)["number"] for name in ("config.json", "summary.json")]
        assert found in ([[2, 2]] if finished else [[1, 1], [2, 1], [2, 2]]), found
        self.write(folder, 3)
        assert files.read_json(folder / "summary.json")["number"] == 3


TARGETS = {"save": Save(), "fill": Fill(), "record": Record()}


def arm(folder: pathlib.Path, at: int, failure: int, log: int) -> None:
    ctypes.CDLL(None).arm(os.fsencode(f"{folder.absolute()}/"), ctypes.c_long(at), failure, log)


def attempt(target: Any, folder: pathlib.Path, at: int, failure: int) -> tuple[int, list[list[str]], str]:
    """Does what a target does, with a fault; → (exit status, its operations, what it printed)."""
    operations, log = folder.with_suffix(".operations"), folder.with_suffix(".log")
    for file in (operations, log):
        file.unlink(missing_ok=True)

    def body() -> None:
        act = target.act(folder)
        arm(folder, at, failure, os.open(operations, os.O_WRONLY | os.O_CREAT | os.O_APPEND))
        act()

    number = program.forked(body, log)
    status = os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
    lines = operations.read_text("utf-8").splitlines() if operations.exists() else []
    return status, [line.split("\t") for line in lines], log.read_text(encoding="utf-8", errors="replace")


def cut_power(before: dict[str, int], operations: list[list[str]]) -> None:
    """Cuts each file that was written after its last sync down to what it held then, as a file system may leave it.

    Args:
        before: file → bytes, all of them synced.
        operations: since then.
    """
    synced, unsynced = dict(before), set()
    for _, what, path, to, *fails in operations:
        if fails:
            break
        if "write" in what or "truncate" in what:
            unsynced.add(path)
        elif "sync" in what:
            synced[path] = int(to)
            unsynced.discard(path)
        elif what == "rename":
            for name in [name for name in {*synced, *unsynced} if name == path or name.startswith(f"{path}/")]:
                new = to + name[len(path) :]
                synced[new] = synced.pop(name, 0)
                unsynced.discard(new)
                if name in unsynced:
                    unsynced.remove(name)
                    unsynced.add(new)
        elif what in ("unlink", "unlinkat"):
            unsynced.discard(path)
            synced.pop(path, None)
    for name in filter(os.path.isfile, unsynced):
        os.truncate(name, min(synced.get(name, 0), os.path.getsize(name)))


def checked(target: Any, folders: list[tuple[pathlib.Path, bool]]) -> list[str]:
    """What is wrong with each folder, "" for nothing; in a process of its own."""

    def wrong() -> Iterator[str]:
        for folder, finished in folders:
            try:
                target.check(folder, finished)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is the finding
                yield f"{type(error).__name__}: {error}"[:800]
            else:
                yield ""

    return program.answers(wrong, folders[0][0].parent / "check.log")


def systematic(name: str, kind: str, base: pathlib.Path, stride: int, first: int) -> dict[str, Any]:
    """Has each operation of a target fail, from `first` in steps of `stride`; → counts, and what went wrong."""
    target = TARGETS[name]
    whole = base / f"{name}-whole"
    whole.mkdir()
    os.waitpid(program.forked(lambda: target.prepare(whole), base / "prepare.log"), 0)
    trial = base / f"{name}-trial"
    shutil.copytree(whole, trial)
    status, operations, said = attempt(target, trial, 0, 0)
    assert status == 0 and operations, (status, said)
    wrong, done, statuses = [], [], collections.Counter()
    places = list(range(first, len(operations) + 1, stride))
    for at in [*places, 0] if kind == "power cut" else places:  # at 0, after the last
        folder = base / f"{name}-{kind.replace(' ', '-')}-{at}"
        shutil.copytree(whole, folder)
        before = {str(path): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
        status, found, said = attempt(target, folder, at, FAILURES[kind])
        hit = next((line for line in found if line[-1] == "FAILS"), None)
        if kind == "power cut":
            cut_power(before, found)
        statuses[status] += 1
        told = said.strip().splitlines()
        if "Traceback" in said or (status not in (0, -9) and (len(told) != 1 or not told[0].startswith("error: "))):
            wrong.append(f"{kind} at {at} {hit}: status {status}, said: {said[:1500]}")
        done.append((folder, status == 0, f"{kind} at {at} {hit}"))
    for (_, _, what), problem in zip(done, checked(target, [entry[:2] for entry in done]), strict=True):
        if problem:
            wrong.append(f"{what}: {problem}")
    for folder, _, _ in done:
        shutil.rmtree(folder)
    shutil.rmtree(whole)
    shutil.rmtree(trial)
    return {"operations": len(operations), "tried": len(done), "statuses": dict(statuses), "wrong": wrong}


def mutate(what: str) -> None:
    """Takes a safeguard out of the code, so that a test can see that it would be missed."""
    if what == "sync":
        os.fsync = lambda _: None
    elif what == "rename":

        def in_place(path: pathlib.Path, write: Callable[[pathlib.Path], Any]) -> None:
            write(part := path.with_name("part"))
            path.write_bytes(part.read_bytes())
            part.unlink()

        files.write_whole = in_place


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--failures", nargs="+", default=list(FAILURES), choices=list(FAILURES))
    parser.add_argument("--stride", type=int, default=1, help="every so many operations")
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--without", choices=("sync", "rename"), help="to see that it is missed")
    given = parser.parse_args()
    mutate(given.without)
    base = pathlib.Path(tempfile.mkdtemp(prefix="faults-")).resolve()
    if not hasattr(ctypes.CDLL(None), "arm"):
        library = base / "faults.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, HERE / "faults.c", "-ldl", "-lpthread"], check=True)
        environment = os.environ | {"LD_PRELOAD": str(library)}
        return subprocess.run([sys.executable, __file__, *sys.argv[1:]], env=environment, check=False).returncode
    program.keep_programs(base / "compiled")
    print("| what | failure | operations | tried | finished | said why | killed | wrong |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    failed = []
    for name in given.targets:
        for kind in given.failures:
            found = systematic(name, kind, base, given.stride, given.first)
            statuses = found["statuses"]
            ends = [
                statuses.get(0, 0),
                sum(count for status, count in statuses.items() if status > 0),
                statuses.get(-9, 0),
            ]
            cells = [name, kind, found["operations"], found["tried"], *ends, len(found["wrong"])]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
            failed += found["wrong"]
    print(*failed, sep="\n\n")
    shutil.rmtree(base)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
