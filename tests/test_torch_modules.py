"""The modules in the hands of other tools: what moves, casts, saves or traces a module, checkpoints it, hooks onto it, or
replaces a part of it."""

from __future__ import annotations

import copy
import io
import pickle
from functools import partial

import pytest

pytest.importorskip("torch")

import torch
import torch.multiprocessing
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import mmattn_torch.nn
from mmattn import rope

B, L, C, D, HEADS, HIDDEN = 2, 7, 3, 32, 2, 48
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(DEVICE)


@pytest.fixture
def tables(monkeypatch):
    """Forget all tables of angles. Returns a function: those that a module hands to the operation when it is called on x."""
    nn, seen = mmattn_torch.nn, []
    nn._keep.cache_clear()
    for name in [name for name, x in vars(nn._Kept).items() if isinstance(x, tuple)]:
        delattr(nn._Kept, name)

    def attention(*args, op=nn.ops.qk_norm_rope_attention, **kwargs):
        seen[:] = kwargs["cos"][0], kwargs["sin"][0]
        return op(*args, **kwargs)

    monkeypatch.setattr(nn.ops, "qk_norm_rope_attention", attention)

    def of(module, x):
        module(x)
        return tuple(seen)

    return of


def attention(**how):
    torch.manual_seed(0)
    return mmattn_torch.nn.RMSNormSelfAttention(D, HEADS, **how)


def under_inference_mode(module):
    with torch.inference_mode():
        return module.to(DEVICE)


def from_meta(module):
    fresh = attention(device="meta").to_empty(device=DEVICE)
    fresh.load_state_dict(module.state_dict())
    return fresh


def assigned(module):
    fresh = attention(device="meta")
    fresh.load_state_dict(module.state_dict(), assign=True)
    return fresh


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


