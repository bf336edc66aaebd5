"""Submissions in Kaggle's format, `img` and a probability for each class: written, checked, scored.

python -m jaxft.submission submission.csv solution.csv
"""

import csv
import pathlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from jaxft.ensemble import Probabilities
from jaxft.files import write_whole
from jaxft.task import LOG_LOSS_CLIP


def write(
    path: pathlib.Path, table: Probabilities, names: Sequence[str], columns: Sequence[str] | None = None
) -> Probabilities:
    """Writes a submission: every file once, in the order of `names`, rows of sum 1 with nothing below 1e-15.

    Args:
        path: of the csv.
        table: of every image that is asked for.
        names: the files of the sample submission, from `sample`, or those of the test set.
        columns: Kaggle's names of the classes, `c0` to `c9`; by default those of the table.

    Returns:
        what was written.

    Raises:
        ValueError: a file of `names` is listed twice or has no probabilities, or the table has another; other columns
            than classes. Nothing is written then.
        OSError: the file cannot be written.
    """
    if double := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"{double[0]} is listed twice among the files that are asked for; give each once")
    columns = table.classes if columns is None else tuple(columns)
    if len(columns) != len(table.classes):
        raise ValueError(f"{len(columns)} columns for {len(table.classes)} classes; give one name for each")
    asked = table.ordered(names)
    values = asked.values.clip(LOG_LOSS_CLIP, 1 - LOG_LOSS_CLIP)
    written = replace(asked, values=values / values.sum(1, keepdims=True), classes=tuple(columns))

    def put(partial: pathlib.Path) -> None:
        with partial.open("w", newline="", encoding="utf-8") as file:
            out = csv.writer(file)
            out.writerow(["img", *columns])
            out.writerows([name, *(f"{v:.10g}" for v in row)] for name, row in zip(names, written.values, strict=True))

    write_whole(path, put)
    return written


def sample(path: pathlib.Path) -> tuple[list[str], list[str]]:
    """(the files, the classes' columns) that a sample submission asks for.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a csv of `img` and classes, or lists a file twice.
    """
    header, rows = _table(path)
    if header[0] != "img":
        raise ValueError(f"{path} begins with {header[0]!r}, expected img and a column for each class")
    return [row[0] for row in rows], header[1:]


def read(path: pathlib.Path) -> Probabilities:
    """A submission, checked: files once each, numbers in every column, rows of sum 1.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not that; the message names the file and the row.
    """
    header, rows = _table(path)
    if header[0] != "img" or len(header) < 3 or "label" in header:
        raise ValueError(f"{path} has the columns {','.join(header)[:80]}; expected img and two or more classes")
    values = np.empty((len(rows), len(header) - 1))
    for number, row in enumerate(rows):
        try:
            values[number] = [float(word) for word in row[1:]]
        except ValueError as error:
            raise ValueError(f"{path}: {row[0]} has {error}; expected a probability for each class") from None
    unknown = np.full(len(rows), -1)
    try:
        return Probabilities(tuple(row[0] for row in rows), tuple(header[1:]), values, unknown, ("",) * len(rows))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def score(submission: pathlib.Path, solution: pathlib.Path) -> dict[str, float]:
    """What a submission is worth: `Probabilities.figures`, with log loss as Kaggle computes it.

    Args:
        submission: as `read`.
        solution: as `labelled`.

    Raises:
        FileNotFoundError, ValueError: as `read` and `labelled`.
    """
    return labelled(read(submission), solution).figures()


def labelled(table: Probabilities, solution: pathlib.Path, columns: Sequence[str] | None = None) -> Probabilities:
    """The table with the labels, and the groups, of a solution, in the order of the solution's files.

    Args:
        table: of the same files.
        solution: a csv of `img` and `classname`, a class's name, and perhaps `subject`, its group; or of `img` and a
            column of 0 and 1 for each class, in any order of files.
        columns: the solution's names of the classes; by default those of the table.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not that, or of other files or classes.
    """
    place = {name: c for c, name in enumerate(table.classes if columns is None else columns)}
    header, rows = _table(solution)
    column = {name: i for i, name in enumerate(header)}
    if header[0] != "img" or not ("classname" in column or set(place) <= set(column)):
        raise ValueError(
            f"{solution} has the columns {','.join(header)[:80]}; expected img,classname or img,{','.join(place)}"
        )
    labels, groups = {}, {}
    for row in rows:
        if "classname" in column:
            found = [row[column["classname"]]]
        else:
            found = [name for name in place if row[column[name]].strip() in ("1", "1.0")]
        if len(found) != 1 or found[0] not in place:
            raise ValueError(
                f"{solution}: {row[0]} has the class {', '.join(found) or 'none'}; expected one of {', '.join(place)}"
            )
        labels[row[0]], groups[row[0]] = place[found[0]], row[column["subject"]] if "subject" in column else ""
    table = table.ordered(list(labels))
    return replace(table, labels=np.asarray(list(labels.values())), groups=tuple(groups.values()))


def _table(path: pathlib.Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a csv whose first column holds distinct names."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = [line for line in csv.reader(file, strict=True) if line]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a csv file ({error})") from error
    if len(lines) < 2 or not lines[0]:
        raise ValueError(f"{path} holds no rows under a header")
    header, rows = lines[0], lines[1:]
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"{path}: {row[0]!r} has {len(row)} columns, the header {len(header)}")
    if double := [name for name, count in Counter(row[0] for row in rows).items() if count > 1]:
        raise ValueError(f"{path}: {double[0]} is listed twice; give each file once")
    return header, rows


def main(submission: pathlib.Path, solution: pathlib.Path) -> None:
    """Prints the log loss and accuracy of a submission.

    Args:
        submission: csv of img and a probability for each class.
        solution: csv of img and classname, or of img and 0 or 1 for each class.
    """
    found = score(submission.expanduser(), solution.expanduser())
    print(f"log loss {found['loss']:.5f}, accuracy {found['accuracy']:.2%}")


if __name__ == "__main__":
    from jaxft import command

    command.run(main)
