"""What a recipe trains on and is scored on: files joined, dev split off, what they share."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from transformers import PreTrainedTokenizerBase

from common.command_line import UserError
from common.data import NLI_TRAIN_FILES, file_record, read_korsts
from common.formats import read_nli_triplets, read_pairs
from common.scoring import PairsEvaluator

UNKNOWN_SHARE, UNKNOWN_SAMPLE = 0.05, 1000  # from which share on, in how many rows
# What to do about a default file that is not there.
INSTEAD = {
    "train": "--train_file gives others",
    "dev": "--dev_file gives another, --dev_share (where pairs are trained) takes a part of them",
    "test": "--test_file gives another, --no_test does without",
}
Scored = tuple[pd.DataFrame, str]  # sentence1, sentence2, score; name of their file


@dataclasses.dataclass(frozen=True)
class Data:
    """The data of a run.

    Attributes:
        train: by task, `nli` (anchor, positive[, negative]) before `sts` (sentence1, sentence2,
            score).
        dev: scores the checkpoints, and chooses one.
        test: scores that one; None with --no_test.
        records: what run.json says of each file.
    """

    train: dict[str, pd.DataFrame]
    dev: PairsEvaluator
    test: PairsEvaluator | None
    records: list[dict[str, Any]]


def read_data(args: argparse.Namespace, *tasks: str) -> Data:
    """Reads the files that the options name, KorNLI and KorSTS where they name none.

    Says on stderr how much of the training data is in dev or test, and leaves it out with
    --leave_out.

    Args:
        tasks: `nli`, `sts` or both.

    Raises:
        UserError: a file that is not there or not whole; nothing left to train on; too few pairs
            for a correlation.
    """
    files: list[tuple[Path, int, str]] = []
    scales: list[float | None] = []

    def read(split: str, given: Path | None) -> Scored:
        path = given or args.data_dir / f"KorSTS/sts-{split}.tsv"
        if not given and not path.exists():
            raise UserError(f"{path}: no such file; {INSTEAD[split]}")
        table, scale = read_pairs(path, args.max_score) if given else (read_korsts(path), None)
        scales.append(scale)
        files.append((path, len(table), split))
        return table, path.name

    parts: dict[str, list[Scored]] = {}
    records: list[dict[str, Any]] = []
    if "nli" in tasks:
        paths = args.train_files or [args.data_dir / name for name in NLI_TRAIN_FILES]
        triplets, found = read_nli_triplets(paths, args.seed)
        records = [record | {"split": "train"} for record in found]
        parts["nli"] = [(triplets, " and ".join(path.name for path in paths))]
    if "sts" in tasks:
        parts["sts"] = [read("train", path) for path in args.train_file or [None]]
    share = getattr(args, "dev_share", None)
    dev = None if share else read("dev", args.dev_file)
    test = None if args.no_test else read("test", args.test_file)
    if args.max_score is not None and args.max_score not in scales:
        raise UserError(f"--max_score {args.max_score:g}: no file here needs it")
    records += [file_record(path, rows) | {"split": split} for path, rows, split in files]

    def join(task: str, *scored: Scored | None) -> pd.DataFrame:
        tables = [_without(*part, [s for s in scored if s], args.leave_out) for part in parts[task]]
        return pd.concat(tables, ignore_index=True)

    train = {}
    if share:
        name = " and ".join(name for _, name in parts["sts"])
        train["sts"], table = split_off(join("sts", test), share, args.seed)
        dev = table, f"{share:g} of {name}"
    train = {task: train[task] if task in train else join(task, dev, test) for task in parts}
    for task, table in train.items():
        if table.empty:
            names = " and ".join(name for _, name in parts[task])
            raise UserError(f"{names}: nothing is left to train on")
    dims = args.matryoshka_dims
    return Data(train, PairsEvaluator(*dev, dims), test and PairsEvaluator(*test, dims), records)


# --- What two files share --------------------------------------------------------------------


def overlap(table: pd.DataFrame, others: Sequence[pd.DataFrame]) -> tuple[np.ndarray, np.ndarray]:
    """Tells which rows hold a pair, in either order, and which a sentence of other tables.

    Args:
        table: rows of texts; the first belongs to a pair with each of the others of its row.
        others: pairs: sentence1, sentence2.

    Returns:
        Two boolean arrays (rows,).
    """
    texts = table.select_dtypes(exclude="number")
    known = pd.concat([other[["sentence1", "sentence2"]] for other in others])
    is_known = texts.isin(pd.unique(known.to_numpy().ravel())).to_numpy()
    pairs = {frozenset(pair) for pair in known.to_numpy()}
    has_pair = np.zeros(len(table), dtype=bool)
    # Only where two texts are known can their pair be.
    for row in np.flatnonzero(is_known.sum(axis=1) > 1):
        first, *rest = texts.iloc[row]
        has_pair[row] = any(frozenset((first, other)) in pairs for other in rest)
    return has_pair, is_known.any(axis=1)


def _without(
    table: pd.DataFrame, name: str, scored: Sequence[Scored], leave_out: str | None
) -> pd.DataFrame:
    """Returns the training rows that --leave_out leaves, and says how many are in dev or test."""
    if not scored:
        return table
    has_pair, has_sentence = overlap(table, [pairs for pairs, _ in scored])
    files = " or ".join(file for _, file in scored)
    pairs, sentences = int(has_pair.sum()), int(has_sentence.sum())
    if leave_out:
        wrong = has_pair if leave_out == "pairs" else has_sentence
        what = "a pair" if leave_out == "pairs" else "a sentence"
        said = f"{name}: {wrong.sum():,} of {len(table):,} rows left out: {what} of {files}"
        table = table[~wrong]
    elif sentences:
        said = (
            f"note: {name}: of {len(table):,} rows {pairs:,} hold a pair and {sentences:,} a "
            f"sentence of {files}; --leave_out pairs or sentences leaves them out"
        )
    else:
        return table
    print(said, file=sys.stderr)
    return table


def split_off(table: pd.DataFrame, share: float, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Splits a share of the pairs off, so that no sentence is on both sides.

    Pairs that share a sentence, or are linked by others that do, stay together. Such groups are
    taken in an order that the seed decides, each that still fits.

    Returns:
        What is left, and what was split off: about `share` of the pairs, never more (rounded).
    """
    codes, sentences = pd.factorize(pd.concat([table["sentence1"], table["sentence2"]]))
    first, second = codes.reshape(2, -1)
    size = (len(sentences), len(sentences))
    links = coo_array((np.ones(len(table)), (first, second)), shape=size)
    _, group_of = connected_components(links, directed=False)
    group, sizes = group_of[first], np.bincount(group_of[first])
    room, taken = round(share * len(table)), np.zeros(len(sizes), dtype=bool)
    for number in np.random.default_rng(seed).permutation(len(sizes)):
        if sizes[number] <= room:
            taken[number], room = True, room - sizes[number]
    is_off = taken[group]
    print(
        f"{is_off.sum():,} of {len(table):,} pairs are split off as dev, in {taken.sum():,} of "
        f"{len(sizes):,} groups that share no sentence",
        file=sys.stderr,
    )
    return table[~is_off].reset_index(drop=True), table[is_off].reset_index(drop=True)


def say_unknown_tokens(
    tokenizer: PreTrainedTokenizerBase, train_data: dict[str, pd.DataFrame]
) -> None:
    """Says on stderr which share of the training sentences' tokens the tokenizer does not know."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None:
        return
    for name, table in train_data.items():
        texts = table.select_dtypes(exclude="number").head(UNKNOWN_SAMPLE).to_numpy().ravel()
        encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        tokens = np.concatenate([np.array(ids, dtype=np.int64) for ids in encoded])
        share = (tokens == unknown).mean() if len(tokens) else 0
        if share >= UNKNOWN_SHARE:
            print(
                f"warning: {name}: the tokenizer does not know {share:.0%} of the tokens: is it "
                "one for Korean?",
                file=sys.stderr,
            )
