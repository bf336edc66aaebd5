"""Files that are put in place whole: a failure leaves what was there."""

import csv
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def write_whole(path: pathlib.Path, write: Callable[[pathlib.Path], Any]) -> None:
    """Has `write` make a file beside `path`, and renames it to that once it is on the disk.

    Raises:
        OSError: the folder cannot be written to, or the disk is full.
    """
    partial = path.with_name(f"{path.name}.part")
    try:
        write(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())  # or a power cut could leave the new name on an empty file
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: pathlib.Path, values: Any) -> None:
    """`values` as indented JSON."""
    write_whole(path, lambda partial: partial.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n"))


def write_csv(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """`rows` under the columns of the last one, blank where an earlier row has no such column.

    Raises:
        ValueError: a row has a column that the last one lacks.
    """

    def write(partial: pathlib.Path) -> None:
        with partial.open("w", newline="") as file:
            table = csv.DictWriter(file, rows[-1])
            table.writeheader()
            table.writerows(rows)

    write_whole(path, write)
