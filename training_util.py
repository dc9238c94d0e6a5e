"""What the three training recipes share: options, batches, trainer, run folder, resume.

A run folder holds the finished model at its top and beside it run.json (command, options,
versions, data, times), scores.json, scores.png, logs/ (TensorBoard) and checkpoints/. A run is
finished when run.json says when.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import functools
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import platform
import re
import resource
import shlex
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset, DatasetDict
from filelock import FileLock, Timeout
from huggingface_hub import EvalResult, HfApi, ModelCardData, get_token
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.base.losses.merged_forward import embed_columns
from sentence_transformers.base.sampler import NoDuplicatesBatchSampler
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MatryoshkaLoss,
)
from sentence_transformers.sentence_transformer.training_args import (
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.util import all_gather, all_gather_with_grad
from transformers import (
    AttentionInterface,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    set_seed,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from data_util import DATA_DIR, UserError
from evaluation_util import SCORE_KEYS, SIMILARITIES, correlations
from model_util import load_encoder, save_encoder

REPOSITORY = Path(__file__).resolve().parent
PACKAGES = ("sentence-transformers", "transformers", "torch", "datasets", "accelerate", "numpy")
# Options that may differ between a run and its --resume: they change nothing about the training.
FREE_ON_RESUME = ("resume", "run_dir", "output_dir", "push_to_hub", "no_test", "save_steps")
MANIFEST = "manifest.json"


# --- Options ---------------------------------------------------------------------------------


def recipe_parser(description: str, output_prefix: str, num_epochs: int) -> argparse.ArgumentParser:
    """Returns a parser with the options that all recipes have. Names and defaults: the original."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument_group("model and data").add_argument
    add(
        "--model_name_or_path",
        default="klue/roberta-base",
        help="Hub name, encoder folder, or run folder of an earlier stage (staged training)",
    )
    add(
        "--max_seq_length",
        type=int,
        default=128,
        help="tokens a sentence is cut to; the longest KorSTS sentence has fewer",
    )
    add(
        "--data_dir",
        type=Path,
        default=DATA_DIR,
        help="a clone of KorNLUDatasets; the default is beside the scripts",
    )
    add = parser.add_argument_group("schedule").add_argument
    add("--num_epochs", type=int, default=num_epochs, help="passes over the data")
    add(
        "--max_steps",
        type=int,
        help="optimizer steps instead of epochs (all tasks counted); the schedule ends there",
    )
    add("--learning_rate", type=float, default=2e-5, help="AdamW's peak, after 10%% of warm-up")
    add(
        "--gradient_accumulation_steps",
        type=int,
        default=1,
        help="batches an optimizer step; in-batch negatives stay those of one batch",
    )
    add(
        "--prompt",
        metavar="TEXT",
        help="put before every sentence, in training and afterwards (the model declares it): what "
        "the encoder was trained with, as 'query: ' for E5",
    )
    add("--early_stopping", type=int, metavar="N", help="stop after N evaluations without a best")
    add(
        "--attention_dropout",
        type=float,
        metavar="P",
        help="instead of the model's own; 0 makes attention much faster on a CPU",
    )
    add("--hidden_dropout", type=float, metavar="P", help="the same of all other layers")
    add(
        "--average_checkpoints",
        type=int,
        default=1,
        metavar="K",
        help="try the mean of the last K checkpoints' weights, too (see --save_steps); dev decides",
    )
    add(
        "--start_weight",
        type=float,
        default=0,
        metavar="W",
        help="try the trained weights mixed with this share of the starting ones; dev decides",
    )
    add("--seed", type=int, default=777, help="decides data order, partners and dropout")
    add(
        "--precision",
        choices=("fp32", "bf16", "fp16", "auto"),
        default="fp32",
        help="fp32 as the original; auto takes bf16 where the GPU has it; bf16 on a CPU is faster "
        "only where it has instructions for it (avx512_bf16, amx_bf16)",
    )
    add = parser.add_argument_group("Matryoshka (https://arxiv.org/abs/2205.13147)").add_argument
    add(
        "--matryoshka_dims",
        type=_numbers(int),
        metavar="DIM,...",
        help="strictly decreasing, e.g. 768,512,256,128,64,32; the largest selects the checkpoint",
    )
    add("--matryoshka_weights", type=_numbers(float), metavar="W,...", help="one a dim; default 1")
    add = parser.add_argument_group("run folder").add_argument
    add("--output_dir", type=Path, default=Path("output"), help="holds one folder a run")
    add("--output_prefix", default=output_prefix, help="run folder name: prefix, model, time")
    add("--run_dir", type=Path, help="exactly this folder instead")
    add("--resume", action="store_true", help="go on in --run_dir from its last whole checkpoint")
    add("--save_steps", type=int, metavar="N", help="checkpoints each N steps and evaluation")
    add("--no_test", action="store_true", help="leave the test set alone (for choosing options)")
    add("--push_to_hub", metavar="REPO", help="upload the finished folder (token: HF_TOKEN)")
    return parser


