"""What was measured on, and the tables that say so."""

import os
import pathlib
import platform
import re
from collections.abc import Sequence

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


def write_table(out: pathlib.Path, head: Sequence[str], rows: Sequence[str], **versions: str) -> None:
    """The lines of `head`, hardware and versions (`versions` of further libraries, too), a blank line and `rows`."""
    from jaxft import devices  # here, as a side of `benchmarks.start` must not pay for it

    found = devices.versions()
    machine = hardware("cpu" if "(cpu)" in found["device"] else found["device"])
    measured = f"Measured on {machine}: " + ", ".join(f"{name} {v}" for name, v in (found | versions).items()) + "."
    out.parent.mkdir(exist_ok=True)
    text = "\n".join([*head, "", measured, "", *rows]) + "\n"
    write_text(out, text)
