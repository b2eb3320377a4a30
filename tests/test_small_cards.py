"""Launches for a card with 99 KB of shared memory, run on what there is: a large GPU, or the interpreter.

What they ask for is compared with what such a card has in tests/test_plans.py, which compiles for it; here their results are.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from importlib import import_module

import frameworks
import pytest
from cases import Case, Normal, heads, key_masks, picks

SHARED = 101_376


@pytest.fixture
def small_card(kernels, monkeypatch):
    """The frameworks' target, but for its shared memory. Without Gluon, which asks for more."""
    small = lambda target: lambda *device: target(*device)._replace(shared=SHARED, gluon=False)
    for name in frameworks.INSTALLED:
        bind = import_module(f"mmattn_{name}._bind")
        monkeypatch.setattr(bind, "target", small(bind.target))


@contextmanager
def products_in_tf32():
    with ExitStack() as stack:
        if "torch" in frameworks.INSTALLED:
            import torch

            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("high")
        if "jax" in frameworks.INSTALLED:
            import jax

            stack.enter_context(jax.default_matmul_precision("tensorfloat32"))
        yield


LENGTHS, REAL = (37, 70), ((37, 20), (1, 65))
ATTENTION = [
    Case(
        "joint_attention",
        f"small-card-{d}{'-key-masks' * masked}",
        heads(2, 2, d, *LENGTHS, real=REAL if masked else ()) | (key_masks(LENGTHS, REAL) if masked else {}),
    )
    for d, masked in ((72, False), (96, True), (128, False))
]
LINEAR = Case("relu_linear_attention", "small-card-128", heads(1, 2, 128, 37, 5, gap=0.05))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", pytest.param("float32", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("case", [*ATTENTION, LINEAR], ids=str)
def test_attention(case, dtype, framework, small_card):
    frameworks.check(case, dtype, frameworks.call(framework, case, dtype))


@pytest.mark.gpu  # the interpreter's products are exact
@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_attention_in_tf32(case, framework, small_card):
    """An operand has 11 bits: results are as far from float64 as float16's are."""
    with products_in_tf32():
        result = frameworks.call(framework, case, "float32")
    exact = frameworks.formula_in(case, "float32", "float64").values
    for name, x in result.values.items():
        error = frameworks.distance(x, exact[name], frameworks.NORMS["l2"])
        assert error < 4e-3, f"{name}: {error:.2g}"


x = dict(x=Normal((1, 2, 8200)))
both = lambda *shape: dict(scale=Normal(shape), shift=Normal(shape))
WIDE = [
    Case("layernorm_adaln", "small-card-per-token", x | both(1, 2, 8200)),
    Case("layernorm_adaln", "small-card-rows", x | both(3, 8200) | picks(1, 2, 3)),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("case", WIDE, ids=str)
def test_modulation_of_wide_tokens(case, dtype, framework, kernels):
    """With the shared memory that the GPU has: float32 asked for more than an H200's."""
    frameworks.check(case, dtype, frameworks.call(framework, case, dtype))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("case", WIDE, ids=str)
def test_modulation_of_wide_tokens_on_a_small_card(case, dtype, framework, small_card):
    frameworks.check(case, dtype, frameworks.call(framework, case, dtype))
