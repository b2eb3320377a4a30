"""What torch does to our operations: compile, export, torch.func, autocast, checkpointing, and the choice of path."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest

pytest.importorskip("torch")

import torch
import torch.autograd.forward_ad as fwad
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, jacrev, jvp, vjp, vmap
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import mmattn_torch
from mmattn_torch import _bind

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
D, HEADS = 48, 2
REFERENCE = dict(implementation="reference")


def randn(*shape, seed=0, **how):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, **how)


def leaf(*shape, **how):
    return randn(*shape, **how).requires_grad_()


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


@pytest.fixture
def cpu(monkeypatch):
    """Operands on the CPU, where there are no kernels, on any machine."""
    monkeypatch.setattr(sys.modules[__name__], "DEVICE", "cpu")


class Recorder(TorchDispatchMode):
    """Calls of our operators and their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    @property
    def names(self) -> list[str]:
        return [operator.name().removeprefix("mmattn::") for operator, _ in self.calls]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mmattn":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def same(got, want, tolerance=1e-5):
    got, want = tree_leaves(got), tree_leaves(want)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        least = max(tolerance, 2 * torch.finfo(a.dtype).eps) if tolerance else 0
        torch.testing.assert_close(a, b, rtol=least, atol=least)


def adaln(x, scale, shift, **how):
    return mmattn_torch.layernorm_adaln(x, scale, shift, **how)


def rms(x, weight, **how):
    return mmattn_torch.rms_norm(x, weight, **how)


def residual(x, h, gate, **how):
    return mmattn_torch.gated_residual(x, h, gate, **how)


def table(x, rows, scale, shift, base, **how):
    return mmattn_torch.rmsnorm_adaln(x, scale, shift, rows=rows, scale_base=base, weight=base, **how)


def gated_norm(x, h, vectors, weight, **how):
    """Both results, one behind the other."""
    gate, scale, shift = vectors.chunk(3, -1)
    return torch.cat(mmattn_torch.gated_residual_norm_adaln(x, h, gate, scale, shift, h_weight=weight, **how), 1)


def mixed(x, h, vectors, weight, **how):
    """A float32 residual stream, and what layers of other dtypes make for it."""
    return gated_norm(x, h, vectors, weight, **how)


