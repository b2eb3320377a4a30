"""`python -m bench tune`: times the configurations that rooms offer and stores the fastest that is right in both frameworks."""

from __future__ import annotations

import math
import pkgutil
import sys
import time
from importlib import import_module

import torch
from torch._functorch import config as functorch_config

import mmattn
import mmattn_jax
import mmattn_torch
from mmattn import tuned

from . import shapes, timing
from .providers import Problem, count, exact, ours_jax, ours_torch, problem
from .run import clear, jax_function, reason, relative_error, together, torch_calls


def forget() -> None:
    """Plans and launches that remember another configuration."""
    for name in [name for name in sys.modules if name.split(".")[0] == "mmattn"]:
        for x in vars(sys.modules[name]).values():
            if hasattr(x, "cache_clear") and x is not tuned.table:
                x.cache_clear()
    mmattn_torch._bind.forget()
    clear()


def candidates(key: tuned.Key) -> list[tuned.Config]:
    modules = [import_module(module.name) for module in pkgutil.walk_packages(mmattn.__path__, "mmattn.")]
    return [tuned.Config(*c) for room in modules if hasattr(room, "candidates") for c in room.candidates(key)]


def keys_of(p: Problem) -> list[tuned.Key]:
    """The keys that the problem's plans look up and that there is a choice for."""
    forget()
    tuned.asked.clear()
    count(p)
    return [key for key in tuned.asked if len(candidates(key)) > 1]


def seconds(p: Problem, key: tuned.Key, config: tuned.Config, exact_results: dict) -> float:
    """Device time of forward and backward, after their check."""
    forget()
    with tuned.trying(key, config):
        work, total = ours_torch(p), 0.0
        for mode, results in exact_results.items():
            calls = torch_calls(work, mode)
            relative_error(p, mode, work, calls[0](), results)
            total += timing.quantiles(timing.graph(calls))[1]
    return total


def check_jax(p: Problem, key: tuned.Key, config: tuned.Config, exact_results: dict) -> None:
    import jax

    forget()
    with tuned.trying(key, config):
        work = ours_jax(p)
        for mode, results in exact_results.items():
            fn, sets = jax_function(work, mode)
            relative_error(p, mode, work, jax.block_until_ready(jax.jit(fn)(*sets[0])), results)


def tune(what: str, shape_names: list[str] | None, dtype: str, limit_s: float | None, workers: int, warm: bool) -> None:
    mmattn_torch.implementation("triton")
    mmattn_jax.implementation("triton")
    functorch_config.donated_buffer = False
    deadline = None if limit_s is None else time.monotonic() + limit_s
    cases = shapes.cases(what, shape_names)
    if workers:
        together([["tune", op, "--shapes", name, "--dtype", dtype, "--warm"] for op, name in cases], workers)
    times: dict[tuned.Key, dict[int, list[float]]] = {}  # of each candidate, over the shapes that share a key
    problems = {}
    for op, name in cases:
        try:
            p = problem(op, name, getattr(torch, dtype), hot=warm)
            keys, exact_results = keys_of(p), {mode: exact(p, mode) for mode in ("fwd", "bwd")}
        except Exception as error:
            print(f"{op} {name} skipped: {reason(error)}", flush=True)
            continue
        for key in keys:
            for i, config in enumerate(candidates(key)):
                if deadline is not None and time.monotonic() > deadline:
                    print(f"time is up: {key} on {op} {name} and what follows not measured", flush=True)
                    return
                try:
                    us = seconds(p, key, config, exact_results)
                except Exception as error:
                    print(f"{op} {name} {key} {config} refused: {reason(error)}", flush=True)
                    us = math.inf
                times.setdefault(key, {}).setdefault(i, []).append(us)
                problems[key] = (p, exact_results)
                print(f"{op} {name} {key} {config}: {us:.2f} us", flush=True)
            if not warm:
                settle(key, times[key], *problems[key])


def settle(key: tuned.Key, times: dict[int, list[float]], p: Problem, exact_results: dict) -> None:
    """Store the candidate with the smallest geometric mean that also passes in JAX; a refused one has an infinite time."""
    offered = candidates(key)
    mean = lambda i: sum(map(math.log, times[i]))
    for i in sorted(times, key=mean):
        if mean(i) == math.inf:
            break
        try:
            check_jax(p, key, offered[i], exact_results)
        except Exception as error:
            print(f"{key} {offered[i]} refused in JAX: {reason(error)}", flush=True)
            continue
        tuned.store(key, offered[i])
        print(f"{key} <- {offered[i]}", flush=True)
        return
    print(f"{key}: no candidate is right in both frameworks", flush=True)
