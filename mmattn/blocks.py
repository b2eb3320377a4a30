"""The blocks, written once over (ops, m): `ops` holds a framework's operations, `m` is the module that holds the layers.

One block of the seed, for the token stream x and, where the module has one, the context stream c with its own weights:

    s1, b1, g1, s2, b2, g2 = W silu(y)
    o = Attention(LN(x) * (1 + s1) + b1, ...)         all streams attend to all streams' keys
    x = x + g1 * o
    x = x + g2 * MLP(LN(x) * (1 + s2) + b2)           MLP = Linear, SiLU, Linear, Dropout

Without conditioning LN has a weight and a bias of its own, s = b = 0 and g = 1. With context_pre_only the context gives keys and
values to the attention and is left as it is: of the above it has s1, b1 and the norm.

Each gated residual and the norm behind it, Attention's last RMSNorm included, are one operation, and so are the norms of q and k,
RoPE and attention. Such an operation reads the weight of a layer that it does not call. Where that would be noticed (hooks,
sharding, offloading, a user's own layer: `ops.untouched` is false), the layer is called, and what it was joined with is done
apart: the same mathematics, rounded once more.

Likewise from one block of a stack to the next: what the MLP says is added by the operation that begins the next block, unless one
of the two is touched. Such an Unadded stream is seen in this file only: public modules are given arrays and return arrays.

Padding (x_mask, context_mask; True = token) is silent both ways: it enters and leaves every module as 0, so whatever it
holds, NaN included, reaches no output, and no gradient comes back through it. Within a block, or a stack, the padding's own
rows are finite and nobody reads them: attention hears no masked token, and all else works on one token at a time.

What `ops` has besides the public operations:
    rows(v, n)                n row vectors per sample of v (B, n * D) or (B, 1, n * D), read in place
    angles(m, x, n)           cos and sin of RoPE's first n positions at least, on x's device
    vector(weight)            a layer's weight as an operand of an operation
    untouched(m, kind)        whether m is our own "RMSNorm", "Sequential", "Attention" or "GPT2Block", and nobody would notice if
                              m was not called but its layers and weights were used
    xp                        the array namespace
    where(mask, x, 0)
    extent(start_pos)         smallest and largest value, None where they cannot be seen without a synchronisation
    per_sample(start_pos, x)  start_pos as an array (B,) on x's device
"""

from __future__ import annotations

from typing import Any, NamedTuple

from . import check
from .op import cast, dtype_name, wide
from .qk_norm_rope import rotate

LAYER_NORM_EPS = 1e-6
RMS_NORM_EPS = 1.1920929e-7  # what torch.nn.RMSNorm(eps=None) means in every dtype but float64


class AttentionOutput(NamedTuple):
    """Updated tokens (B, L, D) and, where a context was given, updated context (B, C, D)."""

    x_out: Any
    context_out: Any = None


class Unadded(NamedTuple):
    """A stream x + gate * h that is not yet added up; h is None where it is."""

    x: Any
    h: Any = None
    gate: Any = None


def head_width(name: str, dim: int, num_head: int, dim_head: int | None) -> int:
    """Width of one head, checked."""
    check.width(name, "dim", dim)
    if not isinstance(num_head, int) or num_head < 1:
        raise ValueError(f"{name}: the number of heads is {num_head!r}; expected an int, at least 1. The seed has 4.")
    if dim_head is None:
        if dim % num_head:
            raise ValueError(
                f"{name}: dim = {dim} is not divisible by num_head = {num_head}. Choose num_head to divide it, or give dim_head."
            )
        dim_head = dim // num_head
    if dim_head % 2:
        raise ValueError(
            f"{name}: the head width is {dim_head}; expected an even one, RoPE turns pairs. Choose another num_head or dim_head."
        )
    check.width(name, "the head width", dim_head, 8, 128)
    return dim_head


def check_block(name: str, dropout: float, conditioning: bool, use_cross_attn: bool, context_pre_only: bool) -> None:
    if not 0 <= dropout < 1:
        raise ValueError(f"{name}: dropout is {dropout}; expected a probability, 0 <= dropout < 1. Use 0 for no dropout.")
    if use_cross_attn and not conditioning:
        raise ValueError(
            f"{name}: use_cross_attn=True needs conditioning=True: the context stream has no norm weights of its own."
        )
    check_pre_only(name, context_pre_only, "use_cross_attn", use_cross_attn)


