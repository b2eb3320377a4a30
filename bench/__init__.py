"""Benchmarks on an NVIDIA GPU: `python -m bench run`, `python -m bench tune`, `python -m bench plot`.

What is timed
    fwd      the forward as training runs it, with what it saves for the backward
    bwd      the gradients of a saved forward for given cotangents, alone
    fwdbwd   both, without an optimiser
Times are device times: of CUDA graph replays in torch; in JAX of calls chained inside one jit, or the sum of their kernels'
times by the profiler where launching takes XLA longer than running (see timing.py). A model's providers without a graph in their
name, and JAX's, are plain calls in a row, the slower of host and device. All ratios come from one run on one GPU.
Beside them stand the host's time for one eager call of a norm (with and without gradients), the distance from float64 (who is
too far from it is printed as wrong, without a time), and, counted from the plans without running them, the launches and bytes
of ours.
A row says how many input sets its calls rotate over; by default they exceed the L2 cache.
"""

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory too
# The calls of a chain are ordered by optimization barriers, which a CUDA graph of XLA's might not respect on its own.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_command_buffer_scheduling_mode=SERIALIZE"
