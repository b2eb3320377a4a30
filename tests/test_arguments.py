"""What the operations refuse, and in which words: the same in both frameworks, for both implementations, and in `explain`."""

from __future__ import annotations

import fractions
import re

import frameworks
import numpy as np
import pytest

import mmattn
from mmattn import Row, check
from mmattn.op import Spec

f32 = lambda *shape: Spec(shape, "float32")
f16 = lambda *shape: Spec(shape, "float16")
i32 = lambda *shape: Spec(shape, "int32")
flags = lambda *shape: Spec(shape, "bool")

B, L, D, H, d = 2, 5, 16, 2, 8
X, V, ROW, PICKS = f32(B, L, D), f32(B, D), f32(D), i32(B, L)
QKV, Q, START = f32(B, L, 3, H, d), f32(B, L, H, d), i32(B)
heads = lambda width: dict.fromkeys(("q", "k", "v"), f32(B, L, H, width))

GOOD = dict(
    layernorm_adaln=dict(x=X),
    rmsnorm_adaln=dict(x=X),
    layer_norm=dict(x=X),
    rms_norm=dict(x=X),
    gated_residual=dict(residual=X, h=X, gate=V),
    gated_residual_norm_adaln=dict(residual=X, h=X, gate=V),
    qk_norm_rope=dict(qkv=QKV, q_weight=f32(d), k_weight=f32(d), over="head"),
    qk_norm_rope_attention=dict(qkv=QKV, q_weight=f32(d), k_weight=f32(d), over="head"),
    joint_attention=dict(q=Q, k=Q, v=Q),
    relu_linear_attention=dict(q=Q, k=Q, v=Q),
)
ADALN = ("layernorm_adaln", "rmsnorm_adaln")
NORMS = (*ADALN, "layer_norm", "rms_norm")
FUSED = ("gated_residual_norm_adaln",)
GATED = ("gated_residual", *FUSED)
ROPE = ("qk_norm_rope", "qk_norm_rope_attention")
SOFTMAX = ("joint_attention", "qk_norm_rope_attention")
UNROTATED = ("joint_attention", "relu_linear_attention")
MASKED = (*SOFTMAX, "relu_linear_attention")

