"""How fast a train step is, or a prediction, beside PyTorch and Keras, in one run.

    python -m benchmarks.train --net vgg16 --freeze first:10 --peers torch keras-tensorflow
    python -m benchmarks.train --net vgg16 resnet50 --freeze none all-but-head --dtype bfloat16 --batch-size 256 \\
        --steps 30 --peers torch torch-compile timm-compile    # on a GPU
    python -m benchmarks.train --predict --batch-size 1 --steps 10    # logits of one image: latency

Every side is a process that builds the same net from the same weights, freezes the same layers and takes the same
batch; their first losses must agree. Then they run in turn, round after round, while the others wait; a turn starts
with a step that is not timed, and all ask for large pages of memory, as the experiments do. The rows go to
docs/speed.csv, with hardware and versions, and docs/speed.png is drawn from it. Peers: `pip install -e '.[peers]'`.

timm's nets of the same names are another function of nearly the same cost, from random weights: their losses are not
compared, and their rows have no share of peak. The others multiply float32 on a GPU as TF32. `step_gflop` counts
convolutions and dense layers by formula, `lowered_gflop` all operations of jaxft's program as lowered with XLA's own
convolutions. `gb_moved` is what the operations of jaxft's program read and write, each loop's turns counted
(`tests.reference.hlo`); over the time and the bandwidth of 2a + b, it may pass 1, as a cache serves part of it. A side
that has no build for the GPU is left out there.
XLA_FLAGS are passed on; by default none is set, as XLA's own choice for one GPU has autotuning and CUDA graphs on.
"""

import contextlib
import csv
import dataclasses
import datetime
import importlib.util
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import peers
from benchmarks.machine import hardware
from jaxft import nets
from jaxft.files import write_csv
from jaxft.progress import bar
from tests.reference import cost, keras_nets

TOLERANCE = {"float32": 1e-3, "bfloat16": 1e-2}  # of the checked losses, as a fraction of the first one
TOLERANCE_TF32 = 1e-2  # of float32 on a GPU


@dataclasses.dataclass(frozen=True)
class Settings:
    """Time train steps of jaxft and its peers, interleaved."""

    net: tuple[str, ...] = ("vgg16",)
    """Nets of the zoo."""
    freeze: tuple[str, ...] = ("none",)
    """What is frozen, as in the experiments; every net is run with each."""
    peers: tuple[str, ...] = ("torch", "keras-jax", "keras-tensorflow")
    """Of torch, torch-compile, torch-max-autotune, timm, timm-compile, keras-jax and keras-tensorflow. timm's run where
    timm has the net and nothing but the classifier is trained, or everything is."""
    batch_size: int = 16
    """Images a step."""
    image_size: int | None = None
    """Height and width in pixels; by default the net's native size."""
    dtype: str = "float32"
    """Of the computation: float32 or bfloat16."""
    rounds: int = 5
    """Times that every side is run."""
    steps: int = 2
    """Steps a side runs in one round."""
    predict: bool = False
    """Time the logits of a batch, in inference, in place of a train step."""
    table: pathlib.Path = pathlib.Path("docs/speed.csv")
    """Where the rows are appended; the plot lies beside it."""


class Failed(Exception):
    """A side ended, or computes something else."""


class Side:
    """A process of `benchmarks.peers`; facts are what it told of itself."""

    def __init__(self, name: str, job: peers.Job):
        command = [sys.executable, "-m", "benchmarks.peers", name]
        self.name = name
        # As the experiments do, and for every side: Linux hands out memory in large pages to who asks for them.
        # What torch.compile kept of another run would hide its compile time.
        environment = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} | os.environ
        environment |= {"TORCHINDUCTOR_CACHE_DIR": str(pathlib.Path(job.weights).parent / "inductor")}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", env=environment
        )
        self.facts = self.ask(json.dumps(dataclasses.asdict(job)))
        self.seconds: list[float] = []
        self.peak_bytes = 0

    def ask(self, line: str) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        with contextlib.suppress(BrokenPipeError):  # of a side that was killed: it gives no answer
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise Failed(f"{self.name} ended with status {self.process.wait()}; its own message is above")
        return json.loads(answer)

    def run(self, steps: int) -> None:
        answer = self.ask(str(steps))
        self.seconds.append(answer["seconds"] / steps)
        self.peak_bytes = answer["peak_bytes"]

    def close(self) -> None:
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