def _numbers(kind: type) -> Any:
    def parse(text: str) -> list:
        return [kind(part) for part in text.split(",")]

    parse.__name__ = f"comma-separated {kind.__name__}"
    return parse


def check_options(args: argparse.Namespace) -> None:
    """Raises `UserError` for the first option that cannot work, before anything is read."""
    positive = ("max_seq_length", "num_epochs", "max_steps", "learning_rate", "save_steps")
    positive += ("gradient_accumulation_steps", "early_stopping", "batch_size", "mini_batch_size")
    positive += ("average_checkpoints",)
    for name in (*positive, "nli_batch_size", "sts_batch_size"):
        value = getattr(args, name, None)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name} {value}: must be above 0")
    for option in ("attention_dropout", "hidden_dropout"):
        share = getattr(args, option)
        if share is not None and not 0 <= share < 1:
            raise UserError(f"--{option} {share}: must be from 0 to below 1")
    if not 0 <= args.start_weight < 1:
        raise UserError(f"--start_weight {args.start_weight}: must be from 0 to below 1")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed {args.seed}: must be from 0 to 4294967295")
    dims, weights = args.matryoshka_dims, args.matryoshka_weights
    if weights and not dims:
        raise UserError("--matryoshka_weights: give --matryoshka_dims too")
    if weights and len(weights) != len(dims):
        raise UserError(f"--matryoshka_weights: {len(weights)} weights for {len(dims)} dims")
    if weights and not all(0 < weight < math.inf for weight in weights):
        raise UserError("--matryoshka_weights: must be above 0")
    if dims and (dims[-1] < 1 or any(a <= b for a, b in itertools.pairwise(dims))):
        raise UserError("--matryoshka_dims: must be strictly decreasing and at least 1")
    if args.resume and args.run_dir is None:
        raise UserError("--resume: give the folder to go on in as --run_dir")
    if args.precision == "fp16" and not torch.cuda.is_available():
        raise UserError("--precision fp16: needs a GPU; fp32, bf16 or auto work here")
    if args.push_to_hub and get_token() is None:
        raise UserError("--push_to_hub: no token: set HF_TOKEN (or log in with `hf auth login`)")
    # torchrun without a GPU trains on CPUs (gloo): accelerate wants to be told.
    args.world_size = PartialState(cpu=not torch.accelerator.is_available()).num_processes
    for name in ("batch_size", "nli_batch_size", "sts_batch_size"):
        size = getattr(args, name, None)
        if size is not None and size % args.world_size:
            raise UserError(f"--{name} {size}: cannot be shared by {args.world_size} processes")
    if not PartialState().is_main_process:
        return  # the first process answers for the folder, and makes it
    if args.resume and not (args.run_dir / "run.json").is_file():
        raise UserError(f"--resume: {args.run_dir}: no run.json: no run to go on with")
    if not args.resume and args.run_dir and args.run_dir.exists() and any(args.run_dir.iterdir()):
        raise UserError(f"--run_dir {args.run_dir}: not empty; --resume goes on with a run")


# --- Batches ---------------------------------------------------------------------------------


def shuffled_batches(
    rows: int, batch_size: int, seed: int, world_size: int = 1
) -> Iterator[list[int]]:
    """Yields batches of row numbers without end, each pass over the rows in a new order.

    The last batch of a pass is what is left, as in the original's loader; of it, rows that
    world_size processes cannot share equally wait for the next pass.
    """
    generator = np.random.default_rng(seed)
    while True:
        order = generator.permutation(rows)[: rows - rows % world_size].tolist()
        for start in range(0, len(order), batch_size):
            yield order[start : start + batch_size]


def no_duplicates_batches(
    triplets: pd.DataFrame, batch_size: int, seed: int
) -> Iterator[list[int]]:
    """Yields full batches in which no text occurs twice, without end, pass after pass.

    Texts are compared stripped and in lower case, as sentence-transformers 2.7 did: a duplicate
    would be its own in-batch negative.

    Raises:
        UserError: the triplets cannot fill one batch.
    """
    normalised = triplets.apply(lambda column: column.str.strip().str.lower())
    sampler = NoDuplicatesBatchSampler(
        Dataset.from_pandas(normalised, preserve_index=False),
        batch_size=batch_size,
        drop_last=True,
        precompute_hashes=True,
        precompute_num_proc=0,  # in this process: a worker outlives a run that is killed
        generator=torch.Generator(),
        seed=seed,
    )
    for epoch in range(sys.maxsize):
        sampler.set_epoch(epoch)
        empty = True
        for batch in sampler:
            empty = False
            yield batch
        if empty:
            raise UserError(
                f"{len(triplets):,} triplets cannot fill one batch of {batch_size} "
                "without a text twice: more data or a smaller batch size is needed"
            )


