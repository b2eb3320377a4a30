"""Every op's formula in float64: its gradient, which the kernels are measured against, by central differences."""

from __future__ import annotations

import frameworks
import numpy as np
import pytest
from cases import CASES, Case, Constant, Normal

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


DECIDES = dict(gated_residual="residual", gated_residual_norm_adaln="residual", qk_norm_rope="qkv", qk_norm_rope_attention="qkv")
DECIDES |= dict(joint_attention="v", relu_linear_attention="v")  # of other ops it is x
BESIDE_FLOAT32 = (
    "layernorm_adaln-everything",
    "rmsnorm_adaln-zero-centered",
    "layernorm_adaln-rows-everything",
    "gated_residual-37x48",
    "gated_residual_norm_adaln-lumina",
    "qk_norm_rope-seed-half",
    "joint_attention-one-token-each",
    "qk_norm_rope_attention-heads-half",
    "relu_linear_attention-37-5",
)


@pytest.mark.parametrize("case", [case for case in SMALL if str(case) in BESIDE_FLOAT32], ids=str)
def test_one_float64_operand_makes_all_arithmetic_float64(case, framework):
    """Beside the float64 operand that decides, float32 ones are as good as the same numbers in float64."""
    arrays, douts = frameworks.operands(case, "float32"), frameworks.cotangents(case, "float32")
    exact = frameworks.formula_in(case, "float32", "float64").values
    decides = DECIDES.get(case.call, "x")
    dtypes = {name: "float64" if name.split("[")[0] == decides else "float32" for name, _ in frameworks.walk(case.operands)}
    dtypes |= {name: leaf.dtype for name, leaf in frameworks.walk(case.operands) if not leaf.differentiable}
    result = framework.formula(case, arrays, douts, dtypes, "float64")
    for name, x in result.values.items():
        rounded_once = frameworks.rounded(exact[name], result.dtypes[name])
        assert frameworks.distance(x, rounded_once, np.linalg.norm) <= (1e-12 if result.dtypes[name] == "float64" else 1e-8), name


MANY = 1000
ones = lambda *shape: Normal(shape, std=0.0, mean=1.0)
ROW = dict(rows=Constant(np.zeros((1, MANY), np.int32)))
SUMS = [
    (Case("rmsnorm_adaln", "table", dict(x=ones(1, MANY, 8), shift=ones(3, 8)) | ROW), "dshift", [MANY, 0, 0]),
    (Case("rmsnorm_adaln", "table-of-samples", dict(x=ones(1, MANY, 8), shift=ones(1, 3, 8)) | ROW), "dshift", [MANY, 0, 0]),
    (Case("rmsnorm_adaln", "scales", dict(x=ones(1, MANY, 8), scale=ones(3, 8)) | ROW, dict(eps=0.0)), "dscale", [MANY, 0, 0]),
    (Case("rmsnorm_adaln", "sample", dict(x=ones(1, MANY, 8), shift=ones(1, 8))), "dshift", MANY),
    (Case("rmsnorm_adaln", "base", dict(x=ones(1, MANY, 8), shift_base=ones(8))), "dshift_base", MANY),
    (Case("layer_norm", "bias", dict(x=ones(1, MANY, 8), bias=ones(8))), "dbias", MANY),
    (Case("gated_residual", "gate", dict(residual=ones(1, MANY, 8), h=ones(1, MANY, 8), gate=ones(1, 8))), "dgate", MANY),
    (
        Case("qk_norm_rope", "weight", dict(qkv=ones(1, MANY, 3, 1, 8), q_weight=ones(8), k_weight=ones(8)), dict(over="width")),
        "dq_weight",
        MANY,
    ),
]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case, name, total", SUMS, ids=[str(case) for case, _, _ in SUMS])
def test_gradients_are_not_summed_in_16_bits(case, name, total, dtype, framework, monkeypatch):
    """A thousand ones are a thousand; in bfloat16 they are 256."""
    shape = (1, MANY, 1, 8) if case.call == "qk_norm_rope" else (1, MANY, 8)
    monkeypatch.setattr(frameworks, "cotangents", lambda *_: {f"out{i}": np.ones(shape) for i in ("", "[0]", "[1]")})
    got = frameworks.call(framework, case, dtype, "reference").values[name]
    np.testing.assert_array_equal(got.reshape(-1, 8), np.reshape(total, (-1, 1)) * np.ones(8))
