"""Trains a recipe: model set-up, the trainer with its callbacks, `train`.

What a recipe is made of (data, batches, loss, optimizer, schedule) is read in its script.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset, DatasetDict
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from sentence_transformers.sentence_transformer.modules import Transformer
from sentence_transformers.sentence_transformer.training_args import (
    SentenceTransformerTrainingArguments,
)
from torch.utils.data import DataLoader
from transformers import (
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    set_seed,
)
from transformers.trainer_utils import EvalLoopOutput

from common.averaging import add_to_mean, try_means
from common.batches import ArrayCollator, move_batch, tokenizing_processes
from common.checkpoints import EMBEDDINGS, read_back, seal_checkpoint, step_of
from common.command_line import UserError, writing
from common.encoders import check_embeddings, default_prompt, load_encoder
from common.evaluation import SCORE_KEYS, spearman_line
from common.graphs import use_graphs
from common.machine import cost, cost_of, process_cost
from common.packing import OneForward, is_packed, pack_sentences, takes_embeddings
from common.run_folder import Result, Run, Scores
from common.scoring import PairsEvaluator
from common.splits import say_unknown_tokens


def load_model(args: argparse.Namespace) -> SentenceTransformer:
    """Seeds torch and loads the encoder with the prompt and the dropouts that it trains with.

    Raises:
        UserError: no transformer with a pad token; a dim above its width; no such dropout; a length
            that prompt and special tokens fill.
    """
    set_seed(args.seed)
    name, options = args.model_name_or_path, ("attention_dropout", "hidden_dropout")
    given = {option: getattr(args, option) for option in options}
    model = load_encoder(
        name,
        args.max_seq_length,
        pooling=args.pooling,
        dropouts={option: share for option, share in given.items() if share is not None},
        trust_remote_code=args.trust_remote_code,
    )
    if not isinstance(model[0], Transformer):
        raise UserError(f"{name}: {type(model[0]).__name__}: only transformers are trained here")
    if model.tokenizer.pad_token is None:
        raise UserError(f"{name}: its tokenizer has no pad token: sentences cannot share a batch")
    declared, others = default_prompt(model), {k: v for k, v in model.prompts.items() if v}
    if args.prompt is not None:
        if declared and declared != args.prompt:
            print(
                f"note: --prompt {args.prompt!r} instead of {name}'s {declared!r}", file=sys.stderr
            )
        model.prompts, model.default_prompt_name = {}, None
        if args.prompt:
            model.prompts, model.default_prompt_name = {"default": args.prompt}, "default"
    elif others and not declared:
        print(f"note: {name}: no prompt is its default, none used of {others}", file=sys.stderr)
    filled = len(model.tokenizer(default_prompt(model).rstrip())["input_ids"])
    if filled >= args.max_seq_length:
        raise UserError(
            f"--max_seq_length {args.max_seq_length}: no room for text: prompt and special tokens "
            f"are {filled}"
        )
    width = model.get_embedding_dimension()
    if args.matryoshka_dims and args.matryoshka_dims[0] > width:
        raise UserError(f"--matryoshka_dims {args.matryoshka_dims[0]}: the model has {width}")
    pack_sentences(model)
    return model


def recipe_loss(
    model: SentenceTransformer,
    loss: torch.nn.Module,
    args: argparse.Namespace,
    gather: bool = False,
) -> torch.nn.Module:
    """Makes the loss take one forward, and count at each of --matryoshka_dims where given.

    On one GPU the model's layers then replay graphs (`use_graphs`).

    Args:
        loss: one that `takes_embeddings`; any other of sentence-transformers keeps its forwards.
        gather: the loss is to see the whole batch where several processes share it, and does not
            gather it itself.

    Raises:
        UserError: --resume with a loss that has weights of its own: checkpoints hold the model's.
    """
    of_model = {id(parameter) for parameter in model.parameters()}
    own = [p for p in loss.parameters() if p.requires_grad and id(p) not in of_model]
    if own and args.resume:
        raise UserError(f"--resume: {type(loss).__name__} has weights that no checkpoint holds")
    if takes_embeddings(loss):
        loss = OneForward(model, loss, gather)
        use_graphs(model)
    if not args.matryoshka_dims:
        return loss
    return MatryoshkaLoss(model, loss, args.matryoshka_dims, args.matryoshka_weights)


# --- Callbacks -------------------------------------------------------------------------------


class EvaluationPoints(ProgressCallback):
    """Evaluates and saves at the recipe's points; prints each dev score; stops early if asked."""

    def __init__(
        self,
        evaluate_at: set[int],
        save_steps: int | None,
        patience: int | None,
        dev: PairsEvaluator,
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
        step, last = state.global_step, state.max_steps
        control.should_evaluate = step in self.evaluate_at or step >= last
        control.should_save = self.saves_at(step, last)

    def saves_at(self, step: int, last: int) -> bool:
        """Tells whether a run of `last` steps writes a checkpoint behind a step."""
        every = self.save_steps
        return step in self.evaluate_at or step >= last or bool(every and step % every == 0)

    def averaged_steps(self, last: int, count: int) -> list[int]:
        """Returns the steps of the last checkpoints to average: none where nobody knows yet."""
        if count == 1 or self.patience is not None:
            return []
        return [step for step in range(1, last + 1) if self.saves_at(step, last)][-count:]

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
        is_best = state.best_metric is None or metrics["eval_cosine_spearman"] > state.best_metric
        if not is_best and self.is_out_of_patience(state):
            control.should_training_stop = True

    def is_out_of_patience(self, state: TrainerState) -> bool:
        """Tells whether as many evaluations as --early_stopping says came after the best one."""
        if self.patience is None or state.best_global_step is None:
            return False
        return sum(step > state.best_global_step for step, _ in evaluations(state)) >= self.patience

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Keeps the trainer's dictionaries out of the terminal; TensorBoard has them."""


def evaluations(state: TrainerState) -> list[tuple[int, Scores]]:
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


# --- The trainer -----------------------------------------------------------------------------


class RecipeTrainer(SentenceTransformerTrainer):
    """sentence-transformers' trainer on a list of batches, with checkpoints that are whole.

    `batches` is the whole run as one list: nothing is drawn while training, so that a resumed run
    sees the batches it would have seen. The best checkpoint and the last one are kept, which holds
    the mean of the last `keep_last` (with --early_stopping all of them stay).
    """

    data_collator_class = ArrayCollator

    def __init__(
        self, batches: list[list[int]], keep_last: int, points: EvaluationPoints, **kwargs: Any
    ) -> None:
        self.batches, self.keep_last, self.points = batches, keep_last, points
        self.unchecked: list[tuple[int, dict[str, Any], torch.Tensor]] = []  # step, batch, loss
        super().__init__(**kwargs)
        self.remove_callback(ProgressCallback)
        self.add_callback(points)

    def get_multi_dataset_batch_sampler(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        return self.batches

    def _build_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """Has processes that tokenize forked, also by Python 3.14: others are sent the model."""
        loader = super()._build_dataloader(*args, **kwargs)
        if loader.num_workers:
            loader.multiprocessing_context = "fork"
        return loader

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """Leaves the library's card out: it asks the Hub; `model_card.model_card` is ours."""

    @contextlib.contextmanager
    def as_saved(self) -> Iterator[None]:
        """Has the model compute in fp32, also while training with bf16 or fp16."""
        mixed_precision_forward = self.model.__dict__.pop("forward", None)  # accelerate's
        try:
            yield
        finally:
            if mixed_precision_forward:
                self.model.forward = mixed_precision_forward

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Scores the weights as they are saved.

        On all processes: the library lets them encode shares of the sentences.
        """
        self.check_losses()
        with self.as_saved():
            return super().evaluation_loop(*args, **kwargs)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return move_batch(inputs, self.args.device, masks_on_host=is_packed(self.model))

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        batch = dict(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.unchecked.append((self.state.global_step + 1, batch, loss))
        if len(self.unchecked) >= self.args.logging_steps:
            self.check_losses()
        return loss

    def check_losses(self) -> None:
        """Raises `FloatingPointError` that names the first batch whose loss is not finite.

        Of all steps since the last call: each look at a loss would wait for that step's backward.
        """
        unchecked, self.unchecked = self.unchecked, []
        losses = torch.stack([loss for *_, loss in unchecked]).tolist() if unchecked else []
        for (step, batch, _), loss in zip(unchecked, losses, strict=True):
            if not math.isfinite(loss):
                texts = [
                    self.processing_class.decode(row, skip_special_tokens=True)
                    for name in sorted(batch)
                    if name.endswith("input_ids")
                    for row in batch[name]
                ]
                raise FloatingPointError(
                    f"step {step}, data set {batch.get('dataset_name')}: the loss is {loss} for "
                    f"the batch: {' | '.join(texts)}"
                )

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self.check_losses()
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with writing(folder):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            with self.as_saved():
                np.save(folder / EMBEDDINGS, check_embeddings(self.model))
            averaged = self.points.averaged_steps(self.state.max_steps, self.keep_last)
            if self.state.global_step in averaged:
                with writing(folder):
                    add_to_mean(folder, self.model, averaged)
            kept = 1 if averaged else self.keep_last
            seal_checkpoint(folder, self.state.best_global_step, kept)


def recipe_trainer(
    run: Run,
    model: SentenceTransformer,
    train_data: dict[str, pd.DataFrame],
    losses: dict[str, torch.nn.Module],
    batches: list[list[int]],
    evaluate_at: set[int],
    dev: PairsEvaluator,
    optimizer: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
    callbacks: list[TrainerCallback] | None = None,
    **schedule: Any,
) -> RecipeTrainer:
    """Sets up the trainer of a recipe.

    Args:
        train_data: one table for each loss; its columns are the loss's, in order.
        batches: of the whole run, row numbers counted through train_data's tables.
        evaluate_at: steps after which the dev score is taken; the last step always is one.
        optimizer: a class and its options, instead of the one that `schedule` names.
        schedule: training arguments of transformers: learning rate, warm-up, weight decay,
            clipping, optimizer.
    """
    args = run.args
    say_unknown_tokens(model.tokenizer, train_data)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run.folder / "logs")
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # `accelerate launch` sets it: not ours
    arguments = SentenceTransformerTrainingArguments(
        **schedule,
        output_dir=str(run.folder / "checkpoints"),
        num_train_epochs=1,  # `batches` is the whole run
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        bf16=run.precision == "bf16",
        fp16=run.precision == "fp16",
        use_cpu=not torch.accelerator.is_available(),
        prompts=default_prompt(model) or None,
        seed=args.seed,
        eval_strategy="no",  # EvaluationPoints decides when
        eval_on_start=run.checkpoint is None,
        save_strategy="steps",
        save_steps=sys.maxsize,
        metric_for_best_model="cosine_spearman",
        greater_is_better=True,
        logging_steps=10,
        logging_nan_inf_filter=False,
        dataloader_pin_memory=False,  # `move_batch` does: the library's thread gets in the way
        dataloader_num_workers=tokenizing_processes(),
        report_to=["tensorboard"],
    )
    if arguments.n_gpu > 1:
        print(
            f"note: one of {arguments.n_gpu} GPUs trains; for all of them: "
            f"torchrun --nproc_per_node {arguments.n_gpu} {shlex.join(sys.argv)}",
            file=sys.stderr,
        )
        arguments._n_gpu = 1  # transformers would split each batch among threads
    return RecipeTrainer(
        model=model,
        args=arguments,
        train_dataset=DatasetDict(
            {name: Dataset.from_pandas(table) for name, table in train_data.items()}
        ),
        loss=losses,
        evaluator=dev,
        batches=batches,
        keep_last=args.average_checkpoints,
        points=EvaluationPoints(evaluate_at, args.save_steps, args.early_stopping, dev),
        optimizer_cls_and_kwargs=optimizer,
        callbacks=callbacks,
    )


def train(run: Run, trainer: RecipeTrainer) -> Result:
    """Trains, or goes on with --resume, and returns what dev likes best of what that gave."""
    dev = trainer.points.dev
    started_at = step_of(run.checkpoint) if run.checkpoint else 0
    if run.args.resume:
        where = run.checkpoint or "the start: no checkpoint yet"
        print(f"resuming from {where}", file=sys.stderr)
    parts = {"start": process_cost()}
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        before = TrainerState()
        if run.checkpoint:
            before = TrainerState.load_from_json(str(run.checkpoint / "trainer_state.json"))
        if trainer.points.is_out_of_patience(before):
            trainer.state = before  # it was killed after its last evaluation
        else:
            trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else None)
    except KeyboardInterrupt:
        options = [option for option in sys.argv[1:] if option != "--resume"]
        if "--run_dir" not in options:
            options += ["--run_dir", str(run.folder)]
        command = shlex.join(["python", sys.argv[0], *options, "--resume"])
        print(f"\nstopped; to go on: {command}", file=sys.stderr)
        raise
    finally:
        if trainer.points.training_bar is not None:
            trainer.points.training_bar.close()  # an error gets a line of its own
    parts["training"] = cost(
        time.perf_counter() - wall - dev.wall_seconds, time.process_time() - cpu - dev.cpu_seconds
    )
    parts["dev scores"] = cost(dev.wall_seconds, dev.cpu_seconds)
    best_step, evaluated = trainer.state.best_global_step, evaluations(trainer.state)
    best, chosen, tried = trainer.model, f"step {best_step}", {}
    # Gradients and the optimizer's moments have done their work: means take as much memory.
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.accelerator.free_memory()
    trainer.model.zero_grad(set_to_none=True)
    if run.is_main:
        with cost_of("reading back", parts):
            best = read_back(
                run.folder / "checkpoints" / f"checkpoint-{best_step}",
                trainer.state.best_metric,
                run.args.max_seq_length,
                trust_remote_code=run.args.trust_remote_code,
            )
        if run.args.average_checkpoints > 1 or run.args.start_weight:
            with cost_of("means", parts):
                scores = dict(evaluated)[best_step]
                best, chosen, tried = try_means(run, dev, best, best_step, scores)
    figures = {
        "steps": trainer.state.global_step - started_at,
        "precision": run.precision,
        "prompt": default_prompt(trainer.model),
        "parts": parts,
    }
    return Result(best, dev, evaluated, best_step, tried, chosen, figures)