def share(batches: Iterable[list[int]], offset: int, world_size: int) -> Iterator[list[int]]:
    """Yields each batch as world_size equal shares, of row numbers counted from offset.

    accelerate deals one share to each process in turn: a step sees the whole batch.
    """
    for batch in batches:
        size = len(batch) // world_size
        for rank in range(world_size):
            yield [offset + row for row in batch[rank * size : (rank + 1) * size]]


# --- Evaluation ------------------------------------------------------------------------------


class KorSTSEvaluator(BaseEvaluator):
    """Scores a model on sentence pairs: the eight correlations, at each Matryoshka dim.

    Keys are those of `evaluation_util.SCORE_KEYS` for the largest dim, and with `@dim` behind them
    for the others. Each distinct sentence is encoded once, for all dims.
    """

    def __init__(self, pairs: pd.DataFrame, dims: Sequence[int] | None) -> None:
        super().__init__()
        self.pairs, self.dims = pairs, list(dims or [])
        self.greater_is_better, self.primary_metric = True, "cosine_spearman"
        self.cpu_seconds = self.wall_seconds = 0.0

    def __call__(
        self,
        model: SentenceTransformer,
        output_path: str | None = None,
        epoch: float = -1,
        steps: int = -1,
    ) -> dict[str, float]:
        """Returns the scores in [-1, 1]; raises FloatingPointError for NaN embeddings."""
        wall, cpu = time.perf_counter(), time.process_time()
        pairs = self.pairs
        codes, sentences = pd.factorize(pd.concat([pairs["sentence1"], pairs["sentence2"]]))
        mixed_precision_forward = model.__dict__.pop("forward", None)  # accelerate's, see below
        try:
            embeddings = model.encode(list(sentences), batch_size=32, show_progress_bar=False)
        finally:
            # While training with bf16 or fp16. Scores are those of the saved weights, in fp32.
            if mixed_precision_forward:
                model.forward = mixed_precision_forward
        first, second = embeddings[codes[: len(pairs)]], embeddings[codes[len(pairs) :]]
        scores = {}
        try:
            for dim in self.dims or [embeddings.shape[1]]:
                suffix = "" if dim == max(self.dims, default=dim) else f"@{dim}"
                result = correlations(first[:, :dim], second[:, :dim], pairs["score"])
                scores |= {key + suffix: value for key, value in result.items()}
        except ValueError as error:
            raise FloatingPointError(f"step {steps}: {error}") from None
        self.cpu_seconds += time.process_time() - cpu
        self.wall_seconds += time.perf_counter() - wall
        return scores


def spearman_line(scores: dict[str, float]) -> str:
    """Formats the four Spearman correlations x100, cosine first."""
    return "  ".join(f"{name} {100 * scores[f'{name}_spearman']:.2f}" for name in SIMILARITIES)


# --- Padding ---------------------------------------------------------------------------------


