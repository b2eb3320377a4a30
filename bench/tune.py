"""`python -m bench tune`: times the configurations that rooms offer and stores the fastest that is right in both frameworks."""

from __future__ import annotations

import math
import pkgutil
import sys
import time
from contextlib import suppress
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
from .providers import Problem, Work, exact, ours_jax, ours_torch, problem
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


def keys_of(p: Problem) -> dict[tuned.Key, str]:
    """The keys that there is a choice for, and the mode whose launches look each one up."""
    forget()
    work, modes = ours_torch(p), {}
    for mode in ("fwd", "bwd"):
        call = torch_calls(work, mode)[0]
        tuned.asked.clear()
        call()
        modes |= dict.fromkeys((key for key in tuned.asked if len(candidates(key)) > 1), mode)
    return modes


class Trial(NamedTuple):
    """A mode of a problem: its results in float64, and how far from them the present choices are."""

    problem: Problem
    mode: str
    exact: tuple
    error: float


def trial(p: Problem, mode: str) -> Trial:
    forget()
    work, results = ours_torch(p), exact(p, mode)
    return Trial(p, mode, results, relative_error(p, mode, work, torch_calls(work, mode)[0](), results))


def checked(t: Trial, work: Work, results) -> None:
    """A configuration changes the order of sums, which moves errors a little; more is a miscompiled kernel."""
    relative_error(t.problem, t.mode, work, results, t.exact, 1.5 * t.error)


def microseconds(t: Trial, key: tuned.Key, config: tuned.Config) -> float:
    """Device time of the mode, checked first."""
    forget()
    with tuned.trying(key, config):
        work = ours_torch(t.problem)
        calls = torch_calls(work, t.mode)
        checked(t, work, calls[0]())
        return timing.quantiles(timing.graph(calls))[1]


def check_jax(t: Trial, key: tuned.Key, config: tuned.Config) -> None:
    forget()
    with tuned.trying(key, config):
        work = ours_jax(t.problem)
        fn, sets = jax_function(work, t.mode)
        checked(t, work, jax.block_until_ready(jax.jit(fn)(*sets[0])))


def compile_part(op: str, name: str, dtype: str, first: int, step: int) -> None:
    """Run every `step`-th candidate once: what it compiles stays on disk."""
    p = problem(op, name, getattr(torch, dtype), hot=True)
    trials = [(key, mode, config) for key, mode in keys_of(p).items() for config in candidates(key)]
    for key, mode, config in trials[first::step]:
        forget()
        with suppress(Exception), tuned.trying(key, config):  # the measurement itself will say
            torch_calls(ours_torch(p), mode)[0]()


def tune(what: str, names: list[str] | None, dtype: str, limit_s: float | None, workers: int, part: list[int] | None) -> None:
    mmattn_torch.set_implementation("triton")
    mmattn_jax.set_implementation("triton")
    functorch_config.donated_buffer = False
    deadline = None if limit_s is None else time.monotonic() + limit_s
    cases = shapes.cases(what, names)
    if part:
        for op, name in cases:
            compile_part(op, name, dtype, *part)
        return
    if workers:
        how = ["--shapes", *names] if names else []
        together([["tune", what, *how, "--dtype", dtype, "--part", str(i), str(workers)] for i in range(workers)], workers)
    times: dict[tuned.Key, dict[int, list[float]]] = {}  # of each candidate, over the shapes that share a key
    for op, name in cases:
        try:
            p = problem(op, name, getattr(torch, dtype), hot=False)
            keys = keys_of(p)
            trials = {mode: trial(p, mode) for mode in dict.fromkeys(keys.values())}
        except Exception as error:
            print(f"{op} {name} skipped: {reason(error)}", flush=True)
            continue
        for key, mode in keys.items():
            for i, config in enumerate(candidates(key)):
                if deadline is not None and time.monotonic() > deadline:
                    print(f"time is up: {key} on {op} {name} and what follows not measured", flush=True)
                    return
                try:
                    us = microseconds(trials[mode], key, config)
                except Exception as error:
                    print(f"{op} {name} {key} {config} refused: {reason(error)}", flush=True)
                    us = math.inf
                times.setdefault(key, {}).setdefault(i, []).append(us)
                print(f"{op} {name} {key} {config}: {us:.2f} us", flush=True)
            settle(trials[mode], key, times[key])


def settle(t: Trial, key: tuned.Key, times: dict[int, list[float]]) -> None:
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
