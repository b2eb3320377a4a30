"""What both frameworks do with weights: check all of them before one is written, and put a file in place at once."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

from .op import Spec

REBUILD = "Build the module with the arguments that the weights were made with."


class Place(NamedTuple):
    """Where a module has a weight: its shape and dtype, and the class of the layer that it belongs to."""

    spec: Spec
    layer: str


def kind(dtype: str) -> str:
    """Dtypes of one kind are cast to each other: float32 and bfloat16, but not int64 and float32."""
    return next((name for name in ("float", "complex", "int", "bool") if name in dtype), dtype)


def check_fit(module: str, places: Mapping[str, Place], given: Mapping[str, Spec]) -> None:
    """Weights must have the module's names and shapes, and dtypes of the same kind."""
    missing, unexpected = sorted(places.keys() - given.keys()), sorted(given.keys() - places.keys())
    if missing or unexpected:
        layers = {name: name.rpartition(".")[0] for name in (*missing, *unexpected)}
        apart = [
            f"{layers[name] or module}, a {places[name].layer}, has {name.rpartition('.')[2]}, for which the weights have "
            f"{', '.join(others)}. "
            for name in missing
            if (others := [other.rpartition(".")[2] for other in unexpected if layers[other] == layers[name]])
        ]
        raise ValueError(
            f"{module}: the weights do not fit; missing {missing}, unexpected {unexpected}. {''.join(apart)}{REBUILD}"
        )
    for name, (spec, _) in places.items():
        if given[name].shape != spec.shape:
            raise ValueError(f"{module}: {name} has shape {given[name].shape}; expected {spec.shape}. {REBUILD}")
        if kind(given[name].dtype) != kind(spec.dtype):
            raise TypeError(
                f"{module}: {name} has dtype {given[name].dtype}; expected {spec.dtype}, or what can be cast to it. {REBUILD}"
            )


def existing(op: str, path: str | os.PathLike) -> str | os.PathLike:
    """path, if there is a file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{op}: there is no file {path}; expected one in the safetensors format. Check the path.")
    return path


def unreadable(op: str, path: str | os.PathLike, error: Exception) -> ValueError:
    return ValueError(f"{op}: {path} is not in the safetensors format, or not all of it is there: {error}. Write it again.")


@contextmanager
def replacing(op: str, path: str | os.PathLike) -> Iterator[Path]:
    """A path to write a file to. At the end of the block it takes the place of `path` at once, with its permissions; after an
    exception it is gone, and `path` is as it was."""
    target = Path(os.path.realpath(path))  # what a link points to
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{op}: the folder of {path} does not exist; expected one to write to. Make it first.")
    there = target.exists()
    if there and not target.is_file():
        raise IsADirectoryError(f"{op}: {path} is a folder, or a device; expected the path of a file. Add a name to it.")
    if there and not os.access(target, os.W_OK):
        raise PermissionError(
            f"{op}: {path} must not be written to; expected a file that may. Change its permissions, or the path."
        )
    beside = target.with_name(f".{uuid4().hex}.tmp")
    try:
        beside.touch(exist_ok=False)
        mode = stat.S_IMODE(
            (target if there else beside).stat().st_mode
        )  # safetensors may make a file that its owner alone reads
        yield beside
        beside.chmod(mode)
        beside.replace(target)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        error.add_note(f"{op}: {path} has not been written; what was there is unchanged.")
        raise