def _attention_in_fp32(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, **options: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Attention of --precision bf16: on CPUs, torch's own in bf16 is several times slower."""
    with torch.autocast("cpu", enabled=False):
        columns = (query.float(), key.float(), value.float())
        return sdpa_attention_forward(module, *columns, attention_mask, **options)


def pack_sentences(model: SentenceTransformer, row_length: int = 48) -> None:
    """Makes training forwards on a CPU skip padding: sentences share rows, each seeing only itself.

    The sentences of a batch are laid into rows of row_length tokens (or the longest sentence's),
    longest first, each where it first fits, with positions that start again and an attention mask
    that is block-diagonal; token embeddings come back in the batch's own layout. Losses and
    gradients are the same up to rounding (and the draws of dropout). As padded by column, two
    thirds of a KorNLI batch are padding. For BERT and RoBERTa; other encoders, GPUs and evaluation
    keep their padded forwards.
    """
    encoder = model[0].model
    offset = {"bert": 0, "roberta": encoder.config.pad_token_id + 1}.get(encoder.config.model_type)
    if offset is None or encoder.device.type != "cpu":
        return
    AttentionInterface.register("sdpa", _attention_in_fp32)
    padded_forward = encoder.forward

    @functools.wraps(padded_forward)
    def packed_forward(**inputs: Any) -> Any:
        mask = inputs["attention_mask"].bool()
        right_padded = mask[:, 0].all() and not (mask[:, 1:] > mask[:, :-1]).any()
        if not encoder.training or not right_padded:
            return padded_forward(**inputs)
        lengths = mask.sum(1).tolist()
        width = max(row_length, *lengths)
        used: list[int] = []
        first = [0] * len(lengths)  # of each sentence, its first place in the flattened rows
        for sentence in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            length = lengths[sentence]
            row = next((row for row, n in enumerate(used) if n + length <= width), len(used))
            if row == len(used):
                used.append(0)
            first[sentence] = row * width + used[row]
            used[row] += length
        column = torch.arange(mask.shape[1])
        place = torch.where(mask, torch.tensor(first)[:, None] + column, first[0])

        def lay(values: torch.Tensor, empty: int) -> torch.Tensor:
            rows = torch.full((len(used) * width,), empty)
            rows[place[mask]] = values.expand_as(mask)[mask]
            return rows.view(len(used), width)

        owner = lay(torch.arange(len(lengths))[:, None], -1)
        blocked = owner[:, :, None] != owner[:, None, :]
        for name in ("input_ids", "token_type_ids"):
            if name in inputs:
                inputs[name] = lay(inputs[name], 0)
        inputs["position_ids"] = lay(column + offset, offset)
        inputs["attention_mask"] = torch.zeros(blocked.shape).masked_fill(
            blocked, torch.finfo(torch.float32).min
        )[:, None]
        output = padded_forward(**inputs)
        output.last_hidden_state = output.last_hidden_state.flatten(0, 1)[place]
        return output

    encoder.forward = packed_forward


# --- Trainer ---------------------------------------------------------------------------------


class EvaluationPoints(ProgressCallback):
    """Evaluates and saves at the recipe's points; prints each dev score; stops early if asked."""

    def __init__(
        self, evaluate_at: set[int], save_steps: int | None, patience: int | None, dev: str
    ) -> None:
        super().__init__()
        self.evaluate_at, self.save_steps = evaluate_at, save_steps
        self.patience, self.dev = patience, dev

    def on_step_end(
        self,
        args: SentenceTransformerTrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        super().on_step_end(args, state, control, **kwargs)
        step = state.global_step
        control.should_evaluate = step in self.evaluate_at or step >= state.max_steps
        control.should_save = control.should_evaluate or (
            self.save_steps is not None and step % self.save_steps == 0
        )

    def on_evaluate(
        self,
        args: SentenceTransformerTrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero:
            scores = {key.removeprefix("eval_"): value for key, value in metrics.items()}
            print(
                f"\nstep {state.global_step}/{state.max_steps}: {self.dev}: Spearman x100: "
                f"{spearman_line(scores)}",
                file=sys.stderr,
            )
        # The trainer takes note of a new best after this call.
        if self.patience is not None and state.best_metric is not None:
            later = [step for step, _ in evaluations(state) if step > state.best_global_step]
            is_best = metrics["eval_cosine_spearman"] > state.best_metric
            control.should_training_stop = not is_best and len(later) >= self.patience

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Keeps the trainer's dictionaries out of the terminal; TensorBoard has them."""


def evaluations(state: TrainerState) -> list[tuple[int, dict[str, float]]]:
    """Returns (step, scores) of each dev evaluation so far; step 0 is before training."""
    return [
        (
            entry["step"],
            {
                key.removeprefix("eval_"): value
                for key, value in entry.items()
                if key.removeprefix("eval_").split("@")[0] in SCORE_KEYS
            },
        )
        for entry in state.log_history
        if "eval_cosine_spearman" in entry
    ]


class AdamWPerTask(torch.optim.AdamW):
    """AdamW with moments of its own for each of two tasks that share the parameters."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        self.task, self.moments = 0, [self.state, defaultdict(dict)]

    def step(self, closure: Any = None) -> Any:
        self.state = self.moments[self.task]
        return super().step(closure)

    def state_dict(self) -> dict[str, Any]:
        tasks = []
        for moments in self.moments:
            self.state = moments
            tasks.append(super().state_dict())
        return {"tasks": tasks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for task, state in enumerate(state_dict["tasks"]):
            super().load_state_dict(state)
            self.moments[task] = self.state


class TakeTurns(TrainerCallback):
    """Tells the optimizer whose step it is: NLI's, then STS's."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["optimizer"].optimizer.task = state.global_step % 2


class RecipeTrainer(SentenceTransformerTrainer):
    """sentence-transformers' trainer on a list of batches, with checkpoints that are whole.

    `batches` is the whole run as one list: nothing is drawn while training, so that a resumed run
    sees the batches it would have seen. A checkpoint counts once its manifest is there, which
    names each file's sha256; the best and the last `keep_last` are kept.
    """

    def __init__(
        self, *args: Any, batches: list[list[int]], keep_last: int = 1, **kwargs: Any
    ) -> None:
        self.batches, self.keep_last = batches, keep_last
        self.tried: dict[str, dict[str, float]] = {}  # see try_means
        self.chosen = ""
        super().__init__(*args, **kwargs)

    def get_multi_dataset_batch_sampler(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        return self.batches

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """Leaves the library's card out: it asks the Hub; `write_model_card` writes ours."""

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        batch = dict(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            texts = [
                self.processing_class.decode(row, skip_special_tokens=True)
                for name in sorted(batch)
                if name.endswith("input_ids")
                for row in batch[name]
            ]
            raise FloatingPointError(
                f"step {self.state.global_step + 1}, data set {batch.get('dataset_name')}: the "
                f"loss is {loss.item()} for the batch: {' | '.join(texts)}"
            )
        return loss

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
        except (RuntimeError, SafetensorError) as error:
            # What torch and safetensors say when the disk is full.
            raise OSError(None, f"not written: {str(error).splitlines()[0]}", str(folder)) from None
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            hashes = {str(path.relative_to(folder)): _sha256(path) for path in files}
            write_json(folder / MANIFEST, hashes)
            for other in checkpoints(folder.parent)[: -self.keep_last]:
                if _step(other) != self.state.best_global_step:
                    # The manifest goes first: half a checkpoint must not look like a whole one.
                    (other / MANIFEST).unlink(missing_ok=True)
                    shutil.rmtree(other)


def checkpoints(folder: Path) -> list[Path]:
    """Returns the checkpoint folders, whole or not, the oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r".*-\d+", path.name)]
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def last_checkpoint(folder: Path) -> Path | None:
    """Returns the last whole checkpoint, and removes what a kill left half-written after it.

    Raises:
        UserError: a checkpoint was whole and is damaged now.
    """
    for checkpoint in reversed(checkpoints(folder)):
        if not (checkpoint / MANIFEST).is_file():
            shutil.rmtree(checkpoint)
            continue
        for name, expected in json.loads((checkpoint / MANIFEST).read_text("utf-8")).items():
            path = checkpoint / name
            if not path.is_file() or _sha256(path) != expected:
                raise UserError(
                    f"{path}: damaged: its content is not what was saved; "
                    f"remove {checkpoint} to go on from an earlier step"
                )
        return checkpoint
    return None


# --- Run folder ------------------------------------------------------------------------------


def write_json(path: Path, content: Any) -> None:
    """Writes JSON beside the file and renames it: a reader never sees half of it."""
    beside = path.with_name(f".{path.name}.writing")
    beside.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(beside, path)


def load_model(args: argparse.Namespace) -> SentenceTransformer:
    """Seeds torch and loads the encoder; raises `UserError` for dims above its width."""
    set_seed(args.seed)
    model = load_encoder(args.model_name_or_path, args.max_seq_length)
    if args.prompt:
        model.prompts, model.default_prompt_name = {"default": args.prompt}, "default"
    width = model.get_embedding_dimension()
    if args.matryoshka_dims and args.matryoshka_dims[0] > width:
        raise UserError(f"--matryoshka_dims {args.matryoshka_dims[0]}: the model has {width}")
    for option in ("attention_dropout", "hidden_dropout"):
        if (share := getattr(args, option)) is None:
            continue
        layers = [
            module
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Dropout)
            and name.endswith("attention.self.dropout") == (option == "attention_dropout")
        ]
        if not layers:
            kind = model[0].model.config.model_type
            raise UserError(f"--{option}: for BERT and RoBERTa, not for {kind}")
        for layer in layers:
            layer.p = share
    pack_sentences(model)
    return model


class OneForward(torch.nn.Module):
    """Embeds all columns of a batch in one forward: the recipes' are sentences of one kind.

    With `gather` the loss sees the shares of all processes, as one process would.
    """

    def __init__(self, model: SentenceTransformer, loss: torch.nn.Module, gather: bool) -> None:
        super().__init__()
        self.model, self.loss = model, loss  # the trainer puts its DDP model where `model` is
        self.gather = gather

    def forward(
        self, sentence_features: Iterable[dict[str, torch.Tensor]], labels: torch.Tensor | None
    ) -> torch.Tensor:
        embeddings = embed_columns(self.model, sentence_features, separate_first=False)
        if self.gather:
            embeddings = [all_gather_with_grad(column) for column in embeddings]
            labels = all_gather(labels)
        return self.loss.compute_loss_from_embeddings(embeddings, labels)


def recipe_loss(
    model: SentenceTransformer,
    loss: torch.nn.Module,
    args: argparse.Namespace,
    gather: bool = False,
) -> torch.nn.Module:
    """Makes the loss take one forward, and count at each of --matryoshka_dims where given.

    `gather` is for losses that do not gather the batch across processes themselves.
    """
    if not isinstance(loss, CachedMultipleNegativesRankingLoss):  # has forwards of its own
        loss = OneForward(model, loss, gather and args.world_size > 1)
    if not args.matryoshka_dims:
        return loss
    return MatryoshkaLoss(model, loss, args.matryoshka_dims, args.matryoshka_weights)


def _options(args: argparse.Namespace) -> dict[str, Any]:
    options = json.loads(json.dumps(vars(args), default=str))
    # The default data folder is beside the scripts on every machine.
    if args.data_dir == DATA_DIR:
        options["data_dir"] = DATA_DIR.name
    return options


def open_run_folder(args: argparse.Namespace, data: list[dict[str, Any]]) -> Path:
    """Makes the run folder (or finds that of --resume) and its run.json, and locks the folder.

    Raises:
        UserError: another run is at work there, it is finished, or its options were different.
    """
    if args.run_dir is None:
        name = args.model_name_or_path.rstrip("/").replace("/", "-").lstrip(".-")
        time_text = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        args.run_dir = args.output_dir / f"{args.output_prefix}{name}-{time_text}"
    # Every process takes the first one's folder: clocks differ.
    args.run_dir = broadcast_object_list([args.run_dir])[0]
    if not PartialState().is_main_process:
        return args.run_dir
    args.run_dir.mkdir(parents=True, exist_ok=True)
    # Held until the process ends, however it ends.
    args.lock = FileLock(args.run_dir / ".lock", timeout=0)
    try:
        args.lock.acquire()
    except Timeout:
        raise UserError(f"{args.run_dir}: another run is at work in this folder") from None
    options = {name: v for name, v in _options(args).items() if name != "lock"}
    if args.resume:
        _check_same_run(args.run_dir, options)
        return args.run_dir
    write_json(
        args.run_dir / "run.json",
        {
            "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
            "options": options,
            "data": data,
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES}
            | {"python": platform.python_version()},
            "git_commit": _git_commit(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "threads": torch.get_num_threads(),
            "started": _now(),
            "finished": None,
        },
    )
    return args.run_dir


def _check_same_run(run_dir: Path, options: dict[str, Any]) -> None:
    run = json.loads((run_dir / "run.json").read_text("utf-8"))
    if run["finished"]:
        raise UserError(f"{run_dir}: this run finished at {run['finished']}")
    for name, value in options.items():
        before = run["options"].get(name)
        if name not in FREE_ON_RESUME and before != value:
            raise UserError(f"--resume: --{name} is {value} now and was {before}: not that run")


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _git_commit() -> str | None:
    command = ["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None  # not a clone: a downloaded archive has no commit


# --- Training and what it leaves -------------------------------------------------------------


def recipe_trainer(
    args: argparse.Namespace,
    model: SentenceTransformer,
    train_data: dict[str, pd.DataFrame],
    losses: dict[str, torch.nn.Module],
    batches: list[list[int]],
    steps: int,
    evaluate_at: set[int],
    dev: pd.DataFrame,
    optimizer: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
) -> RecipeTrainer:
    """Sets up the trainer of a recipe: AdamW, linear schedule with 10% of warm-up, clipping at 1.

    Args:
        train_data: one table for each loss; its columns are the loss's, in order.
        batches: of the whole run, row numbers counted through train_data's tables.
        steps: optimizer steps of the whole run.
        evaluate_at: steps after which the dev score is taken; the last step always is one.
        optimizer: a class and its options, instead of torch's AdamW.
    """
    has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(args.run_dir / "logs")
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(args.run_dir / "checkpoints"),
        num_train_epochs=1,  # `batches` is the whole run
        learning_rate=args.learning_rate,
        weight_decay=0.01,
        max_grad_norm=1.0,
        lr_scheduler_type="linear",
        warmup_steps=math.ceil(0.1 * steps),
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        bf16=args.precision == "bf16" or (args.precision == "auto" and has_bf16),
        fp16=args.precision == "fp16",
        use_cpu=not torch.accelerator.is_available(),
        prompts=args.prompt,
        seed=args.seed,
        eval_strategy="no",  # EvaluationPoints decides when
        eval_on_start=not args.resume,
        save_strategy="steps",
        save_steps=sys.maxsize,
        metric_for_best_model="cosine_spearman",
        greater_is_better=True,
        logging_steps=10,
        logging_nan_inf_filter=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=["tensorboard"],
    )
    trainer = RecipeTrainer(
        model=model,
        args=arguments,
        train_dataset=DatasetDict(
            {name: Dataset.from_pandas(table) for name, table in train_data.items()}
        ),
        loss=losses,
        evaluator=KorSTSEvaluator(dev, args.matryoshka_dims),
        batches=batches,
        keep_last=args.average_checkpoints,
        optimizer_cls_and_kwargs=optimizer,
    )
    trainer.remove_callback(ProgressCallback)
    dev_text = f"sts-dev.tsv, {len(dev):,} pairs"
    trainer.points = EvaluationPoints(evaluate_at, args.save_steps, args.early_stopping, dev_text)
    trainer.add_callback(trainer.points)
    return trainer


def train(args: argparse.Namespace, trainer: RecipeTrainer) -> SentenceTransformer:
    """Trains, or goes on with --resume, and returns the best model, read back from its checkpoint.

    Exits with status 1 when the reloaded model does not give the dev score it was chosen by.
    """
    folder = args.run_dir / "checkpoints"
    checkpoint = None
    if args.resume:
        checkpoint = last_checkpoint(folder) if trainer.is_world_process_zero() else None
        checkpoint = broadcast_object_list([checkpoint])[0]
        trainer.args.eval_on_start = checkpoint is None
        print(f"resuming from {checkpoint or 'the start: no checkpoint yet'}", file=sys.stderr)
    startup = time.time() - psutil.Process().create_time()
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except KeyboardInterrupt:
        options = [option for option in sys.argv[1:] if option != "--resume"]
        if "--run_dir" not in options:
            options += ["--run_dir", str(args.run_dir)]
        command = shlex.join(["python", sys.argv[0], *options, "--resume"])
        print(f"\nstopped; to go on: {command}", file=sys.stderr)
        raise
    finally:
        if trainer.points.training_bar is not None:
            trainer.points.training_bar.close()  # an error gets a line of its own
    evaluation = trainer.evaluator
    args.seconds = {
        "steps": trainer.state.global_step - (_step(checkpoint) if checkpoint else 0),
        "startup_seconds": round(startup, 2),
        "training_wall_seconds": round(time.perf_counter() - wall - evaluation.wall_seconds, 2),
        "training_cpu_seconds": round(time.process_time() - cpu - evaluation.cpu_seconds, 2),
        "evaluation_wall_seconds": round(evaluation.wall_seconds, 2),
        "evaluation_cpu_seconds": round(evaluation.cpu_seconds, 2),
        # Kilobytes on Linux, bytes on macOS.
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        // (2**20 if sys.platform == "darwin" else 2**10),
    }
    best_step, expected = trainer.state.best_global_step, trainer.state.best_metric
    best = load_encoder(str(folder / f"checkpoint-{best_step}"), args.max_seq_length)
    if trainer.is_world_process_zero():
        scores = trainer.evaluator(best, steps=best_step)
        actual = scores["cosine_spearman"]
        if abs(actual - expected) > 1e-6:
            sys.exit(
                f"error: the best checkpoint (step {best_step}) gives dev cosine Spearman {actual} "
                f"when read back, and gave {expected} while training"
            )
        if args.average_checkpoints > 1 or args.start_weight:
            trainer.tried[f"step {best_step}"] = scores
            best = try_means(args, trainer, best)
    return best


def mean_weights(models: list[SentenceTransformer], shares: list[float]) -> SentenceTransformer:
    """Returns a model whose weights are the mean of the models', each with its share (sum 1)."""
    mean = copy.deepcopy(models[0])
    with torch.no_grad():
        for target, *weights in zip(*(m.parameters() for m in (mean, *models)), strict=True):
            target.copy_(sum(share * weight for share, weight in zip(shares, weights, strict=True)))
    return mean


def try_means(
    args: argparse.Namespace, trainer: RecipeTrainer, best: SentenceTransformer
) -> SentenceTransformer:
    """Returns what dev likes best: the best checkpoint or a mean of weights that was asked for.

    Last checkpoints: "Averaging Weights Leads to Wider Optima and Better Generalization",
    https://arxiv.org/abs/1803.05407. With the start: "Robust fine-tuning of zero-shot models",
    https://arxiv.org/abs/2109.01903. The dev scores of all go to trainer.tried.
    """
    candidates = {f"step {trainer.state.best_global_step}": best}
    if (last := args.average_checkpoints) > 1:
        folders = checkpoints(Path(trainer.args.output_dir))[-last:]
        models = [load_encoder(str(folder), args.max_seq_length) for folder in folders]
        name = f"mean of steps {', '.join(str(_step(folder)) for folder in folders)}"
        candidates[name] = mean_weights(models, [1 / len(models)] * len(models))
    if share := args.start_weight:
        start = load_encoder(args.model_name_or_path, args.max_seq_length)
        for name, model in list(candidates.items()):
            mixed = mean_weights([model, start], [1 - share, share])
            candidates[f"{name}, {share:g} of the start"] = mixed
    for name, model in candidates.items():
        if name not in trainer.tried:
            trainer.tried[name] = trainer.evaluator(model, steps=trainer.state.global_step)
        line = spearman_line(trainer.tried[name])
        print(f"{name}: {trainer.points.dev}: {line}", file=sys.stderr)
    # Of equals the first, which is the best checkpoint.
    trainer.chosen = max(candidates, key=lambda name: trainer.tried[name]["cosine_spearman"])
    return candidates[trainer.chosen]


def finish_run(
    args: argparse.Namespace,
    trainer: RecipeTrainer,
    best: SentenceTransformer,
    test: pd.DataFrame | None,
) -> None:
    """Scores the best model on the test set, once, and turns the run folder into a finished one."""
    if not trainer.is_world_process_zero():
        return
    dev_scores = evaluations(trainer.state)
    best_step = trainer.state.best_global_step
    scores = {
        "dev_file": "sts-dev.tsv",
        "dev_pairs": len(trainer.evaluator.pairs),
        "before_training": dict(dev_scores).get(0),
        "evaluations": [{"step": step, **values} for step, values in dev_scores if step],
        "best_step": best_step,
        "tried": trainer.tried,
        "chosen": trainer.chosen or f"step {best_step}",
        "dev": trainer.tried.get(trainer.chosen, dict(dev_scores)[best_step]),
    }
    if scores["before_training"]:
        print(f"sts-dev.tsv before training:  {spearman_line(scores['before_training'])}")
    print(f"sts-dev.tsv, best ({scores['chosen']}): {spearman_line(scores['dev'])}")
    if test is not None:
        test_scores = KorSTSEvaluator(test, args.matryoshka_dims)(best)
        scores |= {"test_file": "sts-test.tsv", "test_pairs": len(test), "test": test_scores}
        print(f"sts-test.tsv, {len(test):,} pairs, x100:")
        print("  ".join(key for key in SCORE_KEYS))
        print("  ".join(f"{100 * test_scores[key]:{len(key)}.2f}" for key in SCORE_KEYS))
        for dim in (args.matryoshka_dims or [])[1:]:
            print(f"cosine_spearman at {dim}: {100 * test_scores[f'cosine_spearman@{dim}']:.2f}")
    write_json(args.run_dir / "scores.json", scores)
    plot_scores(args.run_dir / "scores.png", dev_scores)
    write_model_card(args, scores)
    save_encoder(best, args.run_dir)
    run = json.loads((args.run_dir / "run.json").read_text("utf-8"))
    write_json(args.run_dir / "run.json", run | args.seconds | {"finished": _now()})
    print(f"finished: {args.run_dir}")
    if args.push_to_hub:
        push(args)


def plot_scores(path: Path, dev_scores: list[tuple[int, dict[str, float]]]) -> None:
    """Draws the four dev Spearman correlations over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name in SIMILARITIES:
        values = [100 * scores[f"{name}_spearman"] for _, scores in dev_scores]
        axes.plot([step for step, _ in dev_scores], values, marker="o", label=name)
    axes.set(xlabel="optimizer step", ylabel="dev Spearman x100", title="sts-dev.tsv")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write_model_card(args: argparse.Namespace, scores: dict[str, Any]) -> None:
    """Writes the run folder's README.md: a model card with the test scores as metadata."""
    test = scores.get("test", {})
    dev_score = 100 * scores["dev"]["cosine_spearman"]
    base = args.model_name_or_path
    card_data = ModelCardData(
        language="ko",
        license="cc-by-sa-4.0",  # KorNLUDatasets and the klue models ask for it
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["sentence-transformers", "sentence-similarity", "feature-extraction"],
        base_model=None if Path(base).exists() else base,
        model_name=args.run_dir.name,
        eval_results=[
            EvalResult(
                task_type="semantic-similarity",
                dataset_type="sts-test.tsv",
                dataset_name="KorSTS test" if scores.get("test_pairs") == 1379 else "sts-test.tsv",
                metric_type=key,
                metric_value=round(100 * test[key], 2),
            )
            for key in SCORE_KEYS
            if key in test
        ]
        or None,
    )
    text = f"""---
{card_data.to_yaml()}
---

# {args.run_dir.name}

A Korean sentence encoder: mean pooling, {args.max_seq_length} tokens, trained from
`{Path(base).name if Path(base).exists() else base}` with `{Path(sys.argv[0]).name}` of
ko-sentence-transformers (seed {args.seed}). Options, data and versions: `run.json`; all scores:
`scores.json`. The training data, KorNLUDatasets, is CC BY-SA 4.0.

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("PATH_OR_NAME")
embeddings = model.encode(["안녕하세요?", "한국어 문장 임베딩을 위한 모델입니다."])
```

Dev cosine Spearman x100 (sts-dev.tsv, {scores["dev_pairs"]:,} pairs): {dev_score:.2f}.
"""
    (args.run_dir / "README.md").write_text(text, encoding="utf-8")


def push(args: argparse.Namespace) -> None:
    """Uploads the finished folder; a failure leaves it as it is and ends with status 1."""
    api = HfApi()
    try:
        api.create_repo(args.push_to_hub, exist_ok=True)
        api.upload_folder(
            repo_id=args.push_to_hub,
            folder_path=args.run_dir,
            ignore_patterns=["checkpoints/*", "logs/*", ".*"],
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        sys.exit(f"error: {args.push_to_hub}: not uploaded: {reason}; {args.run_dir} is whole")
    print(f"uploaded: {args.push_to_hub}")
