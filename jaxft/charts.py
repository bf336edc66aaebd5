"""Charts as SVG, in the colours of the page that shows them: light or dark, by CSS variables."""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

import numpy as np

WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 14, 38
STYLE = """\
text{font:12px system-ui,sans-serif;fill:var(--text,#24292f)}.faint{fill:var(--faint,#6b7280)}
.axis{stroke:var(--line,#d0d7de);stroke-width:1;fill:none}.grid{stroke:var(--line,#d0d7de);stroke-width:.5}
.mark{stroke:var(--faint,#6b7280);stroke-width:1;stroke-dasharray:3 3}
.c0{stroke:var(--c0,#0969da);fill:var(--c0,#0969da)}.c1{stroke:var(--c1,#bc4c00);fill:var(--c1,#bc4c00)}
.c2{stroke:var(--c2,#1a7f37);fill:var(--c2,#1a7f37)}.c3{stroke:var(--c3,#8250df);fill:var(--c3,#8250df)}
path.c0,path.c1,path.c2,path.c3{fill:none;stroke-width:2}
path.again{stroke-dasharray:6 4}circle.again{fill:none;stroke-width:2}.cell{fill:var(--cell,#0969da)}.pale{fill:#fff}"""
DARK = """\
@media (prefers-color-scheme:dark){svg{--text:#e6edf3;--faint:#8b949e;--line:#30363d;--c0:#58a6ff;--c1:#f0883e;
--c2:#3fb950;--c3:#bc8cff;--cell:#1f6feb;background:#0d1117}}"""

Points = tuple[Sequence[float], Sequence[float]]


