"""Every launch that the case table leads to, as a value and compiled ahead of time: no GPU is needed.

Each distinct (kernel, config) is compiled once in bfloat16 for each architecture, for its resources and its instructions.
"""

from __future__ import annotations

import importlib
import math
import re
import subprocess
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import NamedTuple

import frameworks
import pytest
import triton
from cases import CASES, Case, Normal, heads, mask, picks, sample, scattered
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

import mmattn
from mmattn._gluon import INSTALLED, GluonASTSource, is_gluon
from mmattn.attention import plans
from mmattn.op import Plan, Spec, Target, row_stride, spec

TARGETS = {
    80: Target(80, 108, 166912),  # A100
    86: Target(86, 82, 101376),  # RTX 3090
    89: Target(89, 128, 101376),  # RTX 4090, L40S
    90: Target(90, 132, 232448, INSTALLED),  # H100, H200
    100: Target(100, 148, 232448),  # B200
    120: Target(120, 170, 101376),  # RTX 5090
}
COMPILED = (80, 90, 100)  # to machine code here
POINTERS = dict(float32="*fp32", float16="*fp16", bfloat16="*bf16", int32="*i32", bool="*i1")
# Registers are a Triton version's: they are held to what was measured with this one. With others sm_90's code must compile.
MEASURED = triton.__version__.startswith("3.7.")
# Bytes of registers that a kernel's worst config may spill, by architecture; nothing elsewhere. Rounded up from what was
# measured. On sm_90 rows of 16384 with their vectors and sums do not fit the registers of one program, and at d = 96 and 128
# dk, dv and two tiles of scores, and at 96 the forward's, fit only nearly: tiles that spill nothing measured slower; nor do a
# rotated head's partial columns and sums. In the backward a key mask on top of a mask or of causal attention spills too: there is
# a loop with it and one without.
SPILLS = {
    80: dict(
        joint_attention_fwd=704,
        joint_attention_bwd=160,
        joint_attention_bwd_dkdv=896,
        joint_attention_bwd_dq=960,
        linear_attention_bwd=256,
        linear_attention_bwd_state=384,
        adaln_bwd=384,
        gated_residual_norm_adaln_bwd=704,
        gated_residual_norm_adaln_fwd=192,
    ),
    90: dict(
        joint_attention_fwd=96,
        joint_attention_bwd=192,
        joint_attention_bwd_dkdv=160,
        joint_attention_bwd_dq=32,
        joint_attention_hopper_bwd=40,
        qk_norm_rope_bwd=16,
        adaln_bwd=256,
        gated_residual_norm_adaln_bwd=704,
        gated_residual_norm_adaln_fwd=192,
    ),
    100: dict(
        joint_attention_fwd=128,
        joint_attention_bwd_dkdv=800,
        joint_attention_bwd_dq=128,
        linear_attention_fwd=64,
        linear_attention_state=64,
        linear_attention_bwd_state=64,
        adaln_fwd=16,
        adaln_bwd=384,
        gated_residual_norm_adaln_bwd=704,
        gated_residual_norm_adaln_fwd=192,
    ),
}
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}


class Ghost:
    """Shape, dtype and strides of an array that does not exist."""

    def __init__(self, shape, dtype, strides=None):
        self.shape, self.dtype = tuple(shape), dtype
        self.strides = strides or tuple(math.prod(self.shape[i + 1 :]) for i in range(len(self.shape)))

    def stride(self):
        return self.strides

    def __getitem__(self, at):
        """A view: whole axes, one slice, one number."""
        kept = [(len(range(n)[i]), s) for i, n, s in zip(at, self.shape, self.strides, strict=False) if isinstance(i, slice)]
        kept += zip(self.shape[len(at) :], self.strides[len(at) :], strict=True)
        shape, strides = zip(*kept, strict=True)
        return Ghost(shape, self.dtype, strides)


