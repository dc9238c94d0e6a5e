"""Measures the recipes at the size that users train: klue/roberta-base's shape, KorNLI's rows.

    python measurements/size.py --data_dir KorNLUDatasets
    python measurements/size.py --data_dir KorNLUDatasets --dev_pairs 200    # on a CPU
    python measurements/size.py --data_dir KorNLUDatasets --whole_v2         # on a GPU

Needs no Hub: the encoder's weights are random, KorNLI's files generated (size_data.py). No score is
kept: those of such a model say nothing.

Each recipe's script runs in a process of its own, with its own options and its whole plan, and is
stopped behind --steps steps. Kept are the start (from the process's to the first step's, without
the dev score between), steps a second, a dev score, a checkpoint, memory; the hours of the whole
recipe are reckoned from these, without the test score. The first tenth of the steps, on a GPU the
first third (kernels and graphs are set up), counts once and not for each step. On a GPU in fp32,
bf16 and tf32 (no option of the scripts: here it is torch.set_float32_matmul_precision("high"), in
dev scores too), and beside STS and NLI sentence-transformers' own trainer, which pads column by
column.

--whole_v2 trains ko-sroberta-v2 to its end, then its STS stage again, killed in its middle and
resumed: both must end with the same weights. Everything goes to size.json beside this script, where
a CPU's and a GPU's figures stand side by side. Give it a machine with nothing else to do and 6 GB
of disk.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import itertools
import math
import os
import platform
import runpy
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.sentence_transformer import losses, training_args
from transformers import TrainerCallback

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.append(str(REPOSITORY))

import size_data  # noqa: E402

from common import training  # noqa: E402
from common.checkpoints import MANIFEST, step_of  # noqa: E402
from common.command_line import (  # noqa: E402
    UserError,
    command_line,
    read_json,
    stored_command,
    write_json,
)
from common.data import NLI_TRAIN_FILES, read_korsts  # noqa: E402
from common.encoders import load_encoder  # noqa: E402
from common.formats import read_nli_triplets  # noqa: E402
from common.machine import device_name, process_cost  # noqa: E402
from common.run_folder import PACKAGES  # noqa: E402

# train.sh's ko-sroberta-v2, but for its precision.
NLI_OF_V2 = ["training_nli.py", "--attention_dropout", "0", "--no_test"]
STS_OF_V2 = [
    "training_sts.py", "--loss", "pearson", "--batch_size", "32", "--learning_rate", "5e-5",
    "--attention_dropout", "0", "--num_epochs", "3", "--save_steps", "30",
    "--average_checkpoints", "9", "--start_weight", "0.25",
]  # fmt: skip
RECIPES = {
    "sts": ["training_sts.py"],
    "nli": ["training_nli.py"],
    "multi-task": ["training_multi-task.py"],
    "v2 sts": STS_OF_V2,
}
LIBRARY = {"sts": 8, "nli": 64}  # batches; of several data sets all have one size there


# --- Runs ------------------------------------------------------------------------------------


def now() -> float:
    """Returns the time, once the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.time()


class Clock(TrainerCallback):
    """Times the steps of a trainer, without dev scores and checkpoints between them.

    Of ours it also notes what the whole recipe would do, and stops it with a dev score and a
    checkpoint behind the last of these steps.
    """

    def __init__(self, steps: int, trainer: Any = None) -> None:
        self.steps, self.trainer, self.found = steps, trainer, {}
        self.first = steps // (3 if torch.cuda.is_available() else 10)
        self.begin = self.end = self.evaluated = self.pauses = self.first_began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0 and self.trainer:
            begun = psutil.Process().create_time() + self.trainer.points.dev.wall_seconds
            self.found["start_seconds"] = time.time() - begun
        if state.global_step == 0:
            self.first_began = now()
        if state.global_step == self.first:
            self.begin = now()
            warm_up = self.begin - self.first_began - self.pauses
            self.found |= {"warm_up_steps": self.first, "warm_up_seconds": warm_up}
            self.pauses = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        is_last = state.global_step == self.steps
        if is_last and self.trainer:
            control.should_evaluate = control.should_save = control.should_training_stop = True
        if control.should_save or is_last:
            self.end = now()
        if is_last:
            seconds = self.end - self.begin - self.pauses
            self.found["steps_a_second"] = (self.steps - self.first) / seconds

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.evaluated = now()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.found["checkpoint_seconds"] = now() - max(self.end, self.evaluated)
        files = Path(args.output_dir, f"checkpoint-{state.global_step}").rglob("*")
        self.found["checkpoint_bytes"] = sum(path.stat().st_size for path in files)
        self.pauses += now() - self.end


