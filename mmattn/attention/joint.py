"""The operation joint_attention: its formula, its arguments."""

from __future__ import annotations

import math

from .. import check
from ..op import Array, Call, Op, Streams, cast, dtype_name, spec, widest
from .plans import any_specs, attention_backward, attention_forward, log_specs, lse_specs, o_specs


def infer(a, *, return_lse, precision, **_):
    return o_specs(a) + (log_specs(a) if return_lse else ()), lse_specs(a, precision) + any_specs(a)


def backward(run, a, outs, extras, douts, *, return_lse, **static):
    dq, dk, dv = attention_backward(run, a, outs, extras, douts, **static)
    return dict(q=dq, k=dk, v=dv)


def ones(xp, x, *shape: int):
    """True in the given shape, on x's device."""
    return xp.broadcast_to(xp.arange(1, like=x) == 0, shape)


def joint_mask(xp, q, attn_mask, key_masks, causal: bool):
    """(B, L, L) over the joint sequence, L the sum of the streams' lengths; q per stream."""
    B, n = q[0].shape[0], len(q)
    rows = []
    for i in range(n):
        row = []
        for t in range(n):
            shape = (B, q[i].shape[1], q[t].shape[1])
            m = ones(xp, q[0], *shape)
            if attn_mask is not None and i == t == 0:
                m = m & attn_mask
            elif attn_mask is not None and i == 0:
                m = m & xp.any(attn_mask, axis=2)[:, :, None]
            elif attn_mask is not None and t == 0:
                m = m & xp.any(attn_mask, axis=1)[:, None, :]
            if causal and i == t:
                m = m & xp.tril(ones(xp, q[0], *shape[1:]))[None]
            for mask, side in ((key_masks[i], 2), (key_masks[t], 1)):
                if mask is not None:
                    m = m & (mask[:, :, None] if side == 2 else mask[:, None, :])
            row.append(m)
        rows.append(xp.concatenate(row, axis=2))
    return xp.concatenate(rows, axis=1)


def silenced(xp, x, mask):
    """x (B, L, ...) with its masked tokens at 0, whatever they hold."""
    return x if mask is None else xp.where(mask.reshape(mask.shape + (1,) * (len(x.shape) - 2)), x, xp.zeros_like(x))


def joined(xp, q, k, v, key_masks) -> list:
    """q, k and v of all streams end to end, wide, masked tokens at 0."""
    dtype = widest(*q, *k, *v)
    silent = lambda xs: [cast(silenced(xp, x, m), dtype) for x, m in zip(xs, key_masks, strict=True)]
    return [xp.concatenate(silent(xs), axis=1) for xs in (q, k, v)]


def split_streams(x, lengths, axis: int) -> tuple:
    """The streams of a joint array, whose tokens are axis 1 or 2."""
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return tuple(x[:, end - n : end] if axis == 1 else x[:, :, end - n : end] for n, end in zip(lengths, ends, strict=True))


