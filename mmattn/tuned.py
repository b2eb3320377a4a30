"""Launch configurations that were measured to be fastest: `python -m bench tune` writes tuned.json, rooms look here.

A room that can launch a kernel in several ways has
    candidates(key) -> [(tile, warps, stages), ...]     the configurations worth trying; none for kernels that are not its own
and launches `lookup(key)`, or its own choice where that is None.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).with_name("tuned.json")


class Key(NamedTuple):
    """What a choice depends on besides the sizes that vary in use."""

    kernel: str
    width: int  # of a row, or the columns that a head is computed in
    dtype: str
    arch: int  # 90: compute capability 9.0

    def __str__(self):
        return "/".join(map(str, self))


class Config(NamedTuple):
    tile: dict[str, int]
    warps: int
    stages: int


_trial: dict[Key, Config] = {}
asked: dict[Key, None] = {}
"""The keys that were looked up, in that order. A key has no length, and a new one comes with a new kernel to compile."""


@cache  # one
def table() -> dict[str, Config]:
    return {key: Config(*config) for key, config in json.loads(TABLE.read_text()).items()}


def lookup(key: Key) -> Config | None:
    """The configuration that was measured to be fastest, None where none was.

    What was measured in bfloat16 on an H200 serves other dtypes and GPUs until they have been measured themselves.
    """
    asked[key] = None
    return _trial.get(key) or table().get(str(key)) or table().get(str(key._replace(dtype="bfloat16", arch=90)))


@contextmanager
def trying(key: Key, config: Config) -> Iterator[None]:
    """Another configuration for a while. Plans that are remembered have to be forgotten first."""
    _trial[key] = config
    try:
        yield
    finally:
        del _trial[key]


def store(key: Key, config: Config) -> None:
    entries = {name: list(entry) for name, entry in (table() | {str(key): config}).items()}
    lines = [f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in sorted(entries.items())]
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    table.cache_clear()
