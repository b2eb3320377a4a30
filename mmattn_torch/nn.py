"""The seed's modules for PyTorch. Their mathematics is mmattn/blocks.py; here are the parameters."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree

from mmattn import blocks, rope
from mmattn.blocks import AttentionOutput
from mmattn.op import next_power_of_2

from . import _arrays
from . import ops as _ops
from ._bind import PLAIN, autocast_dtype, constant_under_compile, plain

__all__ = ["AttentionOutput", "GPT2Block", "GPT2Stack", "RMSNormSelfAttention", "RMSNormSelfCrossAttention"]

# torch.export.save writes the name of what a program returns. (The public register_pytree_node is for classes that torch does not
# know as containers; with optree installed it warns that a named tuple is one.)
_pytree._register_namedtuple(AttentionOutput, serialized_type_name="mmattn.AttentionOutput")


def _per_sample(start_pos, x: Tensor) -> Tensor:
    if isinstance(start_pos, int):
        return torch.full((x.shape[0],), start_pos, dtype=torch.int32, device=x.device)
    return torch.as_tensor(start_pos, device=x.device).expand(x.shape[0])


def _tables(positions: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of RoPE (positions, width / 2), float32."""
    return tuple(torch.tensor(t, device=device) for t in rope.table(positions, width))


class _Kept:
    """The tables of every size and device that has been asked for, one attribute each: torch.compile takes an attribute for an
    input of its graph. All modules share them, and they stay: a CUDA graph may have captured their addresses."""


@cache
def _keep(positions: int, width: int, device: torch.device) -> str:
    """Make the tables, in a thread of their own: what the caller runs under (inference mode, torch.func, a dispatch mode, a
    default device) would mark them for good. Returns the attribute's name."""
    name = f"{positions} {width} {device}"
    with ThreadPoolExecutor(1) as thread:
        setattr(_Kept, name, thread.submit(_tables, positions, width, device).result())
    return name


@constant_under_compile
def _kept(positions: int, width: int, device: torch.device) -> str:
    return _keep(positions, width, device)  # torch.compile would look through the cache and trace what is behind it


