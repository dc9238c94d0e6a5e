"""The options that all recipes have, and their checks. Names and defaults: the original's."""

from __future__ import annotations

import argparse
import itertools
import math
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from huggingface_hub import get_token

from common.command_line import Once, UserError
from common.data import DATA_DIR
from common.encoders import POOLINGS
from common.run_folder import check_folder

FILES = {"type": Path, "action": "extend", "nargs": "+", "metavar": "FILE"}  # one behind the other
FILE = {"type": Path, "action": Once, "const": "put all pairs in one file", "metavar": "FILE"}


def recipe_parser(
    description: str, output_prefix: str, num_epochs: int, *, scored_pairs: bool = False
) -> argparse.ArgumentParser:
    """Returns a parser with the options that all recipes have. Names and defaults: the original.

    Args:
        scored_pairs: the recipe trains on pairs with scores: --train_file and --dev_share.
    """
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
    add(
        "--pooling",
        choices=POOLINGS,
        help="of a plain encoder, whose folder declares none (default: mean)",
    )
    add(
        "--trust_remote_code",
        action="store_true",
        help="run Python code that the model carries: it can do anything on this machine",
    )
    add = parser.add_argument_group("data of your own (forms: docs/own_data.md)").add_argument
    if scored_pairs:
        add("--train_file", **FILES, help="pairs instead of KorSTS's; of several files all")
        add("--dev_share", type=float, metavar="S", help="split this share of train off as dev")
    add("--dev_file", **FILE, help="pairs instead of KorSTS's dev set")
    add("--test_file", **FILE, help="pairs instead of KorSTS's test set")
    add(
        "--max_score",
        type=float,
        help="the highest possible score of these files; KorSTS and KLUE-STS have 5 anyway",
    )
    add(
        "--leave_out",
        choices=("pairs", "sentences"),
        help="of train, what holds a pair or a sentence of dev (or of test, without --no_test)",
    )
    add = parser.add_argument_group("schedule").add_argument
    add("--num_epochs", type=int, default=num_epochs, help="passes over the data")
    add(
        "--max_steps",
        type=int,
        help="optimizer steps instead of epochs (all tasks counted); the schedule ends there",
    )
    add("--learning_rate", type=float, default=2e-5, help="AdamW's peak, behind the warm-up")
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
        help="instead of the model's own; 0 makes a step on a CPU faster",
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
        help="fp32 as the original; auto takes bf16 where the GPU has it, or the CPU has "
        "instructions for it (avx512_bf16, amx_bf16) and is faster with them",
    )
    add = parser.add_argument_group("Matryoshka (https://arxiv.org/abs/2205.13147)").add_argument
    add(
        "--matryoshka_dims",
        type=_numbers(int),
        metavar="DIM,...",
        help="strictly decreasing, e.g. 768,512,256,128,64,32; the whole width selects the "
        "checkpoint",
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


def start_processes() -> int:
    """Joins torchrun's processes where there are some, and returns how many; 1 without torchrun."""
    # torchrun without a GPU trains on CPUs (gloo): accelerate wants to be told.
    return PartialState(cpu=not torch.accelerator.is_available()).num_processes


def check_options(args: argparse.Namespace, processes: int) -> None:
    """Raises `UserError` for the first option that cannot work, before anything is read.

    Args:
        args: the command line.
        processes: among how many a batch is shared.
    """
    positive = ("max_seq_length", "num_epochs", "max_steps", "learning_rate", "save_steps")
    positive += ("gradient_accumulation_steps", "early_stopping", "batch_size", "mini_batch_size")
    positive += ("average_checkpoints", "max_score")
    for name in (*positive, "nli_batch_size", "sts_batch_size"):
        value = getattr(args, name, None)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name} {value}: must be above 0")
    for option in ("attention_dropout", "hidden_dropout"):
        share = getattr(args, option)
        if share is not None and not 0 <= share < 1:
            raise UserError(f"--{option} {share}: must be from 0 to below 1")
    share = getattr(args, "dev_share", None)
    if share is not None and not 0 < share < 1:
        raise UserError(f"--dev_share {share}: must be above 0 and below 1")
    if share is not None and args.dev_file:
        raise UserError("--dev_share and --dev_file: one of them makes the dev set")
    if not 0 <= args.start_weight < 1:
        raise UserError(f"--start_weight {args.start_weight}: must be from 0 to below 1")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed {args.seed}: must be from 0 to 4294967295")
    if bool(getattr(args, "guide", None)) != (getattr(args, "loss", None) == "gist"):
        raise UserError("--loss gist and --guide MODEL go together")
    dims, weights = args.matryoshka_dims, args.matryoshka_weights
    if weights and not dims:
        raise UserError("--matryoshka_weights: give --matryoshka_dims too")
    if weights and len(weights) != len(dims):
        raise UserError(f"--matryoshka_weights: {len(weights)} weights for {len(dims)} dims")
    if weights and not all(0 < weight < math.inf for weight in weights):
        raise UserError("--matryoshka_weights: must be above 0")
    if dims and (dims[-1] < 1 or any(a <= b for a, b in itertools.pairwise(dims))):
        raise UserError("--matryoshka_dims: must be strictly decreasing and at least 1")
    if args.precision == "fp16" and not torch.cuda.is_available():
        raise UserError("--precision fp16: needs a GPU; fp32, bf16 or auto work here")
    if args.push_to_hub and get_token() is None:
        raise UserError("--push_to_hub: no token: set HF_TOKEN (or log in with `hf auth login`)")
    for name in ("batch_size", "nli_batch_size", "sts_batch_size"):
        size = getattr(args, name, None)
        if size is not None and size % processes:
            raise UserError(f"--{name} {size}: cannot be shared by {processes} processes")
    check_folder(args)
