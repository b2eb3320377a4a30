"""Device times in microseconds per call, and what the GPU can do at best."""

from __future__ import annotations

import math
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import torch
import triton

TARGET_US = 2000  # device time of one measured piece: launching it must cost little beside it
SAMPLES = 20


@cache
def stream() -> torch.cuda.Stream:
    """The one stream of everything that is measured: autograd runs a backward where its forward ran."""
    return torch.cuda.Stream()


def quantiles(times: Sequence[float]) -> tuple[float, float, float]:
    """20th percentile, median and 80th percentile."""
    p20, *_, p80 = statistics.quantiles(times, n=5, method="inclusive")
    return p20, statistics.median(times), p80


def elapsed(work: Callable) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end)


def repeats(us: float, multiple: int) -> int:
    """How many calls of about `us` make a measured piece: a multiple of the number of input sets."""
    return multiple * math.ceil(min(max(TARGET_US / max(us, 1), 2), 100) / multiple)


def graph(calls: Sequence[Callable]) -> list[float]:
    """Replays of a CUDA graph that holds many calls, which rotate over `calls`."""
    with torch.cuda.stream(stream()):
        for _ in range(2):  # compiles, loads and allocates, which a capture must not
            for call in calls:
                call()
        n = repeats(elapsed(calls[0]), len(calls))
        captured, results = torch.cuda.CUDAGraph(), [None] * len(calls)
        stream().synchronize()
        # thread_local: a capture would otherwise fail if a thread of JAX's frees memory meanwhile
        with torch.cuda.graph(captured, stream=stream(), capture_error_mode="thread_local"):
            for i in range(n):
                results[i % len(calls)] = calls[i % len(calls)]()  # kept, so that outputs rotate too
        for _ in range(3):
            captured.replay()
        return [elapsed(captured.replay) / n for _ in range(SAMPLES)]


def eager(calls: Sequence[Callable]) -> list[float]:
    """Calls one after the other without a graph: the slower of host and device."""
    with torch.cuda.stream(stream()):
        for call in 2 * list(calls):
            call()
        n = repeats(elapsed(calls[0]), len(calls))

        def work():
            for i in range(n):
                calls[i % len(calls)]()

        return [elapsed(work) / n for _ in range(max(5, SAMPLES // 4))]


def host(call: Callable, n: int = 50) -> float:
    """Median time that one eager call keeps the host, without waiting for the device."""
    with torch.cuda.stream(stream()):
        times = []
        for _ in range(7):
            stream().synchronize()
            start = time.perf_counter()
            for _ in range(n):
                call()
            times.append(1e6 * (time.perf_counter() - start) / n)
        stream().synchronize()
    return statistics.median(times)


def chained(fn: Callable, n: int) -> Callable:
    """n calls of fn that rotate over input sets, each tied to the result of the one before.

    A barrier stands between a call's results and the next call's arguments, and all results are returned: XLA for GPUs, which
    drops barriers after fusion and scheduling, can neither merge equal calls, nor fuse two of them, nor leave one out.
    """
    import jax

    def chain(sets):
        results = []
        for i in range(n):
            result = fn(*sets[i % len(sets)])
            sets, result = jax.lax.optimization_barrier((sets, result))
            results.append(result)
        return results

    return jax.jit(chain)


def chain(fn: Callable, sets: Sequence[tuple]) -> tuple[list[float], float | None]:
    """The time that each further call adds to a chain inside one jit, and the sum of a call's kernel times, None if unknown.

    The first is at least the time that XLA's runtime needs to launch a call, which for short kernels is the longer.
    """
    import jax

    def wall(run):
        start = time.perf_counter()
        jax.block_until_ready(run())
        return 1e6 * (time.perf_counter() - start)

    def launches(run):
        text = run.func.lower(*run.args).compile().as_text()
        return text.count(" fusion(") + text.count(" custom-call(")

    one = partial(jax.jit(fn), *sets[0])
    for _ in range(3):
        wall(one)
    first = statistics.median(wall(one) for _ in range(SAMPLES))
    n = 1 + repeats(max(first - 50, 10), len(sets)) // 2
    many = partial(chained(fn, n), sets)
    if launches(many) < 0.75 * n * launches(one):
        raise RuntimeError(f"XLA merged calls: {n} calls launch {launches(many)} kernels, one launches {launches(one)}")
    for _ in range(3):
        wall(many)
    times = [(wall(many) - first) / (n - 1) for _ in range(SAMPLES)]
    if min(times) <= 0:
        raise RuntimeError(f"a chain of {n} calls took no longer than one call, {first:.0f} us: too noisy to be a measurement")
    return times, kernel_time(many) / n or None


def jitted(fn: Callable, sets: Sequence[tuple]) -> tuple[list[float], float | None]:
    """Calls of jit(fn) one after the other, the slower of host and device, and the sum of a call's kernel times."""
    import jax

    run = jax.jit(fn)
    jax.block_until_ready([run(*args) for args in 2 * list(sets)])

    def wall(n):
        start = time.perf_counter()
        for i in range(n):
            result = run(*sets[i % len(sets)])
        jax.block_until_ready(result)
        return 1e6 * (time.perf_counter() - start) / n

    n = repeats(wall(1), len(sets))
    return [wall(n) for _ in range(max(5, SAMPLES // 4))], kernel_time(partial(run, *sets[0])) or None


def kernel_time(run: Callable) -> float:
    """Sum of the times of all kernels that a JAX program launches, from JAX's profiler; 0 where it cannot see them."""
    import jax
    from jax.profiler import ProfileData

    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            jax.block_until_ready(run())
        (path,) = Path(directory).rglob("*.xplane.pb")
        planes = [plane for plane in ProfileData.from_file(str(path)).planes if plane.name.startswith("/device:GPU")]
    lines = [line for plane in planes for line in plane.lines if line.name.startswith("Stream")]
    return sum(event.duration_ns for line in lines for event in line.events) / 1e3


# What the GPU can do


@triton.jit
def empty_kernel(x_ptr):
    pass


def launch_floor(launches: int) -> float:
    x = torch.empty(1, device="cuda")
    return quantiles(graph([lambda: [empty_kernel[(1,)](x) for _ in range(launches)]]))[1]


def copy_time(size: int, sets: int) -> list[float]:
    """Passes that read and write `size` bytes in all, by a kernel: a copy in a graph may go to a slower copy engine."""
    words = -(-size // 32) * 4
    sources = [torch.randn(words, device="cuda") for _ in range(sets)]
    return graph([partial(torch.neg, x, out=torch.empty_like(x)) for x in sources])


def matmul_rate() -> float:
    """FLOP/s of a large bfloat16 product of normal values."""
    n = 8192
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return 2 * n**3 / quantiles(graph([partial(torch.mm, a, b)]))[1] * 1e6


def query(what: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits", "--id=0"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def ceilings() -> dict:
    """Measured copy bandwidth, matmul rate and launch floors; exp2 by its data sheet rate, 16 per clock and multiprocessor."""
    size = 2**31
    return dict(
        copy_tb_s=size / quantiles(copy_time(size, 1))[1] / 1e6,
        matmul_tflop_s=matmul_rate() / 1e12,
        exp2_s=16e6 * float(query("clocks.max.sm")) * torch.cuda.get_device_properties(0).multi_processor_count,
        one_launch_us=launch_floor(1),
        two_launches_us=launch_floor(2),
    )