# ops, what takes the place of good arguments, what the message says: "..." stands for anything, ARRAY for the framework's array
REFUSED = [
    # sizes: an array is never indexed by another's without having them
    (ADALN, dict(scale=f32(B, D, 1)), "scale has shape (2, 16, 1); expected (B, D)"),
    (
        ADALN,
        dict(shift=f32(3, D)),
        "shift has shape (3, 16); expected (B, D) = (2, 16) or (B, 1, D) = (2, 1, 16) or (B, L, D) = (2, 5, 16) or (D) = (16,)",
    ),
    (ADALN, dict(scale_base=V), "scale_base has shape (2, 16); expected (D) = (16,)"),
    (ADALN, dict(scale=ROW, scale_base=ROW), "scale has shape (16,) and scale_base was given"),
    (ADALN, dict(rows=PICKS), "rows was given without scale and shift"),
    (ADALN, dict(scale=f32(3, D), rows=i32(B, D)), "rows has shape (2, 16); expected (B, L) = (2, 5)"),
    (ADALN, dict(scale=f32(3, D), shift=f32(4, D), rows=PICKS), "shift has shape (4, 16); expected (R, D) = (3, 16)"),
    (ADALN, dict(scale=f32(B, 3, D), shift=f32(3, D), rows=PICKS), "shift has shape (3, 16); expected (B, R, D) = (2, 3, 16)"),
    (ADALN, dict(scale=f32(0, D), rows=PICKS), "scale has shape (0, 16); expected at least one row"),
    (NORMS, dict(weight=V), "weight has shape (2, 16); expected (D) = (16,)"),
    (NORMS, dict(x=f32(L, D)), "x has shape (5, 16), rank 2; expected (B, L, D)"),
    (GATED, dict(gate=f32(3, D)), "gate has shape (3, 16); expected (B, D) = (2, 16) or (B, 1, D)"),
    (GATED, dict(h=f32(B, D, L)), "h has shape (2, 16, 5); expected (B, L, D) = (2, 5, 16)"),
    (FUSED, dict(h_weight=V), "h_weight has shape (2, 16); expected (D) = (16,)"),
    (ROPE, dict(qkv=f32(B, L, 3 * D)), "qkv has shape (2, 5, 48), rank 3; expected (B, L, 3, H, d). Reshape the projection"),
    (ROPE, dict(k_weight=ROW), 'k_weight has shape (16,); expected (W) = (8,). over="head" normalises 8 elements together'),
    (ROPE, dict(start_pos=i32(3)), "start_pos has shape (3,); expected (B) = (2,)"),
    (ROPE, dict(cos=f32(6, 4), sin=f32(10, 4)), "sin has shape (10, 4); expected (S, d/2) = (6, 4)"),
    (ROPE, dict(cos=f32(10, 4), sin=f32(6, 4)), "sin has shape (6, 4); expected (S, d/2) = (10, 4)"),
    (ROPE, dict(cos=f32(10, 4), sin=f32(6, 4), start_pos=START), "sin has shape (6, 4); expected (S, d/2) = (10, 4)"),
    (ROPE, dict(cos=f32(B, 6, 4), sin=f32(B, 10, 4)), "sin has shape (2, 10, 4); expected (B, S, d/2) = (2, 6, 4)"),
    (ROPE, dict(cos=f32(B, 6, 4), sin=f32(1, 6, 4)), "sin has shape (1, 6, 4); expected (B, S, d/2) = (2, 6, 4)"),
    (ROPE, dict(cos=f32(B, 6, 4), sin=f32(6, 4)), "sin has shape (6, 4); expected (B, S, d/2) = (2, 6, 4)"),
    (ROPE, dict(cos=f32(6, 4), sin=f32(6, 3)), "sin has shape (6, 3); expected (S, d/2) = (6, 4)"),
    (ROPE, dict(cos=f32(6, 4), sin=f32(0, 4)), "sin has shape (0, 4); expected (S, d/2) = (6, 4)"),
    (ROPE, dict(cos=f32(6, 4), sin=f32()), "sin has shape (); expected (S, d/2) = (6, 4)"),
    (ROPE, dict(cos=f32(), sin=f32()), "cos has shape (), rank 0; expected (S, d/2) or (B, S, d/2)"),
    (ROPE, dict(cos=f32(6, 0), sin=f32(6, 0)), "cos has shape (6, 0); expected (S, d/2) = (6, 1)"),
    (ROPE, dict(cos=f32(6, 5), sin=f32(6, 5)), "cos has shape (6, 5); expected (S, d/2) = (6, 4)"),
    (ROPE, dict(cos=f32(3, 6, 4), sin=f32(3, 6, 4)), "cos has shape (3, 6, 4); expected (S, d/2) = (6, 4) or (B, S, d/2) = (2,"),
    # No start leaves all tokens within a table with fewer rows than tokens.
    (ROPE, dict(cos=f32(4, 4), sin=f32(4, 4)), "cos has shape (4, 4); expected (S, d/2) = (5, 4)"),
    (ROPE, dict(cos=f32(4, 4), sin=f32(4, 4), start_pos=START), "cos has shape (4, 4); expected (S, d/2) = (5, 4)"),
    (ROPE, dict(cos=f32(0, 4), sin=f32(0, 4), start_pos=START), "cos has shape (0, 4); expected (S, d/2) = (5, 4)"),
    (ROPE, dict(cos=f32(6, 4)), "only one of cos and sin is given; expected both or neither"),
    (ROPE, dict(sin=f32(6, 4)), "only one of cos and sin is given; expected both or neither"),
    (UNROTATED, dict(k=f32(B, 7, H, d)), "k has shape (2, 7, 2, 8); expected (B, L_s, H_kv, d) = (2, 5, 2, 8)"),
    (UNROTATED, dict(v=f32(B, L, H, 16)), "v has shape (2, 5, 2, 16); expected (B, L_s, H_kv, d) = (2, 5, 2, 8)"),
    (UNROTATED, dict(q=f32(B, L, D)), "q has shape (2, 5, 16), rank 3; expected (B, L, H, d). Split the heads"),
    (UNROTATED, dict(k=f32(B, L, 3, d)), "k has 3 heads; expected ... 2 heads"),
    (SOFTMAX, dict(attn_mask=flags(B, L, 4)), "attn_mask has shape (2, 5, 4); expected (B, L, L) = (2, 5, 5)"),
    (MASKED, dict(key_masks=flags(B, 4)), "key_masks has shape (2, 4); expected (B, L_s) = (2, 5)"),
    # widths: what helps hangs on which side they miss
    (("joint_attention",), heads(160), "the head width of q is 160; expected a multiple of 8 from 8 to 128. Use more heads"),
    (("joint_attention",), heads(12), "the head width of q is 12; expected ... Pad q, k and v with zeros ... if scale is given."),
    (("joint_attention",), heads(4), "the head width of q is 4; expected ... Pad q, k and v with zeros ... if scale is given."),
    (("relu_linear_attention",), heads(4), "the head width of q is 4; expected ... Pad q, k and v with zeros"),
    (ROPE, dict(qkv=f32(B, L, 3, H, 160)), "the head width of qkv is 160; expected ... Use more heads"),
    (ROPE, dict(qkv=f32(B, L, 3, H, 12)), "the head width of qkv is 12; expected ... Choose another number of heads: padding"),
    (NORMS, dict(x=f32(B, L, 20)), "the width of x is 20; expected a multiple of 8 from 8 to 16384. Build the model with such a"),
    (NORMS, dict(x=f32(B, L, 16392)), "the width of x is 16392; expected ... Take the framework's own function for wider rows"),
    # streams: the argument with another number of them, and whose number it should have
    (ROPE, dict(qkv=None, q_weight=(ROW, ROW)), "qkv is None; expected an array"),
    (ROPE, dict(qkv=X, q_weight=(ROW, ROW)), "qkv has shape (2, 5, 16), rank 3; expected (B, L, 3, H, d)"),
    (UNROTATED, dict(q=None, k=(Q, Q), v=(Q, Q)), "q is None; expected an array"),
    (ROPE, dict(qkv=()), "qkv is empty; expected at least one stream"),
    (ROPE, dict(qkv=(QKV, QKV)), "q_weight has 1 entry; expected 2, one for each stream of qkv. Give a tuple"),
    (ROPE, dict(cos=(f32(6, 4), None)), "cos has 2 entries; expected 1, one for each stream of qkv"),
    (ROPE, dict(qkv=(QKV, f32(B, 3, 3, 1, d)), q_weight=[f32(d)] * 2, k_weight=[f32(d)] * 2), "qkv[1] has shape (2, 3, 3, 1, 8)"),
    (("qk_norm_rope_attention",), dict(key_masks=[None] * 2), "key_masks has 2 entries; expected 1, one for each stream of qkv"),
    (UNROTATED, dict(key_masks=[None] * 2), "key_masks has 2 entries; expected 1, one for each stream of q"),
    (UNROTATED, dict(k=(Q, Q)), "q, k, v have 1, 2, 1 streams; expected one number"),
    (UNROTATED, dict(q=()), "q is empty; expected at least one stream"),
    (
        UNROTATED,
        dict.fromkeys("qkv", (Q, f32(B, L, 3, d))),
        "q[1] has shape (2, 5, 3, 8); expected (B, L_s, H, d) = (2, 5, 2, 8)",
    ),
    # None
    (NORMS, dict(x=None), "x is None; expected an array"),
    (GATED, dict(gate=None), "gate is None; expected an array"),
    (ROPE, dict(q_weight=None), "q_weight is None; expected an array"),
    (UNROTATED, dict(k=(None,)), "k[0] is None; expected an array"),
    # dtypes
    (NORMS, dict(x=i32(B, L, D)), "x has dtype int32; expected float32, bfloat16, float16 or float64"),
    (ADALN, dict(scale=i32(B, D)), "scale has dtype int32; expected float32, bfloat16, float16 or float64"),
    (ADALN, dict(scale=f32(3, D), rows=f32(B, L)), "rows has dtype float32; expected int32"),
    (GATED, dict(h=i32(B, L, D)), "h has dtype int32; expected float32, bfloat16, float16 or float64"),
    (ROPE, dict(cos=f16(6, 4), sin=f16(6, 4)), "cos has dtype float16; expected the table's dtype, float32"),
    (ROPE, dict(start_pos=f32(B)), "start_pos has dtype float32; expected int32"),
    (SOFTMAX, dict(attn_mask=i32(B, L, L)), "attn_mask has dtype int32; expected bool, True = attend. Compare it first"),
    (
        SOFTMAX,
        dict(attn_mask=f32(B, L, L)),
        "attn_mask has dtype float32; expected bool, True = attend. "
        "Compare it first: mask == 0 for an additive mask of 0 and -inf, mask != 0 for one of 0 and 1.",
    ),
    (MASKED, dict(key_masks=(f16(B, L),)), "key_masks[0] has dtype float16; expected bool, ... mask == 0 for an additive mask"),
    # what is compiled in
    ((*NORMS, *FUSED, *ROPE), dict(eps=10**400), "eps is an int of 1329 bits; expected a number >= 0 that is finite in float32"),
    (NORMS, dict(eps=-1.0), "eps is -1.0; expected a number >= 0 that is finite in float32"),
    (NORMS, dict(eps=float("nan")), "eps is nan; expected a number >= 0"),
    (NORMS, dict(eps=1e39), "eps is 1e+39; expected a number >= 0 that is finite in float32"),
    (NORMS, dict(eps=True), "eps is a bool; expected a Python float"),
    (NORMS, dict(eps=np.ones(2)), "eps is a numpy.ndarray; expected a Python float"),
    (NORMS, dict(eps=ROW), "eps is a ... expected a Python float"),
    (FUSED, dict(h_eps="1e-6"), "h_eps is a str; expected a Python float"),
    (SOFTMAX, dict(scale=10**400), "scale is an int of 1329 bits; expected None for 1 / sqrt(d), or a number that is finite"),
    (SOFTMAX, dict(scale=10**5000), "scale is an int of 16610 bits; expected None"),
    (SOFTMAX, dict(scale=float("inf")), "scale is inf; expected None for 1 / sqrt(d)"),
    (SOFTMAX, dict(scale=[1.0]), "scale is a list; expected a Python float"),
    (SOFTMAX, dict(causal=1), "causal is 1; expected True or False"),
    (SOFTMAX, dict(return_lse=np.bool_(True)), "return_lse is a numpy.bool; expected True or False"),
    (ADALN, dict(zero_centered=True), "zero_centered=True was given without weight"),
    (ADALN, dict(cast="never"), "cast is 'never'; expected one of 'after_weight', 'before_weight', 'none'"),
    (FUSED, dict(gate_fn="relu"), "gate_fn is 'relu'; expected one of 'identity', 'tanh'"),
    (ROPE, dict(over=["head"]), "over is a list; expected one of 'width', 'head'"),
    (ROPE, dict(layout=np.ones(2)), "layout is a numpy.ndarray; expected one of 'interleaved', 'half'"),
    (tuple(GOOD), dict(implementation=[]), "implementation is a list; expected one of None, 'auto', 'triton', 'reference'"),
    (tuple(GOOD), dict(implementation=np.ones(2)), "implementation is a numpy.ndarray; expected one of None"),
    (tuple(GOOD), dict(implementation="cuda"), "implementation is 'cuda'; expected one of None"),
    # rows of packed arrays
    (ADALN, dict(scale=Row(f32(B, 6, D), 6)), "scale is row 6 of an array of shape (2, 6, 16); expected (B, M, D) and an int"),
    (GATED, dict(gate=Row(f32(B, 6, D), None)), "gate is row None of an array of shape (2, 6, 16); expected (B, M, D)"),
    (GATED, dict(gate=Row(f32(B, D), 0)), "gate is row 0 of an array of shape (2, 16); expected (B, M, D)"),
    (GATED, dict(gate=Row([1.0], 0)), "gate.array is a list; expected a ARRAY"),
    (NORMS, dict(weight=Row(f32(B, 6, D), 0)), "weight is a mmattn.op.Row; expected a ARRAY"),
    (ADALN, dict(scale=Row(f32(B, 3, D), 0), rows=PICKS), "scale is a Row; expected a table (R, D) or (B, R, D)"),
]
CASES = [(op, arguments, message) for ops, arguments, message in REFUSED for op in ops]