def _angles(m: _Attention, x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Tables on x's device. They are no buffers of the module: nothing that casts, moves, fills, shards, broadcasts or saves a
    module may round them, write them or free them, and none of it has to know them."""
    key = m.max_seq_len, m.dim_head, x.device
    if torch.compiler.is_compiling() or type(x) in PLAIN:
        return getattr(_Kept, _kept(*key))
    return _tables(*key)  # a FakeTensor, or another subclass of Tensor, may not meet plain ones


def _untouched(module: nn.Module, kind: str) -> bool:
    """Whether calling a module would run our forward and nothing else. What offloads, shards, checkpoints, compiles or adapts a
    module, or looks at it, sets hooks, a forward or a class of its own. (Global hooks, which torch has for debugging, see the
    modules that are called.)"""
    cls = type(module)
    return (
        _FORWARDS[kind].get(cls) is cls.forward
        and "forward" not in module.__dict__
        and module._compiled_call_impl is None
        and not (module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks)
    )


ops = SimpleNamespace(
    layernorm_adaln=_ops.layernorm_adaln,
    gated_residual=_ops.gated_residual,
    gated_residual_norm_adaln=_ops.gated_residual_norm_adaln,
    qk_norm_rope=_ops.qk_norm_rope,
    qk_norm_rope_attention=_ops.qk_norm_rope_attention,
    joint_attention=_ops.joint_attention,
    relu_linear_attention=_ops.relu_linear_attention,
    rows=lambda v, n: v.chunk(n, -1),
    angles=_angles,
    vector=lambda weight: weight,
    untouched=_untouched,
    xp=_arrays,
    where=torch.where,
    extent=_ops.extent,
    per_sample=_per_sample,
)


_buffers: dict[tuple, Tensor] = {}


def _ones(rows: int, like: Tensor) -> Tensor:
    """(1, rows) ones of another tensor's dtype and device. Their memory is never given back, since a graph may have captured its
    address, and none that is a graph's own is kept."""
    size = next_power_of_2(rows)
    key = like.dtype, like.device, size
    if key in _buffers:
        return _buffers[key][:, :rows]
    ones = like.new_ones(1, size)
    if not (like.is_cuda and torch.cuda.is_current_stream_capturing()):
        _buffers[key] = ones
    return ones[:, :rows]


class _LinearFunction(torch.autograd.Function):
    """y = x W^T + b with db = 1^T dy as a matrix product: torch's own column sum of a tall 16-bit matrix takes three to four
    times as long, a quarter of the target model's training step (docs/facts.md)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, weight = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1])
        wanted = ctx.needs_input_grad
        dx = (rows @ weight).reshape(x.shape) if wanted[0] else None
        dweight = rows.T @ x.reshape(-1, x.shape[-1]) if wanted[1] else None
        dbias = (_ones(rows.shape[0], rows) @ rows)[0] if wanted[2] else None
        return dx, dweight, dbias


class Linear(nn.Linear):
    """nn.Linear, with the bias gradient of an eager 16-bit call on a GPU as a matrix product."""

    def forward(self, x: Tensor) -> Tensor:
        ours = (
            not torch.compiler.is_compiling()
            and x.is_cuda
            and x.dtype in (torch.bfloat16, torch.float16)
            and torch.is_grad_enabled()
            and self.bias is not None
            and self.bias.requires_grad
            and plain()
            and {type(x), type(self.weight), type(self.bias)} <= PLAIN
            and x.dtype == self.weight.dtype == self.bias.dtype
            and autocast_dtype(x.device) is None
        )
        return _LinearFunction.apply(x, self.weight, self.bias) if ours else super().forward(x)


class LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return _ops.layer_norm(x, self.weight, self.bias, eps=self.eps)


class RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return _ops.rms_norm(x, self.weight, eps=self.eps)


class _Attention(nn.Module):
    """Layers of one stream or two."""

    def __init__(self, dim, num_head, use_context, max_seq_len, linear, dim_head, context_pre_only=False, **factory):
        super().__init__()
        self.dim, self.num_head, self.max_seq_len = dim, num_head, max_seq_len
        self.use_context, self.linear, self.context_pre_only = use_context, linear, context_pre_only
        self.dim_head = blocks.head_width(type(self).__name__, dim, num_head, dim_head)
        inner = num_head * self.dim_head
        for prefix in ("", "c_") if use_context else ("",):
            asks = not (prefix and context_pre_only)
            norm = partial(RMSNorm, eps=blocks.RMS_NORM_EPS, **factory)
            layers = dict(
                to_qkv=Linear(dim, (3 if asks else 2) * inner, **factory),
                rms_norm_q=norm(inner) if asks else None,
                rms_norm_k=norm(inner),
                to_out=nn.Sequential(Linear(inner, dim, **factory), norm(dim)) if asks else None,
            )
            for name, layer in layers.items():
                self.add_module(prefix + name, layer)


class RMSNormSelfAttention(_Attention):
    """Self-attention with RMSNorm of q and k over the full width, RoPE, and RMSNorm behind the output projection.

    q, k, v = Linear(x);  q, k = RoPE(RMSNorm(q)), RoPE(RMSNorm(k));  x_out = RMSNorm(Linear(softmax(q k^T / sqrt(d)) v))

    dim          width D of the tokens, a multiple of 8.
    num_head     number of heads; dim_head, their width d, is dim / num_head unless given.
    max_seq_len  positions that RoPE knows.
    linear       ReLU linear attention (Katharopoulos et al. 2020, arXiv:2006.16236) in place of softmax.

    forward(x (B, L, D), attn_mask (B, L, L), start_pos, x_mask (B, L)) -> AttentionOutput(x_out (B, L, D))
    attn_mask    bool or integers, True or non-zero = attend. Linear attention reads the first query's row only.
                 NaN in a token that it hides may reach other outputs; x_mask is for padding that may hold any.
    start_pos    position of the first token: an int, or integers (B,). Values on a GPU or under trace are not checked but
                 clamped to the table.
    x_mask       bool, True = token, False = padding: silent whatever it holds, its own output is 0.

    State-dict keys and shapes are the seed's where dim_head * num_head == dim. Raises ValueError or TypeError that names
    the argument. QK-norm: Henry et al. 2020, arXiv:2010.04245. RoPE: Su et al. 2021, arXiv:2104.09864.
    """

    def __init__(
        self,
        dim: int,
        num_head: int = 4,
        max_seq_len: int = 4096,
        linear: bool = False,
        dim_head: int | None = None,
        *,
        device=None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(dim, num_head, False, max_seq_len, linear, dim_head, device=device, dtype=dtype)

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        start_pos: int | Tensor | None = None,
        x_mask: Tensor | None = None,
    ) -> AttentionOutput:
        return blocks.attention(ops, self, x, None, attn_mask, start_pos, x_mask)


class RMSNormSelfCrossAttention(_Attention):
    """Joint attention of tokens x and, with use_context, a context that has projections and norms of its own.

    Every token and every context element attends to both. Only x is rotated: the context has no order. attn_mask covers x;
    x attends to the context where it attends to anything, the context to every token that anything attends to and to itself.
    Otherwise as RMSNormSelfAttention. With context_pre_only the context gives keys and values and asks nothing: it has no
    c_rms_norm_q and no c_to_out, c_to_qkv gives k and v only, and context_out is None.

    forward(x (B, L, D), context (B, C, D), attn_mask (B, L, L), start_pos, x_mask (B, L), context_mask (B, C))
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
        device=None,
        dtype: torch.dtype | None = None,
    ):
        blocks.check_pre_only(type(self).__name__, context_pre_only, "use_context", use_context)
        sizes = (dim, num_head, use_context, max_seq_len, linear, dim_head, context_pre_only)
        super().__init__(*sizes, device=device, dtype=dtype)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        attn_mask: Tensor | None = None,
        start_pos: int | Tensor | None = None,
        x_mask: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> AttentionOutput:
        return blocks.attention(ops, self, x, context, attn_mask, start_pos, x_mask, context_mask)


