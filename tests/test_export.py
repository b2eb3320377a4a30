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

needs_torch = pytest.mark.skipif("torch" not in INSTALLED, reason="needs torch")
needs_jax = pytest.mark.skipif("jax" not in INSTALLED, reason="needs jax")

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
