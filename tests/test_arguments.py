"""What the operations refuse, and in which words: the same in both frameworks and for both implementations."""

from __future__ import annotations

import re

import numpy as np
import pytest

from mmattn.op import Spec

f32 = lambda *shape: Spec(shape, "float32")
i32 = lambda *shape: Spec(shape, "int32")

B, L, H, d = 2, 5, 2, 8
NORM = dict(qkv=f32(B, L, 3, H, d), q_weight=f32(d), k_weight=f32(d), over="head")
GOOD = dict(qk_norm_rope=NORM, qk_norm_rope_attention=NORM)

ROPE = ("qk_norm_rope", "qk_norm_rope_attention")
REFUSED = [  # ops, arguments that take the place of good ones, what the message begins with
    (ROPE, dict(cos=f32(6, 4), sin=f32(10, 4)), "sin[0] has shape (10, 4); expected (S, d/2) = (6, 4)"),
    (ROPE, dict(cos=f32(10, 4), sin=f32(6, 4)), "sin[0] has shape (6, 4); expected (S, d/2) = (10, 4)"),
    (ROPE, dict(cos=f32(10, 4), sin=f32(6, 4), start_pos=i32(B)), "sin[0] has shape (6, 4); expected (S, d/2) = (10, 4)"),
    (ROPE, dict(cos=f32(B, 6, 4), sin=f32(B, 10, 4)), "sin[0] has shape (2, 10, 4); expected (B, S, d/2) = (2, 6, 4)"),
    (ROPE, dict(cos=f32(B, 6, 4), sin=f32(1, 6, 4)), "sin[0] has shape (1, 6, 4); expected (B, S, d/2) = (2, 6, 4)"),
    (ROPE, dict(cos=f32(B, 6, 4), sin=f32(6, 4)), "sin[0] has shape (6, 4); expected (B, S, d/2) = (2, 6, 4)"),
    (ROPE, dict(cos=f32(6, 4), sin=f32(6, 3)), "sin[0] has shape (6, 3); expected (S, d/2) = (6, 4)"),
    (ROPE, dict(cos=f32(6, 4), sin=f32(0, 4)), "sin[0] has shape (0, 4); expected (S, d/2) = (6, 4)"),
    (ROPE, dict(cos=f32(6, 4), sin=f32()), "sin[0] has shape (); expected (S, d/2) = (6, 4)"),
    (ROPE, dict(cos=f32(), sin=f32()), "cos[0] has shape (), rank 0; expected (S, d/2) or (B, S, d/2)"),
    (ROPE, dict(cos=f32(6, 0), sin=f32(6, 0)), "cos[0] has shape (6, 0); expected (S, d/2) = (6, 1)"),
    (ROPE, dict(cos=f32(6, 5), sin=f32(6, 5)), "cos[0] has shape (6, 5); expected (S, d/2) = (6, 4)"),
    (
        ROPE,
        dict(cos=f32(3, 6, 4), sin=f32(3, 6, 4)),
        "cos[0] has shape (3, 6, 4); expected (S, d/2) = (6, 4) or (B, S, d/2) = (2,",
    ),
    # No start leaves all tokens within a table with fewer rows than tokens.
    (ROPE, dict(cos=f32(4, 4), sin=f32(4, 4)), "cos[0] has shape (4, 4); expected (S, d/2) = (5, 4)"),
    (ROPE, dict(cos=f32(4, 4), sin=f32(4, 4), start_pos=i32(B)), "cos[0] has shape (4, 4); expected (S, d/2) = (5, 4)"),
    (ROPE, dict(cos=f32(0, 4), sin=f32(0, 4), start_pos=i32(B)), "cos[0] has shape (0, 4); expected (S, d/2) = (5, 4)"),
    (ROPE, dict(cos=f32(6, 4)), "only one of cos[0] and sin[0] is given; expected both or neither"),
    (ROPE, dict(sin=f32(6, 4)), "only one of cos[0] and sin[0] is given; expected both or neither"),
]
CASES = [(op, arguments, message) for ops, arguments, message in REFUSED for op in ops]


def made(framework, x):
    """The argument that a Spec stands for; anything else as it is."""
    if isinstance(x, Spec):
        return framework.put(np.zeros(x.shape), x.dtype)
    return type(x)(made(framework, y) for y in x) if type(x) in (tuple, list) else x


@pytest.mark.parametrize(("op", "arguments", "message"), CASES)
def test_refused(op, arguments, message, framework):
    given = {name: made(framework, x) for name, x in (GOOD[op] | arguments).items()}
    for implementation in ("triton", "reference"):
        with pytest.raises((ValueError, TypeError), match=re.escape(f"{op}: {message}")):
            getattr(framework.ops, op)(**given, implementation=implementation)