@pytest.mark.parametrize("sizes", [(1, 3 * 96), (1, 1, 3 * 96)], ids=str)
def test_a_lone_sample_is_launched_as_others_are(sizes):
    """Its stride is a constant of the kernel, though no kernel needs it."""
    slices = (*(slice(None) for _ in sizes[1:]), slice(0, 96))
    lone, others = (row_stride(Ghost((batch, *sizes[1:]), "bfloat16")[slices], 1) for batch in (1, 4))
    assert lone == others == 3 * 96


class Launch(NamedTuple):
    plan: Plan
    inputs: tuple[Spec, ...]


class Recorder:
    """The `run` that only takes notes."""

    def __init__(self, target: Target):
        self.target, self.launches = target, []

    def __call__(self, plan: Plan, *arrays):
        self.launches.append(Launch(plan, tuple(map(spec, arrays))))
        return plan.outs


def ghosts(case, dtype: str):
    """The case's call, on ghosts."""
    arrays = {name: Ghost(leaf.shape, leaf.dtype or dtype) for name, leaf in frameworks.walk(case.operands)}
    return getattr(mmattn, case.call)(**frameworks.fill(case.operands, arrays), **case.static)


def specs(tree):
    return (
        tuple(map(specs, tree))
        if isinstance(tree, tuple) and not isinstance(tree, Spec)
        else None
        if tree is None
        else spec(tree)
    )


class Trace(NamedTuple):
    """What a call and its gradient return and launch."""

    call: mmattn.op.Call
    outs: tuple
    extras: tuple
    grads: dict
    launches: list[Launch]


@cache
def trace(case, dtype: str, target: Target) -> Trace:
    call, run = ghosts(case, dtype), Recorder(target)
    op, static = call.op, dict(call.static)
    outs, extras = op.forward(run, SimpleNamespace(**call.operands), **static)
    kept = {name: x if name in op.keeps else specs(x) for name, x in call.operands.items()}
    grads = op.backward(run, SimpleNamespace(**kept), outs if op.keeps_outs else None, extras, outs, **static)
    return Trace(call, tuple(outs), tuple(extras), grads, run.launches)


def check_promises(traced: Trace) -> None:
    """Results have the shapes and dtypes that infer says, and gradients those of their operands."""
    call, outs, extras, grads, _ = traced
    op, static = call.op, dict(call.static)
    assert (specs(outs), specs(extras)) == op.infer(SimpleNamespace(**call.operands), **static)
    assert grads.keys() | op.passes.keys() == set(op.operands) - op.constant
    for name, grad in grads.items():
        promised = specs(call.operands[name])
        if static.get(f"{name}_row") is not None:  # the gradient of one row of a packed operand
            promised = Spec((promised.shape[0], promised.shape[2]), promised.dtype)
        assert specs(grad) == promised, f"gradient of {name}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_are_what_infer_promises(case):
    for dtype in case.dtypes:
        check_promises(trace(case, dtype, TARGETS[90]))


