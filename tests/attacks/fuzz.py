"""Feeds a reader mutated files: `python tests/attacks/fuzz.py READER --minutes 30`; wants `pip install atheris`.

Guided by coverage. A file that harms a reader is kept in --out, one for each place where it did; once mended, it
is copied to `seeds/READER/`, which CI tries.
"""

import argparse
import hashlib
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import traceback

sys.path[:0] = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parents[2])]

SECONDS, MEGABYTES = 20, 4096  # of one file
SEEDS = pathlib.Path(__file__).parent / "seeds"


def child(reader: str, corpus: pathlib.Path, out: pathlib.Path, seconds: int) -> None:
    """Fuzzes until the time is over or something kills the process."""
    import atheris

    with atheris.instrument_imports(include=["jaxft", "PIL", "yaml", "csv", "zipfile", "tarfile"]):
        import readers

    folder = pathlib.Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    seen: set[str] = set()

    def one(content: bytes) -> None:
        try:
            readers.attack(reader, content, folder)
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is a finding
            place = "".join(traceback.format_tb(error.__traceback__)[-1:]) + type(error).__name__
            name = hashlib.sha256(place.encode()).hexdigest()[:12]
            if name not in seen:
                seen.add(name)
                (out / f"{reader}-{name}").write_bytes(content)
                (out / f"{reader}-{name}.txt").write_text(traceback.format_exc(), encoding="utf-8")

    limits = [f"-max_total_time={seconds}", f"-timeout={SECONDS}", f"-rss_limit_mb={MEGABYTES}", "-max_len=65536"]
    atheris.Setup([sys.argv[0], *limits, f"-artifact_prefix={out}/{reader}-", "-print_final_stats=1", str(corpus)], one)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reader")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("findings"))
    parser.add_argument("--corpus", type=pathlib.Path)
    given = parser.parse_args()
    given.out.mkdir(exist_ok=True)
    if given.corpus is not None:
        child(given.reader, given.corpus, given.out.absolute(), round(given.minutes * 60))
        return
    corpus = pathlib.Path(tempfile.mkdtemp())
    for seed in (SEEDS / given.reader).iterdir():
        (corpus / seed.name).write_bytes(seed.read_bytes())
    until, tries = time.monotonic() + given.minutes * 60, 0
    while (left := until - time.monotonic()) > 5:  # a file that kills the process is one finding among others
        words = [given.reader, "--minutes", str(left / 60), "--out", given.out, "--corpus", corpus]
        done = subprocess.run([sys.executable, __file__, *words], stderr=subprocess.PIPE, check=False)
        lines = done.stderr.decode(errors="replace").splitlines()
        units = [line.split()[-1] for line in lines if "number_of_executed_units" in line]
        tries += int(units[-1]) if units else 0
        print(f"{given.reader}: status {done.returncode}, {tries:,} files so far", flush=True)
        if done.returncode:
            print("\n".join(lines[-30:]), flush=True)


if __name__ == "__main__":
    main()
