"""Measures whole runs: v2 in one epoch against the original's own script.

    python measurements/measure_whole_run.py --old_python OLD/bin/python \
        --model models/e5-small-ko --data_dir KorNLUDatasets

OLD is an environment with sentence-transformers 2.7 and transformers 4. Counted is everything from
the start of the process to its end: imports, dev scores, checkpoints, means, test. The original
trains --old_steps steps and takes one dev score; its five epochs are 3,595 such steps and five
dev scores, and their cost is reckoned from these. Ours runs to its end, once a seed. Dev scores by
epoch and the test score of the original come from results/experiments/original-2.7-777.json.
Everything goes to whole_run.json beside this script. Give it a machine with nothing else to do.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.append(str(REPOSITORY))

from common.command_line import (  # noqa: E402
    UserError,
    command_line,
    read_json,
    stored_command,
    write_json,
)

EPOCHS = 5  # the original's
PARTS_OF_THE_ORIGINAL = ("training", "dev score", "saving and test")
# train.sh's e5-small-ko-v2-epoch, but for its precision.
EPOCH_OF_V2 = [
    "--loss", "pearson", "--batch_size", "32", "--learning_rate", "5e-5", "--attention_dropout",
    "0", "--hidden_dropout", "0", "--prompt", "query: ", "--num_epochs", "1", "--start_weight",
    "0.25",
]  # fmt: skip


def fit_old(model_name: str, data_dir: Path, steps: int) -> dict[str, Any]:
    """The original's training_sts.py in short; returns what each part cost."""
    import torch
    from measure_training import read_pairs
    from sentence_transformers import InputExample, SentenceTransformer, losses
    from sentence_transformers.evaluation import EmbeddingSimilarityEvaluator
    from torch.utils.data import DataLoader

    def examples(name: str) -> list[InputExample]:
        pairs = read_pairs(data_dir / f"KorSTS/sts-{name}.tsv")
        return [InputExample(texts=[first, second], label=score) for first, second, score in pairs]

    def clock() -> tuple[float, float]:
        return time.time(), time.process_time()

    torch.manual_seed(777)
    model = SentenceTransformer(model_name)
    model.max_seq_length = 128
    loader = DataLoader(examples("train"), shuffle=True, batch_size=8)
    dev = EmbeddingSimilarityEvaluator.from_input_examples(examples("dev"), name="sts-dev")
    laps = []

    class Timed:
        """The evaluator, with the times at which it begins and ends."""

        def __call__(self, *args: Any, **options: Any) -> float:
            start = clock()
            score = dev(*args, **options)
            laps.append((start, clock()))
            return score

    with tempfile.TemporaryDirectory() as folder:
        begin = clock()
        model.fit(
            [(loader, losses.CosineSimilarityLoss(model))],
            evaluator=Timed(),
            epochs=1,
            steps_per_epoch=steps,
            evaluation_steps=1000,
            warmup_steps=-(-steps // 10),
            output_path=folder,
            show_progress_bar=False,
        )
        model = SentenceTransformer(folder)
        test = EmbeddingSimilarityEvaluator.from_input_examples(examples("test"), name="sts-test")
        test(model)
    after = clock()
    ((dev_begin, dev_end),) = laps

    def cost(since: tuple[float, float], until: tuple[float, float]) -> dict[str, float]:
        return {"wall_seconds": until[0] - since[0], "cpu_seconds": until[1] - since[1]}

    return {
        "steps": steps,
        "steps_an_epoch": len(loader),
        "start_cpu_seconds": begin[1],
        "training": cost(begin, dev_begin),
        "dev score": cost(dev_begin, dev_end),
        "saving and test": cost(dev_end, after),
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def original(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Runs the original; returns its row for `runs`, and what was measured."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [args.old_python, __file__, "--old_report", report, "--model", args.model]
        command += ["--data_dir", args.data_dir, "--old_steps", args.old_steps]
        start = time.time()
        subprocess.run(list(map(str, command)), stdout=subprocess.DEVNULL, check=True)
        wall = time.time() - start
        measured = json.loads(report.read_text(encoding="utf-8"))
    rest = sum(measured[part]["wall_seconds"] for part in PARTS_OF_THE_ORIGINAL)
    measured["start_wall_seconds"] = wall - rest  # imports, data, model
    epochs = {}
    for kind in ("wall_seconds", "cpu_seconds"):
        step = measured["training"][kind] / measured["steps"]
        epochs[kind] = measured["steps_an_epoch"] * step + measured["dev score"][kind]
    whole = {
        kind: measured[f"start_{kind}"] + EPOCHS * epochs[kind] + measured["saving and test"][kind]
        for kind in epochs
    }
    known = read_json(REPOSITORY / "results/experiments/original-2.7-777.json")
    scores = [100 * score for score in known["evaluations"].values()]
    row = {
        "name": "original",
        "seed": known["seed"],
        "points": [
            {
                "cpu_seconds": measured["start_cpu_seconds"] + (index + 1) * epochs["cpu_seconds"],
                "dev_cosine_spearman_x100": score,
            }
            for index, score in enumerate(scores)
        ],
        "whole_wall_seconds": whole["wall_seconds"],
        "whole_cpu_seconds": whole["cpu_seconds"],
        "peak_memory_mb": measured["peak_memory_mb"],
        "dev": max(scores),
        "test": 100 * known["test"]["cosine_spearman"],
    }
    return row, measured


def epoch_of_v2(args: argparse.Namespace, precision: str, seed: int) -> dict[str, Any]:
    """Runs v2 for one epoch; returns its row for `runs`, with the cost of its parts."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        command = [
            sys.executable,
            REPOSITORY / "training_sts.py",
            "--run_dir",
            run_dir,
            *EPOCH_OF_V2,
        ]
        command += ["--model_name_or_path", args.model, "--data_dir", args.data_dir]
        command += ["--precision", precision, "--seed", seed]
        subprocess.run(list(map(str, command)), stdout=subprocess.DEVNULL, check=True)
        run, scores = (
            json.loads((run_dir / name).read_text(encoding="utf-8"))
            for name in ("run.json", "scores.json")
        )
    parts, whole = run["parts"], run["whole"]
    trained = sum(parts[part]["cpu_seconds"] for part in ("start", "training", "dev scores"))
    dev = [scores["before_training"], *scores["evaluations"]]
    half = parts["dev scores"]["cpu_seconds"] / len(dev)
    times = [parts["start"]["cpu_seconds"] + half, trained]
    return {
        "name": f"v2 one epoch, {precision}",
        "seed": seed,
        "points": [
            {
                "cpu_seconds": seconds,
                "dev_cosine_spearman_x100": 100 * score["cosine_spearman"],
            }
            for seconds, score in zip(times, dev, strict=True)
        ],
        "whole_wall_seconds": whole["wall_seconds"],
        "whole_cpu_seconds": whole["cpu_seconds"],
        "peak_memory_mb": whole["peak_memory_mb"],
        "dev": 100 * scores["dev"]["cosine_spearman"],
        "test": 100 * scores["test"]["cosine_spearman"],
        "chosen": scores["chosen"],
        "parts": parts,
    }


def measure(args: argparse.Namespace) -> None:
    """Runs both sides and writes whole_run.json."""
    import statistics

    import torch

    from common.machine import device_name

    runs = []
    for number, seed in enumerate(args.seeds):
        for precision in args.precisions:
            runs.append(epoch_of_v2(args, precision, seed))
            print(json.dumps(runs[-1]), file=sys.stderr)
        if number == 0:
            row, measured = original(args)
            print(json.dumps(measured), file=sys.stderr)
    ratios = {}
    for precision in args.precisions:
        mine = [run for run in runs if run["name"].endswith(precision)]
        for key in ("whole_cpu_seconds", "whole_wall_seconds"):
            median = statistics.median(run[key] for run in mine)
            ratios[f"v2 one epoch, {precision}: {key}"] = median / row[key]
    report = {
        "date": datetime.date.today().isoformat(),
        "command": stored_command(),
        "machine": device_name("cpu"),
        "system": platform.platform(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "ratios_to_the_original": ratios,
        "original_measured": measured,
        "runs": [row, *runs],
    }
    write_json(REPOSITORY / "measurements/whole_run.json", report)
    print(json.dumps(ratios, indent=2))


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--old_python", help="the interpreter of an environment with sentence-transformers 2.7")
    add("--model", required=True)
    add("--data_dir", type=Path, required=True)
    add("--old_steps", type=int, default=180, help="measured of the original's 3,595")
    add("--seeds", type=int, nargs="+", default=[777, 778, 779])
    add("--precisions", nargs="+", default=["fp32"], choices=("fp32", "bf16"))
    add("--old_report", type=Path, help=argparse.SUPPRESS)  # in OLD's own process
    args = parser.parse_args()
    if args.old_report:
        report = fit_old(args.model, args.data_dir, args.old_steps)
        args.old_report.write_text(json.dumps(report), encoding="utf-8")
    elif not args.old_python:
        raise UserError("--old_python is needed")
    else:
        measure(args)


if __name__ == "__main__":
    with command_line():
        main()
