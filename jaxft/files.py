"""Files that are put in place whole: a failure leaves what was there. Text is UTF-8, whatever the locale."""

import csv
import json
import math
import os
import pathlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def write_whole(path: pathlib.Path, write: Callable[[pathlib.Path], Any]) -> None:
    """Has `write` make a file beside `path`, and renames it to `path` once it is on the disk.

    Raises:
        OSError: the folder cannot be written to, or the disk is full; it names `path`, which is as it was.
    """
    # Random, because processes on two machines may share a folder and a process number.
    partial = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        write(partial)
        sync(partial)  # or a power cut could leave the new name on an empty file
        os.replace(partial, path)
        sync(path.parent)
    except OSError as error:  # which names no file where a write fails, and else the partial one
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def force_to_disk(folder: pathlib.Path) -> None:
    """Waits until all that lies in a folder, and its own name, would outlast a power cut.

    Raises:
        OSError: a file cannot be written.
    """
    for path in [*folder.rglob("*"), folder, folder.parent]:
        sync(path)


def sync(path: pathlib.Path) -> None:
    """Waits until a file or, where the system can, a folder is on the disk as it is now."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folder
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # nor syncs what is open to read
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: pathlib.Path, text: str) -> None:
    """`text` as it is."""
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8", newline=""))


def write_json(path: pathlib.Path, values: Any) -> None:
    """`values` as indented JSON that strict readers take: NaN and infinity, which JSON lacks, become null."""
    write_text(path, json.dumps(strict(values), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def strict(values: Any) -> Any:
    """JSON values with None for NaN and infinity, however deep they lie; a tuple becomes a list."""
    if isinstance(values, float):
        return values if math.isfinite(values) else None
    if isinstance(values, Mapping):
        return {key: strict(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [strict(value) for value in values]
    return values


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object that `write_json` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a JSON object; the message names the file.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); delete it, or restore it from a copy") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, not an object; delete it, or restore it from a copy")
    return found


def write_csv(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """`rows` under the columns of the last one, blank where an earlier row has no such column.

    Text that a spreadsheet would take for a formula, as it begins with =, +, -, @ or a tab, gets a ' before it.

    Raises:
        ValueError: there is no row, or a row has a column that the last one lacks.
    """
    if not rows:
        raise ValueError(f"{path}: a table needs at least one row, which names its columns")

    def write(partial: pathlib.Path) -> None:
        with partial.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, rows[-1])
            table.writerow({name: _cell(name) for name in rows[-1]})
            table.writerows({name: _cell(value) for name, value in row.items()} for row in rows)

    write_whole(path, write)


def _cell(value: Any) -> Any:
    if not isinstance(value, str) or not value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value
