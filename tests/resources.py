"""Every kernel, tile and dtype compiled to machine code for every supported card: `python tests/resources.py --workers 2`.

Prints, for each card, what each kernel's worst launch of a dtype asks for: bytes of shared memory, registers a thread, bytes of
registers spilled. Ends with 1 where a launch asks for more shared memory than its card has. Needs no GPU.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

from cases import CASES
from test_plans import TARGETS, base_name, burden, compiled, config, machine_code, trace

CARDS = {80: "A100", 86: "RTX 3090", 89: "RTX 4090, L40S", 90: "H100, H200", 100: "B200", 120: "RTX 5090"}
KINDS = ("float32", "tf32", "bfloat16", "float16")
DOTS = ("joint_attention", "qk_norm_rope_attention", "relu_linear_attention")


class Need(NamedTuple):
    kernel: str
    shared: int
    registers: int
    spilled: int


@cache
def launches(arch: int, kind: str) -> list:
    """Of every configuration the launch that asks most of it."""
    configs = {}
    for case in CASES:
        dtype = "float32" if kind == "tf32" else kind
        if dtype not in case.dtypes or (kind == "tf32" and case.call not in DOTS):
            continue
        if kind == "tf32":
            case = case._replace(label=f"{case.label}-tf32", static=case.static | dict(precision="tf32"))
        for launch in trace(case, dtype, TARGETS[arch]).launches:
            configs.setdefault(config(launch), {})[burden(launch)] = launch
    return [found[max(found)] for found in configs.values()]


def need(work: tuple[int, str, int]) -> Need:
    arch, kind, i = work
    launch = launches(arch, kind)[i]
    kernel = compiled(launch, arch)
    with tempfile.TemporaryDirectory() as folder:
        registers, spilled, _ = machine_code(kernel, Path(folder))
    return Need(base_name(launch.plan), kernel.metadata.shared, int(registers), spilled)


def table(arch: int, needs: dict[tuple[str, str], list[Need]]) -> str:
    """A row for each kernel, a column for each dtype: the most of each number among its launches."""
    lines = [f"| sm_{arch}: {CARDS[arch]}, {TARGETS[arch].shared} bytes | {' | '.join(KINDS)} |", "|---" * (1 + len(KINDS)) + "|"]
    for kernel in sorted({kernel for kernel, _ in needs}):
        cells = []
        for kind in KINDS:
            most = [max(x) for x in zip(*(n[1:] for n in needs.get((kernel, kind), [])), strict=True)]
            cells.append(", ".join(map(str, most)))
        lines.append(f"| {kernel} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cards", type=int, nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--kernels", default="", help="a regular expression that names have to match")
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    fits = True
    with ProcessPoolExecutor(arguments.workers) as pool:
        for arch in arguments.cards:
            works = [
                (arch, kind, i)
                for kind in KINDS
                for i, launch in enumerate(launches(arch, kind))
                if re.search(arguments.kernels, base_name(launch.plan))
            ]
            needs = {}
            for (_, kind, _), n in zip(works, pool.map(need, works), strict=True):
                needs.setdefault((n.kernel, kind), []).append(n)
            print(table(arch, needs), end="\n\n", flush=True)
            fits &= all(n.shared <= TARGETS[arch].shared for found in needs.values() for n in found)
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