def made(framework, x):
    """The argument that a Spec stands for; anything else as it is."""
    if isinstance(x, Spec):
        return framework.put(np.zeros(x.shape), x.dtype)
    if isinstance(x, Row):
        return Row(made(framework, x.array), x.index)
    return type(x)(made(framework, y) for y in x) if type(x) in (tuple, list) else x


def refused(framework, op: str, arguments: dict, message: str) -> None:
    """The call raises the message, which begins with the op and the argument, whichever way it is made."""
    given = {name: made(framework, x) for name, x in (GOOD[op] | arguments).items()}
    message = f"{op}: {message}".replace("ARRAY", dict(torch="torch.Tensor", jax="jax.Array")[framework.name])
    pattern = ".*".join(map(re.escape, message.split("...")))
    ways = [dict(implementation=name) for name in ("triton", "reference", None)]
    for how in ways if "implementation" not in arguments else [{}]:
        with pytest.raises((ValueError, TypeError), match=f"^{pattern}"):
            getattr(framework.ops, op)(**given, **how)
    with pytest.raises((ValueError, TypeError), match=f"^{pattern}"):
        framework.ops.explain(op, **given)


@pytest.mark.parametrize(("op", "arguments", "message"), CASES)
def test_refused(op, arguments, message, framework):
    refused(framework, op, arguments, message)


