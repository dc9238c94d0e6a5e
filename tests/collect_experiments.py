"""Keeps the log of experiments: run folders in, results/experiments.md out.

    python tests/collect_experiments.py output/sts-777 output/sts-778

Each run folder, finished or not, gives a JSON in results/experiments/ that is named by the folder
(its run.json and scores.json in short); the table is written from all of them, the oldest first.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.append(str(REPOSITORY))

from data_util import UserError, command_line  # noqa: E402
from training_util import write_json  # noqa: E402

LEFT_OUT = ("--run_dir", "--output_dir", "--data_dir", "--save_steps", "--resume")
COLUMNS = ("Date", "Commit", "Run", "Command", "Seed", "Threads", "Steps", "CPU s")
COLUMNS += ("Dev by evaluation", "Chosen", "Dev", "Test")
HEAD = f"""# Experiments

KorSTS cosine Spearman x100. Dev is the score that the weights were chosen by, test is empty where
a run was made with `--no_test`. CPU seconds are those of training alone, evaluations and start-up
left out, on a machine that may have had other work; one thread needs fewer of them than two.
`python tests/collect_experiments.py RUN_FOLDER ...` adds rows and writes this file.

| {" | ".join(COLUMNS)} |
|---|---|---|---|---:|---:|---:|---:|---|---|---:|---:|
"""


def short_command(command: str) -> str:
    """Returns the command without folders that differ between machines and --seed."""
    parts, kept = iter(shlex.split(command)), []
    for part in parts:
        if part in (*LEFT_OUT, "--seed"):
            if part != "--resume":
                next(parts)
        else:
            kept.append(Path(part).name if "/" in part else part)
    return shlex.join(kept)


def read_run(folder: Path) -> dict:
    """Returns what the log keeps of a run folder; scores are null where it was not finished."""
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    row = {
        "run": folder.resolve().name,
        "command": short_command(run["command"]),
        "seed": run["options"]["seed"],
        "git_commit": run["git_commit"],
        "started": run["started"],
        "finished": run["finished"],
        "data": run["data"],
        "versions": run["versions"],
    }
    figures = ("threads", "steps", "training_cpu_seconds", "peak_memory_mb")
    row |= {key: run.get(key) for key in figures}
    path = folder / "scores.json"
    scores = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return row | {
        "before_training": (scores.get("before_training") or {}).get("cosine_spearman"),
        "evaluations": {e["step"]: e["cosine_spearman"] for e in scores.get("evaluations", [])},
        "chosen": scores.get("chosen"),
        "dev": scores.get("dev", {}).get("cosine_spearman"),
        "test": scores.get("test"),
    }


def table_row(row: dict) -> str:
    def number(value: float | None, digits: int = 2, factor: float = 100) -> str:
        return "" if value is None else f"{factor * value:,.{digits}f}"

    cells = [
        row["started"][:10],
        (row["git_commit"] or "")[:7],
        row["run"],
        f"`{row['command']}`",
        str(row["seed"]),
        str(row["threads"]),
        number(row["steps"], 0, 1),
        number(row["training_cpu_seconds"], 0, 1) if row["finished"] else "not finished",
        " ".join(map(number, [row["before_training"], *row["evaluations"].values()])),
        row["chosen"] or "",
        number(row["dev"]),
        number((row["test"] or {}).get("cosine_spearman")),
    ]
    return f"| {' | '.join(cells)} |\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", type=Path, help="run folders")
    parser.add_argument("--results_dir", type=Path, default=REPOSITORY / "results")
    args = parser.parse_args()
    folder = args.results_dir / "experiments"
    for run in args.runs:
        if not (run / "run.json").is_file():
            raise UserError(f"{run}: no run.json: not a run folder")
    folder.mkdir(parents=True, exist_ok=True)
    for run in args.runs:
        row = read_run(run)
        write_json(folder / f"{row['run']}.json", row)
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    rows.sort(key=lambda row: (row["started"], row["run"]))
    text = HEAD + "".join(map(table_row, rows))
    (args.results_dir / "experiments.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    with command_line():
        main()