def check_pre_only(name: str, context_pre_only: bool, argument: str, has_context: bool) -> None:
    if context_pre_only and not has_context:
        raise ValueError(f"{name}: context_pre_only=True needs {argument}=True: without a context there is nothing to leave out.")


PREFIXES = ("", "c_")  # of the layers of tokens and context


def attention(ops, m, x, context=None, attn_mask=None, start_pos=None, x_mask=None, context_mask=None) -> AttentionOutput:
    """Joint attention of one or two streams, with QK-RMSNorm over the full width and RoPE on the tokens only."""
    streams, masks = checked_streams(type(m).__name__, m, x, context, x_mask, context_mask, m.use_context)
    outs = attended(ops, m, streams, masks, attn_mask, start_pos)
    return AttentionOutput(
        *(silent(ops, getattr(m, prefix + "to_out")(o), mask) for prefix, o, mask in zip(PREFIXES, outs, masks, strict=False))
    )


def branches(ops, m, streams, masks, attn_mask, start_pos):
    """What a block's attention m says to each stream, and its last RMSNorm if that is not applied yet, or None."""
    if not ops.untouched(m, "Attention"):
        return [(o, None) for o in m(*streams, attn_mask, start_pos, *masks) if o is not None]
    outs = attended(ops, m, streams, masks, attn_mask, start_pos)
    return [projected(ops, getattr(m, prefix + "to_out"), o) for prefix, o in zip(PREFIXES, outs, strict=False)]


def projected(ops, to_out, o):
    if not (ops.untouched(to_out, "Sequential") and ops.untouched(to_out[-1], "RMSNorm")):
        return to_out(o), None
    *layers, norm = to_out
    for layer in layers:
        o = layer(o)
    return o, norm


def attended(ops, m, streams, masks, attn_mask, start_pos):
    """The heads' outputs of each stream side by side, (B, L, heads * head width)."""
    name, x = type(m).__name__, streams[0]
    attn_mask = boolean_mask(name, attn_mask, x)
    n, inner = len(streams), m.num_head * m.dim_head
    prefixes = PREFIXES[:n]
    # Of a context that is left as it is, there are no queries to norm.
    q_norms, k_norms = ([getattr(m, f"{prefix}rms_norm_{part}") for prefix in prefixes] for part in "qk")
    asks = [norm is not None for norm in q_norms]

    qkv = tuple(
        packed(ops, m, getattr(m, prefix + "to_qkv")(silent(ops, s, mask)), ask)
        for prefix, s, mask, ask in zip(prefixes, streams, masks, asks, strict=True)
    )
    cos, sin = ops.angles(m, x, x.shape[1] if start_pos is None else m.max_seq_len)
    rope = dict(cos=(cos, None)[:n], sin=(sin, None)[:n], start_pos=positions(ops, m, x, start_pos))
    joined = all(ops.untouched(norm, "RMSNorm") for norm in (*q_norms, *k_norms) if norm is not None)
    if joined:
        k_weight = tuple(ops.vector(norm.weight) for norm in k_norms)
        # Where q is 0 any weight will do.
        q_weight = tuple(w if norm is None else ops.vector(norm.weight) for norm, w in zip(q_norms, k_weight, strict=True))
        qk = dict(q_weight=q_weight, k_weight=k_weight, over="width", eps=RMS_NORM_EPS, **rope)
    if joined and not m.linear:
        outs = ops.qk_norm_rope_attention(qkv, **qk, attn_mask=attn_mask, key_masks=masks)
    else:
        q, k = ops.qk_norm_rope(qkv, **qk) if joined else normed(ops, qkv, q_norms, k_norms, **rope)
        attend = linear_attention if m.linear else softmax_attention
        outs = attend(ops, q, k, tuple(s[:, :, 2] for s in qkv), attn_mask, masks)
    return [o.reshape(*o.shape[:2], inner) for o, ask in zip(outs, asks, strict=True) if ask]


def packed(ops, m, projection, asks: bool):
    """A projection as (B, L, 3, H, d). A stream that gives keys and values only gets q = 0: the operations have no such streams
    yet, so its output is computed like any other, and left out."""
    B, L, _ = projection.shape
    x = projection.reshape(B, L, 3 if asks else 2, m.num_head, m.dim_head)
    return x if asks else ops.xp.concatenate([ops.xp.zeros_like(x[:, :, :1]), x], axis=2)


