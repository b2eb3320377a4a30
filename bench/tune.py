"""`python -m bench tune`: times the configurations that rooms offer and stores the fastest that is right in both frameworks."""

from __future__ import annotations

import math
import pkgutil
import sys
import time
from importlib import import_module
from typing import NamedTuple

import jax
import torch
from torch._functorch import config as functorch_config

import mmattn
import mmattn_jax
import mmattn_torch
from mmattn import tuned

from . import shapes, timing
from .providers import Problem, Work, count, exact, ours_jax, ours_torch, problem
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


class Trial(NamedTuple):
    """A problem, what its results should be, and how far from that the present configuration is, for each mode."""

    problem: Problem
    exact: dict[str, tuple]
    errors: dict[str, float]


def trial(p: Problem) -> Trial:
    modes, work = ("fwd", "bwd"), ours_torch(p)
    results = {mode: exact(p, mode) for mode in modes}
    return Trial(p, results, {mode: relative_error(p, mode, work, torch_calls(work, mode)[0](), results[mode]) for mode in modes})


def checked(t: Trial, work: Work, mode: str, results) -> None:
    """A configuration changes the order of sums, which moves errors a little; more is a miscompiled kernel."""
    relative_error(t.problem, mode, work, results, t.exact[mode], 1.5 * t.errors[mode])


def microseconds(t: Trial, key: tuned.Key, config: tuned.Config) -> float:
    """Device time of forward and backward, each checked first."""
    forget()
    with tuned.trying(key, config):
        work, total = ours_torch(t.problem), 0.0
        for mode in t.exact:
            calls = torch_calls(work, mode)
            checked(t, work, mode, calls[0]())
            total += timing.quantiles(timing.graph(calls))[1]
    return total


def check_jax(t: Trial, key: tuned.Key, config: tuned.Config) -> None:
    forget()
    with tuned.trying(key, config):
        work = ours_jax(t.problem)
        for mode in t.exact:
            fn, sets = jax_function(work, mode)
            checked(t, work, mode, jax.block_until_ready(jax.jit(fn)(*sets[0])))


def tune(what: str, shape_names: list[str] | None, dtype: str, limit_s: float | None, workers: int, warm: bool) -> None:
    mmattn_torch.implementation("triton")
    mmattn_jax.implementation("triton")
    functorch_config.donated_buffer = False
    deadline = None if limit_s is None else time.monotonic() + limit_s
    cases = shapes.cases(what, shape_names)
    if workers:
        together([["tune", op, "--shapes", name, "--dtype", dtype, "--warm"] for op, name in cases], workers)
    times: dict[tuned.Key, dict[int, list[float]]] = {}  # of each candidate, over the shapes that share a key
    for op, name in cases:
        try:
            p = problem(op, name, getattr(torch, dtype), hot=warm)
            keys, t = keys_of(p), trial(p)
        except Exception as error:
            print(f"{op} {name} skipped: {reason(error)}", flush=True)
            continue
        for key in keys:
            for i, config in enumerate(candidates(key)):
                if deadline is not None and time.monotonic() > deadline:
                    print(f"time is up: {key} on {op} {name} and what follows not measured", flush=True)
                    return
                try:
                    us = microseconds(t, key, config)
                except Exception as error:
                    print(f"{op} {name} {key} {config} refused: {reason(error)}", flush=True)
                    us = math.inf
                times.setdefault(key, {}).setdefault(i, []).append(us)
                print(f"{op} {name} {key} {config}: {us:.2f} us", flush=True)
            if not warm:
                settle(key, times[key], t)


def settle(key: tuned.Key, times: dict[int, list[float]], t: Trial) -> None:
    """Store the candidate with the smallest geometric mean that also passes in JAX; a refused one has an infinite time."""
    offered = candidates(key)
    mean = lambda i: sum(map(math.log, times[i]))
    for i in sorted(times, key=mean):
        if mean(i) == math.inf:
            break
        try:
            check_jax(t, key, offered[i])
        except Exception as error:
            print(f"{key} {offered[i]} refused in JAX: {reason(error)}", flush=True)
            continue
        tuned.store(key, offered[i])
        print(f"{key} <- {offered[i]}", flush=True)
        return
    print(f"{key}: no candidate is right in both frameworks", flush=True)
