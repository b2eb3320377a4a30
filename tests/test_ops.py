"""Every case's kernels, forward and backward, in both frameworks and three dtypes, against float64."""

from __future__ import annotations

from functools import lru_cache

import frameworks
import pytest
from cases import CASES

mark = lambda case: [pytest.mark.gpu] * case.gpu
TABLE = [pytest.param(case, dtype, id=f"{case}-{dtype}", marks=mark(case)) for case in CASES for dtype in case.dtypes]
each_case = pytest.mark.parametrize("case, dtype", TABLE, scope="module")  # the tests of a case run one after the other


@lru_cache(maxsize=4)  # the comparison of the frameworks reads what the tests just before it have computed
def kernels_of(name: str, case, dtype: str) -> frameworks.Result:
    return frameworks.call(frameworks.framework_of(name), case, dtype)


def assert_same_bits(a: frameworks.Result, b: frameworks.Result) -> None:
    assert a.dtypes == b.dtypes
    for name, x in a.values.items():
        differ = x.view("u8") != b.values[name].view("u8")
        assert not differ.any(), f"{name}: {differ.sum()} of {differ.size} values differ"


@each_case
def test_against_float64(case, dtype, framework, kernels):
    frameworks.check(case, dtype, kernels_of(framework.name, case, dtype))


@each_case
def test_frameworks_agree_to_the_bit(case, dtype, kernels):
    if len(frameworks.INSTALLED) < 2:
        pytest.skip(f"only {frameworks.INSTALLED[0]} is installed")
    assert_same_bits(*(kernels_of(name, case, dtype) for name in frameworks.INSTALLED))


@pytest.mark.parametrize("case, dtype", [row for row in TABLE if row.values[1] == "bfloat16"], scope="module")
def test_same_call_twice_gives_the_same_bits(case, dtype, framework, kernels):
    assert_same_bits(kernels_of(framework.name, case, dtype), frameworks.call(framework, case, dtype))
