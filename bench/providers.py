"""Problems (an op at a shape, with its inputs) and who solves them.

A provider is a function Problem -> Work: a function of the differentiable arrays and the input sets that its calls rotate
over. It raises where it cannot take the problem; the run prints why and goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.attention.flex_attention import flex_attention

import mmattn
import mmattn_torch
import mmattn_torch.nn
from mmattn import rope
from mmattn.op import Operands

from . import plain, shapes

DEVICE = "cuda"


class Set(NamedTuple):
    """One set of inputs: differentiable arrays, and cotangents of the outputs."""

    arrays: tuple
    douts: tuple


@dataclass
class Problem:
    op: str
    name: str
    shape: NamedTuple
    dtype: torch.dtype
    formula: Callable  # (ops, *arrays, **constants) -> output(s); ops: mmattn, mmattn_torch, mmattn_jax or plain
    sets: list[Set]
    sample: tuple  # what of each array decides the part of the outputs that is checked; None: all of it, its gradient unchecked
    sample_out: Any = (slice(1),)
    constants: dict[str, Any] = field(default_factory=dict)
    exact: Any = mmattn_torch  # the ops that take float64
    modes: tuple[str, ...] = ("fwd", "bwd")

    @property
    def scores(self) -> int | None:
        """Scores that an attention computes in the forward."""
        if not isinstance(self.shape, shapes.Attention | shapes.Whole):
            return None
        return self.shape.batch * self.shape.heads * sum(self.shape.tokens) ** 2


class Work(NamedTuple):
    framework: str  # "torch" or "jax"
    fn: Callable  # differentiable arrays -> tuple of outputs
    sets: Sequence[Set]
    graph: bool = True  # a CUDA graph in torch, a chain inside one jit in JAX; else plain calls in a row
    common: Callable = lambda results: results  # outputs or gradients -> as the other providers have them


def tuple_of(x) -> tuple:
    return tuple(x) if isinstance(x, tuple | list) else (x,)


# Problems


def normal(*shape: int, dtype: torch.dtype, mean: float = 0.0, std: float = 1.0, grad: bool = True) -> Tensor:
    return (mean + std * torch.randn(shape, device=DEVICE)).to(dtype).requires_grad_(grad)


def nbytes(x) -> int:
    return x.numel() * x.element_size()


def input_sets(make: Callable[[], Set], hot: bool) -> list[Set]:
    """Sets whose arrays and cotangents together are twice the L2 cache; one if `hot`."""
    first = make()
    if hot:
        return [first]
    size = sum(map(nbytes, first.arrays + first.douts))
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return [first, *(make() for _ in range(min(15, max(1, 2 * l2 // size))))]


def norm_problem(op: str, name: str, shape: shapes.Norm, dtype: torch.dtype, hot: bool) -> Problem:
    B, L, D = shape
    x, row = partial(normal, B, L, D, dtype=dtype), partial(normal, B, D, dtype=dtype)
    arrays = {
        "layernorm_adaln": lambda: (x(), row(), row()),
        "rmsnorm_adaln": lambda: (x(), row(), row()),
        "rms_norm": lambda: (x(), normal(D, dtype=dtype, mean=1.0)),
        "layer_norm": lambda: (x(), normal(D, dtype=dtype, mean=1.0), normal(D, dtype=dtype)),
        "gated_residual": lambda: (x(), x(), row()),
        "gated_residual_norm_adaln": lambda: (x(), x(), row(), row(), row()),
    }[op]
    outs = 2 if op == "gated_residual_norm_adaln" else 1
    sets = input_sets(lambda: Set(arrays(), tuple(x(grad=False) for _ in range(outs))), hot)
    sample = tuple(np.s_[:1] if a.shape[0] == B and a.dim() > 1 else None for a in sets[0].arrays)
    return Problem(op, name, shape, dtype, lambda ops, *arrays: getattr(ops, op)(*arrays), sets, sample)


def attention_problem(op: str, name: str, shape: shapes.Attention, dtype: torch.dtype, hot: bool) -> Problem:
    size = (shape.batch, sum(shape.tokens), shape.heads, shape.width)
    unit = lambda: F.rms_norm(normal(*size, dtype=torch.float32, grad=False), size[-1:]).to(dtype).requires_grad_()
    make = lambda: Set((unit(), unit(), normal(*size, dtype=dtype)), (normal(*size, dtype=dtype, grad=False),))
    part = np.s_[:1, :, :2]
    constants = {}
    if shape.padded:  # nothing of the first sample, which is the one that is checked: formulas differ in what hidden queries see
        B, L = size[:2]
        lengths = L - torch.arange(B, device=DEVICE) % 4 * (L // 8)
        constants = dict(key_masks=(torch.arange(L, device=DEVICE) < lengths[:, None],))
    formula = lambda ops, *qkv, **masks: ops.joint_attention(*qkv, **masks)
    return Problem(op, name, shape, dtype, formula, input_sets(make, hot), (part,) * 3, part, constants)


def whole_problem(op: str, name: str, shape: shapes.Whole, dtype: torch.dtype, hot: bool) -> Problem:
    B, H, tokens, d, over, rotated = shape
    weight = partial(normal, H * d if over == "width" else d, dtype=dtype, mean=1.0, std=0.1)

    def make():
        qkv = tuple(normal(B, L, 3, H, d, dtype=dtype) for L in tokens)
        weights = tuple(weight() for _ in range(4))
        return Set(qkv + weights, tuple(normal(B, L, H, d, dtype=dtype, grad=False) for L in tokens))

    def formula(ops, *a, cos, sin):
        return ops.qk_norm_rope_attention(a[:2], a[2:4], a[4:6], over=over, cos=cos, sin=sin)

    heads = slice(None) if over == "width" else slice(2)
    constants = {
        angle: tuple(torch.tensor(t, device=DEVICE) if turn else None for turn in rotated)
        for angle, t in zip(("cos", "sin"), rope.table(max(tokens), d), strict=True)
    }
    sample = (np.s_[:1, :, :, heads],) * 2 + (None,) * 4
    return Problem(
        op, name, shape, dtype, formula, input_sets(make, hot), sample, np.s_[:1, :, heads], constants,
        modes=("fwd", "bwd", "fwdbwd"),
    )  # fmt: skip


@dataclass
class ModelProblem(Problem):
    module: Any = None


def stack(shape: shapes.Model, nn, **factory):
    """GPT2Stack of mmattn_torch.nn or mmattn_jax.nn."""
    how = dict(dim_feedforward=shape.feedforward, dropout=0.0, conditioning=True, use_cross_attn=True)
    return nn.GPT2Stack(shape.depth, shape.width, shape.heads, **how, **factory)


def model_problem(op: str, name: str, shape: shapes.Model, dtype: torch.dtype, hot: bool) -> Problem:
    """One input set: a layer's activations have left the cache when the next call comes, or all fit as in use."""
    B, (L, C), D = shape.batch, shape.tokens, shape.width
    module = stack(shape, mmattn_torch.nn, device=DEVICE, dtype=dtype)
    names, weights = zip(*module.named_parameters(), strict=True)
    tokens, context = partial(normal, B, L, D, dtype=dtype), partial(normal, B, C, D, dtype=dtype)
    arrays = (tokens(), normal(B, 1, D, dtype=dtype), context(), *weights)

    def formula(ops, x, y, context, *weights, cos, sin):
        how = dict(depth=shape.depth, heads=shape.heads, cos=cos, sin=sin)
        return ops.model(dict(zip(names, weights, strict=True)), x, y, context, **how)

    cos, sin = (torch.tensor(t, device=DEVICE) for t in rope.table(L, D // shape.heads))
    return ModelProblem(
        op, name, shape, dtype, formula, [Set(arrays, (tokens(grad=False), context(grad=False)))],
        (np.s_[:1],) * 3 + (None,) * len(weights), np.s_[:1], dict(cos=cos, sin=sin), plain.Torch(plain.sdpa),
        ("fwd", "fwdbwd"), module,
    )  # fmt: skip


def problem(op: str, name: str, dtype: torch.dtype, hot: bool) -> Problem:
    torch.manual_seed(0)
    make = dict(joint_attention=attention_problem, qk_norm_rope_attention=whole_problem, model=model_problem).get(
        op, norm_problem
    )
    return make(op, name, shapes.OPS[op][name], dtype, hot)


def exact(p: Problem, mode: str) -> tuple[Tensor, ...]:
    """The sampled outputs (fwd) or gradients (bwd) in float64."""
    arrays, douts = p.sets[0]
    arrays = [(a if s is None else a[s]).detach().double().requires_grad_() for a, s in zip(arrays, p.sample, strict=True)]
    constants = {name: tuple(m[:1] for m in x) if name == "key_masks" else x for name, x in p.constants.items()}
    with mmattn_torch.implementation("reference"):
        outs = tuple_of(p.formula(p.exact, *arrays, **constants))
    if mode == "fwd":
        return tuple(o.detach() for o in outs)
    wanted = [a for a, s in zip(arrays, p.sample, strict=True) if s is not None]
    return torch.autograd.grad(outs, wanted, [d[p.sample_out].double() for d in douts])


def sampled(p: Problem, mode: str, results: Sequence) -> list:
    """The part of a provider's outputs or gradients that `exact` has too."""
    if mode == "fwd":
        return [o[p.sample_out] for o in results]
    return [g[s] for g, s in zip(results, p.sample, strict=True) if s is not None]


class Counter:
    """The `run` that launches nothing and counts: launches, and the bytes of their inputs and outputs."""

    def __init__(self):
        self.target = mmattn_torch._bind.target(torch.device(DEVICE))
        self.launches = self.bytes = 0

    def __call__(self, plan, *arrays):
        outs = tuple(mmattn_torch._bind.empty(out, torch.device("meta")) for out in plan.outs)
        self.launches += 1
        self.bytes += sum(map(nbytes, {id(x): x for x in arrays + outs}.values()))  # an absent input repeats another
        return outs


class Count(NamedTuple):
    launches: int
    bytes: int  # what the plans move if each reads and writes its arrays once
    least: int  # what any implementation has to move


def count(p: Problem) -> dict[str, Count]:
    """Of our kernels for each mode, from the plans alone."""
    ghost = lambda x: torch.empty_like(x, device="meta")
    constants = {name: tuple(t if t is None else ghost(t) for t in x) for name, x in p.constants.items()}
    arrays = [ghost(a) for a in p.sets[0].arrays]
    call = p.formula(mmattn, *arrays, **constants)
    op, a, static = call.op, Operands(**call.operands), dict(call.static)
    forward, backward = Counter(), Counter()
    outs, extras = op.forward(forward, a, **static)
    op.backward(backward, a, outs if op.keeps_outs else None, extras, outs, **static)
    total = lambda *xs: sum(nbytes(x) for many in xs for x in many)
    flat = {name: [x for x in tuple_of(call.operands[name]) if x is not None] for name in op.operands}
    kept = [x for name in op.keeps for x in flat[name]]
    gradients = [x for name in op.operands if name not in op.constant and name not in op.passes for x in flat[name]]
    counts = dict(
        fwd=Count(forward.launches, forward.bytes, total(arrays, outs)),
        bwd=Count(backward.launches, backward.bytes, total(kept, outs if op.keeps_outs else (), outs, gradients)),
    )
    return counts | dict(fwdbwd=Count(*(map(sum, zip(*counts.values(), strict=True)))))


# Providers: torch


def torch_work(p: Problem, ops, **how) -> Work:
    return Work("torch", lambda *arrays: tuple_of(p.formula(ops, *arrays, **p.constants)), p.sets, **how)


def ours_torch(p: Problem) -> Work:
    return torch_work(p, mmattn_torch)


def eager(p: Problem, attend: Callable = plain.sdpa, **how) -> Work:
    return torch_work(p, plain.Torch(attend), **how)


def compiled(p: Problem, attend: Callable = plain.sdpa, **how) -> Work:
    work = eager(p, attend, **how)
    return work._replace(fn=torch.compile(work.fn, dynamic=False))


def flex_attend(q, k, v):
    return flex_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def flash_attention_4(q, k, v):
    from flash_attn.cute import flash_attn_func

    return tuple_of(flash_attn_func(q, k, v))[0]


def quack(p: Problem) -> Work:
    from quack.rmsnorm import rmsnorm

    return Work("torch", lambda x, weight: (rmsnorm(x, weight, eps=1e-6),), p.sets)


def liger_rms_norm(p: Problem) -> Work:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return Work("torch", lambda x, weight: (LigerRMSNormFunction.apply(x, weight, 1e-6, 0.0, "llama", False),), p.sets)


def liger_rmsnorm_adaln(p: Problem) -> Work:
    from liger_kernel.ops.modulated_rms_norm import LigerModulatedRMSNormFunction

    apply = lambda *arrays: LigerModulatedRMSNormFunction.apply(arrays[0], None, *arrays[1:], 1e-6, 0.0, "llama", False)
    return Work("torch", lambda *arrays: (apply(*arrays),), p.sets)


# Providers: JAX


@cache
def jax_device():
    import jax

    if jax.default_backend() != "gpu":
        raise RuntimeError(f"jax runs on {jax.default_backend()}, it sees no GPU")
    return jax.devices()[0]


def to_jax(x):
    """The same memory as a JAX array; containers and None as they are."""
    import jax

    jax_device()
    if isinstance(x, tuple | list):
        return tuple(map(to_jax, x))
    return x if x is None else jax.dlpack.from_dlpack(x.detach())


def jax_sets(sets: Sequence[Set]) -> list[Set]:
    return [Set(to_jax(s.arrays), to_jax(s.douts)) for s in sets]


def jax_work(p: Problem, ops, **how) -> Work:
    constants = {name: to_jax(x) for name, x in p.constants.items()}
    return Work("jax", lambda *arrays: tuple_of(p.formula(ops, *arrays, **constants)), jax_sets(p.sets), **how)


def ours_jax(p: Problem) -> Work:
    import mmattn_jax

    return jax_work(p, mmattn_jax)


def xla(p: Problem, attention: str = "xla", **how) -> Work:
    jax_device()
    return jax_work(p, plain.Jax(attention), **how)


def flash_attention_3_jax(p: Problem) -> Work:
    from flash_attn3_jax import flash_mha

    ops = plain.Jax("xla")
    ops.attention = flash_mha
    return jax_work(p, ops)


# Providers: attention of several streams, each in memory of its own


def by_stream(p: Problem) -> Problem:
    """The same problem with q, k, v and the output cut into the streams."""
    tokens, n = p.shape.tokens, len(p.shape.tokens)
    if n == 1 or p.constants:
        raise ValueError("the shape has one stream" if n == 1 else "the shape is padded")
    cut = lambda x: tuple(part.contiguous() for part in x.detach().split(tokens, 1))
    sets = [
        Set(tuple(part.requires_grad_() for x in s.arrays for part in cut(x)), tuple(part for x in s.douts for part in cut(x)))
        for s in p.sets
    ]
    formula = lambda ops, *a: ops.joint_attention(a[:n], a[n : 2 * n], a[2 * n :])
    return Problem(p.op, p.name, p.shape, p.dtype, formula, sets, p.sample, p.sample_out)


def ours_by_stream(provider: Callable[[Problem], Work], p: Problem) -> Work:
    n = len(p.shape.tokens)
    join = lambda results: [as_torch(results[i : i + n]) for i in range(0, len(results), n)]
    return provider(by_stream(p))._replace(common=lambda results: [torch.cat(parts, 1) for parts in join(results)])


def as_torch(x):
    """JAX arrays as torch tensors in the same memory; tensors as they are."""
    if isinstance(x, tuple | list):
        return [as_torch(y) for y in x]
    return x if isinstance(x, Tensor) else torch.from_dlpack(x)


# Providers: the model


def ours_model(p: ModelProblem, compiled: bool = False, **how) -> Work:
    module = torch.compile(p.module, dynamic=False) if compiled else p.module
    return Work("torch", lambda x, y, context, *_: tuple(module(x, y, context=context)), p.sets, **how)


def ours_jax_model(p: ModelProblem, **how) -> Work:
    from flax import nnx

    import mmattn_jax.nn

    dtype = str(p.dtype).removeprefix("torch.")
    module = stack(p.shape, mmattn_jax.nn, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
    definition, params, rest = nnx.split(mmattn_jax.from_torch(module, p.module.state_dict()), nnx.Param, ...)

    def fn(x, y, context, params):
        return tuple(nnx.merge(definition, params, rest)(x, y, context=context))

    return Work("jax", fn, [Set((*to_jax(s.arrays[:3]), params), to_jax(s.douts)) for s in p.sets], **how)


BACKENDS = dict(cudnn=SDPBackend.CUDNN_ATTENTION, flash=SDPBackend.FLASH_ATTENTION, efficient=SDPBackend.EFFICIENT_ATTENTION)
SDPA = {name: plain.sdpa_by(backend) for name, backend in BACKENDS.items()}
OURS = {"ours-torch": ours_torch, "ours-jax": ours_jax}
NORM = OURS | {"eager": eager, "compile": compiled, "xla": xla}
CUDNN_JAX = partial(xla, attention="cudnn")
PLAIN = dict(graph=False)
PROVIDERS: dict[str, dict[str, Callable[[Problem], Work]]] = {
    "layernorm_adaln": NORM,
    "rmsnorm_adaln": NORM | {"liger": liger_rmsnorm_adaln},
    "rms_norm": NORM | {"liger": liger_rms_norm, "quack": quack},
    "layer_norm": NORM,
    "gated_residual": NORM,
    "gated_residual_norm_adaln": NORM,
    "joint_attention": OURS
    | {f"{name}-streams": partial(ours_by_stream, provider) for name, provider in OURS.items()}
    | {f"sdpa-{name}": partial(eager, attend=attend) for name, attend in SDPA.items()}
    | {"flex": partial(eager, attend=torch.compile(flex_attend, dynamic=False))}
    | {"flash-attn-4": partial(eager, attend=flash_attention_4), "xla": xla, "cudnn-jax": CUDNN_JAX}
    | {"flash-attn3-jax": flash_attention_3_jax},
    "qk_norm_rope_attention": OURS
    | {"eager": eager}
    | {f"compile-{name}": partial(compiled, attend=attend) for name, attend in SDPA.items()}
    | {"compile-cudnn-apart": partial(compiled, attend=torch.compiler.disable(SDPA["cudnn"]))}
    | {"compile-flex": partial(compiled, attend=flex_attend)}
    | {"compile-flash-attn-4": partial(compiled, attend=torch.compiler.disable(flash_attention_4))}
    | {"xla": xla, "cudnn-jax": CUDNN_JAX},
    "model": {
        "ours-torch": partial(ours_model, **PLAIN),
        "ours-torch-graph": ours_model,
        "ours-torch-compile-graph": partial(ours_model, compiled=True),
        "ours-jax": partial(ours_jax_model, **PLAIN),
        "eager": partial(eager, **PLAIN),
        "eager-graph": eager,
        "compile": partial(compiled, **PLAIN),
        "compile-graph": compiled,
        "compile-flex-graph": partial(compiled, attend=flex_attend),
        "xla": partial(xla, **PLAIN),
        "cudnn-jax": partial(xla, attention="cudnn", **PLAIN),
    },
}
