"""docs/dtypes.md, row by row: every operation called with every pair of dtypes, on both paths, in both frameworks."""

from __future__ import annotations

import re
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import NamedTuple

import frameworks
import numpy as np
import pytest

import mmattn
from mmattn.op import FLOATS, dtype_name

DOCUMENT = Path(mmattn.__file__).parent.parent / "docs" / "dtypes.md"
VECTORS, HEADS = dict.fromkeys(("scale", "shift"), (1, 8)), (1, 3, 1, 8)
SHAPES = {  # of every differentiable argument of every operation
    "layernorm_adaln": dict(x=(1, 3, 8), **VECTORS, **dict.fromkeys(("weight", "bias", "scale_base", "shift_base"), (8,))),
    "layer_norm": dict(x=(1, 3, 8), weight=(8,), bias=(8,)),
    "rms_norm": dict(x=(1, 3, 8), weight=(8,)),
    "gated_residual": dict(residual=(1, 3, 8), h=(1, 3, 8), gate=(1, 8)),
    "gated_residual_norm_adaln": dict(residual=(1, 3, 8), h=(1, 3, 8), gate=(1, 8), **VECTORS, h_weight=(8,)),
    "qk_norm_rope": dict(qkv=(1, 3, 3, 1, 8), q_weight=(8,), k_weight=(8,)),
    "joint_attention": dict(q=HEADS, k=HEADS, v=HEADS),
    "relu_linear_attention": dict(q=HEADS, k=HEADS, v=HEADS),
}
SHAPES["rmsnorm_adaln"], SHAPES["qk_norm_rope_attention"] = SHAPES["layernorm_adaln"], SHAPES["qk_norm_rope"]
STATIC = {
    "qk_norm_rope": dict(over="head"),
    "joint_attention": dict(return_lse=True),
    "qk_norm_rope_attention": dict(over="head", return_lse=True),
}
each_op = pytest.mark.parametrize("op", sorted(SHAPES))


class Rule(NamedTuple):
    """A row of the table, for one operation."""

    decides: str
    others: tuple[str, ...]
    autocast: tuple[str, ...]
    lse: bool  # whether there is one among the results


def rules() -> dict[str, Rule]:
    """The table by operation."""
    cells = [line.split("|")[1:-1] for line in DOCUMENT.read_text().splitlines() if line.startswith("|")]
    named = lambda cell: tuple(re.findall(r"`(\w+)`", cell))
    found = {}
    for ops, decides, others, autocast, results in cells[2:]:
        (leader,) = named(decides)
        assert f"`{leader}`'s" in results
        found |= {op: Rule(leader, named(others), named(autocast), "`lse`" in results) for op in named(ops)}
    return found


RULES = rules()


def checked(op: str, dtypes: dict[str, str]) -> mmattn.op.Call:
    """The core's call, on arrays that have no framework."""
    given = {name: np.empty(SHAPES[op][name], frameworks.numpy_dtype(dtype)) for name, dtype in dtypes.items()}
    return getattr(mmattn, op)(**given, **STATIC.get(op, {}))


def test_the_table_has_every_argument_of_every_operation():
    called = {op: checked(op, dict.fromkeys(shapes, "float32")) for op, shapes in SHAPES.items()}
    assert RULES.keys() == SHAPES.keys() == {name for name in mmattn.__all__ if name.islower()}
    for op, rule in RULES.items():
        assert {rule.decides, *rule.others} == SHAPES[op].keys(), op
    for op in mmattn.OPS:
        arguments = {name for public, call in called.items() if call.op is op for name in SHAPES[public]}
        tables = {f"{name}_table" for name in arguments}  # other forms of the same arguments
        assert arguments == set(op.operands) - op.constant - tables, op


def mixtures(rule: Rule, leaders: tuple[str, ...] = FLOATS):
    """Dtypes by argument, in which every argument meets both of the dtypes that the deciding one does not have."""
    for leader, turn in product(leaders, range(2)):
        unlike = [dtype for dtype in FLOATS if dtype != leader]
        yield {rule.decides: leader} | {name: unlike[(i + turn) % len(unlike)] for i, name in enumerate(rule.others)}


