"""The pictures of results/, drawn from its JSON files."""

from __future__ import annotations

import itertools
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib import font_manager

from common.command_line import replacing

KOREAN_FONTS = {"NanumGothic", "Noto Sans CJK KR", "Malgun Gothic", "AppleGothic"}


def draw_plots(results: list[dict], results_dir: Path) -> None:
    """Draws spearman_by_dimension.png and speed_and_size.png from KorSTS results."""

    def save(figure: plt.Figure, name: str) -> None:
        with replacing(results_dir / name) as file:
            figure.savefig(file, format="png", dpi=150, bbox_inches="tight")
        plt.close(figure)

    fonts = ["DejaVu Sans", *sorted(KOREAN_FONTS.intersection(font_manager.get_font_names()))]
    plt.rcParams.update({"font.family": fonts, "font.size": 11})
    plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.3})
    y_label = "cosine Spearman x100, KorSTS-test"
    if rows := [row for row in results if "dims" in row]:
        figure, axes = plt.subplots(figsize=(8, 4.5))
        for row in rows:
            dims = sorted(map(int, row["dims"]))
            values = [100 * row["dims"][str(dim)]["scores"]["cosine_spearman"] for dim in dims]
            style = "-o" if row["source"] == "measured" else "--s"
            axes.plot(dims, values, style, label=f"{row['name']} ({row['source']})")
        ticks = sorted({int(dim) for row in rows for dim in row["dims"]})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, map(str, ticks))
        axes.set(xlabel="embedding dimension", ylabel=y_label)
        axes.legend(fontsize=9)
        save(figure, "spearman_by_dimension.png")
    if rows := [row for row in results if row["source"] == "measured"]:
        figure, panels = plt.subplots(1, 2, figsize=(10, 4.5), sharey=True)
        several_devices = len({row["device"] for row in rows}) > 1
        for row, marker in zip(rows, itertools.cycle("osD^vP*X<>"), strict=False):
            spearman = 100 * row["scores"]["cosine_spearman"]
            error = np.abs(100 * np.array(row["intervals"]["cosine_spearman"]) - spearman)
            name = f"{row['name']} {row['embedding_precision']}".removesuffix(" float32")
            name += f" ({row['device']})" * several_devices
            speed, megabytes = row["sentences_per_second"], row["model"]["size_bytes"] / 1e6
            for panel, x in zip(panels, (speed, megabytes), strict=True):
                panel.errorbar(x, spearman, error[:, None], fmt=marker, capsize=3, label=name)
        panels[0].set(xlabel="sentences a second", ylabel=y_label)
        panels[1].set(xlabel="size of the weights (MB)")
        for panel in panels:  # from 0, and whole markers at the other end
            panel.set_xlim(0, 1.05 * panel.dataLim.xmax)
        where = {"loc": "lower center", "bbox_to_anchor": (0.5, 0.92)}
        figure.legend(*panels[0].get_legend_handles_labels(), ncols=3, fontsize=9, **where)
        save(figure, "speed_and_size.png")
