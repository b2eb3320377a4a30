"""The operation qk_norm_rope_attention: norm, rotation and joint attention of packed projections."""

from __future__ import annotations

from ..op import Array, Call, Op, Operands, Spec, Streams, spec
from ..qk_norm_rope import norm_backward, norm_forward, norm_operands, norm_reference
from .joint import attention_reference, attention_result, attention_static, infer, mask_operands, silenced
from .plans import attention_backward, attention_forward, folded_scale

NORM = ("over", "eps", "layout")


def parts(static: dict) -> tuple[dict, dict]:
    """Static arguments of the norm, and of the attention."""
    return {k: static[k] for k in NORM}, {k: v for k, v in static.items() if k not in NORM}


def on_packed(a, q, k) -> Operands:
    """Operands of the attention that follows the norm: v is read from the packed projections."""
    return Operands(q=q, k=k, v=a.qkv, attn_mask=a.attn_mask, key_masks=a.key_masks)


def seam(a, scale: float, **_) -> tuple[float, dict]:
    """What q is multiplied by before it is rounded, and what the attention must know of q and v."""
    (_, _, _, H, d), dtype = spec(a.qkv[0])
    factor = folded_scale(scale, dtype)
    return factor or 1.0, dict(v_at=2 * H * d, folded=factor is not None)


def qk_specs(a) -> tuple[Spec, ...]:
    return tuple(Spec((x.shape[0], x.shape[1], x.shape[3], x.shape[4]), spec(x).dtype) for x in a.qkv)


def fused_infer(a, **static):
    qk = qk_specs(a)
    outs, residuals = infer(on_packed(a, qk, qk), **static)
    return outs, qk + qk + residuals


def fused_forward(run, a, **static):
    norm, attention = parts(static)
    q_scale, known = seam(a, **attention)
    b = on_packed(a, *norm_forward(run, a, a.key_masks, q_scale=q_scale, **norm))
    outs, residuals = attention_forward(run, b, **attention, **known)
    return outs, b.q + b.k + residuals


def fused_backward(run, a, outs, extras, douts, *, return_lse, **static):
    n = len(a.qkv)
    norm, attention = parts(static)
    b, (_, known) = on_packed(a, tuple(extras[:n]), tuple(extras[n : 2 * n])), seam(a, **attention)
    dq, dk, dv = attention_backward(run, b, outs, extras[2 * n :], douts, wide=True, **attention, **known)
    return norm_backward(run, a, dq, dk, dv, a.key_masks, **norm)


def fused_reference(xp, a, *, return_lse, causal, scale, precision, **norm):
    streams = tuple(silenced(xp, x, m) for x, m in zip(a.qkv, a.key_masks, strict=True))
    q, k = (
        tuple(
            norm_reference(xp, qkv[:, :, part], w, cos, sin, a.start_pos, **norm)
            for qkv, w, cos, sin in zip(streams, weights, a.cos, a.sin, strict=True)
        )
        for part, weights in ((0, a.q_weight), (1, a.k_weight))
    )
    v = tuple(x[:, :, 2] for x in streams)
    return attention_reference(xp, q, k, v, a.attn_mask, a.key_masks, causal=causal, scale=scale, return_lse=return_lse)


qk_norm_rope_attention_op = Op(
    "qk_norm_rope_attention",
    operands=("qkv", "q_weight", "k_weight", "cos", "sin", "start_pos", "attn_mask", "key_masks"),
    infer=fused_infer,
    forward=fused_forward,
    backward=fused_backward,
    reference=fused_reference,
    keeps=frozenset({"qkv", "q_weight", "k_weight", "cos", "sin", "start_pos", "attn_mask", "key_masks"}),
    keeps_outs=True,
    constant=frozenset({"cos", "sin", "start_pos", "attn_mask", "key_masks"}),
    shared={"q_weight": 1, "k_weight": 1, "cos": 2, "sin": 2},
)


def qk_norm_rope_attention(
    qkv: Streams,
    q_weight: Streams,
    k_weight: Streams,
    *,
    over: str,
    eps: float = 1.1920929e-7,
    cos: Streams | None = None,
    sin: Streams | None = None,
    start_pos: Array | None = None,
    layout: str = "interleaved",
    attn_mask: Array | None = None,
    key_masks: Streams | None = None,
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    precision: str = "ieee",
    start_extent: tuple[int, int] | None = None,
) -> Call:
    """joint_attention(*qk_norm_rope(qkv, ...), v) for packed projections of one or more streams: what the modules call.

    The arguments before attn_mask are qk_norm_rope's, the others joint_attention's. v is read from the packed projections
    and its gradient is written into theirs.
    """
    op = "qk_norm_rope_attention"
    operands, norm = norm_operands(op, qkv, q_weight, k_weight, over, eps, cos, sin, start_pos, layout, start_extent)
    streams = operands["qkv"]
    static = norm | attention_static(op, streams[0].shape[4], causal, scale, return_lse, precision)
    operands |= mask_operands(op, "qkv", streams, attn_mask, key_masks)
    single = not isinstance(qkv, tuple | list)
    return Call(qk_norm_rope_attention_op, operands, tuple(static.items()), attention_result(len(streams), single, return_lse))