def normed(ops, qkv, q_norms, k_norms, cos, sin, start_pos):
    """What qk_norm_rope does, by calls of the norms."""

    def one(x, norm, c, s):
        B, L, H, d = x.shape
        y = x if norm is None else norm(x.reshape(B, L, H * d)).reshape(B, L, H, d)
        if c is None:
            return y
        turned = rotate(ops.xp, wide(y), ops.xp.asarray(c), ops.xp.asarray(s), start_pos, "interleaved")
        return cast(turned, dtype_name(y))

    return [tuple(map(one, (x[:, :, i] for x in qkv), norms, cos, sin)) for i, norms in enumerate((q_norms, k_norms))]


def softmax_attention(ops, q, k, v, attn_mask, masks):
    return ops.joint_attention(q, k, v, attn_mask=attn_mask, key_masks=masks)


def linear_attention(ops, q, k, v, attn_mask, masks):
    """ReLU linear attention. Of attn_mask the seed reads the first query's row, and hides the keys that it excludes."""
    if attn_mask is not None:
        first = attn_mask[:, 0]
        seen = (first, first.any(-1)[:, None])
        k = tuple(ops.where(mask[..., None, None], x, 0) for mask, x in zip(seen, k, strict=False))
    return ops.relu_linear_attention(q, k, v, key_masks=masks)


def block(ops, m, x, y=None, attn_mask=None, context=None, start_pos=None, x_mask=None, context_mask=None) -> AttentionOutput:
    masks = x_mask, context_mask
    streams = advanced(ops, m, unadded(x, context), y, attn_mask, start_pos, *masks)
    return AttentionOutput(*finished(ops, streams, masks))


def stack(ops, m, x, y=None, attn_mask=None, context=None, start_pos=None, x_mask=None, context_mask=None) -> AttentionOutput:
    masks, streams = (x_mask, context_mask), unadded(x, context)
    for layer in m.layers:
        if ops.untouched(layer, "GPT2Block"):
            streams = advanced(ops, layer, streams, y, attn_mask, start_pos, *masks)
        else:
            x, context = (*finished(ops, streams, masks), None)[:2]
            streams = unadded(*layer(x, y, attn_mask, context, start_pos, *masks))
    return AttentionOutput(*finished(ops, streams, masks))


def unadded(*streams):
    return [Unadded(s) for s in streams if s is not None]


def advanced(ops, m, streams, y, attn_mask, start_pos, x_mask, context_mask):
    """Unadded streams in front of a block -> behind it."""
    name = type(m).__name__
    x, context = (*(s.x for s in streams), None)[:2]
    _, masks = checked_streams(name, m, x, context, x_mask, context_mask, m.use_cross_attn)
    check_inputs(name, m, x, y, context)
    layers, attn = ((m, m.context_layers), m.cross_attn) if m.use_cross_attn else ((m,), m.attn)
    modulations = [modulation(ops, layer, y) for layer in layers]

    streams = [Unadded(silent(ops, s.x, mask)) if s.h is None else s for s, mask in zip(streams, masks, strict=True)]
    first = [add_norm(ops, *s, layer.ln_1, rows) for s, layer, (rows, _) in zip(streams, layers, modulations, strict=True)]
    said = branches(ops, attn, [n for _, n in first], masks, attn_mask, start_pos)
    updated = list(zip(first, layers, modulations, strict=True))[: 1 if m.context_pre_only else None]
    second = [
        add_norm(ops, s, h, gate_of(rows), layer.ln_2, mlp_rows, post)
        for ((s, _), layer, (rows, mlp_rows)), (h, post) in zip(updated, said, strict=True)
    ]
    behind = [Unadded(s, layer.mlp(n), gate_of(rows)) for (s, n), (_, layer, (_, rows)) in zip(second, updated, strict=True)]
    return behind + [Unadded(s) for s, _ in first[len(behind) :]]


def finished(ops, streams, masks):
    """The streams added up, their padding 0."""
    return [silent(ops, add(ops, *s), mask) for s, mask in zip(streams, masks, strict=False)]


def modulation(ops, layers, y):
    """(scale, shift, gate) of the attention and of the MLP; None and None without conditioning. A context that is left as it is
    has scale and shift of the attention only."""
    if y is None:
        return None, None
    rows = ops.rows(layers.adaLN_modulation(y), 2 if layers.pre_only else 6)
    return rows[:3], rows[3:]


