"""What was measured on, and the tables that say so."""

import json
import os
import pathlib
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from jaxft.files import write_text


def peak_bytes() -> int:
    """The peak of this process's memory so far; not ru_maxrss, which it inherits from the one that started it."""
    status = pathlib.Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(re.findall(r"VmHWM:\s+(\d+)", status)[0])


def hardware(kind: str) -> str:
    """The GPU, or the processor with the number of its cores that this process may use."""
    if kind != "cpu":
        return kind
    lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


def run_apart(module: str, job: Mapping[str, Any]) -> dict[str, Any]:
    """The last line that `python -m MODULE JOB` prints, as JSON: the job in a process of its own.

    Raises:
        SystemExit: it failed; the end of what it said.
    """
    command = [sys.executable, "-m", module, json.dumps(job)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        raise SystemExit(f"{module} failed at {job}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def write_table(out: pathlib.Path, head: Sequence[str], rows: Sequence[str], **versions: str) -> None:
    """The lines of `head`, hardware and versions (`versions` of further libraries, too), a blank line and `rows`."""
    from jaxft import devices  # here, as a side of `benchmarks.start` must not pay for it

    found = devices.versions()
    machine = hardware("cpu" if "(cpu)" in found["device"] else found["device"])
    measured = f"Measured on {machine}: " + ", ".join(f"{name} {v}" for name, v in (found | versions).items()) + "."
    out.parent.mkdir(exist_ok=True)
    text = "\n".join([*head, "", measured, "", *rows]) + "\n"
    write_text(out, text)