def child(report: str, steps: str, script: str, *options: str) -> None:
    """Runs a training script as its own command does, with a `Clock` at its trainer."""
    recipe_trainer = training.recipe_trainer
    clock = Clock(int(steps))

    def with_clock(run: Any, *args: Any, evaluate_at: set[int], **kwargs: Any) -> Any:
        clock.trainer = recipe_trainer(run, *args, evaluate_at=evaluate_at, **kwargs)
        clock.trainer.add_callback(clock)
        means, mixed = run.args.average_checkpoints > 1, run.args.start_weight > 0
        whole = len(clock.trainer.batches)
        if clock.steps > whole:
            raise UserError(f"--steps {steps}: {script} has {whole:,} here")
        evaluations = {*evaluate_at, whole}
        saved = range(0, whole, run.args.save_steps or whole)[1:]
        clock.found["whole_recipe"] = {
            "steps": whole,
            "dev_scores": 1 + len(evaluations) + means + mixed * (1 + means),
            "checkpoints": len(evaluations.union(saved)),
        }
        return clock.trainer

    with (
        mock.patch.object(training, "recipe_trainer", with_clock),
        mock.patch.object(sys, "argv", [script, *options]),
    ):
        runpy.run_path(str(REPOSITORY / script), run_name="__main__")
    write_json(Path(report), clock.found)


def library(report: str, steps: str, recipe: str, folder: str, precision: str) -> None:
    """Trains with sentence-transformers alone: data, loss, batch size of the recipe, padded."""
    model = load_encoder(str(Path(folder, "encoder")), 128)
    if recipe == "sts":
        table, loss = read_korsts(Path(folder, "KorSTS/sts-train.tsv")), losses.CosineSimilarityLoss
    else:
        files = [Path(folder, name) for name in NLI_TRAIN_FILES]
        table, _ = read_nli_triplets(files, size_data.SEED)
        loss = losses.MultipleNegativesRankingLoss  # scale 20
    arguments = training_args.SentenceTransformerTrainingArguments(
        output_dir=str(Path(report).parent),
        max_steps=int(steps),
        per_device_train_batch_size=LIBRARY[recipe],
        batch_sampler="batch_sampler" if recipe == "sts" else "no_duplicates",
        bf16=precision == "bf16",
        save_strategy="no",
        report_to="none",
    )
    clock = Clock(int(steps))
    SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_pandas(table),
        loss=loss(model),
        callbacks=[clock],
    ).train()
    memory = {name: value for name, value in process_cost().items() if name.startswith("peak")}
    write_json(Path(report), clock.found | memory)


def start(line: list[object]) -> subprocess.Popen:
    """Starts a script of ours in a process of its own."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(REPOSITORY / line[0]), *map(str, line[1:])]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)


def finish(line: list[object]) -> None:
    """Runs a script of ours to its end; raises `UserError` where that is none."""
    process = start(line)
    process.communicate()
    if process.returncode:
        raise UserError(f"exit status {process.returncode}: {' '.join(map(str, line))}")


def measure(recipe: str, precision: str, steps: int, folder: Path) -> dict[str, Any]:
    """Returns what a recipe costs, and the hours of all of it."""
    steps += steps % 2 if recipe == "multi-task" else 0  # as many of NLI as of STS
    with tempfile.TemporaryDirectory(dir=folder) as place:
        report, run_dir = Path(place, "clock.json"), Path(place, "run")
        line = [__file__, "--child", precision, report, steps, *RECIPES[recipe]]
        line += ["--model_name_or_path", folder / "encoder", "--data_dir", folder, "--no_test"]
        line += ["--precision", "fp32" if precision == "tf32" else precision, "--run_dir", run_dir]
        finish(line)
        row, run, scores = map(read_json, (report, run_dir / "run.json", run_dir / "scores.json"))
    parts, plan, whole = run["parts"], row["whole_recipe"], run["whole"]
    dev_seconds = parts["dev scores"]["wall_seconds"] / (1 + len(scores["evaluations"]))
    pairs, all_pairs = scores["dev_pairs"], size_data.KORSTS_ROWS["dev"]
    row |= {"steps_measured": steps, "dev_pairs": pairs, "dev_score_seconds": dev_seconds}
    if pairs < all_pairs:
        dev_seconds *= all_pairs / pairs
        row["whole_dev_score_seconds_by_proportion"] = dev_seconds
    ends = [parts[part]["wall_seconds"] for part in ("reading back", "saving")]
    row["reading_back_and_saving_seconds"] = sum(ends)
    row["cores_used"] = whole["cpu_seconds"] / whole["wall_seconds"]  # few: others took them
    row |= {name: value for name, value in whole.items() if name.startswith("peak")}
    seconds = row["start_seconds"] + plan["steps"] / row["steps_a_second"]
    seconds += plan["dev_scores"] * dev_seconds + plan["checkpoints"] * row["checkpoint_seconds"]
    seconds += row["reading_back_and_saving_seconds"]
    seconds += max(0, row["warm_up_seconds"] - row["warm_up_steps"] / row["steps_a_second"])
    return row | {"hours_of_the_whole_recipe": seconds / 3600}


def measure_library(recipe: str, precision: str, steps: int, folder: Path) -> dict[str, Any]:
    """Returns steps a second and memory of sentence-transformers' own trainer."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        report = Path(place, "clock.json")
        finish([__file__, "--library", precision, report, steps, recipe, folder, precision])
        return read_json(report) | {"steps_measured": steps}


