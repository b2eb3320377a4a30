"""The table of measured launch configurations: what it says is taken, and a room knows what it may say."""

from __future__ import annotations

import pkgutil
from importlib import import_module

import pytest

import mmattn
from mmattn import tuned
from mmattn.attention import plans
from mmattn.tuned import Config, Key

KEY, CONFIG = Key("some_kernel", 128, "bfloat16", 90), Config(dict(ROWS=4, COLS=128), 2, 1)


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """A table of our own."""
    monkeypatch.setattr(tuned, "TABLE", tmp_path / "tuned.json")
    tuned.TABLE.write_text("{}")
    tuned.table.cache_clear()
    yield tuned.TABLE
    tuned.table.cache_clear()


def test_what_is_stored_is_looked_up(scratch):
    assert tuned.lookup(KEY) is None
    tuned.store(KEY, CONFIG)
    other = KEY._replace(arch=80)
    tuned.store(other, CONFIG._replace(warps=8))
    assert tuned.lookup(KEY) == CONFIG and tuned.lookup(other).warps == 8
    assert tuned.lookup(KEY._replace(dtype="float16", arch=100)) == CONFIG  # until that is measured
    assert tuned.lookup(KEY._replace(width=256)) is None
    assert scratch.read_text().splitlines()[1:-1] == sorted(scratch.read_text().splitlines()[1:-1])
    tuned.store(KEY, CONFIG._replace(stages=3))
    assert tuned.lookup(KEY).stages == 3 and tuned.lookup(other).warps == 8


def test_a_trial_ends(scratch):
    tuned.store(KEY, CONFIG)
    with pytest.raises(KeyError), tuned.trying(KEY, CONFIG._replace(warps=8)):
        assert tuned.lookup(KEY).warps == 8
        raise KeyError
    assert tuned.lookup(KEY) == CONFIG


def test_lookups_are_noted(scratch):
    tuned.asked.clear()
    tuned.lookup(KEY)
    assert list(tuned.asked) == [KEY]


def rooms():
    names = [module.name for module in pkgutil.walk_packages(mmattn.__path__, "mmattn.")]
    return [module for module in map(import_module, names) if hasattr(module, "candidates")]


@pytest.mark.parametrize("cols", [16, 32, 48, 64, 80, 96, 128])
@pytest.mark.parametrize("reach, keys", [("short", 200), ("middle", 800), ("long", 4000)])
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_attentions_own_choice_is_a_candidate(cols, reach, keys, masked):
    """So that tuning stores nothing slower."""
    for kind in ("unshifted", "single", "dq", "dkdv"):
        key = Key(f"joint_attention_{kind}-{reach}{'-masked' * masked}", cols, "bfloat16", 90)
        assert plans.rule(kind, cols, "bfloat16", keys, masked) in plans.candidates(key), kind


def test_the_table_holds_candidates_only():
    """A configuration that a room no longer offers is stale: nobody has measured what it does now."""
    for name, config in tuned.table().items():
        kernel, width, dtype, arch = name.split("/")
        key = Key(kernel, int(width), dtype, int(arch))
        offered = [Config(*c) for room in rooms() for c in room.candidates(key)]
        assert config in offered, f"{name}: {config} is not among the candidates of its room; run `python -m bench tune`"