def array_parameters(op: str) -> dict[str, str]:
    return {name: kind for name, kind in check.parameters(getattr(mmattn, op)).items() if kind in ("Array", "Vector", "Streams")}


@pytest.mark.parametrize("op", GOOD)
def test_what_is_no_array_of_the_framework(op, framework):
    strangers = [frameworks.framework_of(name) for name in frameworks.INSTALLED if name != framework.name]
    strangers = [stranger.put(np.ones((2, 2)), "float32") for stranger in strangers]
    strangers += [np.ones((2, 2), np.float32)] if framework.name == "torch" else [np.ma.ones((2, 2))]
    for x in ("abc", 3, True, {}, {"a": 1, 2: X}, object(), (i for i in range(2)), np.float32(1), *strangers):
        for name, kind in array_parameters(op).items():
            came, expected = f"is {check.type_name(x)}; expected", "a ARRAY. Convert it with "
            if kind == "Streams":
                refused(framework, op, {name: x}, f"{name} {came} a ARRAY or a tuple of them, one per stream. Convert it with ")
                refused(framework, op, {name: [x]}, f"{name}[0] {came} {expected}")
            else:
                refused(framework, op, {name: x}, f"{name} {came} {expected}")
                refused(framework, op, {name: [x]}, f"{name} is a list; expected {expected}")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("op", GOOD)
