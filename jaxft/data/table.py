"""A table of images: csv, tsv or Parquet."""

import csv
import io
import math
import os
import pathlib
import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np

from jaxft.data.dataset import Dataset
from jaxft.data.source import SPLITS, Files, Source, in_order, numbered

EXPECTED = (
    "expected a column file and one of label (one class), labels (several, as cat|tabby) or value (a number; several "
    "as value_NAME), and if you like group, split (train, val, test) and weight"
)
UNKNOWN = "?"


def read(path: pathlib.Path, classes: Sequence[str] | None = None) -> Source:
    """The images that a table names.

    Columns, in any order and in capitals or not: `file`, a path relative to the table's folder or a whole one; one of
    `label`, the class; `labels`, several separated by | or ;, an empty cell for none of them; `value`, a number, or
    `value_NAME` for each of several. An empty cell of `label` or `value`, and "?" anywhere, is unknown. Optional are
    `group`, whose images never divide between training and judging; `split`; and `weight` in the loss, at least 0. A
    csv may begin with a byte-order mark, and have commas, semicolons or tabs, quotes, and any ends of lines.

    Args:
        path: of the table; the ending says its format.
        classes: as of `source.read`.

    Raises:
        ValueError: it is no such table, or a cell is none of the above; the message names the row.
        FileNotFoundError: it names files that are not there.
    """
    columns = _parquet(path) if path.suffix.lower() == ".parquet" else _csv(path)
    rows = len(next(iter(columns.values()), []))
    label = [name for name in columns if name in ("label", "labels", "value") or name.startswith("value_")]
    kinds = {name.partition("_")[0] for name in label}
    if "file" not in columns or len(kinds) != 1 or ("value" in label and len(label) > 1):
        raise ValueError(
            f"{path} has the columns {', '.join(columns)}: {EXPECTED}" if columns else f"{path} is empty: {EXPECTED}"
        )
    if not rows:
        raise ValueError(f"{path} has no rows below its header; add one for each image")
    names = tuple(columns["file"])
    if not all(names):
        raise ValueError(f"{path}, row {names.index('') + 2}: the file is not named")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"{path} names {twice[0]!r} {names.count(twice[0])} times; give each image one row")
    if bad := [name for name in names if "\0" in name]:
        raise ValueError(f"{path}, row {names.index(bad[0]) + 2}: {bad[0]!r} cannot be the name of a file")
    files = _files(path, names)
    labels, classes, target = _labels(path, columns, label, classes)
    groups = [group or name for group, name in zip(columns.get("group", names), names, strict=True)]
    dataset = Dataset(path.stem, Files(files), labels, tuple(groups), names, classes, target)  # type: ignore[arg-type]
    weights = None
    if "weight" in columns:
        weights = np.asarray(_numbers(path, "weight", columns["weight"], 1.0), np.float32)
        if (weights < 0).any():
            row = int(np.flatnonzero(weights < 0)[0])
            raise ValueError(f"{path}, row {row + 2}: the weight is {weights[row]:g}; expected at least 0")
    return Source(dataset, _splits(path, columns["split"]) if "split" in columns else (), weights)


def _csv(path: pathlib.Path) -> dict[str, list[str]]:
    """Name of a column → its cells, without blank rows."""
    data = path.read_bytes()
    utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        text = data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error.reason}); save it as csv in UTF-8") from error
    header = next((line for line in text.splitlines() if line.strip()), "")
    # The delimiter is the one that finds a column `file`, else the one that finds most columns.
    options = [(_header(header, mark), mark) for mark in ("\t", ";", ",", "|")]
    delimiter = max(options, key=lambda option: ("file" in option[0], len(option[0])))[1]
    try:
        lines = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path} is not a csv file ({error}); look at its quotes") from error
    lines = [line for line in lines if any(cell.strip() for cell in line)]
    names = [name.strip().lower() for name in lines[0]] if lines else []
    if doubled := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"{path} has two columns {doubled[0]!r}; leave one of them")
    for number, line in enumerate(lines[1:], 2):
        if len(line) > len(names) and any(cell.strip() for cell in line[len(names) :]):
            raise ValueError(
                f"{path}, row {number}: {len(line)} cells for {len(names)} columns; quote what holds a comma"
            )
    cells = [[cell.strip() for cell in line] + [""] * (len(names) - len(line)) for line in lines[1:]]
    return {name: [row[place] for row in cells] for place, name in enumerate(names)}