MOVES = {
    "to the same device": lambda m: m.to(DEVICE),
    "to the same dtype": lambda m: m.float(),
    "half and back": lambda m: m.half().float(),
    "bfloat16 and back": lambda m: m.to(torch.bfloat16).to(torch.float32),
    "away and back": lambda m: m.cpu().to("meta").to_empty(device=DEVICE),
    "in inference mode": under_inference_mode,
    "made on meta": from_meta,
    "assigned weights": assigned,
    "shared memory": lambda m: m.share_memory() if DEVICE == "cpu" else m,
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": saved,
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_tables_of_angles_stay_where_they_are(move, tables):
    """The very same tensors, which a captured CUDA graph may read: float32, exact, and of use to autograd."""
    module, x = attention().to(DEVICE), randn(B, L, D)
    want = tables(module, x)
    got = tables(move(module), x)
    for t, same, exact in zip(got, want, rope.table(4096, D // HEADS), strict=True):
        assert t is same
        assert t.dtype == torch.float32 and not t.is_inference()
        assert torch.equal(t.cpu(), torch.tensor(exact))


def test_tables_of_angles_are_float32_in_any_module(tables):
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        cos, sin = tables(attention(device=DEVICE, dtype=dtype), randn(B, L, D).to(dtype))
        assert cos.dtype == sin.dtype == torch.float32
    assert tables(attention().to(DEVICE), randn(B, L, D))[0] is cos  # one pair for all modules of a device


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_training_after_inference_mode(implementation, kernels):
    """Whatever was moved or first called there, no inference tensor is left behind."""
    x = randn(B, L, D)
    module = attention().to(DEVICE)
    with mmattn_torch.implementation(implementation):
        with torch.inference_mode():
            module.to(DEVICE)(x)
        module(x).x_out.square().sum().backward()
    assert module.to_qkv.weight.grad.abs().sum() > 0


def with_fake_tensors(module, x):
    with FakeTensorMode() as mode:
        assert type(attention(device=DEVICE)(mode.from_tensor(x)).x_out) is FakeTensor


FIRST_USES = {
    "inference mode": torch.inference_mode()(lambda m, x: m(x)),
    "grad": lambda m, x: torch.func.grad(lambda x: m(x).x_out.sum())(x),
    "vmap": lambda m, x: torch.func.vmap(lambda x: m(x).x_out)(x[None]),
    "fake tensors": with_fake_tensors,
    "traced": lambda m, x: make_fx(lambda x: m(x).x_out)(x),
    "traced with fake tensors": lambda m, x: make_fx(
        lambda p, x: functional_call(m, p, (x,)).x_out, tracing_mode="fake"
    )(dict(m.named_parameters()), x),
    "compiled": lambda m, x: torch.compile(m, backend="aot_eager", fullgraph=True)(x),
    "compiled for all lengths": lambda m, x: torch.compile(m, backend="aot_eager", fullgraph=True, dynamic=True)(x),
    "exported": lambda m, x: torch.export.export(m, (x,)),
}  # fmt: skip


@pytest.mark.parametrize("use", FIRST_USES.values(), ids=FIRST_USES)
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # of SDPA under vmap
def test_first_use_of_the_tables_leaves_no_mark(use, tables):
    """What the module runs under when the tables are made is forgotten afterwards."""
    module, x = attention().to(DEVICE), randn(B, L, D)
    torch._dynamo.reset()
    use(module, x)
    made = tables(module, x)
    assert all(type(t) is torch.Tensor and not t.is_inference() for t in made)
    assert all(a is b for a, b in zip(tables(module, x), made, strict=True))
    module(x).x_out.square().sum().backward()
    assert module.to_qkv.weight.grad.isfinite().all()


def test_the_tables_are_what_torch_computes(tables):
    cos, _ = tables(attention().to(DEVICE), randn(B, L, D))
    angle = torch.outer(torch.arange(4096).float(), 1.0 / 10000.0 ** (torch.arange(0, 16, 2).float() / 16))
    assert (cos.cpu() - angle.cos()).abs().max() < 1e-3  # an ulp of a frequency moves the last angle by 5e-4


def test_an_exported_stack_holds_the_tables_once(tables):
    stack = mmattn_torch.GPT2Stack(3, D, HEADS, dim_feedforward=HIDDEN, dropout=0.0).to(DEVICE)
    x = randn(B, L, D)
    program = torch.export.export(stack, (x,))
    assert len(program.constants) == 2
    assert torch.equal(program.module()(x).x_out, stack(x).x_out)


@pytest.mark.gpu
def test_a_captured_graph_outlives_moves_of_its_model(tables):
    module = attention().cuda().requires_grad_(False)
    x = randn(B, L, D)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            module(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = module(x).x_out
    graph.replay()
    want = out.clone()
    module.cuda().to("cuda").float()
    garbage = [torch.full((4096, D // HEADS // 2), 1e3, device="cuda") for _ in range(64)]  # takes whatever memory was freed
    graph.replay()
    assert torch.equal(out, want) and len(garbage) == 64


# Layers that are called where somebody would notice that they are not.


@pytest.fixture(params=["reference", "triton"])
def implementation(request, kernels):
    with mmattn_torch.implementation(request.param):
        yield


STACKS = {
    "cross": dict(conditioning=True, use_cross_attn=True),
    "pre-only": dict(conditioning=True, use_cross_attn=True, context_pre_only=True),
    "conditioned": dict(conditioning=True),
    "plain": dict(),
}


@pytest.fixture(params=STACKS)
def kind(request):
    return request.param


def stack_of(kind, depth=3, seed=0):
    torch.manual_seed(seed)
    return mmattn_torch.GPT2Stack(depth, D, HEADS, dim_feedforward=HIDDEN, dropout=0.0, device=DEVICE, **STACKS[kind])


def inputs_of(kind):
    """Tokens and context are padded, and every input that can have a gradient has one."""
    inputs = dict(x=randn(B, L, D).requires_grad_(), start_pos=torch.tensor([0, 5], device=DEVICE))
    inputs["x_mask"] = torch.arange(L, device=DEVICE) < torch.tensor([[L], [L - 2]], device=DEVICE)
    if kind != "plain":
        inputs["y"] = randn(B, 1, D).requires_grad_()
    if kind in ("cross", "pre-only"):
        inputs["context"] = randn(B, C, D).requires_grad_()
        inputs["context_mask"] = torch.arange(C, device=DEVICE) < torch.tensor([[C - 1], [C]], device=DEVICE)
    return inputs


def outs_and_grads(module, inputs, names=None):
    """Outputs and the gradients of inputs and parameters, these under the names of `names` where modules were renamed."""
    outs = [x for x in module(**inputs) if x is not None]
    wanted = {k: x for k, x in inputs.items() if x.requires_grad}
    for x in (*wanted.values(), *module.parameters()):
        x.grad = None
    sum((out * randn(*out.shape, seed=i)).sum() for i, out in enumerate(outs)).backward()
    wanted |= {(names or {}).get(k, k): p for k, p in module.named_parameters()}
    assert all(x.grad is not None for x in wanted.values()), [k for k, x in wanted.items() if x.grad is None]
    return {i: out.detach() for i, out in enumerate(outs)} | {k: x.grad.clone() for k, x in wanted.items()}


def same(got, want, tolerance=1e-5):
    assert got.keys() == want.keys()
    for name in want:
        error = (got[name] - want[name]).norm() / want[name].norm()
        assert error <= tolerance, f"{name}: {error:.3g}"


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("wrapped", [(0, 1, 2), (1,), (0, 2)], ids=str)
def test_checkpoint_around_layers(wrapped, use_reentrant, kind):
    """As transformers and diffusers checkpoint: around the forward of each layer."""
    module, inputs = stack_of(kind), inputs_of(kind)
    want = outs_and_grads(module, inputs)
    for i in wrapped:
        module.layers[i].forward = partial(checkpoint, module.layers[i].forward, use_reentrant=use_reentrant)
    same(outs_and_grads(module, inputs), want)


def callable_modules(module):
    """All but the containers, which have no forward of their own."""
    return {
        name: m
        for name, m in module.named_modules()
        if name and not isinstance(m, nn.ModuleList) and not name.endswith("context_layers")
    }


def watch(modules):
    """Count the calls of modules; what goes in and comes out must be tensors, or arguments that are none."""
    calls = dict.fromkeys(modules, 0)
    flat = lambda x: [z for y in x for z in flat(y)] if isinstance(x, tuple) else [x]

    def hook(name, module, args, kwargs, out):
        calls[name] += 1
        assert all(x is None or isinstance(x, torch.Tensor) for x in (*flat(args), *flat(out)))
        assert not kwargs

    return calls, [m.register_forward_hook(partial(hook, name), with_kwargs=True) for name, m in modules.items()]


def test_hooks_on_all_layers_fire(kind):
    module, inputs = stack_of(kind), inputs_of(kind)
    want = outs_and_grads(module, inputs)
    calls, handles = watch(callable_modules(module))
    same(outs_and_grads(module, inputs), want)
    assert calls == dict.fromkeys(calls, 1)
    for handle in handles:
        handle.remove()
    same(outs_and_grads(module, inputs), want, 0.0)


def test_hooks_beside_kernels(implementation):
    """Called one by one, the layers take the kernels too."""
    module, inputs = stack_of("cross", depth=2), inputs_of("cross")
    want = outs_and_grads(module, inputs)
    watch(callable_modules(module))
    same(outs_and_grads(module, inputs), want)


def test_a_hook_on_one_layer_fires(kind):
    module, inputs = stack_of(kind, depth=2), inputs_of(kind)
    want = outs_and_grads(module, inputs)
    for name, m in callable_modules(module).items():
        if "layers.1." not in name:
            calls, handles = watch({name: m})
            same(outs_and_grads(module, inputs), want)
            assert calls == {name: 1}
            handles[0].remove()


HANGERS = {
    "forward_pre_hook": lambda m, fire: m.register_forward_pre_hook(fire),
    "forward_hook": lambda m, fire: m.register_forward_hook(fire),
    "full_backward_pre_hook": lambda m, fire: m.register_full_backward_pre_hook(fire),
    "full_backward_hook": lambda m, fire: m.register_full_backward_hook(fire),
    "forward": lambda m, fire: setattr(m, "forward", lambda *args, forward=m.forward: (fire(), forward(*args))[1]),
    "compile": lambda m, fire: m.compile(backend=lambda graph, _: (fire(), graph.forward)[1]),
}


@pytest.mark.parametrize("hang", HANGERS.values(), ids=HANGERS)
@pytest.mark.parametrize(
    "name", ["0", "0.cross_attn", "0.cross_attn.c_to_out", "0.cross_attn.to_out.1", "0.cross_attn.c_rms_norm_k"]
)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch.compile looks at it
def test_whatever_is_hung_on_a_layer_runs(name, hang):
    torch._dynamo.reset()
    module, inputs, fired = stack_of("cross", depth=2), inputs_of("cross"), []
    want = outs_and_grads(module, inputs)
    hang(module.layers.get_submodule(name), lambda *_: fired.append(name))
    same(outs_and_grads(module, inputs), want)
    assert fired


@pytest.mark.parametrize("linear", [False, True])
def test_called_norms_of_attention(linear, implementation):
    """Softmax and linear attention whose norms are called, with every mask."""
    torch.manual_seed(0)
    module = mmattn_torch.RMSNormSelfCrossAttention(D, HEADS, use_context=True, linear=linear, device=DEVICE)
    inputs = inputs_of("cross") | dict(attn_mask=torch.rand(B, L, L, generator=torch.Generator().manual_seed(0)).to(DEVICE) < 0.7)
    del inputs["y"]
    want = outs_and_grads(module, inputs)
    calls, _ = watch({"rms_norm_q": module.rms_norm_q})
    same(outs_and_grads(module, inputs), want)
    assert calls == {"rms_norm_q": 1}


class Scaled(nn.Module):
    """A user's own layer."""

    def __init__(self, inner=None):
        super().__init__()
        self.inner, self.scale = inner, nn.Parameter(torch.tensor(1.0, device=DEVICE))

    def forward(self, x, *args):
        if self.inner is None:
            return x * self.scale
        out = self.inner(x, *args)
        return tuple(s if s is None else s * self.scale for s in out) if isinstance(out, tuple) else out * self.scale


@pytest.mark.parametrize(
    "name", ["layers.0", "layers.1", "layers.2", "attn", "to_qkv", "rms_norm_q", "to_out", "to_out.1", "mlp.0"]
)
def test_a_layer_may_be_replaced_by_a_users_own(name, kind):
    """One that calls the old layer and does nothing more changes nothing."""
    module, inputs = stack_of(kind), inputs_of(kind)
    want = outs_and_grads(module, inputs)
    attn = "layers.1.cross_attn" if "context" in inputs else "layers.1.attn"
    path = name if "layers" in name else attn if name == "attn" else f"layers.1.{name}" if "mlp" in name else f"{attn}.{name}"
    module.set_submodule(path, Scaled(module.get_submodule(path)))
    got = outs_and_grads(module, inputs, {k: k.replace(f"{path}.inner", path) for k, _ in module.named_parameters()})
    assert got.pop(f"{path}.scale").abs() > 0
    same(got, want)


def test_layers_of_other_kinds():
    """The last RMSNorm of a stream's attention may go, and a stack may have a layer of the user's between ours."""
    module, inputs = stack_of("conditioned", depth=2), inputs_of("conditioned")
    module.layers[0].attn.to_out = module.layers[0].attn.to_out[0]
    module.layers.insert(1, Scaled())
    module.layers[1].forward = lambda x, *_: mmattn_torch.AttentionOutput(x * module.layers[1].scale)
    got = outs_and_grads(module, inputs)
    x, y = inputs["x"].detach() * inputs["x_mask"][..., None], inputs["y"].detach()
    for layer in (module.layers[0], module.layers[2]):
        x = layer(x, y, None, None, inputs["start_pos"], inputs["x_mask"]).x_out
    same({0: got[0]}, {0: x.detach()})


def offload(module):
    """Weights lie elsewhere and are with a layer only while it is called, as accelerate and diffusers offload."""

    def onload(m, _):
        for name, value in m.stored.items():
            m._parameters[name] = value

    def release(m, *_):
        for name, value in m.stored.items():
            m._parameters[name] = nn.Parameter(value.to("meta"), requires_grad=value.requires_grad)

    for m in module.modules():
        m.stored = dict(m.named_parameters(recurse=False))
        release(m)
        m.register_forward_pre_hook(onload)
        m.register_forward_hook(release)


def test_offloaded_weights(kind):
    """No weight is read while its layer is not called."""
    module, inputs = stack_of(kind).requires_grad_(False), inputs_of(kind)
    want = module(**inputs)
    offload(module)
    for got, exact in zip(module(**inputs), want, strict=True):
        assert got is exact is None or torch.allclose(got, exact, atol=1e-5)


# Several processes.


def gloo(rank, function, store, *args):
    """One of two processes on the CPU; a function of this file, since it is looked up by name."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    try:
        function(rank, *args)
    finally:
        torch.distributed.destroy_process_group()


def sharded(rank, kind):
    """Parameters and gradients in shards, by layers of every size; each rank has a sample of its own."""
    global DEVICE
    DEVICE = "cpu"
    mesh = init_device_mesh("cpu", (2,))
    inputs = inputs_of(kind)
    plain = stack_of(kind, depth=2)
    want = outs_and_grads(plain, inputs)
    mine = {k: x.detach()[rank : rank + 1].requires_grad_(x.requires_grad) for k, x in inputs.items()}
    names = callable_modules(plain)
    leaves = [name for name, m in names.items() if not list(m.children())]
    norms = [name for name in leaves if isinstance(names[name], nn.RMSNorm)]
    for layers in (norms, ["layers.0", "layers.1"], [*leaves, *(name for name in names if name not in leaves)]):
        module = stack_of(kind, depth=2)
        for name in layers:
            if list(module.get_submodule(name).parameters()):
                fully_shard(module.get_submodule(name), mesh=mesh)
        fully_shard(module, mesh=mesh)
        outs = [x for x in module(**mine) if x is not None]
        sum((out * randn(*want[i].shape, seed=i)[rank : rank + 1]).sum() for i, out in enumerate(outs)).backward()
        same({i: x.detach() for i, x in enumerate(outs)}, {i: want[i][rank : rank + 1] for i in range(len(outs))})
        same(
            {k: 2 * p.grad.full_tensor() for k, p in module.named_parameters()}, {k: want[k] for k, _ in plain.named_parameters()}
        )


def test_fully_sharded_layers(tmp_path):
    torch.multiprocessing.spawn(gloo, (sharded, tmp_path / "store", "cross"), nprocs=2)


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(one_process):
    """The README's model and loss: DistributedDataParallel stops at the second step if a parameter had no gradient."""
    stack, inputs = stack_of("pre-only", depth=2), inputs_of("pre-only")
    module = nn.parallel.DistributedDataParallel(stack)
    for _ in range(3):
        module(**inputs).x_out.sum().backward()
    assert all(p.grad.abs().max() > 0 for p in stack.parameters())
