"""The seed's modules for Flax NNX. Their mathematics is mmattn/blocks.py; here are the parameters."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

from mmattn import Row, blocks, rope
from mmattn.blocks import AttentionOutput

from . import _arrays
from . import ops as _ops

__all__ = ["AttentionOutput", "GPT2Block", "GPT2Stack", "RMSNormSelfAttention", "RMSNormSelfCrossAttention"]

jax.export.register_namedtuple_serialization(AttentionOutput, serialized_name="mmattn.AttentionOutput")


def _rows(v: jax.Array, n: int) -> tuple[Row, ...]:
    packed = v.reshape(v.shape[0], n, v.shape[-1] // n)
    return tuple(Row(packed, i) for i in range(n))


def _per_sample(start_pos, x: jax.Array) -> jax.Array:
    start_pos = jnp.asarray(start_pos, jnp.int32 if isinstance(start_pos, int) else None)
    return jnp.broadcast_to(start_pos, (x.shape[0],))


def _angles(m: nnx.Module, x: jax.Array, n: int) -> tuple[np.ndarray, np.ndarray]:
    tables = rope.table(m.max_seq_len, m.dim_head)
    return tuple(t[:n] for t in tables) if isinstance(n, int) else tables  # constants of the program: no more than it needs


def _untouched(module: nnx.Module, kind: str) -> bool:
    """Whether calling a module would run our own method. nnx.tabulate and users who want nnx.remat put another into the class."""
    cls = type(module)
    return _CALLS[kind].get(cls) is cls.__call__


ops = SimpleNamespace(
    layernorm_adaln=_ops.layernorm_adaln,
    gated_residual=_ops.gated_residual,
    gated_residual_norm_adaln=_ops.gated_residual_norm_adaln,
    qk_norm_rope=_ops.qk_norm_rope,
    qk_norm_rope_attention=_ops.qk_norm_rope_attention,
    joint_attention=_ops.joint_attention,
    relu_linear_attention=_ops.relu_linear_attention,
    rows=_rows,
    angles=_angles,
    vector=lambda weight: weight[...],
    untouched=_untouched,
    xp=_arrays,
    where=jnp.where,
    extent=_ops.extent,
    per_sample=_per_sample,
)


def _silu(x):
    """nnx.silu as a function of this module: JAX's own cannot be pickled."""
    return nnx.silu(x)


def _linear(d_in: int, d_out: int, **factory) -> nnx.Linear:
    """A Linear with torch's initialisation: weight and bias uniform within 1 / sqrt(d_in)."""

    def init(key, shape, dtype, out_sharding=None):
        return jax.random.uniform(key, shape, dtype, -(d_in**-0.5), d_in**-0.5)

    return nnx.Linear(d_in, d_out, kernel_init=init, bias_init=init, **factory)


class Sequential(nnx.List):
    """Layers in a row. Unlike nnx.Sequential's, its paths are torch's: `mlp.0`, not `mlp.layers.0`."""

    def __call__(self, x):
        for layer in self:
            x = layer(x)
        return x


