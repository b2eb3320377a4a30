"""Operands of dots in tf32: rounded to the nearest, not truncated as the tensor cores would."""

from __future__ import annotations

import re

import frameworks
import numpy as np
import pytest
import triton.language as tl
from cases import CASES
from test_plans import TARGETS, base_name, compiled, trace
from triton.runtime import interpreter

pytestmark = pytest.mark.skipif(frameworks.GPU, reason="test_ops runs the instruction itself")


def nearest_tf32(x: np.ndarray) -> np.ndarray:
    """x to the nearest number of 11 significant bits, ties away from zero, by float64 arithmetic."""
    wide = np.where(np.isfinite(x), x, 0).astype(np.float64)
    ulp = np.ldexp(1.0, np.maximum(np.frexp(wide)[1] - 11, -136))
    nearest = np.copysign(np.floor(np.abs(wide) / ulp + 0.5) * ulp, wide)
    with np.errstate(over="ignore"):
        return np.where(np.isfinite(x), nearest.astype(np.float32), x)


def test_the_interpreter_rounds_as_the_instruction_does():
    import interpreted

    bits = np.random.default_rng(0).integers(0, 2**32, 2**16, dtype=np.uint32)
    ties = (bits[:1000] & 0xFFFFE000) | 0x1000
    special = [0, 0x80000000, 1, 0xFFF, 0x1000, 0x7FFFFF, 0x7F7FEFFF, 0x7F7FF000, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000]
    nan = [0x7FC00000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0xFFFFF000]
    x = np.concatenate([bits, ties, np.array(special + nan, np.uint32)])[-(2**16) :].view(np.float32)
    with interpreted.LOCK, interpreted.interpreting():
        for_dot = interpreted.load(interpreted.HOME)["mmattn.dots"].for_dot
        handle = tl.tensor(interpreter.TensorHandle(x, tl.float32), tl.block_type(tl.float32, [x.size]))
        y, same = (for_dot(handle, precision).handle.data for precision in ("tf32", "ieee"))
    np.testing.assert_array_equal(y, nearest_tf32(x))
    np.testing.assert_array_equal(same, x)


STATES = ("%state_ptr", "%dstate_ptr")  # stored rounded


def unrounded(value: str, made: dict) -> list[str]:
    """What a dot's operand comes from that is neither rounded nor exact in tf32."""
    operation, operands = made.get(value, ("argument", []))
    if operation == "tt.elementwise_inline_asm" or operation == "arith.constant":
        return []
    if operation == "arith.extf":  # from 16 bits, which have no more than tf32
        return []
    if operation == "arith.select":
        return [x for operand in operands[1:3] for x in unrounded(operand, made)]
    if operation in ("tt.trans", "tt.reshape"):
        return unrounded(operands[0], made)
    if operation == "tt.load" and origin(operands[0], made) in STATES:
        return []
    return [f"{value}: {operation}"]


def origin(pointer: str, made: dict) -> str:
    """The argument that a pointer was computed from."""
    operation, operands = made.get(pointer, ("argument", []))
    return origin(operands[0], made) if operation in ("tt.splat", "tt.broadcast", "tt.addptr") else pointer


def tf32_launches() -> list:
    """One launch of each kernel whose float32 dots are in tf32, of float32 operands and of bfloat16 ones with a float32 state."""
    launches = {}
    for case in CASES:
        if str(case) in ("joint_attention-lse", "joint_attention-everything", "relu_linear_attention-37-5"):
            case = case._replace(static=case.static | dict(precision="tf32"), label=f"{case.label}-tf32")
            for dtype in ("float32", "bfloat16") if case.call == "relu_linear_attention" else ("float32",):
                for launch in trace(case, dtype, TARGETS[90]).launches:
                    if launch.plan.meta.get("PRECISION") == "tf32":
                        launches[f"{base_name(launch.plan)}-{dtype}-{case.label}"] = launch
    return [pytest.param(launch, id=name) for name, launch in launches.items()]


def operands_and_states(ir: str):
    """Each operand of a float32 dot in tf32, and each value stored as a state, with all that is made before it: of each value the
    operation that makes it, and that one's operands. (Loops beside each other use the same names.)"""
    made = {}
    for line in ir.splitlines():
        if dot := re.search(r"tt\.dot (%\w+), (%\w+), .*inputPrecision = tf32 : tensor<\w+xf32>", line):
            yield from ((x, made) for x in dot.groups())
        if store := re.search(r"tt\.store (%\w+), (%\w+)", line):
            yield from ((x, made) for x in store.groups()[1:] if origin(store[1], made) in STATES)
        if made_here := re.match(r" *(%\w+)(?::\d+)? = ([\w.]+)(.*?)(?: loc\(.*)?$", line):
            name, operation, rest = made_here.groups()
            made[name] = operation, re.findall(r"%\w+", rest)


@pytest.mark.parametrize("launch", tf32_launches())
def test_compiled_dots_get_rounded_operands(launch):
    kernel = compiled(launch, 90)
    found = [(x, unrounded(x, made)) for x, made in operands_and_states(kernel.asm["ttir"])]
    assert found
    assert not [sources for _, sources in found if sources]