def expected(op: str, dtypes: dict[str, str], autocast: str | None) -> tuple[list[str], dict[str, str]]:
    """Dtypes of the results and of the gradients."""
    rule = RULES[op]
    taken = dtypes[rule.decides]
    if autocast and rule.decides in rule.autocast and taken != "float64":
        taken = autocast
    results = dict(qk_norm_rope=2, gated_residual_norm_adaln=2).get(op, 1)
    return [taken] * results + ["float64" if taken == "float64" else "float32"] * rule.lse, dtypes


def arrays(op: str, dtypes: dict[str, str]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(SHAPES[op][name]) for name in dtypes}


def in_torch(op: str, dtypes: dict[str, str], implementation: str, autocast: str | None = None):
    import torch

    front = frameworks.framework_of("torch")
    given = {name: front.put(x, dtypes[name]).requires_grad_() for name, x in arrays(op, dtypes).items()}
    with torch.autocast(front.device, getattr(torch, autocast)) if autocast else nullcontext():
        outs = getattr(front.ops, op)(**given, **STATIC.get(op, {}), implementation=implementation)
    outs = [x for _, x in frameworks.walk(outs)] if isinstance(outs, tuple) else [outs]
    grads = torch.autograd.grad(outs, list(given.values()), [torch.ones_like(x) for x in outs])
    assert all(x.isfinite().all() for x in (*outs, *grads))
    return list(map(dtype_name, outs)), dict(zip(given, map(dtype_name, grads), strict=True))


def in_jax(op: str, dtypes: dict[str, str], implementation: str):
    """Tracing decides dtypes: nothing is computed."""
    import jax

    front = frameworks.framework_of("jax")
    run = lambda given: jax.tree.leaves(getattr(front.ops, op)(**given, **STATIC.get(op, {}), implementation=implementation))

    def outs_and_grads(given):
        outs, vjp = jax.vjp(run, given)
        return outs, *vjp([jax.numpy.ones_like(x) for x in outs])

    given = {name: jax.ShapeDtypeStruct(SHAPES[op][name], frameworks.numpy_dtype(dtype)) for name, dtype in dtypes.items()}
    outs, grads = jax.eval_shape(outs_and_grads, given)
    return list(map(dtype_name, outs)), {name: dtype_name(x) for name, x in grads.items()}


@pytest.fixture(params=["triton", "reference", "auto"])
def implementation(request):
    """Each path in turn; "auto" is torch's fused code where there is no GPU."""
    if request.param == "triton":
        request.getfixturevalue("kernels")
    return request.param


@each_op
def test_torch(op, implementation):
    pytest.importorskip("torch")
    for dtypes in mixtures(RULES[op]):
        assert in_torch(op, dtypes, implementation) == expected(op, dtypes, None), dtypes


@each_op
@pytest.mark.parametrize("autocast", FLOATS[1:])
def test_torch_under_autocast(op, autocast, implementation):
    pytest.importorskip("torch")
    for dtypes in (*mixtures(RULES[op]), dict.fromkeys(SHAPES[op], "float32")):
        assert in_torch(op, dtypes, implementation, autocast) == expected(op, dtypes, autocast), dtypes


@each_op
def test_jax(op, implementation):
    pytest.importorskip("jax")
    for dtypes in mixtures(RULES[op]):
        assert in_jax(op, dtypes, implementation) == expected(op, dtypes, None), dtypes


@each_op
def test_float64_in_torch(op):
    """It decides, whatever is beside it, under autocast too; beside anything else it is refused."""
    pytest.importorskip("torch")
    for dtypes in mixtures(RULES[op], ("float64",)):
        for autocast in (None, "bfloat16"):
            assert in_torch(op, dtypes, "auto", autocast) == expected(op, dtypes, autocast), dtypes


@each_op
def test_float64_in_jax(op):
    jax = pytest.importorskip("jax")
    with jax.enable_x64(True):
        for dtypes in mixtures(RULES[op], ("float64",)):
            assert in_jax(op, dtypes, "auto") == expected(op, dtypes, None), dtypes


@each_op
def test_float64_beside_less_is_refused(op):
    rule = RULES[op]
    for name in rule.others:
        words = rf"{op}: {name}.* has dtype float64; expected float32, .* beside {rule.decides} in bfloat16"
        with pytest.raises(TypeError, match=words):
            checked(op, dict.fromkeys(SHAPES[op], "bfloat16") | {name: "float64"})