def gate_of(rows):
    return None if rows is None else rows[2]


def add_norm(ops, x, h, gate, layer_norm, rows, post=None):
    """x + gate * h and its norm, modulated by `rows` or with weights of its own; post is the RMSNorm of h, if it has one."""
    if h is not None and gate is not None and rows is not None:
        h_weight = None if post is None else ops.vector(post.weight)
        norm = dict(eps=LAYER_NORM_EPS, h_weight=h_weight, h_eps=RMS_NORM_EPS)
        return ops.gated_residual_norm_adaln(x, h, gate, *rows[:2], **norm)
    x = add(ops, x, h if post is None else post(h), gate)
    return x, layer_norm(x) if rows is None else ops.layernorm_adaln(x, *rows[:2], eps=LAYER_NORM_EPS)


def add(ops, x, h, gate):
    """x plus a branch, if there is one, in x's dtype."""
    if h is None:
        return x
    return cast(x + h, dtype_name(x)) if gate is None else ops.gated_residual(x, h, gate)


def silent(ops, x, mask):
    return x if mask is None else ops.where(mask[..., None], x, 0)


def boolean_mask(name: str, mask, x):
    """attn_mask (B, L, L) as booleans; of integers, non-zero = attend."""
    if mask is None:
        return None
    B, L, _ = x.shape
    check.shape(
        name, "attn_mask", mask, ("B, L, L", (B, L, L)), remedy="It covers the tokens; the context's part follows from it."
    )
    check.boolean(name, "attn_mask", mask, integers=True)
    return mask if dtype_name(mask) == "bool" else mask != 0


def positions(ops, m, x, start_pos):
    name, tokens, limit = type(m).__name__, x.shape[1], m.max_seq_len
    if tokens > limit:
        raise ValueError(
            f"{name}: x has {tokens} tokens; expected at most max_seq_len = {limit}. Build the module with a larger max_seq_len."
        )
    if start_pos is None:
        return None
    if not isinstance(start_pos, int):
        check.shape(
            name, "start_pos", start_pos, ("B", (x.shape[0],)), ("", ()), remedy="Give an int, or one start position per sample."
        )
    check.positions(name, ops.extent(start_pos), tokens, limit)
    return ops.per_sample(start_pos, x)


def checked_streams(name: str, m, x, context, x_mask, context_mask, has_context: bool):
    """The streams that are given and their padding masks, as tuples."""
    if context is None and context_mask is not None:
        raise ValueError(f"{name}: context_mask was given without context. Give the context it belongs to, or leave it out.")
    if context is not None and not has_context:
        raise ValueError(
            f"{name}: context was given, but the module was built without it. "
            "Build an attention with use_context=True, a block with use_cross_attn=True, or leave context out."
        )
    streams, masks = ((x,), (x_mask,)) if context is None else ((x, context), (x_mask, context_mask))
    for label, s, mask in zip(("x", "context"), streams, masks, strict=False):
        check.rank(name, label, s, "B, L, D", f"Reshape {label} to batch, tokens, width.")
        check.floating(name, label, s)
        want = (x.shape[0], s.shape[1], m.dim)
        check.shape(name, label, s, ("B, L, D", want), remedy="The module's width is dim, and all streams share the batch.")
        if mask is not None:
            check.shape(
                name, f"{label}_mask", mask, ("B, L", want[:2]), remedy="Give one flag per token, True = token, False = padding."
            )
            check.boolean(name, f"{label}_mask", mask)
    return streams, masks


def check_inputs(name: str, m, x, y, context) -> None:
    if m.use_cross_attn and context is None:
        raise ValueError(f"{name}: context is None, but the module was built with use_cross_attn=True. Give context (B, C, D).")
    if m.conditioning and y is None:
        raise ValueError(f"{name}: y is None, but the module was built with conditioning=True. Give y (B, 1, D) or (B, D).")
    if not m.conditioning and y is not None:
        raise ValueError(
            f"{name}: y was given, but the module was built without conditioning=True. Build it with, or leave y out."
        )
    if y is not None:
        B, D = x.shape[0], m.dim
        check.shape(
            name, "y", y, ("B, 1, D", (B, 1, D)), ("B, D", (B, D)), remedy="Give one conditioning vector per sample of x."
        )
