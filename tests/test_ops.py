"""Every case's kernels, forward and backward, in both frameworks, three dtypes and tf32, against float64."""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache

import frameworks
import numpy as np
import pytest
from cases import CASES, WITHOUT_EPS, Case, Constant, Normal

INTERPRETED_IN_TF32 = (
    "joint_attention-grouped",
    "joint_attention-everything",
    "joint_attention-one-stream-130",
    "qk_norm_rope_attention-seed",
    "relu_linear_attention-130-width-64",
    "relu_linear_attention-key-masks",
)


def dtypes(case) -> tuple[str, ...]:
    """The case's, and tf32 beside the float32 of ops with dots."""
    return case.dtypes + ("tf32",) * (case.call in frameworks.DOTS and "float32" in case.dtypes)


def mark(case, dtype: str) -> list:
    """The interpreter gets few cases in tf32."""
    return [pytest.mark.gpu] * (case.gpu or (dtype == "tf32" and str(case) not in INTERPRETED_IN_TF32))


TABLE = [pytest.param(case, dtype, id=f"{case}-{dtype}", marks=mark(case, dtype)) for case in CASES for dtype in dtypes(case)]
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


@pytest.mark.gpu  # an interpreter cannot do otherwise
@pytest.mark.parametrize("case, dtype", [row for row in TABLE if row.values[1] == "bfloat16"], scope="module")
def test_same_call_twice_gives_the_same_bits(case, dtype, framework, kernels):
    assert_same_bits(kernels_of(framework.name, case, dtype), frameworks.call(framework, case, dtype))


@pytest.mark.parametrize("implementation", ["triton", "reference"])
@pytest.mark.parametrize("how", [dict(causal=True), dict(attn_mask=Constant(np.broadcast_to(np.arange(37) < 30, (1, 37, 37))))])
def test_finite_values_of_hidden_keys_change_nothing(how, implementation, framework, kernels):
    """Tokens 30 to 36 are hidden from the others, and no gradient flows into their own outputs."""
    masks = {name: x for name, x in how.items() if isinstance(x, Constant)}
    operands = dict(q=Normal((1, 37, 2, 16)), k=Normal((1, 37, 2, 16)), v=Normal((1, 37, 2, 16))) | masks
    case = Case("joint_attention", f"hidden-by-{next(iter(how))}", operands, {} if masks else how)
    arrays, douts = frameworks.operands(case, "float32"), frameworks.cotangents(case, "float32")
    dtypes = dict.fromkeys("qkv", "float32") | dict.fromkeys(masks, "bool")
    attend = lambda arrays: framework.ops.joint_attention(**arrays, **case.static, implementation=implementation)

    def seen(factor: float) -> list[np.ndarray]:
        hidden = lambda x, factor: np.concatenate([x[:, :30], factor * x[:, 30:]], 1)
        others = arrays | {name: hidden(arrays[name], factor) for name in "kv"}
        values = framework.differentiate(attend, case, others, dict(out=hidden(douts["out"], 0)), dtypes).values
        return [x[:, :30] for x in values.values()]

    for a, b in zip(seen(1), seen(1e4), strict=True):
        assert np.isfinite(a).all() and np.array_equal(a, b)


def test_results_merge_across_calls_by_their_lse(framework, kernels):
    """What ring attention does: the outputs of two calls with half of the keys each, weighted by exp(lse)."""
    rng = np.random.default_rng(0)
    q, k, more_k, v, more_v = (framework.put(rng.standard_normal((1, 37, 2, 16)), "float32") for _ in range(5))
    attend = lambda *args: framework.ops.joint_attention(*args, return_lse=True, implementation="triton")
    results = [attend(q, k, v), attend(q, more_k, more_v)]
    whole, lse = (framework.get(both[0]) for both in attend((q, q), (k, more_k), (v, more_v)))
    o, log = (np.stack([framework.get(result[i]) for result in results]) for i in range(2))
    weight = np.exp(log - lse).swapaxes(2, 3)[..., None]
    assert np.abs(weight.sum(0) - 1).max() < 1e-5
    assert np.abs((weight * o).sum(0) - whole).max() < 1e-5


EXTREMES = [
    ("int32", 2**31 - 2, 63),
    ("int32", -(2**31), 0),
    ("int64", 2**62, 63),
    ("int64", 2**63 - 1, 63),
    ("int64", -(2**63), 0),
]


@pytest.mark.parametrize("dtype, start, row", EXTREMES)
@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_start_positions_are_clamped_however_far_they_are(implementation, dtype, start, row, framework, kernels):
    """Where they cannot be seen, in compiled functions. Every token then takes the table's last row, or its first one."""
    rng = np.random.default_rng(0)
    angles = rng.standard_normal((64, 8))
    x, ones = rng.standard_normal((2, 5, 3, 2, 16)), np.ones(32)

    def rotated(angles, start):
        def run(qkv, weight, cos, sin, start):
            how = dict(over="width", cos=cos, sin=sin, start_pos=start, implementation=implementation)
            return framework.ops.qk_norm_rope(qkv, weight, weight, **how)

        floats = (framework.put(a, "float32") for a in (x, ones, np.cos(angles), np.sin(angles)))
        return [framework.get(y) for y in framework.compiled(run)(*floats, framework.put(np.array([start, start]), dtype))]

    with framework.wide_integers() if dtype == "int64" else nullcontext():
        got, want = rotated(angles, start), rotated(np.broadcast_to(angles[row], angles.shape), 0)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("case, dtype", [pytest.param(c, d, id=f"{c}-{d}") for c in WITHOUT_EPS for d in c.dtypes])
@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_without_eps(implementation, case, dtype, framework, kernels):
    frameworks.check(case, dtype, frameworks.call(framework, case, dtype, implementation))