def test_torch_tensors_are_dense_and_on_one_device(op):
    torch = pytest.importorskip("torch")
    framework, x = frameworks.framework_of("torch"), torch.eye(2, device=frameworks.framework_of("torch").device)
    first, *others = array_parameters(op)
    for name in [name for name, kind in array_parameters(op).items() if kind == "Vector"]:
        for array in (x.to_mkldnn(), torch.nested.as_nested_tensor([x[0], x[1]])) if x.device.type == "cpu" else ():
            refused(framework, op, {name: Row(array, 0)}, f"{name}.array is ")
    for name in (first, *others):
        refused(
            framework,
            op,
            {name: x.to_sparse()},
            f"{name} is torch.sparse_coo; expected torch.strided. Convert it with to_dense()",
        )
        nested = torch.nested.as_nested_tensor([x[0], x[1]])
        refused(framework, op, {name: nested}, f"{name} is a nested tensor; expected a dense one. Pad it with torch.nested.")
    for name in others:
        message = f"{name} is on meta; expected ..., where {first} is. Move it with {name}.to({first}.device)"
        refused(framework, op, {name: x.to("meta")}, message)


@pytest.mark.parametrize("op", GOOD)
def test_jax_arrays_are_on_one_device(op):
    jax = pytest.importorskip("jax")
    if len(jax.devices()) < 2:
        pytest.skip("one device")
    framework = frameworks.framework_of("jax")
    first, *others = array_parameters(op)
    here, there = (jax.device_put(np.zeros((2, 2), np.float32), device) for device in jax.devices()[:2])
    for name in others:
        message = f"{name} is on ...; expected ..., where {first} is. Move it with jax.device_put({name}, {first}.sharding)"
        refused(framework, op, {first: here, name: there}, message)


