"""Every launch that the case table leads to, as a value and compiled ahead of time: no GPU is needed.

Each distinct (kernel, config) is compiled once in bfloat16 for each architecture, for its resources and its instructions.
"""

from __future__ import annotations

import math
import re
import subprocess
from functools import cache
from types import SimpleNamespace
from typing import NamedTuple

import frameworks
import pytest
import triton
from cases import CASES
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import mmattn
from mmattn.op import Plan, Spec, Target, spec

TARGETS = {80: Target(80, 108, 166912), 90: Target(90, 132, 232448), 100: Target(100, 148, 232448)}
POINTERS = dict(float32="*fp32", float16="*fp16", bfloat16="*bf16", int32="*i32", bool="*i1")
SPILLS = {}  # (kernel, arch): bytes of registers spilled, at most; no kernel may spill on sm_90
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


@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_are_what_infer_promises(case):
    for dtype in case.dtypes:
        call, outs, extras, grads, _ = trace(case, dtype, Target())
        op, static = call.op, dict(call.static)
        assert (specs(outs), specs(extras)) == op.infer(SimpleNamespace(**call.operands), **static)
        assert grads.keys() | op.passes.keys() == set(op.operands) - op.constant
        for name, grad in grads.items():
            promised = specs(call.operands[name])
            if static.get(f"{name}_row") is not None:  # the gradient of one row of a packed operand
                promised = Spec((promised.shape[0], promised.shape[2]), promised.dtype)
            assert specs(grad) == promised, name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_plans_fit_their_kernels(case):
    for dtype in case.dtypes:
        for plan, inputs in trace(case, dtype, Target()).launches:
            parameters = plan.kernel.arg_names
            pointers = len(inputs) + len(plan.outs)
            assert all(name.endswith("_ptr") for name in parameters[:pointers])
            assert parameters[pointers : pointers + len(plan.ints)] == list(plan.ints)
            assert set(parameters[pointers + len(plan.ints) :]) == plan.meta.keys()
            assert [p.name for p in plan.kernel.params if p.is_constexpr] == parameters[pointers + len(plan.ints) :]
            assert all(isinstance(n, int) and 0 <= n < 2**31 for n in plan.ints.values())
            assert 0 <= plan.grid[0] < 2**31 and all(0 <= n < 2**16 for n in plan.grid[1:])


def config(launch: Launch, arch: int):
    """What makes a compilation worth its time: kernel, dtypes, tiles; on sm_90 the flags too. Never eps, strides, offsets."""
    plan = launch.plan
    dtypes = tuple(x.dtype for x in (*launch.inputs, *plan.outs)) if arch == 90 else None
    meta = tuple((k, v) for k, v in plan.meta.items() if not re.search("EPS|STRIDE|_AT$|POSITIONS|SCALE$", k))
    meta = meta if arch == 90 else tuple((k, v) for k, v in meta if not isinstance(v, bool))
    return plan.kernel.fn.__name__, dtypes, meta, plan.warps, plan.stages, arch


def distinct():
    """One launch of each config; of several, the one with the most flags."""
    found = {}
    flags = lambda launch: sum(v is True for v in launch.plan.meta.values())
    for arch, target in TARGETS.items():
        for case in CASES:
            for launch in trace(case, "bfloat16", target).launches:
                key = config(launch, arch)
                if key not in found or flags(launch) > flags(found[key].values[0]):
                    found[key] = pytest.param(launch, arch, id=f"{launch.plan.kernel.fn.__name__}-{case}-sm{arch}")
    return found.values()


def compiled(launch: Launch, arch: int):
    plan, dtypes = launch.plan, [x.dtype for x in (*launch.inputs, *launch.plan.outs)]
    signature = dict(zip(plan.kernel.arg_names, [POINTERS[dtype] for dtype in dtypes], strict=False))
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(dtypes))}
    signature |= dict.fromkeys(plan.ints, "i32") | dict.fromkeys(plan.meta, "constexpr")
    options = dict(num_warps=plan.warps, num_stages=plan.stages, enable_fp_fusion=False)
    source = ASTSource(plan.kernel, signature, dict(plan.meta), aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def tool(name: str, *args) -> str:
    """The output of a tool that Triton ships."""
    return subprocess.run([getattr(triton.knobs.nvidia, name).path, *args], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("launch, arch", distinct())
def test_compiles_well(launch, arch, tmp_path):
    kernel = compiled(launch, arch)
    name = launch.plan.kernel.fn.__name__
    assert kernel.metadata.shared <= TARGETS[arch].shared
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    usage = re.search(r"REG:(\d+) STACK:(\d+)", tool("cuobjdump", "--dump-resource-usage", str(cubin)))
    spilled = int(usage[2])
    assert spilled <= (0 if arch == 90 else SPILLS.get((name, arch), 0)), f"{usage[1]} registers, {spilled} bytes spilled"
    instructions = tool("nvdisasm", "-c", str(cubin))
    if re.search(r"tt\.dot .*bf16", kernel.asm["ttir"]):
        assert TENSOR_CORES[arch] in instructions
    elif launch.plan.meta.get("WIDTH", 0) >= 32:
        assert re.search(r"LDG[\w.]*\.128", instructions), "no 128-bit load"
