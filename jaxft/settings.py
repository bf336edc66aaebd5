"""Settings of a command as a YAML file: one flag a line, without its dashes, and its value."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxft import files


def flattened(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a function that is a command, groups of flags resolved: flag without dashes → value."""
    found: dict[str, Any] = {}
    for name, value in arguments.items():
        if dataclasses.is_dataclass(value):
            found |= flattened({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
        elif isinstance(value, tuple | list):
            found[name.replace("_", "-")] = list(value)
        else:
            plain = value is None or isinstance(value, bool | int | float | str)
            found[name.replace("_", "-")] = value if plain else str(value)
    return found


def write(file: pathlib.Path, settings: Mapping[str, Any]) -> None:
    """Writes what `read` reads.

    Raises:
        OSError: the folder cannot be written to.
    """
    import yaml

    text = yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)
    files.write_text(file, f"# jaxft finetune --config {file.name} repeats this run; give another --folder\n{text}")


def read(file: pathlib.Path) -> dict[str, Any]:
    """Flag without dashes → value.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not such a file.
    """
    import yaml

    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not a YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{file} holds no settings; write one a line, image-size: 224 say")
    return {name.replace("_", "-"): value for name, value in found.items()}