def test_deleted_array():
    jax = pytest.importorskip("jax")
    x = jax.numpy.ones((B, L, D))
    x.delete()
    refused(frameworks.framework_of("jax"), "rms_norm", dict(x=x), "x has been deleted; expected an array with values")


def test_words_within_jit():
    jax = pytest.importorskip("jax")
    framework = frameworks.framework_of("jax")
    given = {name: made(framework, x) for name, x in GOOD["rms_norm"].items()}
    norm = lambda x, **how: framework.ops.rms_norm(x, **how)
    with pytest.raises(
        TypeError, match=r"^rms_norm: eps is a .*Tracer; expected a Python float. Pass a number, it is compiled in"
    ):
        jax.jit(norm)(**given, eps=1e-6)
    with pytest.raises(ValueError, match=r"^rms_norm: weight has shape"):
        jax.jit(norm)(**given, weight=given["x"])


def test_words_of_compiled_code():
    torch = pytest.importorskip("torch")
    framework = frameworks.framework_of("torch")
    qk = torch.compile(framework.ops.qk_norm_rope, backend="eager", dynamic=True)
    given = {name: made(framework, x) for name, x in GOOD["qk_norm_rope"].items()}
    table = lambda positions: framework.put(np.zeros((positions, 4)), "float32")
    qk(**given, cos=table(10), sin=table(10))
    with pytest.raises(ValueError, match=r"^qk_norm_rope: sin has shape \(6, 4\); expected \(S, d/2\) = \(10, 4\)"):
        qk(**given, cos=table(10), sin=table(6))


@pytest.mark.parametrize("op", GOOD)
def test_good_arguments_are_taken(op, framework):
    """So that nothing above is refused for another reason. A number of any type is a number."""
    given = {name: made(framework, x) for name, x in GOOD[op].items()}
    numbers = (1, fractions.Fraction(1, 10**6), np.float32(1e-6))
    for how in [dict(eps=eps) for eps in numbers] if "eps" in check.parameters(getattr(mmattn, op)) else [{}]:
        getattr(framework.ops, op)(**given, **how)
