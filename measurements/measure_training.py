"""Measures a training step of training_sts.py against `fit` of sentence-transformers 2.7.

    python measurements/measure_training.py --old_python OLD/bin/python --model models/e5-small-ko \
        --data_dir KorNLUDatasets

OLD is an environment with sentence-transformers 2.7 and transformers 4. Both sides train on
KorSTS-train in batches of 8 and of 32, in turn, each in a process of its own. CPU seconds and wall
time are those of training alone (ours also writes its checkpoint), memory is the process's peak
(ours also scores 100 pairs of KorSTS-dev twice). Before that both take the same 20 batches without
dropout: the losses must agree. Beside them, what bounds a step: ours without dropout, and its
matrix products alone, forward and backward, in float32. Medians go to training.json beside this
script. Give it a machine with nothing else to do.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.append(str(REPOSITORY))

from common.command_line import UserError, command_line, write_json  # noqa: E402

STEPS = {8: 90, 32: 24}  # as many sentences' work a lap, about
FIGURES = ("cpu_seconds_per_step", "wall_seconds_per_step", "peak_memory_mb")


def read_pairs(train_file: Path) -> list[tuple[str, str, float]]:
    """Returns (sentence1, sentence2, score from 0 to 1) of a KorSTS file."""
    with open(train_file, encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [(row["sentence1"], row["sentence2"], float(row["score"]) / 5) for row in rows]


def fit_old(
    model_name: str, train_file: Path, batch_size: int, steps: int, ordered: bool
) -> dict[str, Any]:
    """The original's training_sts.py in short."""
    from sentence_transformers import InputExample, SentenceTransformer, losses
    from torch.utils.data import DataLoader

    model = SentenceTransformer(model_name)
    model.max_seq_length = 128
    pairs = [InputExample(texts=[a, b], label=score) for a, b, score in read_pairs(train_file)]
    loader = DataLoader(pairs, batch_size=batch_size, shuffle=not ordered)
    loss = losses.CosineSimilarityLoss(model)
    seen = []
    loss.register_forward_hook(lambda *call: seen.append(call[-1].item()))
    wall, cpu = time.perf_counter(), time.process_time()
    model.fit(
        [(loader, loss)],
        epochs=1,
        steps_per_epoch=steps,
        warmup_steps=-(-steps // 10),
        show_progress_bar=False,
    )
    return {
        "cpu_seconds_per_step": (time.process_time() - cpu) / steps,
        "wall_seconds_per_step": (time.perf_counter() - wall) / steps,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "losses": seen,
    }


def losses_new(model_name: str, train_file: Path, batch_size: int, steps: int) -> list[float]:
    """The losses of training_sts.py when its batches are those of the file, in order."""
    import runpy

    from sentence_transformers.sentence_transformer import losses

    from common import batches

    seen = []
    compute = losses.CosineSimilarityLoss.compute_loss_from_embeddings

    def recorded(self: Any, *inputs: Any, **options: Any) -> Any:
        loss = compute(self, *inputs, **options)
        seen.append(loss.item())
        return loss

    def in_order(rows: int, batch_size: int, *_: int) -> Iterator[list[int]]:
        for start in range(0, rows, batch_size):
            yield list(range(start, start + batch_size))

    losses.CosineSimilarityLoss.compute_loss_from_embeddings = recorded
    batches.shuffled_batches = in_order
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = train_command(model_name, train_file, batch_size, steps, Path(folder) / "run")
        runpy.run_path(sys.argv[0], run_name="__main__")
    return seen


def train_command(
    model_name: str, train_file: Path, batch_size: int, steps: int, folder: Path
) -> list[str]:
    """Returns training_sts.py and its options."""
    options = {
        "model_name_or_path": model_name,
        "data_dir": train_file.parent.parent,
        "dev_file": few_pairs(train_file.with_name("sts-dev.tsv"), folder.parent),
        "batch_size": batch_size,
        "max_steps": steps,
        "run_dir": folder,
    }
    pairs = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return [str(REPOSITORY / "training_sts.py"), *pairs, "--no_test"]


def few_pairs(file: Path, folder: Path) -> Path:
    """Copies the first 100 pairs of a KorSTS file: dev scores are no part of a step."""
    with open(file, encoding="utf-8") as lines:
        text = "".join(itertools.islice(lines, 101))
    (folder / file.name).write_text(text, encoding="utf-8")
    return folder / file.name


def fit_new(model_name: str, train_file: Path, batch_size: int, steps: int) -> dict[str, Any]:
    """The command as a user gives it."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        command = train_command(model_name, train_file, batch_size, steps, run_dir)
        subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL, check=True)
        run = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
    training, start = run["parts"]["training"], run["parts"]["start"]
    return {
        "cpu_seconds_per_step": training["cpu_seconds"] / steps,
        "wall_seconds_per_step": training["wall_seconds"] / steps,
        "peak_memory_mb": training["peak_memory_mb"],
        "startup_seconds": start["wall_seconds"],
    }


def matrix_products(
    model_name: str, train_file: Path, batch_size: int, steps: int
) -> dict[str, Any]:
    """The matrix products of the steps' tokens and nothing else: no padding, no rows of sentences.

    Each product of the forward has two of the same size in the backward.
    """
    import torch
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_name)
    # Of the whole file, as the steps draw from it: its first pairs are short ones.
    pairs = read_pairs(train_file)
    texts = [text for pair in pairs for text in pair[:2]]
    tokens = batch_size * sum(map(len, tokenizer(texts)["input_ids"])) // len(pairs)
    config = AutoConfig.from_pretrained(model_name)
    width, inner = config.hidden_size, config.intermediate_size
    length = tokens // (2 * batch_size)  # of a sentence, for attention
    heads = 2 * batch_size * config.num_attention_heads
    operands = [(torch.randn(tokens, width), torch.randn(width, width))] * 4
    operands += [(torch.randn(tokens, width), torch.randn(width, inner))]
    operands += [(torch.randn(tokens, inner), torch.randn(inner, width))]
    query = torch.randn(heads, length, width // config.num_attention_heads)
    operands += [(query, query.mT), (torch.randn(heads, length, length), query)]
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps * config.num_hidden_layers):
        for x, weight in operands:
            gradient = x @ weight
            gradient @ weight.mT
            x.mT @ gradient
    return {
        "cpu_seconds_per_step": (time.process_time() - cpu) / steps,
        "wall_seconds_per_step": (time.perf_counter() - wall) / steps,
    }


def child(python: str, way: str, *arguments: object) -> dict[str, Any]:
    """Returns what one way found, in a process of its own."""
    command = [python, __file__, "--child", way, *map(str, arguments)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def without_dropout(model: str, folder: str) -> str:
    """Copies an encoder and takes its dropout away; returns the copy's folder."""
    copy = shutil.copytree(model, Path(folder) / "encoder")
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(copy)


def main() -> None:
    """Runs what the command line asks for."""
    if sys.argv[1:2] == ["--child"]:
        way, model, train_file, batch_size, steps = sys.argv[2:]
        work = (model, Path(train_file), int(batch_size), int(steps))
        if way == "losses":
            result = {"losses": losses_new(*work)}
        elif way == "products":
            result = matrix_products(*work)
        else:
            result = fit_old(*work, ordered=way == "old_ordered")
        print(json.dumps(result))
        return
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--old_python", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data_dir", type=Path, default=REPOSITORY / "KorNLUDatasets")
    parser.add_argument("--repeats", type=int, default=3)
    output = Path(__file__).with_name("training.json")
    parser.add_argument("--output", type=Path, default=output, help="default: beside this script")
    args = parser.parse_args()
    train_file = args.data_dir / "KorSTS" / "sts-train.tsv"
    for path in (train_file, Path(args.model) / "config.json"):
        if not path.is_file():
            raise UserError(f"{path}: no such file")
    with tempfile.TemporaryDirectory() as folder:
        steady = without_dropout(args.model, folder)
        old = child(args.old_python, "old_ordered", steady, train_file, 8, 20)["losses"]
        new = child(sys.executable, "losses", steady, train_file, 8, 20)["losses"]
        difference = max(abs(a - b) for a, b in zip(old, new, strict=True))
        print(f"20 losses without dropout differ by at most {difference:.1e}", file=sys.stderr)
        rounds: dict[str, list[dict[str, Any]]] = {}
        for _ in range(args.repeats):
            for batch_size, steps in STEPS.items():
                lap = child(args.old_python, "old", args.model, train_file, batch_size, steps)
                del lap["losses"]
                rounds.setdefault(f"old, batch {batch_size}", []).append(lap)
                print("old", batch_size, lap, file=sys.stderr)
                lap = fit_new(args.model, train_file, batch_size, steps)
                rounds.setdefault(f"new, batch {batch_size}", []).append(lap)
                print("new", batch_size, lap, file=sys.stderr)
                lap = fit_new(steady, train_file, batch_size, steps)
                rounds.setdefault(f"new without dropout, batch {batch_size}", []).append(lap)
                lap = child(sys.executable, "products", args.model, train_file, batch_size, steps)
                rounds.setdefault(f"matrix products, batch {batch_size}", []).append(lap)
                print("products", batch_size, lap, file=sys.stderr)
    from common.machine import device_name, instruction_sets  # of today's torch: not in OLD

    medians = {
        name: {key: statistics.median(lap[key] for lap in laps) for key in laps[0]}
        for name, laps in rounds.items()
    }
    report = {
        "model": Path(args.model).name,
        "machine": device_name("cpu"),
        "instruction_sets": instruction_sets(),
        "data": train_file.name,
        "repeats": args.repeats,
        "steps": STEPS,
        "largest_difference_of_20_losses": difference,
        "ratios": {
            f"batch {size}": {
                key: medians[f"new, batch {size}"][key] / medians[f"old, batch {size}"][key]
                for key in FIGURES
            }
            for size in STEPS
        },
        "medians": medians,
        "rounds": rounds,
    }
    write_json(args.output, report)
    print(json.dumps({key: report[key] for key in ("ratios", "medians")}, indent=2))


if __name__ == "__main__":
    with command_line():
        main()
