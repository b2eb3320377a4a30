"""Command line: `python -m bench run`, `python -m bench plot`."""

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
    run.add_argument("--budget", type=float, help="seconds after which nothing new is started")
    run.add_argument("--hot", action="store_true", help="one input set, in the cache where it fits")
    run.add_argument("--profile", action="store_true", help="also sum kernel times of JAX's chains with JAX's profiler")
    run.add_argument("--commit", help="what the rows name, where the tree has no git")

    plot = commands.add_parser("plot", help="draw docs/figures/<op>.png from the newest rows")
    plot.add_argument("files", nargs="*", type=Path, help="default: bench/results/*.jsonl")
    plot.add_argument("--dtype", default="bfloat16")
    plot.add_argument("--out", type=Path, help="default: docs/figures")

    arguments = parser.parse_args()
    if arguments.command == "plot":
        from .plot import plot

        plot(arguments.files, arguments.dtype, arguments.out)
        return

    from .providers import PROVIDERS
    from .run import run

    known = {name for providers in PROVIDERS.values() for name in providers}
    unknown = sorted(set(arguments.providers or ()) - known)
    if unknown:
        parser.error(f"unknown providers {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    run(
        arguments.what,
        arguments.shapes,
        arguments.providers,
        arguments.dtype,
        arguments.mode,
        arguments.out,
        arguments.budget,
        arguments.hot,
        arguments.profile,
        arguments.commit,
    )


if __name__ == "__main__":
    main()
