"""The modules in the hands of torch's other tools: what moves, casts, saves and traces a module."""

from __future__ import annotations

import copy
import io
import pickle

import pytest

pytest.importorskip("torch")

import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

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