class _StreamLayers(nn.Module):
    """What one stream of a block has besides attention."""

    def __init__(self, dim, dim_feedforward, dropout, conditioning, pre_only=False, **factory):
        super().__init__()
        self.pre_only = pre_only
        norm = lambda: None if conditioning else LayerNorm(dim, eps=blocks.LAYER_NORM_EPS, **factory)
        self.ln_1, self.ln_2 = norm(), norm()
        if conditioning:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(dim, (2 if pre_only else 6) * dim, **factory))
        if not pre_only:
            mlp = [Linear(dim, dim_feedforward, **factory), nn.SiLU(), Linear(dim_feedforward, dim, **factory)]
            self.mlp = nn.Sequential(*mlp, *([nn.Dropout(dropout)] if dropout else []))


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
    dropout          probability in [0, 1).
    conditioning     whether y modulates the norms.
    use_cross_attn   whether there is a context stream; needs conditioning.
    max_seq_len      positions that RoPE knows.
    context_pre_only whether the context only gives keys and values, and is left as it is: context_out is the context. Its
                     adaLN_modulation then has scale and shift only, it has no MLP, and its attention is as told there.

    forward(x (B, L, D), y (B, 1, D) or (B, D), attn_mask (B, L, L), context (B, C, D), start_pos, x_mask, context_mask)
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
        device=None,
        dtype: torch.dtype | None = None,
    ):
        blocks.check_block(type(self).__name__, dropout, conditioning, use_cross_attn, context_pre_only)
        factory = dict(device=device, dtype=dtype)
        super().__init__(dim_base, dim_feedforward, dropout, conditioning, **factory)
        self.dim, self.conditioning, self.use_cross_attn = dim_base, conditioning, use_cross_attn
        self.context_pre_only = context_pre_only
        if use_cross_attn:
            self.context_layers = _StreamLayers(dim_base, dim_feedforward, dropout, conditioning, context_pre_only, **factory)
            sizes = (dim_base, num_attn_head, True, max_seq_len, False, dim_head, context_pre_only)
            self.cross_attn = RMSNormSelfCrossAttention(*sizes, **factory)
        else:
            self.attn = RMSNormSelfAttention(dim_base, num_attn_head, max_seq_len, dim_head=dim_head, **factory)

    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        attn_mask: Tensor | None = None,
        context: Tensor | None = None,
        start_pos: int | Tensor | None = None,
        x_mask: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> AttentionOutput:
        return blocks.block(ops, self, x, y, attn_mask, context, start_pos, x_mask, context_mask)


class GPT2Stack(nn.Module):
    """`depth` blocks in a row, layers.0, layers.1, ...; arguments and forward as in GPT2Block.

    context_pre_only  the last block leaves the context as it is, so that a loss on x_out alone reaches every parameter. Without
                      it, the last block's layers of the context then have no gradient, for which DistributedDataParallel wants
                      find_unused_parameters=True.

    A layer may be replaced by any module with GPT2Block's forward.
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
        device=None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        block = (dim_base, num_attn_head, dim_head, dim_feedforward, dropout, conditioning, use_cross_attn, max_seq_len)
        pre_only = [context_pre_only and i == depth - 1 for i in range(depth)]
        self.layers = nn.ModuleList(GPT2Block(*block, last, device=device, dtype=dtype) for last in pre_only)

    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        attn_mask: Tensor | None = None,
        context: Tensor | None = None,
        start_pos: int | Tensor | None = None,
        x_mask: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> AttentionOutput:
        return blocks.stack(ops, self, x, y, attn_mask, context, start_pos, x_mask, context_mask)


_FORWARDS = {
    kind: {cls: cls.forward for cls in classes}
    for kind, classes in dict(
        RMSNorm=[RMSNorm],
        Sequential=[nn.Sequential],
        Attention=[RMSNormSelfAttention, RMSNormSelfCrossAttention],
        GPT2Block=[GPT2Block],
    ).items()
}
