"""Operands of dots in tf32.

The tensor cores read the upper 19 bits of a float32 operand and ignore the 13 below. Left alone, that truncates every operand
towards zero, by half an ulp of tf32 on average, and no sum averages that out. So operands are rounded to the nearest first.

A dot with input_precision="tf32x3" needs none of this: Triton splits each operand into a rounded one and a remainder.
"""

from __future__ import annotations

from ._triton import INTERPRETED, tl, triton


@triton.jit
def for_dot(x, PRECISION: tl.constexpr):
    """x as a dot of this precision should get it: float32 rounded to tf32, ties away from zero, where the dot is in tf32.

    `cvt.rna.tf32.f32` is three instructions, and exact for NaN and infinity; integer arithmetic on the bits comes to the same
    three. What matters is where they run. Arithmetic the compiler moves to where the dot reads its operand: there every warp has
    all of a tile and rounds it once more, twice the instructions and kilobytes of spilled registers on sm_80. So they are not
    `pure`, and stay where x was loaded or computed; round a tile once, outside of loops that do not change it.
    """
    if PRECISION == "tf32" and x.dtype == tl.float32:
        if INTERPRETED:
            return nearest_tf32(x)
        else:
            return tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=False, pack=1)
    else:
        return x


@triton.jit
def nearest_tf32(x):
    """What the instruction does, for the interpreter: half an ulp is added to the bits, then the lower ones are cleared."""
    bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)  # a carry would make a zero of some NaN