def takes_part(peer: str, net: str, freeze: str) -> bool:
    """timm's layers have other names, so only all of them or all but the classifier can be frozen alike."""
    return not peer.startswith("timm") or (net in peers.TIMM and freeze in ("none", "all-but-head"))


def measure(settings: Settings, name: str, freeze: str) -> list[dict[str, Any]]:
    """One row a side, of the net called `name` with `freeze`.

    Raises:
        Failed: a side failed, or the sides do not compute the same losses.
    """
    row = nets.spec(name)
    size = (settings.image_size, settings.image_size) if settings.image_size else row.native_size
    net: Any = nets.create(name, row.num_classes, dtype=jnp.dtype(settings.dtype), **peers.without_dropout(name))
    net, state = cost.shapes(net, freeze, size)
    if settings.predict:
        step_flops = 2e9 * row.gmac * settings.batch_size * np.prod(size) / np.prod(row.native_size)
        lowered_flops = None
    else:
        step_flops = cost.formula(net, state, size, settings.batch_size)
        lowered_flops = cost.traced_step(net, state, size, settings.batch_size).lower().cost_analysis()["flops"]
    command = [sys.executable, "-m", "benchmarks.peaks", settings.dtype]
    peaks = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, encoding="utf-8").stdout)
    sides: dict[str, Side] = {}
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        advance = stack.enter_context(bar(f"{name} {freeze}", settings.rounds, unit="rounds"))
        file = pathlib.Path(folder) / "net.weights.h5"
        keras_nets.reference(name, size, classifier=True).save_weights(file)
        job = peers.Job(
            name, str(file), tuple(sorted(net.frozen)), size, settings.batch_size, settings.dtype, settings.predict
        )
        for side in ("jaxft", *(peer for peer in settings.peers if takes_part(peer, name, freeze))):
            advance(0, f"building {side}")
            sides[side] = Side(side, job)
            stack.callback(sides[side].close)
        ours = sides["jaxft"].facts
        on_gpu = ours["device"] != "cpu"
        tolerance = TOLERANCE_TF32 if on_gpu and settings.dtype == "float32" else TOLERANCE[settings.dtype]
        for side in list(sides.values()):
            if on_gpu and side.facts["device"] == "cpu":
                print(f"{side.name} is left out: what is installed has no build for {ours['device']}", file=sys.stderr)
                del sides[side.name]
                continue
            if side.facts["device"] != "cpu" and not on_gpu:
                raise Failed(f"{side.name} runs on {side.facts['device']}, jaxft on {ours['device']}")
            same = np.allclose(side.facts["losses"], ours["losses"], rtol=0, atol=tolerance * ours["losses"][0])
            if not same and not side.name.startswith("timm"):
                raise Failed(f"{side.name} computes other losses, {side.facts['losses']}, than jaxft, {ours['losses']}")
        for number in range(settings.rounds):
            order = list(sides)[number % len(sides) :] + list(sides)[: number % len(sides)]
            for side in order:
                sides[side].run(settings.steps)
            advance(1)
    rows = []
    for side in sides.values():
        median = statistics.median(side.seconds)
        moved = side.facts.get("moved_bytes")
        rows.append(
            {
                "date": datetime.date.today().isoformat(),
                "hardware": hardware(ours["device"]),
                "net": name,
                "freeze": "predict" if settings.predict else freeze,
                "batch": settings.batch_size,
                "size": "×".join(map(str, size)),
                "dtype": settings.dtype,
                "side": side.name,
                "images_per_second": round(settings.batch_size / median, 2),
                "seconds_per_step": f"{median:.3g}",
                "fastest": f"{min(side.seconds):.3g}",
                "slowest": f"{max(side.seconds):.3g}",
                "rounds": settings.rounds,
                "steps": settings.steps,
                "peak_mb": round(side.peak_bytes / 1e6),
                "compile_s": round(side.facts["compile_s"], 1),
                "step_gflop": round(step_flops / 1e9, 1),
                "lowered_gflop": round(lowered_flops / 1e9, 1) if lowered_flops and side.name == "jaxft" else "",
                "peak_gflops": round(peaks["flops"] / 1e9),
                "share_of_peak": "" if side.name.startswith("timm") else round(step_flops / median / peaks["flops"], 3),
                "versions": side.facts["versions"],
                "gb_moved": round(moved / 1e9, 2) if moved else "",
                "peak_gb_per_second": round(peaks["bandwidth"] / 1e9, 1),
                "share_of_bandwidth": round(moved / median / peaks["bandwidth"], 3) if moved else "",
            }
        )
    return rows


