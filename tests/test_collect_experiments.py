"""The log of experiments: what it keeps of a run folder, and what it says of another folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent / "collect_experiments.py"


def collect(results_dir: Path, *folders: Path) -> subprocess.CompletedProcess:
    line = [sys.executable, SCRIPT, *folders, "--results_dir", results_dir]
    return subprocess.run(list(map(str, line)), capture_output=True, text=True)


def test_rows_come_from_run_folders_finished_or_not(tmp_path: Path) -> None:
    for name, finished in (("done", "2026-01-02T00:00:00+00:00"), ("dead", None)):
        run = {
            "command": "python training_sts.py --data_dir /home/a/b --seed 1 --run_dir x --no_test",
            "options": {"seed": 1},
            "git_commit": "0123456789",
            "started": "2026-01-01T00:00:00+00:00",
            "finished": finished,
            "data": [],
            "versions": {},
            "threads": 2,
        }
        (tmp_path / name).mkdir()
        if finished:
            run |= {"steps": 1234, "training_cpu_seconds": 56.7}
            scores = {
                "before_training": {"cosine_spearman": 0.5},
                "evaluations": [{"step": 10, "cosine_spearman": 0.625}],
                "chosen": "step 10",
                "dev": {"cosine_spearman": 0.625},
                "test": {"cosine_spearman": 0.75},
            }
            (tmp_path / name / "scores.json").write_text(json.dumps(scores))
        (tmp_path / name / "run.json").write_text(json.dumps(run))
    assert collect(tmp_path / "results", tmp_path / "done", tmp_path / "dead").returncode == 0
    rows = (tmp_path / "results/experiments.md").read_text(encoding="utf-8").splitlines()[-2:]
    start = "| 2026-01-01 | 0123456 |"
    command = "`python training_sts.py --no_test` | 1 | 2 |"
    assert rows == [
        f"{start} dead | {command}  | not finished |  |  |  |  |",
        f"{start} done | {command} 1,234 | 57 | 50.00 62.50 | step 10 | 62.50 | 75.00 |",
    ]


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    done = collect(tmp_path / "results", tmp_path)
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path}: no run.json: not a run folder\n"
    assert not (tmp_path / "results").exists()