class LayerNorm(nnx.Module):
    def __init__(self, width: int, *, param_dtype: DTypeLike):
        self.weight = nnx.Param(jnp.ones((width,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((width,), param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        return _ops.layer_norm(x, self.weight[...], self.bias[...], eps=blocks.LAYER_NORM_EPS)


class RMSNorm(nnx.Module):
    def __init__(self, width: int, *, param_dtype: DTypeLike):
        self.weight = nnx.Param(jnp.ones((width,), param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        return _ops.rms_norm(x, self.weight[...], eps=blocks.RMS_NORM_EPS)


class _Attention(nnx.Module):
    """Layers of one stream or two."""

    def __init__(
        self, dim, num_head, use_context, max_seq_len, linear, dim_head, context_pre_only=False, *, dtype, param_dtype, rngs
    ):
        self.dim, self.num_head, self.max_seq_len = dim, num_head, max_seq_len
        self.use_context, self.linear, self.context_pre_only = use_context, linear, context_pre_only
        self.dim_head = blocks.head_width(type(self).__name__, dim, num_head, dim_head)
        factory = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        inner = num_head * self.dim_head
        for prefix in ("", "c_") if use_context else ("",):
            asks = not (prefix and context_pre_only)
            norm = partial(RMSNorm, param_dtype=param_dtype)
            layers = dict(
                to_qkv=_linear(dim, (3 if asks else 2) * inner, **factory),
                rms_norm_q=norm(inner) if asks else None,
                rms_norm_k=norm(inner),
                to_out=Sequential([_linear(inner, dim, **factory), norm(dim)]) if asks else None,
            )
            for name, layer in layers.items():
                setattr(self, prefix + name, layer)


class RMSNormSelfAttention(_Attention):
    """Self-attention with RMSNorm of q and k over the full width, RoPE, and RMSNorm behind the output projection.

    q, k, v = Linear(x);  q, k = RoPE(RMSNorm(q)), RoPE(RMSNorm(k));  x_out = RMSNorm(Linear(softmax(q k^T / sqrt(d)) v))

    dim          width D of the tokens, a multiple of 8.
    num_head     number of heads; dim_head, their width d, is dim / num_head unless given.
    max_seq_len  positions that RoPE knows.
    linear       ReLU linear attention (Katharopoulos et al. 2020, arXiv:2006.16236) in place of softmax.
    dtype        what the Linear layers compute in, by default what x and the parameters promote to; param_dtype: stored.
    rngs         for torch's initialisation, U(-1/sqrt(fan_in), 1/sqrt(fan_in)).

    module(x (B, L, D), attn_mask (B, L, L), start_pos, x_mask (B, L)) -> AttentionOutput(x_out (B, L, D))
    attn_mask    bool or integers, True or non-zero = attend. Linear attention reads the first query's row only.
                 NaN in a token that it hides may reach other outputs; x_mask is for padding that may hold any.
    start_pos    position of the first token: an int, or integers (B,). Values on a GPU or under trace are not checked but
                 clamped to the table.
    x_mask       bool, True = token, False = padding: silent whatever it holds, its own output is 0.

    Raises ValueError or TypeError that names the argument. QK-norm: Henry et al. 2020, arXiv:2010.04245.
    RoPE: Su et al. 2021, arXiv:2104.09864.
    """

    def __init__(
        self,
        dim: int,
        num_head: int = 4,
        max_seq_len: int = 4096,
        linear: bool = False,
        dim_head: int | None = None,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(dim, num_head, False, max_seq_len, linear, dim_head, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        attn_mask: jax.Array | None = None,
        start_pos: int | ArrayLike | None = None,
        x_mask: jax.Array | None = None,
    ) -> AttentionOutput:
        return blocks.attention(ops, self, x, None, attn_mask, start_pos, x_mask)


class RMSNormSelfCrossAttention(_Attention):
    """Joint attention of tokens x and, with use_context, a context that has projections and norms of its own.

    Every token and every context element attends to both. Only x is rotated: the context has no order. attn_mask covers x;
    x attends to the context where it attends to anything, the context to every token that anything attends to and to itself.
    Otherwise as RMSNormSelfAttention. With context_pre_only the context gives keys and values and asks nothing: it has no
    c_rms_norm_q and no c_to_out, c_to_qkv gives k and v only, and context_out is None.

    module(x (B, L, D), context (B, C, D), attn_mask (B, L, L), start_pos, x_mask (B, L), context_mask (B, C))
        -> AttentionOutput(x_out (B, L, D), context_out (B, C, D) or None without context)

    MMDiT: Esser et al. 2024, arXiv:2403.03206.
    """

    def __init__(
        self,
        dim: int,
        num_head: int = 4,
        use_context: bool = False,
        max_seq_len: int = 4096,
        linear: bool = False,
        dim_head: int | None = None,
        context_pre_only: bool = False,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        blocks.check_pre_only(type(self).__name__, context_pre_only, "use_context", use_context)
        sizes = (dim, num_head, use_context, max_seq_len, linear, dim_head, context_pre_only)
        super().__init__(*sizes, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        context: jax.Array | None = None,
        attn_mask: jax.Array | None = None,
        start_pos: int | ArrayLike | None = None,
        x_mask: jax.Array | None = None,
        context_mask: jax.Array | None = None,
    ) -> AttentionOutput:
        return blocks.attention(ops, self, x, context, attn_mask, start_pos, x_mask, context_mask)


class _StreamLayers(nnx.Module):
    """What one stream of a block has besides attention."""

    def __init__(self, dim, dim_feedforward, dropout, conditioning, pre_only=False, *, dtype, param_dtype, rngs):
        factory = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.pre_only = pre_only
        norm = lambda: None if conditioning else LayerNorm(dim, param_dtype=param_dtype)
        self.ln_1, self.ln_2 = norm(), norm()
        if conditioning:
            self.adaLN_modulation = Sequential([_silu, _linear(dim, (2 if pre_only else 6) * dim, **factory)])
        if not pre_only:
            mlp = [_linear(dim, dim_feedforward, **factory), _silu, _linear(dim_feedforward, dim, **factory)]
            self.mlp = Sequential([*mlp, *([nnx.Dropout(dropout, rngs=rngs)] if dropout else [])])


class GPT2Block(_StreamLayers):
    """A transformer block, conditioned by adaLN-Zero where asked for, with one stream or two.

    s1, b1, g1, s2, b2, g2 = Linear(silu(y))                   scale, shift, gate, in this order
    x = x + g1 * Attention(LN(x) * (1 + s1) + b1)              RMSNormSelfAttention, or RMSNormSelfCrossAttention
    x = x + g2 * MLP(LN(x) * (1 + s2) + b2)                    MLP = Linear, SiLU, Linear, Dropout
    The context stream has the same layers with weights of its own. Without conditioning, LN has weight and bias, s = b = 0
    and g = 1.

    dim_base         width D of all streams, a multiple of 8.
    num_attn_head    number of heads; dim_head, their width, is dim_base / num_attn_head unless given.
    dim_feedforward  hidden width of the MLP.
    dropout          probability in [0, 1); `module.eval()` switches it off.
    conditioning     whether y modulates the norms.
    use_cross_attn   whether there is a context stream; needs conditioning.
    max_seq_len      positions that RoPE knows.
    context_pre_only whether the context only gives keys and values, and is left as it is: context_out is the context. Its
                     adaLN_modulation then has scale and shift only, it has no MLP, and its attention is as told there.

    module(x (B, L, D), y (B, 1, D) or (B, D), attn_mask (B, L, L), context (B, C, D), start_pos, x_mask, context_mask)
        -> AttentionOutput(x_out (B, L, D), context_out (B, C, D) or None); the rest as in RMSNormSelfCrossAttention.

    adaLN-Zero: Peebles & Xie 2023, arXiv:2212.09748.
    """

    def __init__(
        self,
        dim_base: int,
        num_attn_head: int = 4,
        dim_head: int | None = None,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        conditioning: bool = False,
        use_cross_attn: bool = False,
        max_seq_len: int = 4096,
        context_pre_only: bool = False,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        blocks.check_block(type(self).__name__, dropout, conditioning, use_cross_attn, context_pre_only)
        factory = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        super().__init__(dim_base, dim_feedforward, dropout, conditioning, **factory)
        self.dim, self.conditioning, self.use_cross_attn = dim_base, conditioning, use_cross_attn
        self.context_pre_only = context_pre_only
        if use_cross_attn:
            self.context_layers = _StreamLayers(dim_base, dim_feedforward, dropout, conditioning, context_pre_only, **factory)
            sizes = (dim_base, num_attn_head, True, max_seq_len, False, dim_head, context_pre_only)
            self.cross_attn = RMSNormSelfCrossAttention(*sizes, **factory)
        else:
            self.attn = RMSNormSelfAttention(dim_base, num_attn_head, max_seq_len, dim_head=dim_head, **factory)

    def __call__(
        self,
        x: jax.Array,
        y: jax.Array | None = None,
        attn_mask: jax.Array | None = None,
        context: jax.Array | None = None,
        start_pos: int | ArrayLike | None = None,
        x_mask: jax.Array | None = None,
        context_mask: jax.Array | None = None,
    ) -> AttentionOutput:
        return blocks.block(ops, self, x, y, attn_mask, context, start_pos, x_mask, context_mask)


class GPT2Stack(nnx.Module):
    """`depth` blocks in a row, layers.0, layers.1, ...; arguments and call as in GPT2Block.

    context_pre_only  the last block leaves the context as it is, so that a loss on x_out alone reaches every parameter.

    A layer may be replaced by any module with GPT2Block's call.
    """

    def __init__(
        self,
        depth: int,
        dim_base: int,
        num_attn_head: int = 4,
        dim_head: int | None = None,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        conditioning: bool = False,
        use_cross_attn: bool = False,
        max_seq_len: int = 4096,
        context_pre_only: bool = False,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        block = (dim_base, num_attn_head, dim_head, dim_feedforward, dropout, conditioning, use_cross_attn, max_seq_len)
        pre_only = [context_pre_only and i == depth - 1 for i in range(depth)]
        factory = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.layers = nnx.List([GPT2Block(*block, last, **factory) for last in pre_only])

    def __call__(
        self,
        x: jax.Array,
        y: jax.Array | None = None,
        attn_mask: jax.Array | None = None,
        context: jax.Array | None = None,
        start_pos: int | ArrayLike | None = None,
        x_mask: jax.Array | None = None,
        context_mask: jax.Array | None = None,
    ) -> AttentionOutput:
        return blocks.stack(ops, self, x, y, attn_mask, context, start_pos, x_mask, context_mask)


_CALLS = {
    kind: {cls: cls.__call__ for cls in classes}
    for kind, classes in dict(
        RMSNorm=[RMSNorm],
        Sequential=[Sequential],
        Attention=[RMSNormSelfAttention, RMSNormSelfCrossAttention],
        GPT2Block=[GPT2Block],
    ).items()
}