def per_query_head(xp, x, heads: int):
    """x (B, L, H_kv, d) with each head as often as heads of q read it: (B, L, heads, d)."""
    B, L, kv_heads, d = x.shape
    if kv_heads == heads:
        return x
    return xp.broadcast_to(x[:, :, :, None], (B, L, kv_heads, heads // kv_heads, d)).reshape(B, L, heads, d)


HIDDEN = -3e38  # in place of a hidden key's score: less than any, but finite, since JAX's debug_infs looks at every array


def attention_reference(xp, q, k, v, attn_mask, key_masks, *, causal: bool, scale: float, return_lse: bool):
    """Outputs per stream in v's dtype, followed by the log-sum-exps where they are wanted, wide."""
    dtype, lengths = spec(v[0]).dtype, [x.shape[1] for x in q]
    mask = joint_mask(xp, q, attn_mask, key_masks, causal)[:, None]
    q, k, v = joined(xp, q, k, v, key_masks)
    k, v = (per_query_head(xp, x, q.shape[2]) for x in (k, v))
    s = xp.where(mask, xp.einsum("bqhd,bkhd->bhqk", q, k) * scale, HIDDEN)
    largest = xp.amax if sum(lengths) else xp.sum  # of no score at all there is no maximum, but a sum
    top = largest(s, axis=-1, keepdims=True)
    p = xp.where(mask, xp.exp(s - top), 0.0)
    total = xp.sum(p, axis=-1, keepdims=True)
    seen = total != 0  # NaN is not 0, and must not be silent
    total = xp.where(seen, total, 1.0)
    o = split_streams(xp.einsum("bhqk,bkhd->bqhd", p / total, v), lengths, 1)
    o = tuple(cast(x, dtype) for x in o)
    if not return_lse:
        return o
    return o + split_streams(xp.where(seen, xp.log(total) + top, -math.inf)[..., 0], lengths, 2)


def reference(xp, a, *, precision, **static):
    return attention_reference(xp, a.q, a.k, a.v, a.attn_mask, a.key_masks, **static)


joint_attention_op = Op(
    "joint_attention",
    operands=("q", "k", "v", "attn_mask", "key_masks"),
    infer=infer,
    forward=attention_forward,
    backward=backward,
    reference=reference,
    keeps=frozenset({"q", "k", "v", "attn_mask", "key_masks"}),
    keeps_outs=True,
    constant=frozenset({"attn_mask", "key_masks"}),
    dense={"q": 2, "k": 2, "v": 2},
)


def mask_operands(op: str, name: str, streams, attn_mask, key_masks) -> dict:
    """Checked masks of streams whose tokens are axis 1; `name` is the argument that they are."""
    B, L = streams[0].shape[:2]
    key_masks = check.streams(op, "key_masks", key_masks, (name, len(streams)))
    if attn_mask is not None:
        check.shape(op, "attn_mask", attn_mask, ("B, L, L", (B, L, L)), remedy=f"The mask is over the first stream of {name}.")
        check.boolean(op, "attn_mask", attn_mask)
    for x, (mask_name, m) in zip(streams, key_masks, strict=True):
        if m is not None:
            remedy = "Give one bool per token of the stream, True = a real token."
            check.shape(op, mask_name, m, ("B, L_s", (B, x.shape[1])), remedy=remedy)
            check.boolean(op, mask_name, m)
    return dict(attn_mask=attn_mask, key_masks=tuple(m for _, m in key_masks))


def joint_operands(op: str, q, k, v, *, grouped: bool) -> tuple[dict, bool]:
    """Checked q, k, v per stream, and whether they came as bare arrays. grouped: several heads of q may share one of k and v."""
    single = not isinstance(q, tuple | list)
    q, k, v = (check.streams(op, name, x) for name, x in (("q", q), ("k", k), ("v", v)))
    for name, x in (*q, *k, *v):
        check.rank(op, name, x, "B, L, H, d", "Split the heads: (batch, tokens, heads, head width).")
    n = len(q)
    if len(k) != n or len(v) != n:
        raise ValueError(
            f"{op}: q, k, v have {n}, {len(k)}, {len(v)} streams; expected one number of them. Give each one entry per stream."
        )
    (q_name, q0), (k_name, k0), (v_name, v0) = q[0], k[0], v[0]
    B, _, H, d = q0.shape
    padded = "Pad q, k and v with zeros to one, the result's first columns are the same"
    check.head_width(op, f"the head width of {q_name}", d, f"{padded} if scale is given." if grouped else f"{padded}.")
    dtype = check.floating(op, v_name, v0)
    kv_heads = k0.shape[2]
    if (not grouped and kv_heads != H) or kv_heads == 0 or H % kv_heads:
        expected = f"a divisor of q's {H} heads, which share them in groups" if grouped else f"q's {H} heads"
        raise ValueError(f"{op}: {k_name} has {kv_heads} heads; expected {expected}. Project k and v to so many heads.")
    for name, x in ((q_name, q0), (k_name, k0)):
        check.beside(op, name, x, dtype, "v")
    for i in range(n):
        q_name, x = q[i]
        L = x.shape[1]
        check.shape(op, q_name, x, ("B, L_s, H, d", (B, L, H, d)), remedy="All streams share B, H and d.")
        for name, y in (k[i], v[i]):
            want = ("B, L_s, H_kv, d", (B, L, kv_heads, d))
            check.shape(op, name, y, want, remedy="k and v share their shape, their heads are the same in all streams.")
        for xs in (q, k, v):
            check.same_dtype(op, *xs[i], dtype_name(xs[0][1]), xs[0][0])
            check.addressable(op, *xs[i], 2)
    return {name: tuple(x for _, x in xs) for name, xs in (("q", q), ("k", k), ("v", v))}, single


def attention_static(op: str, d: int, causal, scale, return_lse, precision) -> dict:
    for name, flag in (("causal", causal), ("return_lse", return_lse)):
        check.flag(op, name, flag)
    if scale is not None:
        expected = "None for 1 / sqrt(d), or a number that is finite in float32"
        scale = check.number(op, "scale", scale, -check.FLOAT32_MAX, expected, "Leave it out, or pass such a number.")
    check.choice(op, "precision", precision, ("ieee", "tf32"))
    scale = int(d) ** -0.5 if scale is None else scale  # torch.jit.trace counts with tensors, and the scale is a number
    return dict(causal=causal, scale=scale, return_lse=return_lse, precision=precision)


def attention_result(n: int, single: bool, return_lse: bool):
    """outs -> outputs per stream, with their log-sum-exps on request; bare arrays where the arguments were."""
    one = (lambda x: x[0]) if single else tuple
    return lambda outs: (one(outs[:n]), one(outs[n:])) if return_lse else one(outs[:n])


def joint_attention(
    q: Streams,
    k: Streams,
    v: Streams,
    *,
    attn_mask: Array | None = None,
    key_masks: Streams | None = None,
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    precision: str = "ieee",
) -> Call:
    """o_s = softmax(scale * q_s [k_0, k_1, ...]^T) [v_0, v_1, ...]: every stream attends to the tokens of all streams.

    q          (B, L_s, H, d) per stream; d a multiple of 8, 8 to 128. A single array is one stream. The
               streams are not concatenated in memory.
    k, v       (B, L_s, H, d), or (B, L_s, H_kv, d) where H / H_kv heads of q in a row share one (grouped-query attention).
               v is float32, bfloat16 or float16, q and k any of them; they are rounded to v's dtype (docs/dtypes.md).
    attn_mask  (B, L_0, L_0) bool over the first stream, True = attend. For pairs with another stream any() of its row or
               column stands in, and the other streams see each other.
    key_masks  per stream (B, L_s) bool or None, True = a real token. A masked token is silent both ways: nobody attends to
               it, its output is 0 and its gradients are 0, whatever it holds, NaN included. Mind that
               torch.nn.MultiheadAttention's key_padding_mask means the opposite.
    causal     limits keys of the query's own stream to its own position and before.
    scale      default 1 / sqrt(d).
    returns    (B, L_s, H, d) per stream in v's dtype; with return_lse a pair (outputs, lses), lse (B, H, L_s) float32, the
               natural logarithm of the sum of exponentials, differentiable.

    A key that attn_mask or causal hides has weight 0: as long as products with its k and v are finite, outputs and gradients do
    not depend on them, but for their rounding. NaN or infinity there is not silent, since 0 * NaN is NaN, and which outputs it
    reaches differs between the kernels and the reference. Padding that may hold such values needs key_masks.

    A row without any key has output 0, lse -inf and gradient 0. Scores and sums are float32; float32 dots are IEEE unless
    the framework's matmul precision asks for tf32, for which operands are rounded to the nearest. Raises ValueError or TypeError
    that names the argument.
    FlashAttention-2: Dao 2023, arXiv:2307.08691. Grouped queries: Ainslie et al. 2023, arXiv:2305.13245.
    Joint attention of MMDiT: Esser et al. 2024, arXiv:2403.03206.
    """
    op = "joint_attention"
    operands, single = joint_operands(op, q, k, v, grouped=True)
    streams = operands["q"]
    operands |= mask_operands(op, "q", streams, attn_mask, key_masks)
    static = attention_static(op, streams[0].shape[3], causal, scale, return_lse, precision)
    return Call(joint_attention_op, operands, tuple(static.items()), attention_result(len(streams), single, return_lse))
