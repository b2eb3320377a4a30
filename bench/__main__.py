"""Command line: `python -m bench run`, `tune` and `plot`."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import shapes


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of mmattn on an NVIDIA GPU.")
    commands = parser.add_subparsers(dest="command", required=True)

    run = commands.add_parser("run", help="measure, print tables, append rows to a JSONL file")
    run.add_argument("what", nargs="?", default="all", choices=(*shapes.GROUPS, *(op for op in shapes.OPS if op != "model")))
    names = list(dict.fromkeys(name for named in shapes.OPS.values() for name in named))
    run.add_argument("--shapes", nargs="+", choices=names, help="in this order; default: all that an op has")
    run.add_argument("--providers", nargs="+", help="default: all; see PROVIDERS in bench/providers.py")
    run.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    run.add_argument("--mode", default="both", choices=("fwd", "bwd", "both"), help="bwd covers fwdbwd too")
    run.add_argument("--out", type=Path, help="default: bench/results/<gpu>-<what>.jsonl")
    run.add_argument("--limit-s", type=float, help="seconds after which nothing new is started")
    run.add_argument("--workers", type=int, default=0, help="compile in so many processes first")
    run.add_argument("--warm", action="store_true", help="compile only, what such a process does")
    run.add_argument("--hold", type=Path, help="model only: compile everything, wait until this file exists, then time")
    run.add_argument("--hot", action="store_true", help="one input set, in the cache where it fits")
    run.add_argument("--commit", help="what the rows name, where the tree has no git")

    tune = commands.add_parser("tune", help="time the configurations that rooms offer, write mmattn/tuned.json")
    tune.add_argument("what", choices=(*shapes.GROUPS, *(op for op in shapes.OPS if op != "model")))
    tune.add_argument("--shapes", nargs="+", choices=names)
    tune.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    tune.add_argument("--limit-s", type=float, help="seconds after which nothing new is timed; what is settled is stored")
    tune.add_argument("--workers", type=int, default=0, help="compile in so many processes first")
    tune.add_argument("--part", nargs=2, type=int, metavar=("I", "N"), help="compile only, every N-th candidate: such a process")

    plot = commands.add_parser("plot", help="draw docs/figures/<op>.png from the newest rows")
    plot.add_argument("files", nargs="*", type=Path, help="default: bench/results/*.jsonl")
    plot.add_argument("--dtype", default="bfloat16")
    plot.add_argument("--out", type=Path, help="default: docs/figures")

    arguments = parser.parse_args()
    if arguments.command == "plot":
        from .plot import plot

        plot(arguments.files, arguments.dtype, arguments.out)
        return
    if arguments.command == "tune":
        from .tune import tune

        tune(arguments.what, arguments.shapes, arguments.dtype, arguments.limit_s, arguments.workers, arguments.part)
        return

    from .providers import PROVIDERS
    from .run import run, warm

    known = {name for providers in PROVIDERS.values() for name in providers}
    unknown = sorted(set(arguments.providers or ()) - known)
    if unknown:
        parser.error(f"unknown providers {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    if arguments.hold and arguments.what != "model":
        parser.error("--hold is for the model alone")
    named = (arguments.what, arguments.shapes, arguments.providers, arguments.dtype, arguments.mode)
    if arguments.warm:
        warm(*named)
    else:
        run(*named, arguments.out, arguments.limit_s, arguments.hot, arguments.commit, arguments.workers, arguments.hold)


if __name__ == "__main__":
    main()