@pytest.mark.parametrize(
    "room, launch, out, name, case",
    [
        ("residual", "bwd_plan", 0, "h", "gated_residual-bfloat16-branch"),
        ("gated_residual_norm_adaln", "bwd_plan", 1, "h", "gated_residual_norm_adaln-bfloat16-branch"),
        ("adaln.op", "vectors_plan", 0, "scale", "layernorm_adaln-bfloat16-vectors"),
        ("qk_norm_rope", "weights_plan", 0, "q_weight", "qk_norm_rope-bfloat16-weights"),
    ],
)
def test_a_gradient_in_the_wrong_dtype_is_found(room, launch, out, name, case, monkeypatch):
    """Torch would cast it without a word."""
    module = importlib.import_module(f"mmattn.{room}")
    right = getattr(module, launch)

    def wrong(*args):
        outs = list(right(*args).outs)
        outs[out] = Spec(outs[out].shape, "float32")
        return replace(right(*args), outs=tuple(outs))

    case = next(c for c in CASES if str(c) == case)
    check_promises(trace.__wrapped__(case, "float32", TARGETS[90]))
    monkeypatch.setattr(module, launch, wrong)
    with pytest.raises(AssertionError, match=f"gradient of {name}"):
        check_promises(trace.__wrapped__(case, "float32", TARGETS[90]))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_plans_fit_their_kernels(case):
    for dtype in case.dtypes:
        for plan, inputs in trace(case, dtype, TARGETS[90]).launches:
            parameters = plan.kernel.arg_names
            pointers = len(inputs) + len(plan.outs)
            assert all(name.endswith("_ptr") for name in parameters[:pointers])
            assert parameters[pointers : pointers + len(plan.ints)] == list(plan.ints)
            assert set(parameters[pointers + len(plan.ints) :]) == plan.meta.keys()
            assert [p.name for p in plan.kernel.params if p.is_constexpr] == parameters[pointers + len(plan.ints) :]
            assert all(isinstance(n, int) and 0 <= n < 2**31 for n in plan.ints.values())
            assert 0 <= plan.grid[0] < 2**31 and all(0 <= n < 2**16 for n in plan.grid[1:])


TILE = {"ROWS", "COLS", "QUERIES", "KEYS", "TOKENS", "PAIRS", "LINES", "ALONG", "PRECISION", "LOOP"}


def config(launch: Launch):
    """Kernel, tile, warps, stages; not the streams' number, flags, widths, strides and eps that a config serves."""
    plan = launch.plan
    tile = tuple((name, x) for name, x in plan.meta.items() if name in TILE)
    return base_name(plan), tile, plan.warps, plan.stages


def base_name(plan: Plan) -> str:
    """A kernel's name without the number of streams."""
    return re.sub(r"(_\d+)?_kernel$", "", plan.kernel.fn.__name__)


def burden(launch: Launch):
    """What a launch asks of its config: blocks without a loop, masks and other flags, streams, width."""
    meta = launch.plan.meta
    return (
        sum(x for name, x in meta.items() if name.startswith("BLOCK")),
        sum(int(x) for x in meta.values() if isinstance(x, bool)) + meta.get("MASKED", 0),
        len(launch.inputs),
        meta.get("WIDTH", 0),
    )


def representatives():
    """Of every config the launch that asks most of it."""
    configs = {}
    for arch in COMPILED if MEASURED else (90,):
        for case in CASES:
            for launch in trace(case, "bfloat16", TARGETS[arch]).launches:
                configs.setdefault((arch, *config(launch)), {})[burden(launch)] = case, launch
    for (arch, *_), launches in configs.items():
        case, launch = launches[max(launches)]
        yield pytest.param(launch, arch, id=f"{launch.plan.kernel.fn.__name__}-{case}-sm{arch}")


def source_of(launch: Launch):
    """What triton.compile takes, and its options."""
    plan, dtypes = launch.plan, [x.dtype for x in (*launch.inputs, *launch.plan.outs)]
    signature = dict(zip(plan.kernel.arg_names, [POINTERS[dtype] for dtype in dtypes], strict=False))
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(dtypes))}  # what the JIT finds out about pointers
    signature |= dict.fromkeys(plan.ints, "i32") | dict.fromkeys(plan.meta, "constexpr")
    options = dict(num_warps=plan.warps, num_stages=plan.stages, enable_fp_fusion=False)
    return (GluonASTSource if is_gluon(plan.kernel) else ASTSource)(plan.kernel, signature, dict(plan.meta), aligned), options


