"""How fast a train step is, beside PyTorch and Keras, in one run.

    python -m benchmarks.train --net vgg16 --freeze first:10 --peers torch keras-tensorflow

Every side is a process that builds the same net from the same weights, freezes the same layers and takes the same
batch; their first losses must agree. Then they run in turn, round after round, while the others wait. The rows go to
docs/speed.csv, with hardware and versions, and docs/speed.png is drawn from it. Peers: `pip install -e '.[peers]'`.
"""

import csv
import dataclasses
import datetime
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks import parity, peers
from jaxft import masking, nets
from jaxft.progress import bar

TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}  # of the first losses, relative


@dataclasses.dataclass(frozen=True)
class Settings:
    """Time train steps of jaxft and its peers, interleaved."""

    net: str = "vgg16"
    """A net of the zoo."""
    freeze: str = "none"
    """As in the experiments."""
    peers: tuple[str, ...] = ("torch", "keras-jax", "keras-tensorflow")
    """Of torch, torch-compile, keras-jax and keras-tensorflow."""
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
    table: pathlib.Path = pathlib.Path("docs/speed.csv")
    """Where the rows are appended; the plot lies beside it."""


class Side:
    """A process of `benchmarks.peers`; facts are what it told of itself."""

    def __init__(self, name: str, job: peers.Job):
        command = [sys.executable, "-m", "benchmarks.peers", name]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.facts = self.ask(json.dumps(dataclasses.asdict(job)))
        self.seconds: list[float] = []
        self.peak_bytes = 0

    def ask(self, line: str) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{' '.join(map(str, self.process.args))} ended with status {self.process.wait()}")  # type: ignore[arg-type]
        return json.loads(answer)

    def run(self, steps: int) -> None:
        answer = self.ask(str(steps))
        self.seconds.append(answer["seconds"] / steps)
        self.peak_bytes = answer["peak_bytes"]

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def hardware(kind: str) -> str:
    """The GPU, or the processor with the number of its cores that this process may use."""
    if kind != "cpu":
        return kind
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


def measure(settings: Settings) -> list[dict[str, Any]]:
    """One row a side.

    Raises:
        SystemExit: a side failed, or the sides do not compute the same losses.
    """
    row = nets.spec(settings.net)
    size = (settings.image_size,) * 2 if settings.image_size else row.native_size
    net = nets.create(settings.net, row.num_classes)
    weighted = nets.init(net, size, 0)["params"]
    frozen = masking.frozen_layers(net, settings.freeze, weighted)
    del weighted
    sides: dict[str, Side] = {}
    with tempfile.TemporaryDirectory() as folder, bar("sides", settings.rounds, unit="rounds") as advance:
        file = pathlib.Path(folder) / "net.weights.h5"
        parity.reference(settings.net, size, classifier=True).save_weights(file)
        job = peers.Job(settings.net, str(file), tuple(sorted(frozen)), size, settings.batch_size, settings.dtype)
        for name in ("jaxft", *settings.peers):
            advance(0, f"building {name}")
            sides[name] = Side(name, job)
        ours = np.array(sides["jaxft"].facts["losses"])
        for name, side in sides.items():
            if not np.allclose(side.facts["losses"], ours, rtol=TOLERANCE[settings.dtype], atol=0):
                raise SystemExit(f"{name} computes other losses, {side.facts['losses']}, than jaxft, {ours.tolist()}")
        for number in range(settings.rounds):
            order = list(sides)[number % len(sides) :] + list(sides)[: number % len(sides)]
            for name in order:
                sides[name].run(settings.steps)
            advance(1)
    for side in sides.values():
        side.close()
    facts = sides["jaxft"].facts
    rows = []
    for name, side in sides.items():
        median = statistics.median(side.seconds)
        rows.append(
            {
                "date": datetime.date.today().isoformat(),
                "hardware": hardware(side.facts["device"]),
                "net": settings.net,
                "freeze": settings.freeze,
                "batch": settings.batch_size,
                "size": "×".join(map(str, size)),
                "dtype": settings.dtype,
                "side": name,
                "images_per_second": round(settings.batch_size / median, 2),
                "seconds_per_step": f"{median:.4g}",
                "fastest": f"{min(side.seconds):.4g}",
                "slowest": f"{max(side.seconds):.4g}",
                "rounds": settings.rounds,
                "steps": settings.steps,
                "peak_mb": round(side.peak_bytes / 1e6),
                "compile_s": round(side.facts["compile_s"], 1),
                "step_gflop": round(facts["step_flops"] / 1e9, 1),
                "peak_gflops": round(facts["peak_flops"] / 1e9),
                "share_of_peak": round(facts["step_flops"] / median / facts["peak_flops"], 3),
                "versions": side.facts["versions"],
            }
        )
    return rows


def draw(table: pathlib.Path) -> None:
    """One panel a machine; for each net and freeze specification, the newest images a second of every side."""
    newest: dict[str, dict[str, dict[str, float]]] = {}
    with table.open(newline="") as file:
        for row in csv.DictReader(file):
            case = f"{row['net']} {row['dtype']}\n{row['freeze']}, batch {row['batch']}"
            newest.setdefault(row["hardware"], {}).setdefault(case, {})[row["side"]] = float(row["images_per_second"])
    names = list(peers.SIDES)
    height = sum(0.6 + 0.24 * sum(map(len, cases.values())) for cases in newest.values())
    figure = Figure(figsize=(8, 1 + height), layout="constrained")
    panels = figure.subplots(len(newest), 1, squeeze=False)[:, 0]
    for axes, (machine, cases) in zip(panels, newest.items(), strict=True):
        y, ticks = 0.0, []
        for sides in cases.values():
            first = y
            for side in sorted(sides, key=names.index):
                axes.barh(y, sides[side], 0.9, color=f"C{names.index(side)}")
                axes.annotate(
                    f"{side}  {sides[side]:.4g}",
                    (sides[side], y),
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
        axes.set(title=machine, xlabel="images a second (more is better)")
        axes.margins(x=0.25)
    figure.savefig(table.with_suffix(".png"), dpi=110)


def main(settings: Settings) -> None:
    rows = measure(settings)
    settings.table.parent.mkdir(exist_ok=True)
    fresh = not settings.table.exists()
    with settings.table.open("a", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        if fresh:
            table.writeheader()
        table.writerows(rows)
    draw(settings.table)
    shown = Table(title=f"{settings.net}, {settings.freeze} frozen, {rows[0]['hardware']}")
    columns = (
        "side",
        "images_per_second",
        "seconds_per_step",
        "fastest",
        "slowest",
        "peak_mb",
        "compile_s",
        "share_of_peak",
    )
    for column in columns:
        shown.add_column(column.replace("_", " "), justify="left" if column == "side" else "right")
    for row in rows:
        shown.add_row(*(str(row[column]) for column in columns))
    Console().print(shown)


if __name__ == "__main__":
    main(tyro.cli(Settings))
