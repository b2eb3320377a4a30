"""Random calls: a minute of them here, five minutes on a GPU. `python tests/fuzz.py` makes more of them."""

from __future__ import annotations

import os
from itertools import islice

import frameworks
import fuzz
import numpy as np
import pytest
from frameworks import GPU, INSTALLED


def search(seed: int, ops: list[str], seconds: float, most: int) -> None:
    _, failure = fuzz.search(seed, ops, INSTALLED, seconds, most)
    if failure:
        raise AssertionError(fuzz.report(failure)) from failure.error


@pytest.mark.skipif(GPU, reason="a GPU has more time")
@pytest.mark.parametrize("op", fuzz.OPS)
def test_random_calls(op):
    """The same calls everywhere, of which a slow machine makes fewer."""
    search(0, [op], seconds=45 / len(fuzz.OPS), most=20)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(8))
def test_more_random_calls(seed):
    """Five minutes in all, where eight workers share the seeds."""
    workers = min(8, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
    search(seed, list(fuzz.OPS), seconds=300 * workers / 8, most=100_000)


def test_a_call_is_its_text():
    """The text of a call makes it again, values included."""
    for op, choose in islice(fuzz.calls(1, list(fuzz.OPS)), 30):
        call = fuzz.build(op, choose)
        again = fuzz.build(op, fuzz.Choices(fuzz.parsed(call.text.removeprefix(op))))
        assert again.text == call.text
        for a, b in zip(call.cases, again.cases, strict=True):
            values, same = frameworks.operands(a, call.dtype), frameworks.operands(b, call.dtype)
            assert all(np.array_equal(x, same[name], equal_nan=True) for name, x in values.items())