def whole_v2(folder: Path, max_steps: int | None) -> dict[str, Any]:
    """Trains ko-sroberta-v2 to its end, and its STS stage again, killed in the middle."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        nli, unkilled, killed = (Path(place, name) for name in ("nli", "sts", "killed"))
        rest = ["--data_dir", folder, "--precision", "auto"]
        if max_steps:
            rest += ["--max_steps", max_steps, "--save_steps", max(1, max_steps // 8)]
        line = [*NLI_OF_V2, *rest, "--model_name_or_path", folder / "encoder"]
        finish([*line, "--run_dir", nli])
        line = [*STS_OF_V2, *rest, "--model_name_or_path", nli, "--no_test"]
        finish([*line, "--run_dir", unkilled])
        stages = [read_json(stage / "run.json") for stage in (nli, unkilled)]
        process, killed_after = start([*line, "--run_dir", killed]), 0
        while process.poll() is None and killed_after < stages[1]["steps"] // 2:
            whole = killed.glob(f"checkpoints/*/{MANIFEST}")
            killed_after = max((step_of(manifest.parent) for manifest in whole), default=0)
            time.sleep(0.01)
        process.kill()  # SIGKILL
        process.communicate()
        finish([*line, "--run_dir", killed, "--resume"])  # an error where it was finished
        weights = [read_json(path / "run.json")["weights"] for path in (unkilled, killed)]
    return {
        "steps": [stage["steps"] for stage in stages],
        "precision": stages[1]["precision"],
        "wall_seconds": [stage["whole"]["wall_seconds"] for stage in stages],
        "killed_after_step": killed_after,
        "weights": weights,
        "same_weights": weights[0] == weights[1],
    }


# --- Report ----------------------------------------------------------------------------------


def store(output: Path, kind: str, **found: Any) -> None:
    """Adds figures to what size.json has of this kind of machine, `cpu` or `gpu`.

    Those of another machine of the kind go: its rows would stand under this one's name.
    """
    report = read_json(output) if output.is_file() else {}
    machine, threads = device_name("cuda" if kind == "gpu" else "cpu"), torch.get_num_threads()
    before = report.get(kind, {})
    if (before.get("machine"), before.get("threads")) != (machine, threads):
        before = {}
    report[kind] = {
        **before,
        "machine": machine,
        "threads": threads,
        "system": platform.platform(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "date": datetime.date.today().isoformat(),
        "command": stored_command(),
        **found,
        "rows": before.get("rows", {}) | found.get("rows", {}),
    }
    write_json(output, report)


def main() -> None:
    """Runs what the command line asks for."""
    if sys.argv[1:2] in (["--child"], ["--library"]):
        way, precision, *rest = sys.argv[1:]
        if precision == "tf32":
            torch.set_float32_matmul_precision("high")
        return {"--child": child, "--library": library}[way](*rest)
    kind = "gpu" if torch.cuda.is_available() else "cpu"
    usual_steps, minutes = (300, 12) if kind == "gpu" else (3, math.inf)
    precisions = ["fp32", "bf16", "tf32"] if kind == "gpu" else ["fp32"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data_dir", type=Path, help="KorNLUDatasets; without it KorSTS is generated, too")
    add("--work_dir", type=Path, help="keeps what is generated here; default: a temporary folder")
    add("--recipes", nargs="+", default=list(RECIPES), choices=RECIPES)
    add("--precisions", nargs="+", default=precisions, choices=("fp32", "bf16", "tf32"))
    add("--steps", type=int, help="measured of each recipe; default: 300 on a GPU, 3 on a CPU")
    add("--dev_pairs", type=int, help="of KorSTS-dev, for a slow machine; default: all 1,500")
    add("--minutes", type=float, default=minutes, help="no run begins that would not end within")
    add("--no_library", action="store_true", help="on a GPU: our trainer alone")
    whole_help = "this instead; --steps of each stage where given, with eight checkpoints"
    add("--whole_v2", action="store_true", help=whole_help)
    add("--output", type=Path, default=Path(__file__).with_name("size.json"), help="a JSON file")
    args = parser.parse_args()
    begun, took = time.monotonic(), Counter()
    with contextlib.ExitStack() as stack:
        folder = args.work_dir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stems = size_data.write_data(folder, args.data_dir, args.dev_pairs)
        encoder = size_data.write_encoder(folder, stems)
        if args.whole_v2:
            return store(args.output, kind, whole_v2=whole_v2(folder, args.steps))
        ways = {measure: RECIPES}
        if kind == "gpu" and not args.no_library:
            ways[measure_library] = LIBRARY
        for precision, way, recipe in itertools.product(args.precisions, ways, args.recipes):
            if recipe not in ways[way]:
                continue
            before = time.monotonic()
            if before - begun + took[recipe] > 60 * args.minutes:
                print(f"no time left for {recipe}, {precision}", file=sys.stderr)
                continue
            row = way(recipe, precision, args.steps or usual_steps, folder)
            took[recipe] = max(took[recipe], time.monotonic() - before)
            name = f"{recipe}, {precision}" + ", library" * (way is measure_library)
            print(name, row, file=sys.stderr)
            store(args.output, kind, encoder=encoder, rows={name: row})


if __name__ == "__main__":
    with command_line():
        main()
