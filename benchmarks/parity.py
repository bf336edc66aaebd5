"""The same weights in Keras and in jaxft: the largest deviation of any stage, for every net of the zoo.

    python -m benchmarks.parity [NET …] [--out docs/parity.md]

Keras builds each net with random weights and random BatchNorm statistics and saves them; jaxft ports the file; both
compute the same images. Nets that Keras lacks come from tests/reference. A deviation is max|Δ| / max|reference|, in
float32 at the highest matmul precision: at the native size with the classifier, and at an odd size without.
"""

import dataclasses
import pathlib
import tempfile

import tyro

from benchmarks.machine import write_table
from jaxft import nets, port_weights
from jaxft.progress import bar
from tests.reference import keras_nets


def measure(name: str, size: tuple[int, int], classifier: bool) -> dict[str, float]:
    """Stage → deviation, through a `.weights.h5` file."""
    model = keras_nets.reference(name, size, classifier)
    images = keras_nets.images_of(size)
    num_classes = nets.spec(name).num_classes if classifier else None
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "net.weights.h5"
        model.save_weights(path)
        variables, _ = port_weights.load(name, path, num_classes=num_classes)
    net = nets.create(name, num_classes)
    return keras_nets.deviations(
        keras_nets.our_stages(net, variables, images), keras_nets.keras_stages(name, model, net, images)
    )


@dataclasses.dataclass(frozen=True)
class Settings:
    """Measure how far jaxft deviates from Keras on the same weights."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Nets of the zoo; all by default."""
    out: pathlib.Path = pathlib.Path("docs/parity.md")
    """The table, as Markdown."""


def main(settings: Settings) -> None:
    rows = []
    names = settings.names or tuple(nets.ZOO)
    with bar("parity", len(names), unit="nets") as advance:
        for name in names:
            row = nets.spec(name)
            native = measure(name, row.native_size, classifier=True)
            odd = measure(name, keras_nets.odd_size(name), classifier=False)
            worst, at = max((deviation, stage) for stage, deviation in native.items())
            logits = native[list(native)[-1]]
            source = "keras.applications" if name in keras_nets.APPLICATIONS else "tests/reference"
            rows.append(
                f"| {name} | {source} | {len(native)} | {worst:.1e} ({at}) | {logits:.1e} "
                f"| {max(odd.values()):.1e} ({'×'.join(map(str, keras_nets.odd_size(name)))}) |"
            )
            print(rows[-1], flush=True)
            advance(1, name)
    head = [
        "# Parity with Keras",
        "",
        "`python -m benchmarks.parity` writes this table: the largest max|Δ| / max|reference| over all stages,",
        "float32, random weights and BatchNorm statistics, ported from the file that Keras saved.",
    ]
    columns = [
        "| net | reference | stages | native size: worst stage | logits | odd size, no classifier: worst stage |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    write_table(settings.out, head, [*columns, *rows], keras=keras_nets.keras.__version__)


if __name__ == "__main__":
    main(tyro.cli(Settings))