def _header(line: str, delimiter: str) -> list[str]:
    return [name.strip().lower() for name in next(csv.reader([line], delimiter=delimiter), [])]


def _parquet(path: pathlib.Path) -> dict[str, list[str]]:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    def text(cell: object) -> str:
        if isinstance(cell, list):
            return "|".join(map(str, cell))
        return "" if cell is None or (isinstance(cell, float) and math.isnan(cell)) else str(cell).strip()

    try:
        table = parquet.read_table(path)
        names = [name.strip().lower() for name in table.column_names]
        columns = zip(names, table.columns, strict=True)
        return {name: [text(cell) for cell in column.to_pylist()] for name, column in columns}
    except (arrow.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:  # of pages, and of cells
        raise ValueError(f"{path} is not a whole Parquet file ({error}); write it again") from error


def _files(path: pathlib.Path, names: Sequence[str]) -> tuple[str, ...]:
    folder = path.absolute().parent
    found, missing = [], []
    for name in names:
        # Windows writes backslashes, and macOS decomposes letters with accents.
        spellings = [name, name.replace("\\", "/")]
        spellings += [unicodedata.normalize(form, spelling) for spelling in spellings for form in ("NFC", "NFD")]
        paths = [os.path.join(folder, os.path.expanduser(spelling)) for spelling in dict.fromkeys(spellings)]
        place = next((place for place in paths if os.path.isfile(place)), None)
        found.append(place)
        if place is None:
            missing.append(name)
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise FileNotFoundError(
            f"{path} names {len(missing)} of {len(names)} files that are not there: {', '.join(missing[:3])}{more}; "
            f"paths are relative to {folder}"
        )
    return tuple(found)


def _labels(
    path: pathlib.Path, columns: dict[str, list[str]], label: list[str], classes: Sequence[str] | None
) -> tuple[np.ndarray, tuple[str, ...], str]:
    """(labels, classes, target) of the columns `label`."""
    if label == ["label"]:
        return *numbered(["" if cell == UNKNOWN else cell for cell in columns["label"]], classes, str(path)), "class"
    if label == ["labels"]:
        sets = [
            None if cell == UNKNOWN else [part.strip() for part in cell.replace(";", "|").split("|") if part.strip()]
            for cell in columns["labels"]
        ]
        found = in_order({name for names in sets for name in names or ()})
        if not found and classes is None:
            raise ValueError(f"{path}: no row has a label; write some in the column labels, as cat|tabby")
        _, classes = numbered(found, classes, str(path))
        rows = [[-1] * len(classes) if names is None else [name in names for name in classes] for names in sets]
        return np.asarray(rows, np.int32), classes, "labels"
    names = tuple(name.removeprefix("value_") for name in label)
    if classes is not None and tuple(classes) != names:
        if set(classes) != set(names):
            raise ValueError(f"{path} holds the values {', '.join(names)}, the model predicts {', '.join(classes)}")
        label, names = [label[names.index(name)] for name in classes], tuple(classes)
    values = [_numbers(path, name, columns[name], math.nan) for name in label]
    return np.asarray(values, np.float32).T.copy(), names, "values"


def _numbers(path: pathlib.Path, name: str, cells: Sequence[str], blank: float) -> list[float]:
    found = []
    for row, cell in enumerate(cells, 2):
        try:
            found.append(blank if cell in ("", UNKNOWN) else float(cell))
        except ValueError:
            hint = "; write a decimal point" if "," in cell else ""
            raise ValueError(f"{path}, row {row}: the {name} is {cell!r}, expected a number{hint}") from None
    return found


def _splits(path: pathlib.Path, cells: Sequence[str]) -> tuple[str, ...]:
    for row, cell in enumerate(cells, 2):
        if cell and cell.lower() not in SPLITS:
            raise ValueError(f"{path}, row {row}: the split is {cell!r}, expected train, val or test")
    return tuple(SPLITS.get(cell.lower(), "") for cell in cells)