def compiled(launch: Launch, arch: int):
    source, options = source_of(launch)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def shared_memory(launch: Launch, arch: int) -> int:
    """Bytes that Triton asks for: it knows them before PTX, so that neither that nor ptxas need be waited for."""
    (source, options), target, metadata, stages = source_of(launch), GPUTarget("cuda", arch, 32), {}, {}
    backend = make_backend(target)
    options = backend.parse_options(options | source.parse_options())
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    backend.add_stages(stages, options, source.language)
    implementation, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    module = source.make_ir(target, options, implementation, modules, context)
    for stage in stages.values():
        if "shared" not in metadata:
            module = stage(module, metadata)
    return metadata["shared"]


WIDE = 8200  # in a tile of 16384 columns, of which one row in float32 takes 64 KB


def wide_norms():
    """Calls whose rows are as long as shared memory holds few of, with every form of modulation."""
    x = dict(x=Normal((1, 2, WIDE)))
    both = lambda *shape, **how: {name: Normal(shape, **how) for name in ("scale", "shift")}
    yield Case("layernorm_adaln", "wide", x | both(1, WIDE))
    yield Case("layernorm_adaln", "wide-per-token", x | both(1, 2, WIDE))
    yield Case("layernorm_adaln", "wide-per-token-float32", x | both(1, 2, WIDE, dtype="float32"))
    yield Case("layernorm_adaln", "wide-rows", x | both(3, WIDE) | picks(1, 2, 3))
    yield Case("layernorm_adaln", "wide-rows-of-samples", x | both(1, 3, WIDE) | picks(1, 2, 3))
    residual = dict(residual=Normal((1, 2, WIDE)), h=Normal((1, 2, WIDE))) | sample(1, WIDE, "gate")
    yield Case("gated_residual", "wide", residual)
    yield Case("gated_residual_norm_adaln", "wide", residual | sample(1, WIDE, "scale", "shift"))
    for dtype in ("float32", "bfloat16"):
        branch = residual | dict(h=Normal((1, 2, WIDE), dtype=dtype))
        yield Case("gated_residual_norm_adaln", f"wide-{dtype}-branch", branch | sample(1, WIDE, "scale", "shift", dtype=dtype))


@pytest.mark.parametrize("case", list(wide_norms()), ids=str)
def test_what_a_norm_stages_fits(case):
    """Modulation of each token is staged as x is: not counted, it asked for more than an H200 has."""
    for dtype, arch in (("float32", 80), ("float32", 90), ("bfloat16", 80)):
        for launch in trace(case, dtype, TARGETS[arch]).launches:
            if "vectors" not in base_name(launch.plan) and "sum" not in base_name(launch.plan):
                assert shared_memory(launch, arch) <= TARGETS[arch].shared, (dtype, arch, base_name(launch.plan))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cards_of_one_kind_get_one_launch(case):
    """So that what one of them holds the others do: sm_86 and sm_89 differ in nothing that a plan looks at."""
    for dtype in case.dtypes:
        one, other = (trace(case, dtype, TARGETS[86]._replace(arch=arch)).launches for arch in (86, 89))
        assert one == other


def wide_heads():
    """Attention at width 128, where tiles take most: (case, dtype)."""
    B, H, d, lengths = 2, 8, 128, (2000, 37)
    everything = mask(B, lengths[0]) | scattered(B, *lengths)
    for dtype, qk, precision, masks in (
        ("bfloat16", None, "ieee", {}),
        ("float16", None, "ieee", everything),
        ("bfloat16", "float32", "ieee", everything),
        ("float32", None, "tf32", {}),
    ):
        operands = heads(B, H, d, *lengths, qk=dict(dtype=qk) if qk else None) | masks
        label = "-".join(["wide", dtype, *filter(None, (qk, precision)), *(["masks"] if masks else [])])
        yield pytest.param(Case("joint_attention", label, operands, dict(precision=precision)), dtype, id=label)


