"""`python -m bench run`: measures, writes a row as soon as it is measured, prints a table for each op, shape and mode."""

from __future__ import annotations

import contextlib
import datetime
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jax
import torch
from torch._functorch import config as functorch_config

import mmattn_jax
import mmattn_torch

from . import shapes, timing
from .providers import PROVIDERS, Count, Problem, Work, as_torch, count, exact, problem, sampled

RESULTS = Path(__file__).parent / "results"
WRONG = dict(bfloat16=3e-2, float16=5e-3, float32=2e-3)  # relative errors beyond which a time says nothing
FLOPS = dict(fwd=4.0, bwd=10.0, fwdbwd=14.0)  # per score and element of a head; a backward counts 2.5 forwards
COPY = "copy"  # moves the bytes that the op has to move, as a provider of its own


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def machine(commit: str | None) -> dict:
    """What every row says about where it comes from."""
    packages = {name.replace("-", "_"): installed(name) for name in ("torch", "triton", "jax", "jaxlib", "jax-triton")}
    return dict(
        gpu=torch.cuda.get_device_name(),
        driver=timing.query("driver_version"),
        **packages,
        cudnn=torch.backends.cudnn.version(),
        commit=commit or git_commit(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


# One provider at one mode


def torch_calls(work: Work, mode: str) -> list[Callable]:
    def call(arrays, douts):
        if mode == "fwd":
            return partial(work.fn, *arrays)
        if mode == "bwd":
            return partial(torch.autograd.grad, work.fn(*arrays), arrays, douts, retain_graph=True)
        return lambda: torch.autograd.grad(work.fn(*arrays), arrays, douts)

    with torch.cuda.stream(timing.stream()):
        return [call(*s) for s in work.sets]


def jax_function(work: Work, mode: str) -> tuple[Callable, list[tuple]]:
    """What a chain calls, and the argument sets it rotates over."""
    if mode == "fwd":
        return work.fn, [s.arrays for s in work.sets]
    if mode == "bwd":
        forward = jax.jit(lambda *arrays: jax.vjp(work.fn, *arrays)[1])
        return lambda pullback, douts: pullback(douts), [(forward(*s.arrays), s.douts) for s in work.sets]
    return lambda arrays, douts: jax.vjp(work.fn, *arrays)[1](douts), [(s.arrays, s.douts) for s in work.sets]


class Wrong(Exception):
    """A provider's results are not the problem's."""


def calls_of(work: Work, mode: str) -> list[Callable] | tuple[Callable, list[tuple]]:
    return (torch_calls if work.framework == "torch" else jax_function)(work, mode)


def compiled(work: Work, mode: str) -> list[Callable] | tuple[Callable, list[tuple]]:
    """calls_of what has been compiled; JAX does so without running, so that its allocator holds nothing yet."""
    calls = calls_of(work, mode)
    if work.framework == "torch":
        with torch.cuda.stream(timing.stream()):
            calls[0]()
    else:
        fn, sets = calls
        jax.jit(fn).lower(*sets[0]).compile()
    return calls


def timed(times: list[float], error=None, host_us=None, host_no_grad_us=None, kernels_us=None, whole=False) -> dict:
    """device_us is what providers are compared by: the sum of its kernels' times where a profiler shows them, without what lies
    between them, else a call's, which includes launching them and in JAX is a difference of two wall clocks. `whole`: a call's
    even so, for what users wait for as a whole."""
    p20, p50, p80 = timing.quantiles(times)
    host = dict(host_us=host_us, host_no_grad_us=host_no_grad_us)
    device = p50 if kernels_us is None or whole else kernels_us
    return dict(p20_us=p20, p50_us=p50, p80_us=p80, kernels_us=kernels_us, device_us=device, error=error, **host)


def measure(p: Problem, work: Work, mode: str, calls, exact_results) -> dict:
    kernels = host = host_no_grad = None
    if work.framework == "torch":
        with torch.cuda.stream(timing.stream()):
            results = calls[0]()
            error = relative_error(p, mode, work, results, exact_results)
        times = (timing.graph if work.graph else timing.eager)(calls)
        if p.op in shapes.GROUPS["norms"]:
            host = timing.host(calls[0])
            if mode == "fwd":
                with torch.no_grad():
                    host_no_grad = timing.host(calls[0])
    else:
        fn, sets = calls
        error = relative_error(p, mode, work, jax.block_until_ready(jax.jit(fn)(*sets[0])), exact_results)
        if work.graph:
            times, kernels = timing.chain(fn, sets)
        else:
            times, kernels = timing.jitted(fn, sets)
    return timed(times, error, host, host_no_grad, kernels, whole=p.op == "model")


def relative_error(p: Problem, mode: str, work: Work, results, exact_results, limit: float | None = None) -> float | None:
    """Largest ||x - float64|| / ||float64|| of the outputs or gradients of the first input set; Wrong if beyond the limit."""
    if exact_results is None:
        return None
    pairs = zip(sampled(p, mode, as_torch(work.common(results))), exact_results, strict=True)
    error = max(((x.double() - y).norm() / y.norm()).item() for x, y in pairs)
    if not error <= (limit or WRONG[dtype_of(p)]):
        raise Wrong(f"relative error {error:.1e} from float64")
    return error


def dtype_of(p: Problem) -> str:
    return str(p.dtype).removeprefix("torch.")


def rates(p: Problem, mode: str, us: float, counted: Count | None, top: dict) -> dict:
    """Bytes or scores per second, and the roof over them on this GPU."""
    if p.op in shapes.GROUPS["norms"]:
        return dict(tb_s=counted.least / us / 1e6, roof=top["copy_tb_s"])
    if p.scores is None:
        return {}
    scores_s, d = p.scores / us * 1e6, p.shape.width
    # a fused backward needs every exponential once, as the forward does
    passes = dict(fwd=("fwd",), bwd=("bwd",), fwdbwd=("fwd", "bwd"))[mode]
    seconds = sum(max(1 / top["exp2_s"], FLOPS[half] * d / top["matmul_tflop_s"] / 1e12) for half in passes)
    return dict(scores_s=scores_s, tflop_s=FLOPS[mode] * d * scores_s / 1e12, roof=1 / seconds)


# Tables


def peer(row: dict) -> bool:
    return not row["provider"].startswith("ours") and row["provider"] != COPY


def summary(rows: list[dict], top: dict) -> dict:
    """Each provider's time against the best peer's, and its bandwidth against a large copy's."""
    best = min(filter(peer, rows), key=lambda row: row["device_us"], default=None)
    return dict(
        best_peer=best and best["provider"],
        best_peer_us=best and best["device_us"],
        times_best_peer={row["provider"]: best["device_us"] / row["device_us"] for row in rows} if best else {},
        of_copy={row["provider"]: row["tb_s"] / top["copy_tb_s"] for row in rows if "tb_s" in row},
    )


def table(rows: list[dict], ratios: dict) -> str:
    columns = {
        "provider": lambda r: r["provider"],
        "device us": lambda r: f"{r['device_us']:.1f}",
        "p50 us": lambda r: f"{r['p50_us']:.1f}",
        "p20 - p80": lambda r: f"{r['p20_us']:.1f} - {r['p80_us']:.1f}",
        "TB/s": lambda r: f"{r['tb_s']:.2f}" if "tb_s" in r else "",
        "of copy": lambda r: f"{ratios['of_copy'][r['provider']]:.2f}" if r["provider"] in ratios["of_copy"] else "",
        "Tscores/s": lambda r: f"{r['scores_s'] / 1e12:.2f}" if "scores_s" in r else "",
        "TFLOP/s": lambda r: f"{r['tflop_s']:.0f}" if "tflop_s" in r else "",
        "of roof": lambda r: f"{r['scores_s'] / r['roof']:.2f}" if "scores_s" in r else "",
        "x best peer": lambda r: f"{ratios['times_best_peer'][r['provider']]:.2f}" if ratios["times_best_peer"] else "",
        "error": lambda r: f"{r['error']:.1e}" if r["error"] is not None else "",
        "host us": lambda r: f"{r['host_us']:.1f}" if r["host_us"] is not None else "",
        "host no_grad us": lambda r: f"{r['host_no_grad_us']:.1f}" if r["host_no_grad_us"] is not None else "",
    }
    lines = [[name, *map(cell, rows)] for name, cell in columns.items()]
    lines = [column for column in lines if any(column[1:])]
    widths = [max(map(len, column)) for column in lines]
    left = lambda text, width, i: text.ljust(width) if i == 0 else text.rjust(width)
    return "\n".join(
        "  " + "  ".join(left(column[n], w, i) for i, (column, w) in enumerate(zip(lines, widths, strict=True)))
        for n in range(len(rows) + 1)
    )


# The run


def reason(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}"[:200]


class Session:
    """Where rows go, what they all say, and how much time is left."""

    def __init__(self, out: Path, limit_s: float | None, about: dict):
        self.about, self.deadline = about, None if limit_s is None else time.monotonic() + limit_s
        out.parent.mkdir(parents=True, exist_ok=True)
        self.file = out.open("a")

    def write(self, kind: str, **row) -> dict:
        row = dict(kind=kind, **row)
        self.file.write(json.dumps(row | self.about) + "\n")
        self.file.flush()
        return row

    @property
    def over(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline


def compile_first(p: Problem, modes: Iterable[str], providers: list[str]) -> dict[str, tuple[Work, dict]]:
    """Each provider's work and its compiled calls of each mode. What does not compile is left out, and is tried again when its
    turn comes, which then says why."""
    held = {}
    for name in providers:
        with contextlib.suppress(Exception):
            held[name] = work, calls = PROVIDERS[p.op][name](p), {}
            for mode in modes:
                start = time.monotonic()
                calls[mode] = compiled(work, mode)
                print(f"{p.op} {p.name}: {name} {mode} compiled in {time.monotonic() - start:.1f} s", flush=True)
        clear(code=False)
    return held


def run_problem(
    session: Session, p: Problem, modes: list[str], providers: list[str], top: dict, held: dict[str, tuple[Work, dict]] | None
) -> None:
    where = f"{p.op} {p.name}"
    dtype = dtype_of(p)
    about = dict(op=p.op, shape=p.name, sizes=shapes.text(p.shape), dtype=dtype, sets=len(p.sets))
    counts = {} if p.op == "model" else count(p)
    results = {mode: exact(p, mode) if mode in ("fwd", "bwd") and (p.op, mode) != ("model", "bwd") else None for mode in modes}
    torch.cuda.synchronize()
    rows = {mode: [] for mode in modes}

    def note(provider: str, mode: str, measured: dict):
        counted = counts.get(mode)
        ours = dict(launches=counted.launches, plan_bytes=counted.bytes) if counted and provider.startswith("ours") else {}
        rated = rates(p, mode, measured["device_us"], counted, top)
        rows[mode].append(session.write("time", **about, mode=mode, provider=provider, **measured, **rated, **ours))

    for name in providers:
        if session.over:
            print(f"{where}: time is up, {name} and those after it not reached", flush=True)
            break
        work, calls, mode = None, None, "build"
        try:
            work, calls = (held or {}).pop(name, None) or (PROVIDERS[p.op][name](p), {})
            for mode in modes:
                note(name, mode, measure(p, work, mode, calls.get(mode) or calls_of(work, mode), results[mode]))
        except Wrong as error:
            print(f"{where}: {name} is wrong at {mode}: {error}", flush=True)
            session.write("wrong", **about, mode=mode, provider=name, why=str(error))
        except Exception as error:  # a provider that cannot take the problem must not end the run
            print(f"{where}: {name} skipped at {mode}: {reason(error)}", flush=True)
        work = calls = None
        clear(code=held is None)
    if p.op in shapes.GROUPS["norms"] and not session.over:
        for mode in modes:
            note(COPY, mode, timed(timing.copy_time(counts[mode].least, len(p.sets))))
    for mode in modes:
        if rows[mode]:
            ratios = session.write("summary", **about, mode=mode, **summary(rows[mode], top))
            ours = f"; ours: {counts[mode].launches} launch(es), {counts[mode].bytes / 1e6:.1f} MB" if mode in counts else ""
            print(f"\n{where} ({about['sizes']}) {dtype} {mode}, {len(p.sets)} input sets{ours}")
            print(table(rows[mode], ratios), flush=True)


def together(commands: list[list[str]], workers: int) -> None:
    """Run `python -m bench` several times at once: what they compile stays on disk."""
    alone = lambda command: subprocess.run([sys.executable, "-m", "bench", *command], stdout=subprocess.DEVNULL)
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(alone, commands))


def warm(what: str, shape_names: list[str] | None, provider_names: list[str] | None, dtype: str, mode: str) -> None:
    """Run every torch provider once on one input set."""
    functorch_config.donated_buffer = False
    for op, name in shapes.cases(what, shape_names):
        p = problem(op, name, getattr(torch, dtype), hot=True)
        for provider in PROVIDERS[op]:
            with contextlib.suppress(Exception):  # the run itself will say
                if (provider_names is None or provider in provider_names) and "jax" not in provider and provider != "xla":
                    torch_calls(PROVIDERS[op][provider](p), "fwd" if mode == "fwd" else "bwd")[0]()
            clear()


def clear(code: bool = True) -> None:
    """Nothing of one provider may stay for the next: compiled code of one function would serve another that looks the same."""
    gc.collect()
    torch.cuda.empty_cache()
    if code:
        torch._dynamo.reset()
        jax.clear_caches()


def run(
    what: str,
    shape_names: list[str] | None,
    provider_names: list[str] | None,
    dtype: str,
    mode: str,
    out: Path | None,
    limit_s: float | None,
    hot: bool,
    commit: str | None,
    workers: int,
    hold: Path | None,
) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("bench run: torch sees no GPU; the benchmark needs an NVIDIA GPU.")
    mmattn_torch.set_implementation("triton")  # never a silent fall back
    mmattn_jax.set_implementation("triton")
    functorch_config.donated_buffer = False  # a saved forward is differentiated many times
    cases = shapes.cases(what, shape_names)
    modes = dict(fwd=("fwd",), bwd=("bwd", "fwdbwd"), both=("fwd", "bwd", "fwdbwd"))[mode]
    if workers:
        named = ["--providers", *provider_names] if provider_names else []
        together(
            [["run", op, "--shapes", name, *named, "--dtype", dtype, "--mode", mode, "--warm"] for op, name in cases], workers
        )
    of = lambda p: [mode for mode in p.modes if mode in modes]
    known = lambda op: [provider for provider in PROVIDERS[op] if provider_names is None or provider in provider_names]
    ready = {}
    if hold:
        for op, name in cases:
            p = problem(op, name, getattr(torch, dtype), hot)
            ready[op, name] = p, compile_first(p, of(p), known(op))
        print(f"compiled, waiting for {hold}", flush=True)
        while not hold.exists():
            time.sleep(0.05)
    about = machine(commit)
    slug = about["gpu"].removeprefix("NVIDIA ").replace(" ", "-").lower()
    out = out or RESULTS / f"{slug}-{what}.jsonl"
    session = Session(out, limit_s, about)
    top = timing.ceilings()
    session.write("machine", **top)
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print(
        f"copy {top['copy_tb_s']:.2f} TB/s, matmul {top['matmul_tflop_s']:.0f} TFLOP/s, exp2 {top['exp2_s'] / 1e12:.2f}e12/s, "
        f"empty kernel {top['one_launch_us']:.2f} us, two {top['two_launches_us']:.2f} us",
        flush=True,
    )
    for i, (op, name) in enumerate(cases):
        if session.over:
            print("time is up, not reached: " + ", ".join(" ".join(case) for case in cases[i:]))
            break
        try:
            p, held = ready.pop((op, name), None) or (problem(op, name, getattr(torch, dtype), hot), None)
            run_problem(session, p, of(p), known(op), top, held)
        except Exception as error:  # out of memory for one shape must not end the run
            print(f"{op} {name} skipped: {reason(error)}", flush=True)
        p = held = None
        clear(code=not ready)
    print(f"\nrows are in {out}")
