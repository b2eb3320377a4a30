"""The forward for Hopper without a GPU: which calls take it, what JAX lowers them to, and both launches on the CPU.

Triton's interpreter knows no Gluon, so a few lines of NumPy stand in for that launch. Its code is compiled in test_plans and
runs in test_ops on a GPU (`-k hopper`).
"""

from __future__ import annotations

from types import SimpleNamespace

import frameworks
import ml_dtypes
import numpy as np
import pytest
from cases import Case, Normal, heads, key_masks, mask, projections
from test_plans import Ghost, Recorder, base_name, ghosts

from mmattn._gluon import INSTALLED, is_gluon
from mmattn.op import Plan, Target

pytestmark = pytest.mark.skipif(not INSTALLED, reason="this Triton has no Gluon under the names that the kernel uses")
HOPPER = Target(sms=2, gluon=True)


def kernels_of(call, target: Target) -> list[str]:
    run = Recorder(target)
    call.op.forward(run, SimpleNamespace(**call.operands), **dict(call.static))
    return [base_name(launch.plan) for launch in run.launches]


def attention(*shape: int, static: dict | None = None, **more) -> Case:
    return Case("joint_attention", "any", heads(*shape) | more, static or {})


TAKEN = ["joint_attention_hopper", "joint_attention_repair"]
PLAIN = ["joint_attention_fwd"]


@pytest.mark.parametrize(
    "case, dtype, target, kernels",
    [
        (attention(2, 3, 64, 128), "bfloat16", HOPPER, TAKEN),
        (attention(2, 3, 128, 333, 154, static=dict(return_lse=True, scale=-0.3)), "bfloat16", HOPPER, TAKEN),
        (attention(2, 3, 128, 333, 154), "bfloat16", Target(), PLAIN),
        (attention(2, 3, 128, 333, 154), "bfloat16", Target(arch=100, gluon=True), PLAIN),
        (attention(2, 3, 128, 333, 154), "float16", HOPPER, PLAIN),
        (attention(2, 3, 96, 333, 154), "bfloat16", HOPPER, PLAIN),
        (attention(2, 3, 64, 333, 127), "bfloat16", HOPPER, PLAIN),
        (attention(2, 3, 64, 333, 154, 154), "bfloat16", HOPPER, PLAIN),
        (attention(2, 3, 64, 333, static=dict(causal=True)), "bfloat16", HOPPER, PLAIN),
        (attention(2, 3, 64, 333, **mask(2, 333)), "bfloat16", HOPPER, PLAIN),
        (attention(2, 3, 64, 333, 154, **key_masks((333, 154), ((), (1, 2)))), "bfloat16", HOPPER, PLAIN),
        (attention(2, 4, 64, 333, **{name: heads(2, 2, 64, 333)[name] for name in "kv"}), "bfloat16", HOPPER, PLAIN),
        (attention(2, 3, 64, 333, q=(Normal((2, 333, 3, 64), dtype="float32"),)), "bfloat16", HOPPER, PLAIN),
    ],
    ids=str,
)
def test_which_calls_take_it(case, dtype, target, kernels):
    assert kernels_of(ghosts(case, dtype), target) == kernels


@pytest.mark.parametrize("address, stride, kernels", [(32, 192, TAKEN), (40, 192, PLAIN), (32, 196, PLAIN)])
def test_it_takes_what_the_tensor_memory_accelerator_can_address(address, stride, kernels):
    import mmattn

    class View(Ghost):
        def data_ptr(self):
            return address

    q = View((2, 333, 3, 64), "bfloat16", (333 * stride, stride, 64, 1))
    assert kernels_of(mmattn.joint_attention(q, q, q), HOPPER) == kernels


def wide(x) -> np.ndarray:
    return np.asarray(x.float() if hasattr(x, "float") else x, np.float32)


def write(out, x: np.ndarray) -> None:
    if hasattr(out, "copy_"):
        import torch

        out.copy_(torch.from_numpy(np.array(x)))
    else:
        out[...] = x


def stand_in(plan: Plan, operands, outs) -> None:
    """joint_attention_hopper by its formula. A row out of range is left as its NaN."""
    n, meta = len(operands) // 3, plan.meta
    q, k, v = (np.concatenate([wide(x) for x in operands[i * n : (i + 1) * n]], 1) for i in range(3))
    v = v[:, :, 2] if meta["V_AT"] else v
    p = np.exp2(np.einsum("blhd,bmhd->bhlm", q, k) * np.float32(meta["SCALE"]))
    total = p.sum(-1)
    good = (total >= 2.0**-64) & (total <= 2.0**64)
    p = np.where(good[..., None], p, np.nan)
    o = np.einsum("bhlm,bmhd->blhd", p.astype(ml_dtypes.bfloat16).astype(np.float32) / total[..., None], v)
    lse = np.where(good, np.log2(total), np.nan)
    ends = np.cumsum([x.shape[1] for x in operands[:n]])[:-1]
    logs = np.split(lse * np.log(2), ends, 2) if meta["LOGS"] else []
    for out, x in zip(outs, [*np.split(o, ends, 1), *np.split(lse, ends, 2), *logs], strict=False):
        write(out, x)


CASES = (
    Case("joint_attention", "in-range", heads(1, 1, 64, 130, 128), dict(return_lse=True)),
    Case("joint_attention", "some-out-of-range", heads(1, 1, 64, 330, qk=dict(std=3.8)), dict(return_lse=True)),
    Case("joint_attention", "all-out-of-range", heads(1, 2, 64, 130, 128, qk=dict(std=5.0))),
    Case("qk_norm_rope_attention", "packed", projections(1, 2, 64, 130, 128, over="head"), dict(over="head")),
)


@pytest.mark.skipif(frameworks.GPU, reason="the stand-in is for the interpreter")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_launches_against_float64(case, framework, kernels, monkeypatch):
    import interpreted

    launched, launch = [], interpreted.launch

    def either(plan, operands, outs):
        launched.append(base_name(plan))
        with np.errstate(all="ignore"):
            (stand_in if is_gluon(plan.kernel) else launch)(plan, operands, outs)

    binder = framework.ops._bind
    monkeypatch.setattr(interpreted, "launch", either)
    monkeypatch.setattr(binder, "target", lambda *device: HOPPER)
    for _ in range(2):  # the first call, and a replay
        frameworks.check(case, "bfloat16", frameworks.call(framework, case, "bfloat16"))
    assert launched.count("joint_attention_hopper") == launched.count("joint_attention_repair") >= 2
    assert "joint_attention_fwd" not in launched


def test_jax_lowers_it_to_xlas_call(monkeypatch):
    jax = pytest.importorskip("jax")
    import mmattn_jax

    monkeypatch.setattr(mmattn_jax._bind, "target", lambda: HOPPER)
    streams = tuple(jax.ShapeDtypeStruct((2, L, 3, 64), "bfloat16") for L in (333, 154))
    traced = jax.jit(lambda *qkv: mmattn_jax.joint_attention(*qkv)).trace(streams, streams, streams)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "stablehlo.custom_call" in line]
    assert len(calls) == 2
    assert "@triton_kernel_call_ffi" in calls[0] and "xi8>" in calls[0]
    assert calls[1].count("output_operand_alias<") == 6
