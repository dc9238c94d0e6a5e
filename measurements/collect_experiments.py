"""Keeps the log of training runs: run folders in, results/experiments/NAME.json out.

    python measurements/collect_experiments.py --group v2 output/v2-777 output/v2-778
    python benchmark.py --update_readme

Each run folder, finished or not, gives a JSON that is named by the folder: its run.json and
scores.json in short (common/experiment_log.py says what is in it). The second command writes the
tables from all of them.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.append(str(REPOSITORY))

from common.command_line import UserError, command_line, form_of, read_json, write_json  # noqa: E402
from common.experiment_log import FIGURES, GROUPS, read_rows, without_repeats  # noqa: E402

# Where a run's files lie says nothing about it.
PLACES = ("run_dir", "output_dir", "output_prefix", "data_dir", "resume", "push_to_hub")
LEFT_OUT = (*(f"--{name}" for name in PLACES), "--seed")


def without_folders(value: Any) -> Any:
    """Returns an option's value with paths of this machine cut to their last part."""
    if isinstance(value, list):
        return [without_folders(each) for each in value]
    is_path = isinstance(value, str) and value.startswith(("/", ".", "~"))
    return Path(value).expanduser().resolve().name if is_path else value


def short_command(command: str) -> str:
    """Returns the command as it took effect, without --seed and folders of one machine."""
    return shlex.join(without_repeats(map(without_folders, shlex.split(command)), LEFT_OUT))


def read_run(folder: Path, group: str) -> dict[str, Any]:
    """Returns the log's row of a run folder: null is what the folder does not say.

    Raises:
        UserError: run.json or scores.json is not a run's.
    """
    path = folder / "scores.json"
    with form_of(folder, "run.json or scores.json is not that of a run"):
        run, scores = read_json(folder / "run.json"), read_json(path) if path.is_file() else {}
        options = run["options"]
        row = {
            "run": folder.resolve().name,
            "group": group,
            "source": "measured",
            "read_from": {},
            "command": short_command(run["command"]),
            "options": {
                name: without_folders(value)
                for name, value in options.items()
                if name not in (*PLACES, "seed")
            },
            "seed": options["seed"],
            "save_steps": options.get("save_steps"),
        }
        names = ("git_commit", "started", "finished", "data", "versions")
        row |= {key: run[key] for key in names}
        row |= {key: run.get(key) for key in FIGURES} | _costs(run)
        evaluations, tried = scores.get("evaluations", []), scores.get("tried")
        return row | {
            "before_training": _cosine_spearman(scores.get("before_training")),
            "evaluations": {each["step"]: _cosine_spearman(each) for each in evaluations},
            "tried": tried and {name: _cosine_spearman(each) for name, each in tried.items()},
            "chosen": scores.get("chosen"),
            "dev": _cosine_spearman(scores.get("dev")),
            "test": scores.get("test"),
        }


def _costs(run: dict[str, Any]) -> dict[str, Any]:
    """Returns the log's figures of what the run cost; {} for runs that say it in these already."""
    if "parts" not in run:
        return {}
    parts, whole = run["parts"], run["whole"]
    costs = {
        f"{name}_{key}": parts[part][key]
        for name, part in (("training", "training"), ("evaluation", "dev scores"))
        for key in ("wall_seconds", "cpu_seconds")
    }
    return costs | {
        "startup_seconds": parts["start"]["wall_seconds"],
        "total_wall_seconds": whole["wall_seconds"],
        "peak_memory_mb": whole["peak_memory_mb"],
    }


def _cosine_spearman(scores: dict[str, float] | None) -> float | None:
    return scores["cosine_spearman"] if scores else None


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN_FOLDER")
    group_help = "the question that the runs belong to; default: as before, else other"
    add("--group", choices=GROUPS, help=group_help)
    add("--results_dir", type=Path, default=REPOSITORY / "results", help="default: results/ here")
    args = parser.parse_args()
    for folder in args.runs:
        if not (folder / "run.json").is_file():
            raise UserError(f"{folder}: no run.json: not a run folder")
    names = [folder.resolve().name for folder in args.runs]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two runs are named {name}: one would replace the other in the log")
    known = read_rows(args.results_dir)
    rows = []
    for folder in args.runs:
        before = known.get(folder.resolve().name)
        rows.append(read_run(folder, args.group or (before["group"] if before else "other")))
        if before and before["started"] != rows[-1]["started"]:
            name = rows[-1]["run"]
            raise UserError(f"{folder}: the log has another run named {name}: rename the folder")
    for row in rows:
        path = args.results_dir / "experiments" / f"{row['run']}.json"
        write_json(path, row)
        print(path)


if __name__ == "__main__":
    with command_line():
        main()
