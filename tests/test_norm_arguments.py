"""What the norms refuse, and in which words. No framework is needed: shapes and dtypes are all that is looked at."""

from __future__ import annotations

import re

import pytest

import mmattn
from mmattn.op import Spec

B, L, D = 2, 7, 48
f32 = lambda *shape: Spec(shape, "float32")
X, V, ROW, PICKS = f32(B, L, D), f32(B, D), f32(D), Spec((B, L), "int32")

NORM_ERRORS = {
    "scale has shape (2, 48, 1); expected (B, D)": dict(scale=f32(B, D, 1)),
    "shift has shape (3, 48); expected (B, D) = (2, 48) or (B, 1, D) = (2, 1, 48) or (B, L, D) = (2, 7, 48) or (D) = (48,)": dict(
        shift=f32(3, D)
    ),
    "scale has dtype float64; expected float32, bfloat16, float16 beside x in float32": dict(scale=Spec((B, D), "float64")),
    "scale_base has shape (2, 48); expected (D) = (48,)": dict(scale_base=V),
    "scale has shape (48,) and scale_base was given": dict(scale=ROW, scale_base=ROW),
    "rows was given without scale and shift": dict(rows=PICKS),
    "rows has shape (2, 48); expected (B, L) = (2, 7)": dict(scale=f32(3, D), rows=Spec((B, D), "int32")),
    "rows has dtype float32; expected int32": dict(scale=f32(3, D), rows=f32(B, L)),
    "shift has shape (4, 48); expected (R, D) = (3, 48)": dict(scale=f32(3, D), shift=f32(4, D), rows=PICKS),
    "shift has shape (3, 48); expected (B, R, D) = (2, 3, 48)": dict(scale=f32(B, 3, D), shift=f32(3, D), rows=PICKS),
    "scale has shape (0, 48); expected at least one row": dict(scale=f32(0, D), rows=PICKS),
    "zero_centered=True was given without weight": dict(zero_centered=True),
    "cast is 'never'; expected one of 'after_weight', 'before_weight', 'none'": dict(cast="never"),
    "eps is -1.0; expected a finite number >= 0": dict(eps=-1.0),
}
FUSED_ERRORS = {
    "gate has shape (48,); expected (B, D) = (2, 48) or (B, 1, D)": dict(gate=ROW),
    "gate is a NoneType; expected an array": dict(gate=None),
    "scale has shape (2, 7, 48); expected (B, D)": dict(scale=X),
    "h_weight has shape (2, 48); expected (D) = (48,)": dict(h_weight=V),
    "h has shape (2, 48, 7); expected (B, L, D)": dict(h=f32(B, D, L)),
    "h has dtype float64; expected float32, bfloat16, float16 beside residual in float32": dict(h=Spec((B, L, D), "float64")),
    "gate_fn is 'relu'; expected one of 'identity', 'tanh'": dict(gate_fn="relu"),
    "h_eps is a str; expected a Python float": dict(h_eps="1e-6"),
}


@pytest.mark.parametrize(("message", "arguments"), NORM_ERRORS.items())
@pytest.mark.parametrize("function", [mmattn.layernorm_adaln, mmattn.rmsnorm_adaln])
def test_norm(function, message, arguments):
    with pytest.raises((ValueError, TypeError), match=re.escape(f"{function.__name__}: {message}")):
        function(X, **arguments)


@pytest.mark.parametrize(("message", "arguments"), FUSED_ERRORS.items())
def test_gated_residual_norm_adaln(message, arguments):
    with pytest.raises((ValueError, TypeError), match=re.escape(f"gated_residual_norm_adaln: {message}")):
        mmattn.gated_residual_norm_adaln(**dict(residual=X, h=X, gate=V) | arguments)