def append(table: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    """Writes the table with `rows` at its end; older rows are blank in columns that came later."""
    if table.exists():
        with table.open(newline="", encoding="utf-8") as file:
            rows = [*csv.DictReader(file), *rows]
    table.parent.mkdir(exist_ok=True)
    write_csv(table, rows)


def draw(table: pathlib.Path) -> None:
    """One panel a machine; for each net and freeze specification, the newest rate of every side, over jaxft's then."""
    newest: dict[str, dict[str, dict[str, tuple[float, float, str]]]] = {}
    with table.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            case = f"{row['net']} {row['size']} {row['dtype']}\n{row['freeze']}, batch {row['batch']}"
            sides = newest.setdefault(row["hardware"], {}).setdefault(case, {})
            rate = float(row["images_per_second"])
            ours = rate if row["side"] == "jaxft" else sides["jaxft"][0]  # whose row is the first of a run
            sides[row["side"]] = rate, rate / ours, row["date"]
    names = list(peers.SIDES)
    heights = [0.6 + sum(0.17 * len(sides) + 0.12 for sides in cases.values()) for cases in newest.values()]
    figure = Figure(figsize=(8, sum(heights)), layout="constrained")
    panels = figure.subplots(len(newest), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (machine, cases) in zip(panels, newest.items(), strict=True):
        y, ticks = 0.0, []
        for sides in cases.values():
            first = y
            for side in sorted(sides, key=names.index):
                rate, of_ours, date = sides[side]
                axes.barh(y, of_ours, 0.9, color=f"C{names.index(side)}")
                note = " (another function)" if side.startswith("timm") else ""
                note += f" (run of {date})" if date != sides["jaxft"][-1] else ""
                axes.annotate(
                    f"{side}  {rate:.4g}{note}",
                    (of_ours, y),
                    (3, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8,
                )
                y += 1
            ticks.append((first + y - 1) / 2)
            y += 0.6
        axes.set_yticks(ticks, list(cases), fontsize=8)
        axes.invert_yaxis()
        axes.set(
            title=machine, xlabel="images a second (the number), as a multiple of jaxft's (the bar; more is better)"
        )
        axes.margins(x=0.45, y=0.01)
    figure.savefig(table.with_suffix(".png"), dpi=110)


def show(rows: list[dict[str, Any]]) -> None:
    what = "prediction" if rows[0]["freeze"] == "predict" else f"{rows[0]['freeze']} frozen"
    title = f"{rows[0]['net']}, {what}, {rows[0]['dtype']}, {rows[0]['hardware']}"
    shown = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))  # 80 columns hold it whole
    headings = {
        "side": "side",
        "images / s": "images_per_second",
        "s/step": "seconds_per_step",
        "fastest": "fastest",
        "slowest": "slowest",
        "peak MB": "peak_mb",
        "compile s": "compile_s",
        "of peak": "share_of_peak",
        "of GB/s": "share_of_bandwidth",
    }
    for heading in headings:
        shown.add_column(heading, justify="left" if heading == "side" else "right", no_wrap=heading == "side")
    for row in rows:
        shown.add_row(*(str(row[column]) for column in headings.values()))
    Console().print(shown)


def main(settings: Settings) -> None:
    for peer in settings.peers:
        library = "timm" if peer.startswith("timm") else peers.SIDES[peer][0] if peer in peers.SIDES else None
        if library is None or peer == "jaxft":
            raise SystemExit(f"no peer is called {peer!r}; there are {', '.join(list(peers.SIDES)[1:])}")
        if not importlib.util.find_spec(library):
            raise SystemExit(f"{peer} needs {library}: pip install {library}, or leave it out of --peers")
    jax.config.update("jax_platforms", "cpu")  # of this process alone: the device is for the sides
    failed = []
    for name, freeze in itertools.product(settings.net, settings.freeze):
        try:
            rows = measure(settings, name, freeze)
        except (Failed, ValueError) as error:  # one net has no such stage, say, or does not fit; the others go on
            failed.append(f"{name} {freeze}")
            print(f"{failed[-1]}: {error}", file=sys.stderr)
            continue
        append(settings.table, rows)
        draw(settings.table)
        show(rows)
    if failed:
        raise SystemExit(f"not measured: {', '.join(failed)}")


if __name__ == "__main__":
    main(tyro.cli(Settings))