@pytest.mark.parametrize("case, dtype", list(wide_heads()))
def test_attention_fits_a_card_of_99_kb(case, dtype):
    """The backward at width 128 asked for 131,072 bytes, and for 163,840 in tf32. What plans expect is an upper bound."""
    card = TARGETS[86]
    call, _, _, _, launches = trace(case, dtype, card)
    for launch in launches:
        name, meta = base_name(launch.plan), launch.plan.meta
        kind = name.rpartition("_")[2]
        if kind in ("fwd", "dq", "dkdv"):
            asked = shared_memory(launch, card.arch)
            kind = "unshifted" if kind == "fwd" and not meta["SHIFTED"] else kind
            expected = plans.shared_bytes(SimpleNamespace(**call.operands), kind, meta, launch.plan.stages)
            assert asked <= expected <= card.shared, (name, asked, expected)


MIXED = [case for case in CASES if not case.gpu and str(case).endswith(("-each-its-own", "float16-qk", "float32-qk"))]


@pytest.mark.parametrize("case", MIXED, ids=str)
def test_operands_of_several_dtypes_compile(case):
    """The interpreter adds and multiplies across dtypes where the compiler would not."""
    for launch in trace(case, "bfloat16", TARGETS[90]).launches:
        assert compiled(launch, 90).metadata.shared <= TARGETS[90].shared


def tool(name: str, *args) -> str:
    """The output of a tool that Triton ships."""
    return subprocess.run([getattr(triton.knobs.nvidia, name).path, *args], capture_output=True, text=True, check=True).stdout


def machine_code(kernel, folder) -> tuple[str, int, str]:
    """Registers, bytes spilled and instructions of a compiled kernel."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    usage = re.search(r"REG:(\d+) STACK:(\d+)", tool("cuobjdump", "--dump-resource-usage", str(cubin)))
    return usage[1], int(usage[2]), tool("nvdisasm", "-c", "--no-dataflow", str(cubin))


@pytest.mark.parametrize("launch, arch", list(representatives()))
def test_compiles_well(launch, arch, tmp_path):
    kernel = compiled(launch, arch)
    name = base_name(launch.plan)
    assert kernel.metadata.shared <= TARGETS[arch].shared
    registers, spilled, code = machine_code(kernel, tmp_path)
    assert not MEASURED or spilled <= SPILLS[arch].get(name, 0), f"{registers} registers, {spilled} bytes spilled"
    instructions = set(re.findall(r"\b(?:HMMA|HGMMA|UTC\w*MMA|LDG[\w.]*)", code))
    if re.search(r"(tt\.dot|warp_group_dot) .*bf16", kernel.asm.get("ttir") or kernel.asm["ttgir"]):
        # Two warps and the warp's own HMMA serve narrow heads better than four warps and wgmma.
        wanted = TENSOR_CORES[arch] if name.startswith("joint_attention") and launch.plan.warps >= 4 else "MMA"
        assert any(wanted in x for x in instructions), instructions
    elif launch.plan.meta.get("WIDTH", 0) >= 32:
        assert any(x.endswith(".128") or ".128." in x for x in instructions), instructions


LINEAR = next(case for case in CASES if str(case) == "relu_linear_attention-1x8x128-512")


@pytest.mark.parametrize("dtype", LINEAR.dtypes)
def test_linear_attention_fits_a_card_of_99_kb(dtype):
    """S and its transpose alone took 131,072 bytes at width 128."""
    for launch in trace(LINEAR, dtype, TARGETS[86]).launches:
        assert shared_memory(launch, 86) <= TARGETS[86].shared, base_name(launch.plan)


@pytest.mark.parametrize("launch", trace(LINEAR, "float32", TARGETS[80]).launches, ids=lambda launch: base_name(launch.plan))
def test_linear_attention_in_ieee_float32_spills_nothing(launch, tmp_path):
    """With a product's whole operand rows in registers it was up to 3.2 KB a thread."""
    registers, spilled, _ = machine_code(compiled(launch, 80), tmp_path)
    assert not MEASURED or spilled == 0, f"{registers} registers, {spilled} bytes spilled"
