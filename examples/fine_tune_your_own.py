"""Fine-tunes a trained sentence encoder on your own scored sentence pairs: a CSV file in UTF-8.

    pip install "sentence-transformers[train]"
    python fine_tune_your_own.py pairs.csv --output my-model

The columns: sentence1, sentence2 and score (0 to --scale); others are left alone. About a tenth of
the pairs is kept back as dev set and shares no sentence with the others. It chooses nothing: the
last weights are saved. Prints cosine Spearman x100 on it, here of 1,000 KorSTS pairs and another
encoder (multilingual-e5-small):

    900 pairs for training, 100 for dev
    before: 84.03
    after: 87.42
"""

import argparse
import contextlib
import csv
import os
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

import numpy as np
import pandas as pd
from datasets import Dataset
from safetensors import SafetensorError
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from sentence_transformers.sentence_transformer.losses import CoSENTLoss
from sentence_transformers.sentence_transformer.training_args import (
    SentenceTransformerTrainingArguments,
)

COLUMNS = ["sentence1", "sentence2", "score"]
BATCH_SIZE = 32  # CoSENT compares the pairs of a batch with each other: not too small
LEAST_DEV_PAIRS = 10


def fail(message: object) -> NoReturn:
    """Ends as for every bad argument or file: one line on stderr, exit status 2."""
    print(f"error: {message}".splitlines()[0], file=sys.stderr)
    sys.exit(2)


def read_pairs(path: Path, scale: float) -> pd.DataFrame:
    """Returns the file's COLUMNS, with scores in [0, 1]. Ends at the first line that is wrong."""
    if not path.is_file():
        fail(f"{path}: no such file")
    rows = []
    with path.open("rb") as file:
        reader = csv.DictReader((line.decode("utf-8-sig") for line in file), strict=True)
        try:
            if missing := [name for name in COLUMNS if name not in (reader.fieldnames or [])]:
                raise ValueError(f"no column {', '.join(missing)}")
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError("not as many fields as the header: quote text with commas")
                if not (row["sentence1"].strip() and row["sentence2"].strip()):
                    raise ValueError("a sentence is blank")
                if not 0 <= float(row["score"]) <= scale:
                    raise ValueError(f"score {row['score']} is outside 0 to {scale:g} (--scale)")
                rows.append([row["sentence1"], row["sentence2"], float(row["score"]) / scale])
        except UnicodeDecodeError:
            fail(f"{path}:{reader.reader.line_num + 1}: not UTF-8 (in Excel, save as CSV UTF-8)")
        except (ValueError, csv.Error) as error:
            fail(f"{path}:{reader.reader.line_num or 1}: {error}")
    return pd.DataFrame(rows, columns=COLUMNS)


def split(pairs: pd.DataFrame, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Returns (train, dev). Pairs that share a sentence, even through others, stay together."""
    ends, texts = pd.factorize(np.concatenate([pairs["sentence1"], pairs["sentence2"]]))
    ends = ends.reshape(2, -1)  # (first or second sentence, pair)
    graph = coo_array((np.ones(len(pairs)), ends), shape=(len(texts), len(texts)))
    groups = connected_components(graph, directed=False)[1][ends[0]]
    sizes, chosen, room = np.bincount(groups), [], len(pairs) // 10
    for group in np.random.default_rng(seed).permutation(len(sizes)):
        if sizes[group] <= room:
            chosen.append(group)
            room -= sizes[group]
    in_dev = np.isin(groups, chosen)
    return pairs[~in_dev], pairs[in_dev]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("pairs", type=Path, metavar="PAIRS.csv", help="scored sentence pairs")
    parser.add_argument(
        "--output", type=Path, required=True, help="new folder", default=argparse.SUPPRESS
    )
    parser.add_argument("--model", default="jhgan/ko-sroberta-multitask", help="Hub name or folder")
    parser.add_argument("--scale", type=float, default=5, help="the highest score; 0 is the lowest")
    parser.add_argument("--num_epochs", type=int, default=4, help="passes over the pairs")
    parser.add_argument("--seed", type=int, default=777, help="decides dev set, order and dropout")
    args = parser.parse_args()
    if args.scale <= 0 or args.num_epochs < 1:
        fail("--scale and --num_epochs: must be positive")
    if args.output.is_file() or (args.output.is_dir() and any(args.output.iterdir())):
        fail(f"{args.output}: is there already: give a new folder")
    train, dev = split(read_pairs(args.pairs, args.scale), args.seed)
    if len(train) < BATCH_SIZE or len(dev) < LEAST_DEV_PAIRS or dev["score"].nunique() < 2:
        few = f"{args.pairs}: too few pairs apart: {len(train)} for training, {len(dev)} for dev"
        fail(f"{few}; {BATCH_SIZE} and {LEAST_DEV_PAIRS} are needed, dev with two scores or more")
    try:
        model = SentenceTransformer(args.model)
    except (OSError, ValueError, SafetensorError) as error:
        fail(f"{args.model}: cannot be loaded from a folder or the Hub: {error}")
    evaluator = EmbeddingSimilarityEvaluator(*map(list, dev.to_numpy().T), main_similarity="cosine")
    print(f"{len(train)} pairs for training, {len(dev)} for dev")
    print(f"before: {100 * evaluator(model)['spearman_cosine']:.2f}", flush=True)

    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output.parent) as folder:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=folder,
            num_train_epochs=args.num_epochs,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=2e-5,
            warmup_steps=0.1,  # of all steps
            seed=args.seed,
            save_strategy="no",
            report_to="none",
        )
        data = Dataset.from_pandas(train, preserve_index=False)
        trainer = SentenceTransformerTrainer(model, arguments, data, loss=CoSENTLoss(model))
        with contextlib.redirect_stdout(sys.stderr):  # the trainer prints its losses
            trainer.train()
        print(f"after: {100 * evaluator(model)['spearman_cosine']:.2f}")
        # No model card: its template would quote your sentences.
        model.save_pretrained(f"{folder}/model", create_model_card=False)
        os.replace(f"{folder}/model", args.output)


if __name__ == "__main__":
    main()
