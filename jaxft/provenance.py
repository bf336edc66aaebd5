"""What a run's record says of values, functions and arrays, as JSON that is the same in every process."""

import dataclasses
import hashlib
import inspect
import pathlib
import subprocess
import types
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import numpy as np


def revision(folder: pathlib.Path) -> str | None:
    """The git commit that a folder is at, with "+changes" where tracked files differ from it; None outside of git."""

    # Without a monitor of files, which a repository could name a program for, and without names of tags.
    words = ["-c", "core.fsmonitor=false", "describe", "--always", "--abbrev=40", "--dirty=+changes", "--exclude=*"]
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, encoding="utf-8", timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def describe(value: Any, within: tuple[int, ...] = ()) -> Any:
    """A value as JSON: words and numbers as they are, dataclasses by fields, functions by name, closure and settings.

    `within` holds the ids of what the value is a part of, which may come again inside of it.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if id(value) in within:
        return "what this is a part of"
    part = partial(describe, within=(*within, id(value)))
    if isinstance(value, Mapping):
        return {str(key): part(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [part(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        array = np.asarray(value)
        return array.tolist() if array.size <= 16 else f"{array.dtype}{list(array.shape)} {digest(array)}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: part(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"is": type(value).__qualname__, **fields}
    if isinstance(value, partial):
        return {"is": part(value.func), "args": part(value.args), **part(value.keywords)}
    if isinstance(value, pathlib.PurePath):
        return str(value)
    if inspect.isroutine(value) or (callable(value) and hasattr(value, "__wrapped__")):  # the latter as jax.jit gives
        return _function(value, part)
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if inspect.ismodule(value):
        return value.__name__
    return {"is": f"{type(value).__module__}.{type(value).__qualname__}", **part(getattr(value, "__dict__", {}))}


def _function(function: Callable[..., Any], part: Callable[[Any], Any]) -> Any:
    name = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', repr(function))}"
    function = inspect.unwrap(function)
    if inspect.ismethod(function):
        return {"is": name, "of": part(function.__self__)}
    if not inspect.isfunction(function):
        return name
    seen = inspect.getclosurevars(function)
    numbers_and_words = {key: value for key, value in seen.globals.items() if isinstance(value, int | float | str)}
    settings = {key: part(value) for key, value in {**numbers_and_words, **seen.nonlocals}.items()}
    if "<lambda>" in name:  # nothing else tells one from another
        settings["code"] = _written(function.__code__)
    defaults = {"defaults": function.__defaults__, "keywords": function.__kwdefaults__}
    settings |= {key: part(value) for key, value in defaults.items() if value}
    return {"is": name, **settings} if settings else name


def _written(code: types.CodeType) -> list[Any]:
    """The names and constants of a function's code, those of functions inside of it too."""
    found: list[Any] = list(code.co_names)
    for value in code.co_consts:
        if isinstance(value, types.CodeType):
            found += _written(value)
        elif isinstance(value, int | float | str):
            found.append(value)
    return found


def digest(tree: Any) -> str:
    """SHA-256, hexadecimal, of the arrays of a pytree with their places, shapes and dtypes."""

    def one(item: tuple[Any, Any]) -> bytes:
        path, leaf = item
        array = np.ascontiguousarray(leaf)
        named = f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode()
        return hashlib.sha256(named + hashlib.sha256(array.reshape(-1).view(np.uint8).data).digest()).digest()

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    with ThreadPoolExecutor() as pool:  # hashing lets other threads run
        parts = pool.map(one, sorted(leaves, key=lambda item: jax.tree_util.keystr(item[0])))
    return hashlib.sha256(b"".join(parts)).hexdigest()