def attention(x, c, weights, mask, key_mask, **how):
    """The seed's attention of two streams."""
    packed = tuple(t.reshape(*t.shape[:2], 3, HEADS, t.shape[2] // (3 * HEADS)) for t in (x, c))
    out = mmattn_torch.qk_norm_rope_attention(
        packed,
        (weights[0], weights[1]),
        (weights[2], weights[3]),
        over="width",
        attn_mask=mask,
        key_masks=(key_mask, None),
        **how,
    )
    return torch.cat(out, 1)


def rotated(qkv, weight, start_pos, **how):
    """q and k of packed projections, each sample with a position of its own."""
    angles = torch.arange(4096, device=qkv.device)[:, None] * 0.3 ** torch.arange(D // HEADS // 2, device=qkv.device)
    packed = qkv.reshape(*qkv.shape[:2], 3, HEADS, D // HEADS)
    rotation = dict(over="width", cos=angles.cos(), sin=angles.sin(), start_pos=start_pos)
    return torch.cat(mmattn_torch.qk_norm_rope(packed, weight, weight, **rotation, **how), 1)


def joint(q, c, kv, c_kv, mask, **how):
    """Grouped queries of two streams under all masks."""
    key_mask = mask[:, 0] | (torch.arange(mask.shape[1], device=mask.device) < 2)
    masks = dict(attn_mask=mask, key_masks=(key_mask, None), causal=True)
    return torch.cat(mmattn_torch.joint_attention((q, c), (kv, c_kv), (kv.sin(), c_kv), **masks, **how), 1)


def linear(q, k, v, c, key_mask, **how):
    return torch.cat(mmattn_torch.relu_linear_attention((q, c), (k, c), (v, c), key_masks=(key_mask, None), **how), 1)


def operands(f, B: int, L: int, C: int = 5) -> list:
    """Arguments of one of the functions above; the floats require gradients."""
    if f is adaln:
        return [leaf(B, L, D), leaf(B, 1, D), leaf(B, D)]
    if f is rms:
        return [leaf(B, L, D), leaf(D)]
    if f is residual:
        return [leaf(B, L, D), leaf(B, L, D, seed=1), leaf(B, D)]
    if f is table:
        rows = torch.arange(L, dtype=torch.int32, device=DEVICE)[None].expand(B, L) % 4
        return [leaf(B, L, D), rows, leaf(B, 4, D), leaf(B, 4, D, seed=1), leaf(D)]
    if f is gated_norm:
        return [leaf(B, L, D), leaf(B, L, D, seed=1), leaf(B, 3 * D), leaf(D)]
    if f is mixed:
        return [leaf(B, L, D), *(leaf(*n, dtype=torch.bfloat16) for n in ((B, L, D), (B, 3 * D))), leaf(D, dtype=torch.float16)]
    if f is linear:
        heads = [leaf(B, L, HEADS, D // HEADS, seed=i) for i in range(3)]
        return [*heads, leaf(B, C, HEADS, D // HEADS), torch.arange(L, device=DEVICE)[None].expand(B, L) < L - 2]
    if f is rotated:
        return [leaf(B, L, 3 * D), leaf(D), torch.arange(B, dtype=torch.int32, device=DEVICE) % 5]
    # At least one key for every row but the last, which is empty.
    mask = (randn(B, L, L) > 0) | torch.eye(L, dtype=torch.bool, device=DEVICE)
    mask[:, -1] = False
    if f is joint:
        return [*(leaf(B, n, heads, D // HEADS) for heads in (HEADS, 1) for n in (L, C)), mask]
    key_mask = torch.arange(L, device=DEVICE)[None].expand(B, L) < L - 2
    return [leaf(B, L, 3 * D), leaf(B, C, 3 * D), leaf(4, D), mask, key_mask]


OPERATOR = {
    adaln: "adaln",
    rms: "adaln",
    table: "adaln",
    residual: "gated_residual",
    gated_norm: "gated_residual_norm_adaln",
    mixed: "gated_residual_norm_adaln",
    rotated: "qk_norm_rope",
    joint: "joint_attention",
    attention: "qk_norm_rope_attention",
    linear: "relu_linear_attention",
}
every_function = pytest.mark.parametrize("f", OPERATOR, ids=lambda f: f.__name__)
small_functions = pytest.mark.parametrize("f", [adaln, rms, residual], ids=lambda f: f.__name__)


def with_gradients(f, arguments):
    """Output and gradients against a random cotangent."""
    out = f(*arguments)
    leaves = [x for x in arguments if x.requires_grad]
    return out.detach(), *torch.autograd.grad(out, leaves, randn(*out.shape, seed=7, dtype=out.dtype))


@every_function
def test_kernels_equal_formula(f, kernels):
    arguments = operands(f, 2, 37)
    with Recorder() as calls:
        got = with_gradients(f, arguments)
    assert calls.names == [f"{OPERATOR[f]}_fwd", f"{OPERATOR[f]}_bwd"]
    same(got, with_gradients(lambda *a: f(*a, **REFERENCE), arguments), 1e-4)


def negated(x):
    """x by torch's negative bit: in memory is -x."""
    return torch._neg_view(-x) if x.is_floating_point() else x


def imaginary(x):
    """x as the imaginary part of a conjugate: in memory is -x, with gaps."""
    return torch.complex(torch.zeros_like(x), -x).conj().imag if x.dtype == torch.float32 else x


def shifted(x):
    """x from an address that is no multiple of 16 bytes."""
    memory = x.new_empty(x.numel() + 1)
    return memory[1:].copy_(x.reshape(-1)).view(x.shape)


def spread(x):
    """x with a stride of 2 between its numbers."""
    return torch.stack([x, x], -1)[..., 0]


class Wrapped(torch.Tensor):
    """A subclass that changes nothing."""


LOOKS = (negated, imaginary, shifted, spread, lambda x: x.as_subclass(Wrapped))
each_look = pytest.mark.parametrize("look", LOOKS, ids=["negated", "imaginary", "shifted", "spread", "subclass"])


@each_look
@every_function
def test_memory_that_is_not_what_a_tensor_says(f, look, kernels):
    """Operands and cotangents whose numbers are elsewhere than in contiguous memory, or are not there."""
    arguments = operands(f, 2, 7)
    leaves = [x for x in arguments if x.requires_grad]
    out = f(*arguments)
    dout = randn(*out.shape, seed=7)
    want = out, *torch.autograd.grad(out, leaves, dout, retain_graph=True)
    got = out, *torch.autograd.grad(out, leaves, look(dout))
    same(got, want, 0)
    alike = [look(x.detach()).requires_grad_(x.requires_grad) for x in arguments]
    out = f(*alike)
    same((out, *torch.autograd.grad(out, [x for x in alike if x.requires_grad], look(dout))), want, 0)


@pytest.mark.parametrize("f", [adaln, rms, residual, table])
def test_sparse_cotangents(f, kernels):
    """Of operations whose result is the output itself: torch's own functions behind the others take none."""
    arguments = operands(f, 2, 7)
    leaves = [x for x in arguments if x.requires_grad]
    out = f(*arguments)
    dout = randn(*out.shape, seed=7)
    gradients = lambda dout: torch.autograd.grad(out, leaves, dout, retain_graph=True)
    same(gradients(dout.to_sparse()), gradients(dout), 0)


@every_function
def test_cotangents_of_one_number_or_without_memory(f, kernels):
    arguments = operands(f, 2, 7)
    leaves = [x for x in arguments if x.requires_grad]
    out = f(*arguments)
    gradients = lambda dout: torch.autograd.grad(out, leaves, dout, retain_graph=True)
    one = out.new_ones(())
    same(gradients(one.expand(out.shape)), gradients(one.expand(out.shape).contiguous()), 0)
    same(gradients(torch._efficientzerotensor(out.shape, device=out.device)), gradients(torch.zeros_like(out)), 0)


@every_function
def test_fallback_equals_formula(f, cpu):
    """torch's fused code, where there are no kernels, against the formula that an explicit request gets."""
    arguments = operands(f, 2, 37)
    same(with_gradients(f, arguments), with_gradients(lambda *a: f(*a, **REFERENCE), arguments))


@pytest.mark.parametrize("f", [rms, adaln], ids=lambda f: f.__name__)
def test_fallback_without_eps(f, cpu):
    """torch's own rms_norm makes NaN of a row of zeros, and its squares underflow."""
    x, *vectors = operands(f, 2, 5)
    x = (x * torch.tensor([0, 1, 1e-20, 1e-30, 1e-10])[:, None]).detach().requires_grad_()
    function = {rms: mmattn_torch.rms_norm, adaln: mmattn_torch.layernorm_adaln}[f]
    got, want = (with_gradients(partial(function, eps=0.0, **how), [x, *vectors]) for how in ({}, REFERENCE))
    same(got, want, 0)
    assert not got[0][:, 0].isnan().any()
    assert not got[1][:, 0].any()


def test_padding_is_silent_in_the_fallback(cpu):
    x, c, weights, mask, key_mask = operands(attention, 2, 9)
    mask = mask | True
    dirty = torch.where(key_mask[..., None], x, torch.nan).detach().requires_grad_()
    got, want = (with_gradients(attention, [t, c, weights, mask, key_mask]) for t in (dirty, x))
    same(got, want)


def operators_in(graph: torch.fx.GraphModule) -> list[str]:
    """Names of our operators in a compiled graph."""
    names = [node.target.name() for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    return [name.removeprefix("mmattn::") for name in names if name.startswith("mmattn::")]


def compiled_once(f, compared):
    """Operators in the one graph that serves batches and lengths that differ."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(f, fullgraph=True, backend=counter, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for B, L in ((3, 7), (4, 12)):
            arguments = operands(f, B, L)
            compared(with_gradients(compiled, arguments), with_gradients(f, arguments))
    return operators_in(counter.graphs[-1])


@every_function
def test_compile_without_recompilation(f, kernels):
    assert compiled_once(f, partial(same, tolerance=0)) == [f"{OPERATOR[f]}_fwd"]


@every_function
def test_compile_of_the_fallback(f, cpu):
    assert compiled_once(f, same) == []


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # inductor's own
def test_inductor(kernels):
    def layer(x, modulation):
        scale, shift, gate = modulation.chunk(3, -1)
        return mmattn_torch.gated_residual(x, mmattn_torch.layernorm_adaln(x, scale, shift).sin(), gate)

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for L in (7, 12):
        arguments = [leaf(2, L, D), leaf(2, 3 * D)]
        same(with_gradients(compiled, arguments), with_gradients(layer, arguments))


def test_changed_setting_recompiles(kernels):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(rms, fullgraph=True, backend=counter)
    arguments = operands(rms, 2, 7)
    for setting in ("auto", "reference", "auto", "reference"):
        with mmattn_torch.implementation(setting):
            compiled(*arguments)
    assert list(map(operators_in, counter.graphs)) == [["adaln_fwd"], []]


@pytest.mark.parametrize("strict", [True, False])
@every_function
def test_export(f, strict, kernels):
    class Module(torch.nn.Module):
        def forward(self, *arguments):
            return f(*arguments)

    B, L = torch.export.Dim("B", min=2, max=64), torch.export.Dim("L", min=2, max=4096)
    arguments = tuple(x.detach() for x in operands(f, 3, 7))
    sizes = {3: B, 7: L}
    shapes = tuple({i: sizes[n] for i, n in enumerate(x.shape) if n in sizes} for x in arguments)
    program = torch.export.export(Module(), arguments, dynamic_shapes=(shapes,), strict=strict)
    assert f"torch.ops.mmattn.{OPERATOR[f]}_fwd" in program.graph_module.print_readable(print_output=False)
    arguments = tuple(x.detach() for x in operands(f, 2, 12))
    same(program.module()(*arguments), f(*arguments), 0)


@every_function
def test_opcheck(f, kernels):
    """torch's own tests of an operator: schema, autograd registration, fake kernel, dynamic shapes."""
    with Recorder() as calls:
        with_gradients(f, operands(f, 3, 7))
    assert calls.names == [f"{OPERATOR[f]}_fwd", f"{OPERATOR[f]}_bwd"]
    for operator, arguments in calls.calls:
        opcheck(operator, tree_map(lambda x: x.detach() if isinstance(x, torch.Tensor) else x, arguments))
    operator, arguments = calls.calls[0]
    trained = lambda x: x.detach().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x
    opcheck(operator, tree_map(trained, arguments))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("implementation", ["triton", "auto", "reference"])
@every_function
def test_jit_trace(f, implementation, request):
    """A trace serves other batches and lengths too, forward and backward.

    It holds no guard of derivatives, and without one torch adds the gradients of a tensor that is given thrice in another order.
    """
    request.getfixturevalue("kernels" if implementation == "triton" else "cpu")
    how, tolerance = dict(implementation=implementation), 1e-6 if implementation == "auto" else 0
    traced = torch.jit.trace(lambda *a: f(*a, **how), tuple(x.detach() for x in operands(f, 2, 7)))
    for B, L in ((2, 7), (3, 12)):
        arguments = operands(f, B, L)
        same(with_gradients(traced, arguments), with_gradients(lambda *a: f(*a, **how), arguments), tolerance)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("path", ["kernels", "cpu"])
def test_jit_trace_of_a_stack(path, request):
    request.getfixturevalue(path)
    stack = mmattn_torch.GPT2Stack(2, D, HEADS, dropout=0.0, conditioning=True, use_cross_attn=True, device=DEVICE)
    inputs = lambda B, L: dict(x=randn(B, L, D), y=randn(B, 1, D), context=randn(B, 5, D))
    traced = torch.jit.trace(stack, example_kwarg_inputs=inputs(2, 7), strict=False)
    for B, L in ((2, 7), (3, 12)):
        same(traced(**inputs(B, L)), stack(**inputs(B, L)), 0)


class OnOneDevice(TorchDispatchMode):
    """Refuses tensors that are made elsewhere, as a CUDA graph refuses to copy them."""

    def __init__(self, device: str):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        devices = {x.device.type for x in tree_leaves(out) if isinstance(x, torch.Tensor)}
        assert devices <= {self.device}, f"{func} makes tensors on {devices}"
        return out


@pytest.mark.parametrize("implementation", ["auto", "reference"])
@every_function
def test_constants_are_made_on_the_device(f, implementation, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "DEVICE", "meta")
    arguments = operands(f, 2, 7)
    leaves = [x for x in arguments if x.requires_grad]
    with OnOneDevice("meta"):
        out = f(*arguments, implementation=implementation)
        torch.autograd.grad(out, leaves, torch.empty_like(out))


@pytest.mark.parametrize("linear", [False, True])
def test_constants_of_modules_are_made_on_the_device(linear):
    inputs = dict(x=torch.empty(2, 7, D, device="meta"), context=torch.empty(2, 5, D, device="meta"))
    inputs["attn_mask"] = torch.empty(2, 7, 7, device="meta", dtype=torch.bool)
    attention = mmattn_torch.RMSNormSelfCrossAttention(D, HEADS, use_context=True, linear=linear, device="meta")
    with OnOneDevice("meta"):
        attention(**inputs, start_pos=3).x_out.sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["triton", "reference"])
@every_function
def test_cuda_graph(f, implementation):
    """Forward and backward, captured once and replayed on other data."""
    arguments = [x.detach().clone().requires_grad_(x.requires_grad) for x in operands(f, 2, 37)]
    leaves = [x for x in arguments if x.requires_grad]
    dout = torch.ones_like(f(*arguments)).cumsum(-1) / D

    def run():
        out = f(*arguments, implementation=implementation)
        return out.detach(), *torch.autograd.grad(out, leaves, dout)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = run()
    with torch.no_grad():
        for x in arguments:
            x.copy_(0.5 * x.roll(1, 0) if x.is_floating_point() else x.roll(1, 0))
    graph.replay()
    same(replayed, run(), 0 if implementation == "triton" else 1e-5)


def both(transform, f, arguments):
    """A transform of the kernels and of the formula."""
    arguments = [x.detach() for x in arguments]
    same(transform(f)(*arguments), transform(lambda *a: f(*a, **REFERENCE))(*arguments), 1e-4)


def loss(f):
    return lambda *arguments: (f(*arguments) ** 2).sum()


@every_function
def test_grad(f, kernels):
    arguments = operands(f, 2, 7)
    floats = tuple(i for i, x in enumerate(arguments) if x.is_floating_point())
    both(lambda f: grad(loss(f), floats), f, arguments)


@small_functions
def test_vjp_and_jacrev(f, kernels):
    arguments = operands(f, 2, 3)
    both(lambda f: lambda *a: vjp(f, *a)[1](randn(2, 3, D, seed=3)), f, arguments)
    both(lambda f: jacrev(lambda *a: f(*a)[:, 0, :2], argnums=1), f, arguments)


@every_function
def test_vmap_is_one_launch(f, kernels):
    arguments = [torch.stack([x, x.roll(1, 0)], 1) for x in operands(f, 2, 7)]
    with Recorder() as calls:
        vmap(f, 1)(*[x.detach() for x in arguments])
    assert calls.names == [f"{OPERATOR[f]}_fwd"]
    both(lambda f: vmap(f, 1), f, arguments)


@every_function
def test_vmap_of_grad_keeps_vector_gradients_apart(f, kernels):
    """Per-example gradients of all operands, vectors that the examples share included."""
    arguments = operands(f, 2, 7)
    floats = tuple(i for i, x in enumerate(arguments) if x.is_floating_point())
    arguments[0] = randn(3, *arguments[0].shape)
    mapped = (0, *[None] * (len(arguments) - 1))
    both(lambda f: vmap(grad(loss(f), floats), mapped), f, arguments)


@pytest.mark.parametrize("implementation", ["triton", "auto", "reference"])
@every_function
def test_vmap_over_no_example(f, implementation, request):
    """All operands mapped, or the first alone; one vmap, or another one within or around it."""
    request.getfixturevalue("kernels" if implementation == "triton" else "cpu")
    arguments = [x.detach() for x in operands(f, 1, 4, 2)]
    g = lambda *a: f(*a, implementation=implementation)
    gradients = grad(loss(g), tuple(i for i, x in enumerate(arguments) if x.is_floating_point()))
    every, alone = (0,) * len(arguments), (0, *[None] * (len(arguments) - 1))
    for h, axes, shape in ((g, alone, (0,)), (gradients, every, (0,)), (gradients, every, (0, 2)), (gradients, alone, (2, 0))):
        none = [x if axis is None else x.new_empty(shape + x.shape) for x, axis in zip(arguments, axes, strict=True)]
        mapped = vmap(h, axes) if len(shape) == 1 else vmap(vmap(h, axes), axes)
        got, want = tree_leaves(mapped(*none)), tree_leaves(h(*arguments))
        assert [(x.shape, x.dtype) for x in got] == [(shape + x.shape, x.dtype) for x in want]


def test_nested_vmap_of_a_shared_vector(kernels):
    """The inner vmap gives the weight a group axis, the outer one leaves it alone, and the other way round."""
    x, weight = randn(3, 4, 2, 5, D), randn(4, D)
    for inner, outer in (((0, 0), (0, None)), ((0, None), (0, 0))):
        weight = randn(4 if inner[1] == 0 else 3, D)
        both(lambda f, i=inner, o=outer: vmap(vmap(grad(loss(f), (0, 1)), i), o), rms, [x, weight])


@pytest.mark.parametrize("mapped", [(0, None), (None, 0), (0, 0)])
def test_vmap_over_a_table(mapped, kernels):
    """cos and sin of several tables, or one of them alone."""
    qkv, weight = randn(2, 5, 3, HEADS, 8), randn(HEADS * 8)
    tables = [randn(3, 9, 4, seed=seed) if dim == 0 else randn(9, 4, seed=seed) for seed, dim in enumerate(mapped)]
    norm = lambda cos, sin, **how: mmattn_torch.qk_norm_rope(qkv, weight, weight, over="width", cos=cos, sin=sin, **how)
    both(lambda f: vmap(f, mapped), norm, tables)


@pytest.mark.parametrize("name", ["cos", "sin"])
def test_gradient_of_a_constant_is_refused(name, kernels):
    weight, tables = randn(HEADS * 8), dict(cos=randn(9, 4), sin=randn(9, 4))
    tables[name].requires_grad_()
    run = partial(mmattn_torch.qk_norm_rope, randn(2, 5, 3, HEADS, 8), weight, weight, over="width", **tables)
    for call in (run, torch.compile(run, backend="aot_eager")):
        with pytest.raises(RuntimeError, match=f"qk_norm_rope: {name} wants a gradient, for which there is no kernel"):
            call()
    run(**REFERENCE)[0].sum().backward()
    assert tables[name].grad.abs().max() > 0


def test_grad_of_vmap_sums_over_it(kernels):
    both(lambda f: grad(lambda x, w: (vmap(f, (0, None))(x, w) ** 2).sum(), (0, 1)), rms, [randn(3, 2, 5, D), randn(D)])


def test_compiled_transforms(kernels):
    arguments = [randn(3, 2, 5, D), randn(D)]
    transform = vmap(grad(loss(rms), (0, 1)), (0, None))
    same(torch.compile(transform, fullgraph=True, backend="aot_eager")(*arguments), transform(*arguments))


def forward_mode(f, x):
    return jvp(f, (x,), (x,))[1]


def dual_numbers(f, x):
    with fwad.dual_level():
        return fwad.unpack_dual(f(fwad.make_dual(x, x))).tangent


def forward_over_reverse(f, x):
    return jvp(grad(loss(f)), (x,), (x,))[1]


def reverse_over_reverse(f, x):
    return grad(lambda x: grad(loss(f))(x).sum())(x)


def double_backward(f, x):
    x = x.requires_grad_()
    (dx,) = torch.autograd.grad(loss(f)(x), x, create_graph=True)
    return torch.autograd.grad(dx.sum(), x)[0]


HIGHER = [forward_mode, dual_numbers, forward_over_reverse, reverse_over_reverse, double_backward]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own forward mode
@pytest.mark.parametrize("derivative", HIGHER, ids=lambda f: f.__name__)
@pytest.mark.parametrize("path", ["kernels", "cpu"])
@every_function
def test_higher_derivatives(f, path, derivative, request):
    """One rule wherever a call runs: refused unless the reference is asked for."""
    request.getfixturevalue(path)
    arguments = operands(f, 2, 5)
    x = randn(*arguments[at := 1 if f is residual else 0].shape)  # the gradient of `residual` is passed on, without a kernel
    others = [x.detach() for x in arguments]
    with pytest.raises(RuntimeError, match='implementation="reference"'):
        derivative(lambda x: f(*others[:at], x, *others[at + 1 :]), x)
    if path == "cpu":  # the formula, which is tested once
        return
    x, *others = (x.double() if x.is_floating_point() else x for x in (x, *others))
    g = lambda x: f(*others[:at], x, *others[at + 1 :], **REFERENCE)
    got, step = derivative(g, x.clone()), 1e-6
    if derivative in (forward_mode, dual_numbers):
        want = (g(x + step * x) - g(x - step * x)) / (2 * step)
    else:
        direction = x if derivative is forward_over_reverse else torch.ones_like(x)
        want = (grad(loss(g))(x + step * direction) - grad(loss(g))(x - step * direction)) / (2 * step)
    same(got, want)


@every_function
def test_first_derivatives_of_the_fallback_under_transforms(f, cpu):
    """What lets no second derivative through lets the first through, for each example and each operand."""
    arguments = [x.detach() for x in operands(f, 2, 5)]
    floats = tuple(i for i, x in enumerate(arguments) if x.is_floating_point())
    both(lambda f: grad(loss(f), floats), f, arguments)
    examples = [torch.stack([x, x.roll(1, 0)]) for x in arguments]
    both(lambda f: vmap(grad(loss(f), floats)), f, examples)


def test_gradient_of_a_constant_is_refused_in_the_fallback(cpu):
    """As by the kernels; the gradients that are passed on may be differentiated there too."""
    weight, table = randn(HEADS * 8), leaf(9, 4)
    run = partial(mmattn_torch.qk_norm_rope, randn(2, 5, 3, HEADS, 8), weight, weight, over="width", sin=table.detach())
    with pytest.raises(RuntimeError, match="qk_norm_rope: cos wants a gradient, for which there is no kernel"):
        run(cos=table)
    with pytest.raises(RuntimeError, match="qk_norm_rope: cos wants a gradient, for which there is no kernel"):
        grad(lambda cos: run(cos=cos)[0].sum())(table.detach())
    x, h, gate = operands(residual, 2, 5)
    (dx,) = torch.autograd.grad(mmattn_torch.gated_residual(x, h, gate).pow(2).sum(), x, create_graph=True)
    assert torch.equal(torch.autograd.grad(dx.sum(), x)[0], torch.full_like(x, 2))


@pytest.mark.parametrize("path", ["kernels", "cpu"])
def test_create_graph_alone_is_no_second_derivative(path, request):
    request.getfixturevalue(path)
    x = leaf(2, 5, D)
    (dx,) = torch.autograd.grad(loss(mmattn_torch.rms_norm)(x), x, create_graph=True)
    same(dx.detach(), torch.autograd.grad(loss(mmattn_torch.rms_norm)(x), x)[0])


@pytest.mark.parametrize("implementation", ["triton", "reference", "auto"])
def test_autocast(implementation, request):
    if implementation == "triton":
        request.getfixturevalue("kernels")
    how = dict(implementation=implementation)
    q = leaf(1, 5, HEADS, 16)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            x = randn(2, 5, D, dtype=dtype)
            assert mmattn_torch.layernorm_adaln(x, **how).dtype == dtype
            assert mmattn_torch.rms_norm(x, randn(D), **how).dtype == dtype
        out = mmattn_torch.joint_attention(q, q, q.to(torch.bfloat16), **how)
        assert out.dtype == torch.bfloat16
        same(mmattn_torch.rms_norm(q[0], **how), mmattn_torch.rms_norm(q[0].detach(), **REFERENCE))
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32 and q.grad.isfinite().all()


class Autocast(torch.nn.Module):
    """A float32 stream and a context, with autocast layers between the operations."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        linear = partial(torch.nn.Linear, device=DEVICE)
        self.modulation, self.qkv, self.context, self.out = linear(D, 3 * D), linear(D, 3 * D), linear(D, 3 * D), linear(D, D)

    def forward(self, x, c, y, **how):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            scale, shift, gate = self.modulation(y).chunk(3, -1)
            h = mmattn_torch.layernorm_adaln(x, scale, shift, **how)
            packed = lambda t: t.unflatten(-1, (3, HEADS, D // HEADS))
            q, k, v = zip(*(packed(t).unbind(2) for t in (self.qkv(h), self.context(c).float())), strict=True)
            o, _ = mmattn_torch.joint_attention(q, k, v, **how)
            return mmattn_torch.gated_residual(x, self.out(o.flatten(2)), gate, **how)


AUTOCAST_WAYS = {
    "compile": lambda f: torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=True),
    "checkpoint": lambda f: lambda *a: checkpoint(f, *a, use_reentrant=False),
    "export": lambda f: lambda *a: torch.export.export(f, a).module()(*a),
    "another call": lambda f: f,
}


@pytest.mark.parametrize("way", AUTOCAST_WAYS)
def test_autocast_of_layers_between_operations(way, kernels):
    """The residual stream stays float32, the layers' bfloat16 goes into the operations as it is."""
    layer = Autocast()
    arguments = [leaf(2, 7, D), leaf(2, 5, D), leaf(2, D)]
    got = with_gradients(AUTOCAST_WAYS[way](layer), arguments)
    assert {x.dtype for x in got} == {torch.float32}
    same(got, with_gradients(layer, arguments))
    same(got, with_gradients(partial(layer, **REFERENCE), arguments), 0.03)


def test_modules_cast_nothing_under_autocast(kernels):
    """What their layers return goes into the operations as it is: every cast would be a launch and a copy."""
    block = mmattn_torch.GPT2Block(D, HEADS, dim_feedforward=D, dropout=0.0, conditioning=True, use_cross_attn=True).to(DEVICE)
    with torch.autocast(DEVICE, dtype=torch.bfloat16), Recorder() as calls:
        out = block(randn(2, 7, D), randn(2, D), context=randn(2, 5, D))
    assert {x.dtype for x in out} == {torch.float32}
    given = {name: [x.dtype for x in arrays] for name, (_, (arrays, _)) in zip(calls.names, calls.calls, strict=True)}
    float32, low = torch.float32, torch.bfloat16
    assert given["adaln_fwd"] == [float32, low, low]
    assert given["gated_residual_norm_adaln_fwd"] == [float32, low, low, low, low, float32]  # the last is a weight
    assert given["gated_residual_fwd"] == [float32, low, low]


def test_explain_under_autocast(kernels):
    """Streams that autocast makes alike are none to refuse."""
    q = randn(1, 5, HEADS, 16), randn(1, 3, HEADS, 16, dtype=torch.bfloat16)
    qkv = tuple(x.unflatten(1, (-1, 1)).expand(-1, -1, 3, -1, -1) for x in q)
    weights = (randn(16),) * 2
    calls = [
        (mmattn_torch.joint_attention, (q, q, q), {}),
        (mmattn_torch.joint_attention, (), dict(q=q, k=q, v=q)),
        (mmattn_torch.relu_linear_attention, (q, q, q), {}),
        (mmattn_torch.qk_norm_rope_attention, (qkv, weights, weights), dict(over="head")),
    ]
    for op, arguments, options in calls:
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            assert all(x.dtype == torch.bfloat16 for x in op(*arguments, **options))
            assert mmattn_torch.explain(op, *arguments, **options).path == "triton"
        for call in (op, partial(mmattn_torch.explain, op)):
            with pytest.raises(TypeError, match=r"has dtype bfloat16; expected .* dtype, float32"):
                call(*arguments, **options)


@small_functions
def test_checkpoint(f, kernels):
    arguments = operands(f, 2, 7)
    want = with_gradients(f, arguments)
    with Recorder() as calls:
        same(
            with_gradients(lambda *a: checkpoint(lambda *a: f(*a).sin(), *a, use_reentrant=False), arguments)[0], want[0].sin(), 0
        )
    assert calls.names == [f"{OPERATOR[f]}_{half}" for half in ("fwd", "fwd", "bwd")]


def test_selective_checkpoint_keeps_our_results(kernels):
    def policy(context, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op.namespace == "mmattn" else CheckpointPolicy.PREFER_RECOMPUTE

    arguments = operands(rms, 2, 7)
    f = lambda *a: checkpoint(
        lambda *a: rms(*a).sin(), *a, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)
    )
    with Recorder() as calls:
        got = with_gradients(f, arguments)
    assert calls.names == ["adaln_fwd", "adaln_bwd"]
    same(got, with_gradients(lambda *a: rms(*a).sin(), arguments), 0)


def test_modulation_is_read_in_place(kernels, monkeypatch):
    """The rows of chunk(6), not contiguous, reach the kernels at their own address, forward and backward."""
    addresses = []
    original = _bind.launch

    def launch(plan, arrays, outs):
        addresses.append([x.data_ptr() for x in arrays])
        return original(plan, arrays, outs)

    monkeypatch.setattr(_bind, "launch", launch)
    x = leaf(2, 7, D)
    scale, shift, gate = leaf(2, 1, 6 * D).chunk(6, -1)[:3]
    assert not scale.is_contiguous()
    out = mmattn_torch.gated_residual(x, mmattn_torch.layernorm_adaln(x, scale, shift), gate)
    forward = len(addresses)
    out.sum().backward()
    for view in (scale, gate):
        assert any(view.data_ptr() in launched for launched in addresses[:forward])
        assert any(view.data_ptr() in launched for launched in addresses[forward:])


def test_other_strides_are_copied(kernels):
    x = randn(7, 2, D).transpose(0, 1).requires_grad_()
    scale = randn(D, 2).T.requires_grad_()
    arguments = [x, scale, leaf(1, D).expand(2, D)]
    same(
        with_gradients(adaln, arguments), with_gradients(adaln, [t.detach().contiguous().requires_grad_() for t in arguments]), 0
    )


@every_function
def test_empty_batch(f, kernels):
    got = with_gradients(f, operands(f, 0, 7))
    want = with_gradients(lambda *a: f(*a, **REFERENCE), operands(f, 0, 7))
    same(got, want, 0)


def test_explain_agrees_with_the_call(kernels):
    x = randn(2, 5, D)
    assert mmattn_torch.explain(mmattn_torch.rms_norm, x).path == "triton"
    with Recorder() as calls:
        assert mmattn_torch.explain("rms_norm", x, implementation="reference").path == "reference"
        assert mmattn_torch.explain("rms_norm", x.double()) == ("reference", "float64 has no kernels")
        assert mmattn_torch.explain("layernorm_adaln", torch.empty(2, 5, D, device="meta")).path == "triton"
        mmattn_torch.rms_norm(x.double())
    assert calls.names == []


def test_explain_names_what_replaces_the_formula(cpu):
    x, q = randn(2, 5, D), randn(2, 5, HEADS, 8)
    reason = lambda op, *arguments, **how: mmattn_torch.explain(op, *arguments, **how).reason
    fused = dict(layer_norm="layer_norm", rms_norm="rms_norm", joint_attention="scaled_dot_product_attention")
    for op, name in fused.items():
        arguments = [q] * 3 if op == "joint_attention" else [x]
        assert reason(op, *arguments).endswith(f"; torch.nn.functional.{name} takes the place of the formula")
        assert reason(op, *arguments, **REFERENCE) == "asked for by the call"
        assert reason(op, *(t.double() for t in arguments)) == "float64 has no kernels"
    for plain in (reason("joint_attention", q, q, q, return_lse=True), reason("relu_linear_attention", q, q, q)):
        assert plain.endswith("the arrays are on cpu")


def test_explain_without_a_gpu():
    x = torch.empty(2, 5, D, device="meta")
    path, reason = mmattn_torch.explain("rms_norm", x, device="cpu")
    assert path == "reference" and "cpu" in reason
    with pytest.raises(ValueError, match="explain: op is 'softmax'; expected one of"):
        mmattn_torch.explain("softmax", x)
    with pytest.raises(ValueError, match="rms_norm: x has shape"):
        mmattn_torch.explain("rms_norm", x[0])


def test_an_amd_gpu_takes_the_reference(cpu, monkeypatch):
    """No kernel has run on one, and torch's properties of one lack what a plan asks for."""
    monkeypatch.setattr(torch.version, "hip", "7.1.52802")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=9, minor=4))
    gpu, reason = torch.device("cuda", 7), "the kernels have run on NVIDIA GPUs only, and this is one of AMD's (ROCm)"
    x = randn(2, 5, D)
    assert mmattn_torch.explain("rms_norm", x, device=gpu).reason.startswith(reason)
    monkeypatch.setattr(_bind, "device_of", lambda call: gpu)
    assert torch.equal(mmattn_torch.rms_norm(x), torch.nn.functional.rms_norm(x, (D,), eps=1e-6))
    with pytest.raises(RuntimeError, match=f"cannot be met: {re.escape(reason)}"):
        mmattn_torch.rms_norm(x, implementation="triton")


def test_float64_has_every_derivative(cpu):
    """It takes the reference whatever is asked for, not torch's fused code."""
    q = randn(1, 3, 1, 8, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda q: mmattn_torch.joint_attention(q, q, q), (q,))


def test_unmet_request_says_why():
    with pytest.raises(RuntimeError, match=r'rms_norm: implementation="triton" cannot be met: .* the arrays are on cpu'):
        mmattn_torch.rms_norm(torch.randn(2, 5, D), implementation="triton")


def python(code: str, **environment) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_environment_variable():
    code = "import torch, mmattn_torch; print(mmattn_torch.explain('rms_norm', torch.ones(1, 1, 8)).reason)"
    assert "MMATTN_IMPLEMENTATION" in python(code, MMATTN_IMPLEMENTATION="reference")


def test_without_triton():
    code = """
import sys
sys.modules["triton"] = None
import torch, mmattn_torch
x = torch.ones(2, 3, 8, requires_grad=True)
mmattn_torch.layernorm_adaln(x, x[:, 0]).sum().backward()
print(mmattn_torch.explain("rms_norm", x, device="cuda").reason, "torch._dynamo" in sys.modules)
"""
    assert python(code) == "triton is not installed; torch.nn.functional.rms_norm takes the place of the formula False"


@pytest.mark.parametrize("name", [name for name in mmattn_torch.__all__ if name in mmattn_torch.ops.CORE])
def test_documentation(name):
    """help() shows the core's text and a signature that differs from the core's by types and `implementation`."""
    public, core = getattr(mmattn_torch, name), mmattn_torch.ops.CORE[name]
    assert inspect.getdoc(public).startswith(inspect.getdoc(core))
    shape = lambda f: [
        (p.name, p.kind, p.default)
        for p in inspect.signature(f).parameters.values()
        if p.name not in ("precision", "start_extent")
    ]
    *parameters, last = shape(public)
    assert last == ("implementation", inspect.Parameter.KEYWORD_ONLY, None)
    assert parameters == shape(core)
    assert all(p.annotation is not p.empty for p in inspect.signature(public).parameters.values())


def test_remembered_calls_keep_their_tensors_apart(kernels):
    """A call is remembered by the looks of its tensors; one tensor for two arguments must not stand for two later on."""
    x, a, b = randn(2, 5, 16), randn(2, 16), randn(2, 16)
    for scale, shift in ((a, a), (a, b), (b, a)):
        arguments = [t.clone().requires_grad_() for t in (x, scale)]
        arguments.append(arguments[1] if scale is shift else shift.clone().requires_grad_())
        grads = {}
        for how in ("triton", "reference"):
            y = mmattn_torch.layernorm_adaln(*arguments, implementation=how)
            distinct = arguments[:2] if scale is shift else arguments
            grads[how] = [
                y,
                *torch.autograd.grad(y, distinct, torch.linspace(-1, 1, y.numel(), device=y.device).reshape(y.shape)),
            ]
        torch.testing.assert_close(grads["triton"], grads["reference"])


LOOKS = dict(
    contiguous=lambda x: x,
    strided=lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    permuted=lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    misaligned=lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x),
)


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
@small_functions
def test_second_call_repeats_the_first_on_new_tensors(f, look, kernels):
    """The first call of a look is recorded, the second replayed, each forward and backward."""
    for seed in range(2):
        arguments = [look(x.detach() + seed).requires_grad_() for x in operands(f, 2, 7)]
        same(with_gradients(f, arguments), with_gradients(lambda *a: f(*a, **REFERENCE), arguments), 1e-4)
        with torch.no_grad():
            same(f(*arguments), f(*arguments, **REFERENCE), 1e-4)


def test_saved_tensors_may_come_back_with_other_looks(kernels):
    """Hooks hand back copies, which need not have the strides of what was saved."""
    x, scale = leaf(2, 7, D), leaf(2, 6 * D).chunk(6, -1)[1]
    want = with_gradients(lambda x: adaln(x, scale, None), [x])
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t.clone(), LOOKS["permuted"]):
        got = with_gradients(lambda x: adaln(x, scale, None), [x])
    assert x.shape in packed
    same(got, want, 0)


@pytest.mark.parametrize("op", [mmattn_torch.joint_attention, mmattn_torch.relu_linear_attention])
@pytest.mark.parametrize("lengths", [(0, 7), (7, 0)])
def test_empty_stream(op, lengths, kernels):
    streams = [leaf(2, n, HEADS, 24) for n in lengths]
    both(lambda f: lambda a, b: f((a, b), (a, b), (a, b))[lengths.index(7)], op, streams)


class Subclass(torch.Tensor):
    """A tensor that somebody has given a type of its own."""


def test_subclasses_keep_apart(kernels):
    """What is remembered of calls is remembered of plain tensors."""
    weight = randn(D)
    for shape in ((2, 5, D), (3, 9, D), (3, 9, D)):
        x = randn(*shape)
        for arguments in ((x.as_subclass(Subclass), weight), (x, weight.as_subclass(Subclass))):
            same(mmattn_torch.rms_norm(*arguments).as_subclass(torch.Tensor), mmattn_torch.rms_norm(x, weight, **REFERENCE), 1e-4)


def test_views_that_are_not_what_their_memory_says(kernels):
    x = randn(2, 5, D)
    for _ in range(2):
        same(mmattn_torch.layernorm_adaln(torch._neg_view(x)), mmattn_torch.layernorm_adaln(-x))


def test_first_call_in_inference_mode(kernels):
    """What it leaves behind serves calls outside as well."""
    with torch.inference_mode():
        mmattn_torch.joint_attention(*[randn(2, 5, HEADS, 24)] * 3)
    q = leaf(0, 5, HEADS, 24)
    mmattn_torch.joint_attention(q, q, q).sum().backward()
    x = leaf(0, 5, D)
    mmattn_torch.rms_norm(x, leaf(D)).sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("operand", range(3))
def test_nan_is_not_silent(dtype, operand, kernels):
    """In q it makes its row's output NaN, in k and v every row's of its head, in all columns or its own."""
    q, k, v = arrays = [randn(2, 70, HEADS, 32, seed=i, dtype=dtype) for i in range(3)]
    arrays[operand][0, 3, 1, 2] = torch.nan
    got, want = (mmattn_torch.joint_attention(q, k, v, **how) for how in ({}, REFERENCE))
    assert want.isnan().any()
    assert torch.equal(got.isnan(), want.isnan())


def test_one_gradient_of_two_outputs(kernels):
    """The gradient of an output that nobody used is None until the kernels need it."""
    q, c = leaf(2, 7, HEADS, 24), leaf(2, 5, HEADS, 24)
    first = lambda **how: mmattn_torch.joint_attention((q, c), (q, c), (q, c), **how)[0].sum()
    same(torch.autograd.grad(first(), [q, c]), torch.autograd.grad(first(**REFERENCE), [q, c]), 1e-4)


def test_eager_calls_ask_the_op_once(kernels, monkeypatch):
    """After that its launches are repeated, by whichever way a call comes."""
    x, asked, record = leaf(2, 5, D), [], _bind.record
    monkeypatch.setattr(_bind, "record", lambda *a: asked.append(a) or record(*a))
    for _ in range(3):
        mmattn_torch.rms_norm(x).sum().backward()
    assert len(asked) == 2


def test_a_profiler_sees_the_operators(kernels):
    x = leaf(2, 5, D)
    with torch.profiler.profile() as profile:
        mmattn_torch.rms_norm(x)
    assert "mmattn::adaln_fwd" in {event.name for event in profile.events()}


def separate(residual, h, gate, scale, shift, *, eps, h_weight, h_eps):
    """gated_residual_norm_adaln as the operations that it joins."""
    h = h if h_weight is None else mmattn_torch.rms_norm(h, h_weight, eps=h_eps)
    r = mmattn_torch.gated_residual(residual, h, gate)
    return r, mmattn_torch.layernorm_adaln(r, scale, shift, eps=eps)


def launches(module, inputs, monkeypatch) -> Counter:
    """The kernels that a forward and backward launch, and how often."""
    names = []

    def launch(plan, arrays, outs):
        name = plan.kernel.fn.__name__.removesuffix("_kernel")
        names.append(name)
        return lambda addresses: names.append(name)

    monkeypatch.setattr(_bind, "launch", launch)
    monkeypatch.setattr(_bind, "problem", lambda device: None)
    _bind.forget()
    sum(out.sum() for out in module(**inputs)).backward()
    _bind.forget()
    return Counter(names)


def test_launches_per_layer(cpu, monkeypatch, capsys):
    """Of a layer's residuals, gates, norms and modulations none is a launch of its own: two a stream, forward."""
    inputs = dict(x=leaf(2, 70, D), y=leaf(2, 1, D), context=leaf(2, 20, D))

    def per_layer():
        stack = lambda depth: mmattn_torch.GPT2Stack(depth, D, HEADS, conditioning=True, use_cross_attn=True, dropout=0.0)
        two, three = (launches(stack(depth), inputs, monkeypatch) for depth in (2, 3))
        return {name: n - two[name] for name, n in three.items() if n > two[name]}

    after = per_layer()
    monkeypatch.setattr(mmattn_torch.nn.ops, "gated_residual_norm_adaln", separate)
    before = per_layer()
    norms = lambda counts, half: sum(
        n for name, n in counts.items() if "attention" not in name and "qk" not in name and half in name
    )
    with capsys.disabled():
        print(f"\nlaunches of a layer of two streams, forward and backward: before {before}, after {after}")
    assert (norms(before, "fwd"), norms(after, "fwd")) == (10, 4)
    assert {name for name in after if name.endswith("fwd") and "attention" not in name and "qk" not in name} == {
        "gated_residual_norm_adaln_fwd"
    }
    assert sum(after.values()) < sum(before.values())


def modulated(x, vectors, **how):
    return mmattn_torch.layernorm_adaln(x, vectors[:, :D], vectors[:, D : 2 * D], **how)


def residual_and_norm(x, vectors, **how):
    rows = (vectors[:, i * D : (i + 1) * D] for i in range(3))
    return mmattn_torch.gated_residual_norm_adaln(x, x.sin(), *rows, **how)[1]


NORMS = [modulated, residual_and_norm, lambda x, vectors, **how: mmattn_torch.rms_norm(x, vectors[0, :D], **how)]


@pytest.mark.gpu
@pytest.mark.parametrize("f", NORMS, ids=["adaln", "gated_residual_norm_adaln", "rms_norm"])
def test_one_compile_serves_every_batch_and_length(f):
    """Lengths and batch sizes are runtime integers: 1, multiples of 16 and others, one chunk a sample or many."""
    modules = [sys.modules[name] for name in ("mmattn.adaln.kernels", "mmattn.gated_residual_norm_adaln")]
    kernels = [k for module in modules for k in vars(module).values() if hasattr(k, "device_caches")]

    def run(B, L):
        with_gradients(f, [leaf(B, L, D, dtype=torch.bfloat16), leaf(B, 3 * D, dtype=torch.bfloat16)])
        return {k.fn.__name__: sum(len(cache[0]) for cache in k.device_caches.values()) for k in kernels}

    run(2, 7000)  # many chunks a sample, so that the second kernel runs too
    first = run(3, 70)
    for B, L in ((1, 1), (2, 16), (16, 37), (700, 5), (1, 9000)):
        assert run(B, L) == first, (B, L)


@pytest.mark.gpu
@pytest.mark.parametrize("f", NORMS, ids=["adaln", "gated_residual_norm_adaln", "rms_norm"])
def test_more_elements_than_32_bits_count(f):
    """The last tokens of 2^31 elements and some are what they are by themselves."""
    L = 2**31 // D + 100
    vectors = randn(1, 3 * D, dtype=torch.bfloat16)
    x = torch.zeros(1, L, D, dtype=torch.bfloat16, device=DEVICE)
    x[:, -50:] = randn(1, 50, D, dtype=torch.bfloat16)
    x.requires_grad_()
    last = x[:, -50:].detach().requires_grad_()
    y, want = f(x, vectors), f(last, vectors)
    assert torch.equal(y[:, -50:], want)
    dy = randn(1, 50, D, seed=1, dtype=torch.bfloat16)
    (dx,) = torch.autograd.grad(y[:, -50:], x, dy)
    assert torch.equal(dx[:, -50:], torch.autograd.grad(want, last, dy)[0])
