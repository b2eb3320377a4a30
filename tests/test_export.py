"""Exported programs: what they hold, and that another process can load and run them."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from frameworks import INSTALLED

if "torch" in INSTALLED:
    import torch

    import mmattn_torch
if "jax" in INSTALLED:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    import mmattn_jax.nn
    from mmattn_jax import _jax_triton

needs_torch = pytest.mark.skipif("torch" not in INSTALLED, reason="needs torch")
needs_jax = pytest.mark.skipif("jax" not in INSTALLED, reason="needs jax")
needs_jax_triton = pytest.mark.skipif("jax" not in INSTALLED or not _jax_triton.installed(), reason="needs jax-triton")

B, L, C, D, HEADS = 2, 9, 5, 32, 2
STACK = dict(dim_feedforward=48, dropout=0.0, conditioning=True, use_cross_attn=True)
INPUTS = {
    name: np.random.default_rng(n).standard_normal((B, n, D)).astype(np.float32) for name, n in dict(x=L, y=1, context=C).items()
}


def python(code: str, *arguments) -> str:
    """What a fresh process prints, in which torch's first call sees the same settings as here."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


LOAD_TORCH = """
import sys, numpy, torch, mmattn_torch
torch.set_num_threads(1)
program = torch.export.load(sys.argv[1])
names = {str(node.target) for node in program.graph.nodes if "mmattn" in str(node.target)}
print(sorted(names))
if not names:
    out = program.module()(**{k: torch.tensor(x) for k, x in numpy.load(sys.argv[2]).items()})
    assert isinstance(out, mmattn_torch.AttentionOutput)
    numpy.savez(sys.argv[3], *[x.detach() for x in out])
"""


def exported_stack(path, device):
    """A stack and its inputs in torch; its program is saved at the path."""
    stack = mmattn_torch.GPT2Stack(2, D, HEADS, **STACK, device=device)
    inputs = {name: torch.tensor(x, device=device) for name, x in INPUTS.items()}
    torch.export.save(torch.export.export(stack, (), inputs), path)
    return stack, inputs


@needs_torch
def test_saved_stack_runs_in_another_process(tmp_path):
    """Exported on a CPU it holds plain torch code, which needs the package for AttentionOutput only."""
    stack, inputs = exported_stack(tmp_path / "stack.pt2", "cpu")
    np.savez(tmp_path / "inputs.npz", **INPUTS)
    assert python(LOAD_TORCH, tmp_path / "stack.pt2", tmp_path / "inputs.npz", tmp_path / "outs.npz") == "[]"
    for got, want in zip(np.load(tmp_path / "outs.npz").values(), stack(**inputs), strict=True):
        np.testing.assert_allclose(got, want.detach().numpy(), rtol=1e-5, atol=1e-5)


@needs_torch
def test_saved_stack_calls_the_operators(tmp_path, kernels):
    """Exported where the kernels run it calls our operators, which `import mmattn_torch` defines."""
    stack, inputs = exported_stack(tmp_path / "stack.pt2", "cuda" if torch.cuda.is_available() else "cpu")
    for got, want in zip(torch.export.load(tmp_path / "stack.pt2").module()(**inputs), stack(**inputs), strict=True):
        assert torch.equal(got, want)
    assert "mmattn.qk_norm_rope_attention_fwd.default" in python(LOAD_TORCH, tmp_path / "stack.pt2")


LOAD_JAX = """
import sys, numpy, jax, mmattn_jax.nn
exported = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
out = exported.call(*numpy.load(sys.argv[2]).values())
assert isinstance(out, mmattn_jax.nn.AttentionOutput)
numpy.savez(sys.argv[3], *out)
"""


@needs_jax
def test_serialized_stack_runs_in_another_process(tmp_path):
    stack = mmattn_jax.nn.GPT2Stack(1, D, HEADS, **STACK, rngs=nnx.Rngs(0))
    call = jax.jit(lambda x, y, context: stack(x, y, context=context))
    exported = jax.export.export(call, platforms=("cpu",))(*map(jnp.asarray, INPUTS.values()))
    (tmp_path / "stack").write_bytes(exported.serialize())
    np.savez(tmp_path / "inputs.npz", **INPUTS)
    with jax.default_device(jax.devices("cpu")[0]):
        want = call(*INPUTS.values())
    python(LOAD_JAX, tmp_path / "stack", tmp_path / "inputs.npz", tmp_path / "outs.npz")
    for got, x in zip(np.load(tmp_path / "outs.npz").values(), want, strict=True):
        np.testing.assert_allclose(got, x, rtol=1e-5, atol=1e-5)


