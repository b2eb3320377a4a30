"""What only a GPU can show. test_ops runs there too, with `pytest -m gpu`, all sizes and dtypes through both frameworks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import frameworks
import numpy as np
import pytest
from cases import CASES, Case, Normal, heads, projections, rope, sample, shared

pytestmark = pytest.mark.gpu

tiny = lambda *names: {name: Normal((7, 3, 8)) for name in names}
TINY = [
    Case("layernorm_adaln", "tiny", tiny("x") | sample(7, 8, "scale", "shift")),
    Case("rms_norm", "tiny", tiny("x") | shared(8, "weight")),
    Case("gated_residual", "tiny", tiny("residual", "h") | sample(7, 8, "gate")),
    Case("gated_residual_norm_adaln", "tiny", tiny("residual", "h") | sample(7, 8, "gate", "scale") | shared(8, "h_weight")),
    Case("qk_norm_rope", "tiny", projections(7, 1, 8, 3, over="width") | rope(4, 8, True), dict(over="width")),
    Case("joint_attention", "tiny", heads(7, 1, 8, 3, 2), dict(return_lse=True)),
    Case("qk_norm_rope_attention", "tiny", projections(7, 1, 8, 3, 2, over="head") | rope(4, 8, True, False), dict(over="head")),
    Case("relu_linear_attention", "tiny", heads(7, 1, 8, 3, 2)),
]


@pytest.mark.parametrize("case", TINY, ids=str)
def test_more_samples_than_a_grid_axis_holds(case, framework, kernels):
    """70,000 samples, of which every seven are alike: a sample's results do not depend on its place in the batch."""
    times = 10_000
    few, many = (frameworks.call(framework, case, "bfloat16", times=n) for n in (1, times))
    per_sample = few.values.keys() - {f"d{name}" for name in frameworks.shared_names(case)}
    assert per_sample
    for name in per_sample:
        assert np.array_equal(many.values[name], np.concatenate([few.values[name]] * times)), name


def sanitizer() -> str | None:
    return shutil.which("compute-sanitizer", path=os.environ["PATH"] + ":/usr/local/cuda/bin")


SMALL = {case.call: case for case in CASES if not case.gpu and "empty" not in case.label and case.dtypes != ("bfloat16",)}
IN_TURN = Case("joint_attention", "small-heads-in-turn", heads(34, 8, 16, 70, 37), dict(return_lse=True))
NARROW = [case for case in CASES if str(case) in ("joint_attention-seed", "joint_attention-key-masks", "joint_attention-lse")]
SANE = [*SMALL.values(), *NARROW, IN_TURN]
SCRIPT = """
import frameworks, test_gpu
framework = frameworks.framework_of(frameworks.INSTALLED[0])
for case in test_gpu.SANE:
    frameworks.call(framework, case, "bfloat16")
    print("sane", case)
"""


@pytest.mark.skipif(sanitizer() is None, reason="compute-sanitizer is not installed")
def test_memory_accesses_are_sane():
    """compute-sanitizer over a small case of every op and several of narrow heads, forward and backward; without a caching
    allocator, which would hide accesses past an array's end."""
    here = str(Path(__file__).parent)
    path = os.pathsep.join([here, *filter(None, sys.path)])
    env = os.environ | dict(PYTHONPATH=path, PYTORCH_NO_CUDA_MEMORY_CACHING="1", XLA_PYTHON_CLIENT_ALLOCATOR="platform")
    command = [sanitizer(), "--error-exitcode", "1", sys.executable, "-c", SCRIPT]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert run.stdout.count("sane") == len(SANE)