def lines(
    title: str,
    series: Mapping[str, Points],
    x: str,
    marks: Mapping[float, str] | None = None,
    limits: tuple[float, float] | None = None,
) -> str:
    """Curves with points, one colour each, the fifth to eighth dashed, a legend above; NaN breaks a curve.

    Args:
        title: what a screen reader says.
        series: name → (xs, ys).
        x: label of the axis.
        marks: x → what a dashed line there means.
        limits: of y; by default those of the values.
    """
    xs = [value for points in series.values() for value in points[0]]
    ys = [value for points in series.values() for value in points[1] if math.isfinite(value)]
    low, high = limits or (min(ys, default=0.0), max(ys, default=1.0))
    if limits is None:  # room for the words of marks
        high += 0.1 * ((high - low) or abs(high) or 1.0)
    at_x, at_y = (
        _scale(min(xs, default=0), max(xs, default=1), LEFT, WIDTH - RIGHT),
        _scale(low, high, HEIGHT - BOTTOM, TOP),
    )
    parts = _frame(at_x, at_y, _ticks(low, high), _whole_ticks(min(xs, default=0), max(xs, default=1)), x)
    for row, (place, word) in enumerate((marks or {}).items()):
        parts.append(f'<path class="mark" d="M{at_x(place):.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        end, at = at_x(place) > WIDTH * 0.7, TOP + 10 + 14 * (row % 2)  # words of neighbours stand below each other
        parts.append(_text(at_x(place) + (-4 if end else 4), at, word, "end" if end else "start", "faint"))
    for number, (name, (px, py)) in enumerate(series.items()):
        colour, pen, path = _colour(number), "M", []
        for a, b in zip(px, py, strict=True):
            if math.isfinite(b):
                path.append(f"{pen}{at_x(a):.1f} {at_y(b):.1f}")
            pen = "L" if math.isfinite(b) else "M"
        parts.append(f'<path class="{colour}" d="{"".join(path)}"/>')
        pairs = [(a, b) for a, b in zip(px, py, strict=True) if math.isfinite(b)]
        parts += [_dot(at_x(a), at_y(b), colour, f"{name} {b:.4g}") for a, b in pairs]
    return _svg(title, parts, list(series))


def scatter(title: str, xs: Sequence[float], ys: Sequence[float], x: str) -> str:
    """Points about the diagonal."""
    both = [value for value in (*xs, *ys) if math.isfinite(value)]
    low, high = min(both, default=0.0), max(both, default=1.0)
    at_x, at_y = _scale(low, high, LEFT, WIDTH - RIGHT), _scale(low, high, HEIGHT - BOTTOM, TOP)
    parts = _frame(at_x, at_y, _ticks(low, high), _ticks(low, high), x)
    parts.append(f'<path class="mark" d="M{at_x(low):.1f} {at_y(low):.1f}L{at_x(high):.1f} {at_y(high):.1f}"/>')
    for a, b in zip(xs, ys, strict=True):
        if math.isfinite(a) and math.isfinite(b):
            parts.append(
                f'<circle class="c0" r="2.5" fill-opacity=".5" stroke="none" cx="{at_x(a):.1f}" cy="{at_y(b):.1f}"/>'
            )
    return _svg(title, parts, [])


def reliability(title: str, probability: np.ndarray, happened: np.ndarray, bins: int = 10) -> str:
    """How often what is predicted with a probability happens: bars against the diagonal, with counts below.

    Args:
        probability: float [n] of 0 to 1.
        happened: bool [n].
    """
    place = np.minimum((np.asarray(probability, float) * bins).astype(int), bins - 1)
    counts = np.bincount(place, minlength=bins)
    shares = np.bincount(place, happened, bins) / np.maximum(counts, 1)
    at_x, at_y = _scale(0, 1, LEFT, WIDTH - RIGHT), _scale(0, 1, HEIGHT - BOTTOM, TOP)
    ticks = [0, 0.25, 0.5, 0.75, 1.0]
    parts = _frame(at_x, at_y, ticks, ticks, "predicted probability")
    wide = at_x(1 / bins) - at_x(0) - 3
    for number, (count, share) in enumerate(zip(counts.tolist(), shares.tolist(), strict=True)):
        if count:
            top = at_y(share)
            parts.append(
                f'<rect class="c0" stroke="none" fill-opacity=".65" x="{at_x(number / bins) + 1.5:.1f}" y="{top:.1f}" '
                f'width="{wide:.1f}" height="{HEIGHT - BOTTOM - top:.1f}"><title>{count} predictions, {share:.0%} right'
                f"</title></rect>"
            )
    parts.append(f'<path class="mark" d="M{at_x(0):.1f} {at_y(0):.1f}L{at_x(1):.1f} {at_y(1):.1f}"/>')
    return _svg(title, parts, [])


def confusion(title: str, counts: np.ndarray, classes: Sequence[str]) -> str:
    """Labels down, predictions across, each row as shares of its label; numbers where there is room.

    Args:
        counts: int [C, C].
        classes: C names.
    """
    size = len(classes)
    named = size <= 24
    side = max(4, min(46, 640 // max(size, 1)))
    letters = max((len(_short(name)) for name in classes), default=0)
    left, top = (min(150, 8 + 7 * letters), min(150, 8 + 7 * letters)) if named else (24, 24)
    wide, high = left + side * size + 4, top + side * size + 4
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    parts = []
    for i, j in np.ndindex(size, size):
        x, y = left + j * side, top + i * side
        if counts[i, j] or size <= 40:
            opacity = 0.06 + 0.94 * shares[i, j] if counts[i, j] else 0.03
            box = f'x="{x}" y="{y}" width="{side - 1}" height="{side - 1}"'
            tip = escape(f"{classes[i]} → {classes[j]}: {counts[i, j]}")
            parts.append(f'<rect class="cell" {box} fill-opacity="{opacity:.2f}"><title>{tip}</title></rect>')
        if named and side >= 22 and counts[i, j]:
            kind = "pale" if shares[i, j] > 0.4 else ""
            parts.append(_text(x + side / 2 - 0.5, y + side / 2 + 4, counts[i, j], "middle", kind))
    if named:
        for i, name in enumerate(map(_short, classes)):
            parts.append(_text(left - 6, top + i * side + side / 2 + 4, name, "end"))
            x, y = left + i * side + side / 2 + 4, top - 6
            parts.append(f'<text transform="translate({x} {y}) rotate(-90)">{escape(name)}</text>')
    else:
        parts.append(_text(left, 14, "predictions →", kind="faint"))
        parts.append(f'<text class="faint" transform="translate(14 {top}) rotate(90)">labels →</text>')
    return _whole(title, f"0 0 {wide} {high}", wide, parts)


def alone(svg: str) -> str:
    """A chart as a file of its own, with its colours."""
    return svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(
        ">", f"><style>{STYLE}{DARK}</style>", 1
    )


def _text(x: float, y: float, words: object, anchor: str = "start", kind: str = "") -> str:
    """Words at a place; `kind` is a class of the style, and says a colour."""
    said = f' class="{kind}"' if kind else ""
    return f'<text{said} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(str(words))}</text>'


def _dot(x: float, y: float, colour: str, tip: str) -> str:
    return f'<circle class="{colour}" r="2.5" cx="{x:.1f}" cy="{y:.1f}"><title>{escape(tip)}</title></circle>'


def _whole(title: str, box: str, width: float, parts: Sequence[str]) -> str:
    named = f'role="img" aria-label="{escape(title)}"'
    return f'<svg {named} viewBox="{box}" style="max-width:{width:.0f}px">{"".join(parts)}</svg>'


def _short(name: str) -> str:
    return name if len(name) <= 20 else f"{name[:19]}…"


def _scale(low: float, high: float, first: float, last: float) -> Callable[[float], float]:
    """Where a value of `low` to `high` lies between `first` and `last`."""
    span = (high - low) or 1.0
    return lambda value: first + (value - low) / span * (last - first)


def _ticks(low: float, high: float) -> list[float]:
    span = (high - low) or 1.0
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 5)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _whole_ticks(low: float, high: float) -> list[float]:
    return sorted({float(round(tick)) for tick in _ticks(low, high) if low <= round(tick) <= high} | {low, high})


def _frame(
    at_x: Callable[[float], float],
    at_y: Callable[[float], float],
    y_ticks: Sequence[float],
    x_ticks: Sequence[float],
    x: str,
) -> list[str]:
    """Axes with ticks, and a line across the picture for each tick of y."""
    parts = []
    for tick in y_ticks:
        parts.append(f'<path class="grid" d="M{LEFT} {at_y(tick):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(_text(LEFT - 6, at_y(tick) + 4, f"{tick:.4g}", "end", "faint"))
    last = -math.inf
    for tick in x_ticks:
        if at_x(tick) - last >= 26:
            parts.append(_text(at_x(tick), HEIGHT - BOTTOM + 16, f"{tick:.4g}", "middle", "faint"))
            last = at_x(tick)
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    parts.append(_text((LEFT + WIDTH) / 2, HEIGHT - 4, x, "middle", "faint"))
    return parts


def _colour(number: int) -> str:
    return f"c{number % 4}" + (" again" if number // 4 % 2 else "")


def _svg(title: str, parts: Sequence[str], names: Sequence[str]) -> str:
    """A chart; the names of its colours stand in lines above it."""
    legend, x, y = [], LEFT, -4
    for number, name in enumerate(names):
        wide = 26 + 7 * len(name)
        if x + wide > WIDTH and x > LEFT:
            x, y = LEFT, y - 18
        legend.append(f'<circle class="{_colour(number)}" r="4" cx="{x + 4}" cy="{y - 4}"/>{_text(x + 14, y, name)}')
        x += wide
    top = y - 16 if names else 0
    return _whole(title, f"0 {top} {WIDTH} {HEIGHT - top}", WIDTH * 1.4, [*legend, *parts])
