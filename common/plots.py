"""The pictures of results/, drawn from its JSON files and from measurements/whole_run.json."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

os.environ["MPLBACKEND"] = "Agg"  # a notebook's own may be one that is not installed here
import matplotlib.pyplot as plt
from matplotlib import font_manager

from common import whole_runs
from common.command_line import read_json, replacing

KOREAN_FONTS = {"NanumGothic", "Noto Sans CJK KR", "Malgun Gothic", "AppleGothic"}
COLOURS = ("tab:grey", "tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple")


def draw_plots(results: list[dict], results_dir: Path, measurements: Path) -> None:
    """Draws what there are numbers for; a picture without numbers is not made.

    spearman_by_dimension.png   Matryoshka models, from KorSTS results
    speed_and_size.png          SentenceTransformer and exported files, from results_dir/onnx
    score_by_cost.png           dev score against CPU seconds, from measurements/whole_run.json
    """
    plt.rcdefaults()  # whatever matplotlibrc is here
    fonts = ["DejaVu Sans", *sorted(KOREAN_FONTS.intersection(font_manager.get_font_names()))]
    plt.rcParams.update({"font.family": fonts, "font.size": 11})
    plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True})
    exported = [read_json(path) for path in sorted((results_dir / "onnx").glob("*.json"))]
    runs = whole_runs.read_whole_runs(measurements / "whole_run.json")
    figures = {
        "spearman_by_dimension.png": spearman_by_dimension(results),
        "speed_and_size.png": speed_and_size(exported),
        whole_runs.PICTURE: score_by_cost(runs),
    }
    for name, figure in figures.items():
        if figure is not None:
            with replacing(results_dir / name) as file:
                figure.savefig(file, format="png", dpi=150, bbox_inches="tight")
            plt.close(figure)


def spearman_by_dimension(results: Sequence[dict]) -> plt.Figure | None:
    """Draws cosine Spearman by dimension: measured models as lines, published ones dashed grey."""
    rows = [row for row in results if "dims" in row]
    if not rows:
        return None
    figure, axes = plt.subplots(figsize=(8, 4.5))
    colours = iter(COLOURS[1:] * len(rows))
    for row, marker in zip(rows, "os^Dv<>P*X" * len(rows), strict=False):
        dims = sorted(map(int, row["dims"]))
        values = [100 * row["dims"][str(dim)]["scores"]["cosine_spearman"] for dim in dims]
        is_measured = row["source"] == "measured"
        line, colour = ("-", next(colours)) if is_measured else ("--", COLOURS[0])
        label = f"{row['name']} ({row['source']})"
        axes.plot(dims, values, line, color=colour, marker=marker, label=label)
    ticks = sorted({int(dim) for row in rows for dim in row["dims"]})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, map(str, ticks))
    axes.set(xlabel="embedding dimension", ylabel="cosine Spearman x100, KorSTS-test")
    axes.legend(fontsize=9)
    return figure


def speed_and_size(exported: Sequence[dict]) -> plt.Figure | None:
    """Draws each export's encoders: sentences a second, megabytes, score with what it lost."""
    if not exported:
        return None
    rows = [(result, row) for result in exported for row in result["rows"]]
    several = len(exported) > 1
    names = [f"{result['model']}, {row['encoder']}" if several else row["encoder"]
             for result, row in rows]  # fmt: skip
    figure, (speed, size, score) = plt.subplots(
        1, 3, figsize=(11, 1.2 + 0.6 * len(rows)), sharey=True
    )
    for shift, batch, colour in ((-0.2, 32, COLOURS[1]), (0.2, 1, COLOURS[2])):
        places = [place + shift for place in range(len(rows))]
        values = [row[f"sentences_per_second_{batch}"] for _, row in rows]
        bars = speed.barh(places, values, 0.38, color=colour, label=f"batch {batch}")
        speed.bar_label(bars, fmt="{:.0f}", padding=2, fontsize=9)
    bars = size.barh(range(len(rows)), [row["size_bytes"] / 1e6 for _, row in rows], 0.5,
                     color=COLOURS[1])  # fmt: skip
    size.bar_label(bars, fmt="{:.0f}", padding=2, fontsize=9)
    for place, (result, row) in enumerate(rows):
        whole = result["rows"][0]["cosine_spearman"]
        value = 100 * row["cosine_spearman"]
        # The interval of what was lost, paired with the first row, about the row's own score.
        low, high = (100 * (whole - end) for end in reversed(row["lost_interval"]))
        ends = [[max(value - low, 0)], [max(high - value, 0)]]
        score.errorbar(value, place, xerr=ends, fmt="o", color=COLOURS[1], capsize=4)
        score.annotate(f"{value:.2f}", (value, place), (0, 8), textcoords="offset points",
                       ha="center", fontsize=9)  # fmt: skip
    for panel in (speed, size):
        panel.set_xlim(0, 1.18 * panel.dataLim.xmax)
    score.margins(x=0.25)
    speed.set_yticks(range(len(rows)), names)
    speed.set_ylim(len(rows) - 0.4, -0.6)
    speed.set(xlabel="sentences a second, CPU")
    size.set(xlabel="MB")
    score.set(xlabel="KorSTS-test, and 95% interval\nof the difference from the first")
    speed.legend(fontsize=9, loc="upper right")
    return figure


def score_by_cost(runs: Sequence[dict]) -> plt.Figure | None:
    """Draws dev scores against the CPU seconds of the whole run: a line a run, a colour a recipe.

    The star is the finished model at the end of its run.
    """
    if not runs:
        return None
    figure, axes = plt.subplots(figsize=(8, 4.5))
    groups = whole_runs.by_name(runs)
    for (name, seeds), colour in zip(groups.items(), COLOURS * len(groups), strict=False):
        label = f"{name} ({len(seeds)} seeds)" if len(seeds) > 1 else f"{name} (one seed)"
        for run in seeds:
            points = [(p["cpu_seconds"], p["dev_cosine_spearman_x100"]) for p in run["points"]]
            end = (run["whole_cpu_seconds"], run["dev"])
            axes.plot(*zip(*points, end, strict=True), "-", color=colour, alpha=0.6, label=label)
            axes.plot(*zip(*points, strict=True), ".", color=colour)
            axes.plot(*end, "*", color=colour, markersize=11)
            label = None
    axes.set_xlim(0)
    axes.set(
        xlabel="CPU seconds since the start of the process, everything counted",
        ylabel="cosine Spearman x100, KorSTS-dev",
    )
    axes.legend(fontsize=9, loc="lower right")
    return figure
