"""What whole runs cost: their file, the tables, the picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import run_script

from common import plots, whole_runs
from common.command_line import REPOSITORY, UserError
from common.experiment_log import read_comparisons
from common.results import NOT_MEASURED, read_results

V2 = read_comparisons(REPOSITORY / "measurements/v2.txt")


def run(name: str, seed: int, cpu: float, dev: float, **changes: object) -> dict:
    points = [(0.1 * cpu, 79.5), (0.5 * cpu, dev - 0.25), (0.9 * cpu, dev)]
    return {
        "name": name,
        "seed": seed,
        "points": [{"cpu_seconds": a, "dev_cosine_spearman_x100": b} for a, b in points],
        "whole_wall_seconds": cpu / 2,
        "whole_cpu_seconds": cpu,
        "dev": dev,
        "test": dev - 4,
    } | changes


def write(folder: Path, *runs: dict) -> Path:
    path = folder / "whole_run.json"
    path.write_text(json.dumps({"runs": runs}), encoding="utf-8")
    return path


@pytest.fixture
def report(tmp_path: Path) -> Path:
    return write(
        tmp_path,
        run("v2 short, fp32", 778, 600, 86.02),
        run("v2 short, fp32", 777, 500, 86.01),
        run("v2 short, fp32", 779, 400, 86.03),
        run("original", 777, 2500, 85.35, test=None, peak_memory_mb=1500),
    )


def test_the_cost_of_recipes_stands_beside_the_originals(report: Path) -> None:
    part = whole_runs.cost_part(whole_runs.read_whole_runs(report))
    assert part.splitlines()[2:] == [
        "| 원본 스크립트 | 777 | 85.35 |  | 2,500 | 1,250 | 1,500 |",
        "| 짧은 v2, fp32 | 777, 778, 779 | 86.01, 86.02, 86.03 | 82.01, 82.02, 82.03 "
        "| 500 (0.20x) | 250 |  |",
    ]


def test_no_memory_no_column(tmp_path: Path) -> None:
    runs = whole_runs.read_whole_runs(write(tmp_path, run("v2 short, bf16", 777, 300, 86.01)))
    assert "메모리" not in whole_runs.cost_part(runs)
    assert whole_runs.cost_part(runs).endswith("| 300 | 150 |")  # no original to compare with


def test_the_first_table_has_published_rows_and_what_was_measured(report: Path) -> None:
    rows, runs = read_results(REPOSITORY / "results"), whole_runs.read_whole_runs(report)
    lines = whole_runs.first_part(rows, V2, runs).splitlines()[2:]
    assert [line.rsplit(" | ", 1)[1] for line in lines] == [
        "85.60 |", "81.82 |", "80.97 [78.78, 82.92] |", "82.02 [79.93, 83.88] |", "82.02 |",
    ]  # fmt: skip
    assert lines[-1].startswith("| 짧은 v2, fp32 (시드 3개 평균) |")
    one = [run for run in runs if run["seed"] == 777]
    assert "| 짧은 v2, fp32 (시드 하나) |" in whole_runs.first_part(rows, V2, one)
    renamed = [run | {"name": run["name"].replace("v2 short", "v2 one epoch")} for run in one]
    assert "| v2 한 에포크, fp32 (시드 하나) |" in whole_runs.first_part(rows, V2, renamed)


def test_nothing_is_shown_of_what_was_not_measured(tmp_path: Path) -> None:
    parts = whole_runs.generated_parts(tmp_path / "whole_run.json", [], [])
    assert "\n\nGPU에서 측정하지 않음: STS(fp32, tf32, bf16), " in parts.pop("size")
    not_measured = dict.fromkeys(("first", "cost", "int8"), NOT_MEASURED)
    assert parts == not_measured | {"cost-picture": ""}
    assert plots.score_by_cost([]) is None
    plots.draw_plots([], tmp_path, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_picture_is_drawn_and_shown(report: Path, tmp_path: Path) -> None:
    runs = whole_runs.read_whole_runs(report)
    assert f'src="results/{whole_runs.PICTURE}"' in whole_runs.picture_part(runs)
    axes = plots.score_by_cost(runs).axes[0]
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["original (one seed)", "v2 short, fp32 (3 seeds)"]
    ends = [line.get_xydata()[-1].tolist() for line in axes.lines if line.get_marker() == "*"]
    assert ends == [[2500, 85.35], [500, 86.01], [600, 86.02], [400, 86.03]]
    results_dir = tmp_path / "results"
    results_dir.mkdir()
    plots.draw_plots([], results_dir, tmp_path)
    assert [path.name for path in results_dir.iterdir()] == [whole_runs.PICTURE]
    assert (results_dir / whole_runs.PICTURE).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "changes",
    [
        {"dev": 0.86},  # not x100
        {"test": 0.82},
        {"dev": None},
        {"points": []},
        {"whole_cpu_seconds": 100.0},  # less than at the last point
        {"points": [{"cpu_seconds": 1.0}]},
    ],
)
def test_a_file_that_is_no_report_is_named(tmp_path: Path, changes: dict) -> None:
    path = write(tmp_path, run("original", 777, 2500, 85.35) | changes)
    with pytest.raises(UserError, match=r"whole_run\.json: no report of whole runs"):
        whole_runs.read_whole_runs(path)


def test_what_int8_loses_is_shown_with_its_interval(tmp_path: Path) -> None:
    path = tmp_path / "int8.json"
    assert whole_runs.int8_part(path) == NOT_MEASURED
    scores = {"fp32": 82.0, "int8": 81.875, "lost": 0.125, "lost_interval": [-0.05, 0.3]}
    row = {"name": "v2", "size_ratio": 0.2675, "float32_layers": "", "dev": scores, "test": scores}
    path.write_text(json.dumps({"rows": [row, row | {"float32_layers": "/layer.1/Gemm"}]}))
    first, second = whole_runs.int8_part(path).splitlines()[2:]
    assert first == ("| v2 | 26.8% | - | 82.00 | 0.12 [-0.05, 0.30] | 82.00 | 0.12 [-0.05, 0.30] |")
    assert second == first.replace("| - |", "| /layer.1/Gemm |")


@pytest.mark.parametrize(
    ("options", "status", "line"),
    [([], 2, "--old_python is needed"),
     (["--old_python", "python"], 1, "exit status 2 of: ")],
)  # fmt: skip
def test_what_the_measurement_lacks_is_one_line(
    options: list[str], status: int, line: str, tmp_path: Path
) -> None:
    """Before anything runs; of a run that fails, which has said why, its command."""
    options += ["--model", str(tmp_path), "--data_dir", str(tmp_path)]
    done = run_script("measurements/measure_whole_run.py", *options)
    assert done.returncode == status
    assert done.stderr.startswith(f"error: {line}") and len(done.stderr.splitlines()) == 1
