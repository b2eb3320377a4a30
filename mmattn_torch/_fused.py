"""What torch has fused itself. Where a call falls back from the kernels, it replaces the op's formula.

A call that asks for the reference gets the formula, which has every derivative; see _derivatives.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch._C._functorch import TransformType, get_interpreter_stack

import mmattn
from mmattn.adaln.op import norm as formula
from mmattn.adaln.op import shows_tiny_rows
from mmattn.attention.joint import joint_mask, silenced, split_streams
from mmattn.op import Call, Operands, cast, dtype_name

from . import _arrays


def norm(xp, x, *, eps, center):
    if shows_tiny_rows(x, eps):
        return formula(xp, x, eps=eps, center=center)
    width = x.shape[-1:]
    return F.layer_norm(x, width, eps=eps) if center else F.rms_norm(x, width, eps=eps)


def mapped() -> bool:
    """Whether torch.func.vmap maps the call. SDPA has no rule for that: it would run once for each example, and not for none."""
    if torch.compiler.is_compiling():
        return False
    return any(level.key() == TransformType.Vmap for level in get_interpreter_stack() or ())


def joint_attention(a, *, return_lse, causal, scale, precision):
    if return_lse or mapped():
        static = dict(return_lse=return_lse, causal=causal, scale=scale, precision=precision)
        return mmattn.joint_attention_op.reference(_arrays, a, **static)
    return attention(a.q, a.k, a.v, a.attn_mask, a.key_masks, causal, scale)


def qk_norm_rope_attention(a, *, return_lse, causal, scale, precision, **norm):
    if return_lse or mapped():
        static = dict(return_lse=return_lse, causal=causal, scale=scale, precision=precision, **norm)
        return mmattn.qk_norm_rope_attention_op.reference(_arrays, a, **static)
    streams = tuple(silenced(_arrays, x, m) for x, m in zip(a.qkv, a.key_masks, strict=True))
    operands = Operands(qkv=streams, q_weight=a.q_weight, k_weight=a.k_weight, cos=a.cos, sin=a.sin, start_pos=a.start_pos)
    qk = mmattn.qk_norm_rope_op.reference(_arrays, operands, **norm)
    q, k, v = qk[: len(streams)], qk[len(streams) :], tuple(x[:, :, 2] for x in streams)
    return attention(q, k, v, a.attn_mask, a.key_masks, causal, scale)


def attention(q, k, v, attn_mask, key_masks, causal: bool, scale: float):
    """Outputs per stream. Masked tokens are zeroed first, NaN times 0 would not be silent; SDPA's empty rows are 0."""
    dtype, lengths = dtype_name(v[0]), [x.shape[1] for x in v]
    masked = attn_mask is not None or any(m is not None for m in key_masks) or (causal and len(v) > 1)
    mask = joint_mask(_arrays, q, attn_mask, key_masks, causal)[:, None] if masked else None
    q, k, v = (
        torch.cat([silenced(_arrays, cast(x, dtype), m) for x, m in zip(xs, key_masks, strict=True)], 1).transpose(1, 2)
        for xs in (q, k, v)
    )
    # A branch, since what torch.jit.trace and torch.compile count heads with compares to no bool.
    grouped = dict(enable_gqa=True) if q.shape[1] != k.shape[1] else {}
    o = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal and not masked, scale=scale, **grouped)
    return split_streams(o.transpose(1, 2), lengths, 1)


FUSED = {
    "adaln": partial(mmattn.adaln.reference, _arrays, norm=norm),
    "gated_residual_norm_adaln": partial(mmattn.gated_residual_norm_adaln_op.reference, _arrays, norm=norm),
    "joint_attention": joint_attention,
    "qk_norm_rope_attention": qk_norm_rope_attention,
}


def fused_name(call: Call) -> str | None:
    """What of torch's takes the place of the formula in a call, None where nothing does."""
    static = dict(call.static)
    if call.op.name not in FUSED or static.get("return_lse"):
        return None
    kind = "scaled_dot_product_attention" if "causal" in static else "layer_norm" if static["center"] else "rms_norm"
    return f"torch.nn.functional.{kind}"
