"""`python -m bench plot`: one figure per op from the newest rows, providers over shapes, the roof as a line."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator

from . import shapes

ROOT = Path(__file__).parents[1]
MODES = dict(fwd="forward", bwd="backward", fwdbwd="forward + backward")
MARKERS = "osD^vP*X<>hd"


def newest(files: list[Path], dtype: str) -> list[dict]:
    """The last measured row of each op, shape, mode and provider."""
    rows = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    rows = sorted((row for row in rows if row["kind"] == "time" and row["dtype"] == dtype), key=lambda row: row["date"])
    return list({(row["op"], row["shape"], row["mode"], row["provider"]): row for row in rows}.values())


def quantity(row: dict) -> tuple[str, float, float | None]:
    """What a row is drawn as, its value and its roof."""
    if "tb_s" in row:
        return "TB/s", row["tb_s"], row["roof"]
    if "scores_s" in row:
        return "scores/s", row["scores_s"], row["roof"]
    return "ms", row.get("device_us", row["p50_us"]) / 1e3, None  # the first rows have no device_us


def draw(op: str, rows: list[dict]) -> plt.Figure:
    modes = [mode for mode in MODES if any(row["mode"] == mode for row in rows)]
    names = [name for name in shapes.OPS[op] if any(row["shape"] == name for row in rows)]
    providers = sorted(dict.fromkeys(row["provider"] for row in rows), key=lambda name: not name.startswith("ours"))
    figure, axes = plt.subplots(
        1, len(modes), figsize=(1.5 + 5 * len(modes), 4.5), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, mode in zip(axes[0], modes, strict=True):
        for i, provider in enumerate(providers):
            here = [row for row in rows if row["mode"] == mode and row["provider"] == provider]
            ours = provider.startswith("ours")
            at = [names.index(row["shape"]) + 0.5 * (i + 0.5) / len(providers) - 0.25 for row in here]
            axis.plot(
                at, [quantity(row)[1] for row in here], MARKERS[i % len(MARKERS)], label=provider, color=f"C{i % 10}",
                markersize=9 if ours else 6, markeredgecolor="black" if ours else "none", linestyle="none",
            )  # fmt: skip
        for row in rows:
            unit, _, roof = quantity(row)
            if row["mode"] == mode and roof is not None:
                at = names.index(row["shape"])
                axis.plot([at - 0.4, at + 0.4], [roof, roof], color="black", linewidth=1)
        axis.set(title=MODES[mode], yscale="log", xlim=(-0.5, len(names) - 0.5))
        sizes = {row["shape"]: row["sizes"] for row in rows}
        ticks = dict(fontsize=7, rotation=40, ha="right", rotation_mode="anchor")
        axis.set_xticks(range(len(names)), [f"{name}\n{sizes[name]}" for name in names], **ticks)
        axis.grid(axis="y", which="both", alpha=0.3)
        axis.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
    axes[0][0].set_ylabel(f"{unit} (lower is better)" if unit == "ms" else f"{unit} (line: roof)")
    axes[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5))
    last = max(rows, key=lambda row: row["date"])
    figure.suptitle(f"{op}, {last['dtype']}, {last['gpu']}, {last['date'][:10]}")
    return figure


def plot(files: list[Path], dtype: str, out: Path | None) -> None:
    files, out = files or sorted((ROOT / "bench" / "results").glob("*.jsonl")), out or ROOT / "docs" / "figures"
    rows = newest(files, dtype)
    if not rows:
        raise SystemExit(
            f"bench plot: no {dtype} rows in {', '.join(map(str, files)) or 'bench/results'}; run `python -m bench run`."
        )
    out.mkdir(parents=True, exist_ok=True)
    for op in dict.fromkeys(row["op"] for row in rows):
        figure = draw(op, [row for row in rows if row["op"] == op])
        figure.savefig(out / f"{op}.png", dpi=150)
        plt.close(figure)
        print(out / f"{op}.png")
