"""Every op's formula in float64: its gradient, which the kernels are measured against, by central differences."""

from __future__ import annotations

import frameworks
import numpy as np
import pytest
from cases import CASES

SMALL = [case for case in CASES if not case.gpu and case.dtypes != ("bfloat16",)]


def weighted_sum(case, arrays, douts) -> float:
    """The outputs, in NumPy, against their cotangents; a row without keys has lse -inf and counts for nothing."""
    with np.errstate(all="ignore"):
        outs = dict(frameworks.walk(frameworks.formula(np, case, arrays), "out"))
    return sum(float(np.sum(np.where(np.isfinite(out), out, 0.0) * douts[name])) for name, out in outs.items())


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradient_is_the_slope(case):
    arrays, douts = frameworks.operands(case, "float64"), frameworks.cotangents(case, "float64")
    gradients = frameworks.formula_in(case, "float64", "float64").values
    rng = case.rng()
    for name, leaf in frameworks.walk(case.operands):
        if not leaf.differentiable:
            continue
        direction = leaf.std * rng.standard_normal(leaf.shape)
        f = lambda t: weighted_sum(case, arrays | {name: arrays[name] + t * direction}, douts)  # noqa: B023
        h = 2.0**-9
        slope = (45 * (f(h) - f(-h)) - 9 * (f(2 * h) - f(-2 * h)) + f(3 * h) - f(-3 * h)) / (60 * h)
        expected = float(np.sum(gradients[f"d{name}"] * direction))
        scale = np.linalg.norm(gradients[f"d{name}"]) * np.linalg.norm(direction)
        assert abs(slope - expected) <= 1e-7 * scale, f"d{name}: slope {slope}, gradient {expected}"


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_frameworks_run_the_same_formula(case):
    """torch's and JAX's float64 values and gradients, and NumPy's values, of one formula."""
    arrays, douts = frameworks.operands(case, "float64"), frameworks.cotangents(case, "float64")
    dtypes = {name: "float64" if leaf.differentiable else leaf.dtype for name, leaf in frameworks.walk(case.operands)}
    values = frameworks.exact_outputs(case, "float64")
    for name in frameworks.INSTALLED:
        result = frameworks.framework_of(name).formula(case, arrays, douts, dtypes, "float64")
        expected = frameworks.formula_in(case, "float64", "float64").values | values
        assert result.values.keys() == expected.keys()
        for key, x in result.values.items():
            assert frameworks.distance(x, expected[key], np.linalg.norm) <= 1e-12, f"{name} {key}"