# Symbolic sizes in JAX: batch, lengths and rows of tables are open


d = D // HEADS
MASK = "mask"  # behind a shape: booleans, of which each row and column has one
PICKS = "picks"  # integers from 0 to 1


def stack(x, y, context, x_mask, context_mask):
    module = mmattn_jax.nn.GPT2Stack(1, D, HEADS, **STACK, rngs=nnx.Rngs(0))
    return tuple(module(x, y, context=context, start_pos=2, x_mask=x_mask, context_mask=context_mask))


SYMBOLIC = dict(
    modulation=(
        lambda x, scale, shift, weight: mmattn_jax.layernorm_adaln(x, scale, shift, weight=weight),
        [("B", "L", D), ("B", D), ("B", "L", D), (D,)],
    ),
    table=(
        lambda x, scale, base, rows: mmattn_jax.rmsnorm_adaln(x, scale, rows=rows, scale_base=base),
        [("B", "L", D), ("B", "R", D), (D,), ("B", "L", PICKS)],
    ),
    residual=(lambda x, gate: mmattn_jax.gated_residual(x, x, mmattn_jax.Row(gate, 1)), [("B", "L", D), ("B", 3, D)]),
    residual_norm=(
        lambda x, gate, weight: mmattn_jax.gated_residual_norm_adaln(x, x, gate, gate, h_weight=weight),
        [("B", "L", D), ("B", 1, D), (D,)],
    ),
    rotated=(
        lambda qkv, w, cos, start: mmattn_jax.qk_norm_rope(qkv, w, w, over="width", cos=cos, sin=cos, start_pos=start),
        [("B", "L", 3, HEADS, d), (D,), ("P", d // 2), ("B", PICKS)],
    ),
    joint=(
        lambda q, kv, c, c_kv, mask, keys: mmattn_jax.joint_attention(
            (q, c), (kv, c_kv), (kv, c_kv), attn_mask=mask, key_masks=(None, keys), causal=True, return_lse=True
        ),
        [*(("B", n, heads, d) for n in "LC" for heads in (HEADS, 1)), ("B", "L", "L", MASK), ("B", "C", MASK)],
    ),
    whole=(
        lambda qkv, c, w, cos: mmattn_jax.qk_norm_rope_attention(
            (qkv, c), (w, w), (w, w), over="width", cos=(cos, None), sin=(cos, None)
        ),
        [("B", "L", 3, HEADS, d), ("B", "C", 3, HEADS, d), (D,), (64, d // 2)],
    ),
    linear=(
        lambda q, c, keys: mmattn_jax.relu_linear_attention((q, c), (q, c), (q, c), key_masks=(keys, None)),
        [("B", "L", HEADS, d), ("B", "C", HEADS, d), ("B", "L", MASK)],
    ),
    linear_module=(
        lambda x: mmattn_jax.nn.RMSNormSelfAttention(D, HEADS, 64, linear=True, rngs=nnx.Rngs(0))(x).x_out,
        [("B", "L", D)],
    ),
    stack=(stack, [("B", "L", D), ("B", 1, D), ("B", "C", D), ("B", "L", MASK), ("B", "C", MASK)]),
)
symbolic_cases = pytest.mark.parametrize("name", SYMBOLIC)


def array_of(shape: tuple, sizes: dict[str, int]):
    """Values of a shape's sizes."""
    *axes, kind = shape if shape[-1] in (MASK, PICKS) else (*shape, None)
    rng, shape = np.random.default_rng(len(axes)), [sizes.get(n, n) for n in axes]
    if kind == MASK:
        return (rng.random(shape) > 0.3) | (np.arange(shape[-1]) < 1)
    return rng.integers(0, 2, shape, dtype=np.int32) if kind else rng.standard_normal(shape).astype(np.float32)


def with_gradients(f, shapes):
    """The gradients of a sum of f's results with respect to all floats but tables of angles, and the results."""
    floats = tuple(i for i, shape in enumerate(shapes) if shape[-1] not in (MASK, PICKS, d // 2))

    def loss(*arrays):
        outs = f(*arrays)
        return sum(jnp.sum(jnp.where(jnp.isfinite(y), y, 0) ** 2) for y in jax.tree.leaves(outs)), outs

    return jax.jit(jax.grad(loss, floats, has_aux=True))


def symbolic(shapes):
    """Arguments whose sizes are symbols."""
    symbols = dict(zip("BLCRP", jax.export.symbolic_shape("B, L, C, R, P"), strict=True))
    kinds = {MASK: "bool", PICKS: "int32"}
    axes = [shape[:-1] if shape[-1] in kinds else shape for shape in shapes]
    sizes = [tuple(symbols.get(n, n) for n in shape) for shape in axes]
    return [jax.ShapeDtypeStruct(n, kinds.get(shape[-1], "float32")) for n, shape in zip(sizes, shapes, strict=True)]


@needs_jax
@pytest.mark.parametrize(
    ("name", "implementation"),
    [(name, "auto") for name in SYMBOLIC] + [(name, "reference") for name in SYMBOLIC if name not in ("linear_module", "stack")],
)
def test_one_export_serves_every_size(name, implementation):
    f, shapes = SYMBOLIC[name]
    arrays = [array_of(shape, dict(B=3, L=5, C=4, R=3, P=9)) for shape in shapes]
    with mmattn_jax.implementation(implementation), jax.default_device(jax.devices("cpu")[0]):
        f = with_gradients(f, shapes)
        exported = jax.export.export(f, platforms=("cpu",))(*symbolic(shapes))
        got, want = (jax.tree.leaves(g(*arrays)) for g in (exported.call, f))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@needs_jax_triton
@symbolic_cases
def test_kernels_refuse_symbolic_sizes(name):
    f, shapes = SYMBOLIC[name]
    export = jax.export.export(jax.jit(f), platforms=("cuda",), disabled_checks=mmattn_jax.EXPORT_CHECKS)
    with pytest.raises(ValueError, match=r'an array has the symbolic shape \(.*; expected numbers.* implementation="reference"'):
        export(*symbolic(shapes))
    with mmattn_jax.implementation("reference"):
        assert export(*symbolic(shapes)).platforms == ("cuda",)


@needs_jax_triton
def test_explain_refuses_symbolic_sizes():
    x, *_ = symbolic([("B", "L", D)])
    assert mmattn_jax.explain("rms_norm", x, device="cpu").path == "reference"
    with pytest.raises(ValueError, match=rf"rms_norm: an array has the symbolic shape \(B, L, {D}\)"):
        mmattn_jax.explain("rms_norm", x, device="cuda")


@needs_jax
def test_checks_of_symbolic_sizes():
    """Widths are numbers, equal symbols are equal, and a table is not compared with a length."""
    symbols = dict(zip("BLW", jax.export.symbolic_shape("B, L, W"), strict=True))
    of = lambda *shape: jax.ShapeDtypeStruct([symbols.get(n, n) for n in shape], jnp.float32)
    evaluate = lambda op, *arrays, **how: jax.eval_shape(lambda *a: getattr(mmattn_jax, op)(*a, **how), *arrays)
    with pytest.raises(ValueError, match="rms_norm: the width of x is W, a symbolic size; expected a number"):
        evaluate("rms_norm", of("B", "L", "W"))
    with pytest.raises(ValueError, match="joint_attention: the head width of q is W, a symbolic size; expected a number"):
        evaluate("joint_attention", *[of("B", "L", 2, "W")] * 3)
    with pytest.raises(ValueError, match=r"the width of qkv, heads .*, is 8\*W, a symbolic size; expected a number"):
        evaluate("qk_norm_rope", of("B", "L", 3, "W", 8), of(8), of(8), over="head")
    with pytest.raises(ValueError, match=r"layernorm_adaln: scale has shape \(L, 32\); expected \(B, D\) = \(B, 32\)"):
        evaluate("layernorm_adaln", of("B", "L", 32), of("L", 32))
    table = [of(4, "W")] * 2
    with pytest.raises(ValueError, match=r"cos(\[0\])? has shape \(4, W\); expected"):
        jax.eval_shape(
            lambda qkv, w, cos, sin: mmattn_jax.qk_norm_rope(qkv, w, w, over="head", cos=cos, sin=sin),
            of("B", "L", 3, 2, 8), of(8), *table,
        )  # fmt: skip
