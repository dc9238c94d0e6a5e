"""Fine-tunes a trained encoder on your own scored pairs: a CSV of sentence1, sentence2, score.

    python fine_tune_your_own.py pairs.csv --output my-model

A tenth of the pairs is the dev set; training leaves out pairs that share a sentence with it.
Prints dev cosine Spearman x100 before and after, and saves the last weights (nothing is chosen).
"""

import argparse
import csv
import os
import sys
from pathlib import Path
from pickle import UnpicklingError

import pandas as pd
import torch
from datasets import Dataset
from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer as Encoder
from sentence_transformers import SentenceTransformerTrainer as Trainer
from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from sentence_transformers.sentence_transformer.losses import CoSENTLoss

for stream in (sys.stdout, sys.stderr):
    stream.reconfigure(errors="replace")  # what the console's encoding does not have
parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("pairs", help="CSV in UTF-8; other columns are left alone")
parser.add_argument("--output", required=True, help="new folder")
parser.add_argument("--model", default="jhgan/ko-sroberta-multitask", help="Hub name or folder")
parser.add_argument("--scale", type=float, default=5, help="the highest score; 0 is the lowest")
parser.add_argument("--num_epochs", type=int, default=4)
args = parser.parse_args()
rows, columns, place = [], ["sentence1", "sentence2", "score"], args.pairs
try:
    with open(args.pairs, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        if not set(columns) <= set(reader.fieldnames or []):
            raise ValueError(f"needs the columns {', '.join(columns)}")
        for row in reader:
            place = f"{args.pairs}:{reader.line_num}"
            if None in row or None in row.values():
                raise ValueError("not as many fields as the header: quote text that has commas")
            first, second, score = row["sentence1"], row["sentence2"], float(row["score"])
            if not (first.strip() and second.strip() and 0 <= score <= args.scale):
                raise ValueError(f"needs two sentences and a score from 0 to {args.scale:g}")
            rows.append((first, second, score / args.scale))
    pairs = pd.DataFrame(rows, columns=columns)
    dev = pairs.sample(frac=0.1, random_state=777)
    shared = pairs[columns[:2]].isin({*dev["sentence1"], *dev["sentence2"]}).any(axis=1)
    if len(train := pairs[~shared]) < 32 or dev["score"].nunique() < 2:
        raise ValueError(f"too few pairs: {len(train)} for training, {len(dev)} for dev")
    # float32: weights kept in half precision would train, and be rounded, in it.
    model = Encoder(place := args.model, model_kwargs={"dtype": torch.float32})
    os.makedirs(place := args.output)  # refused where there is something already
except (OSError, ValueError, csv.Error, SafetensorError, UnpicklingError) as error:
    why = " ".join(str(error).split())
    for path in Path(args.model).rglob("*") if place is args.model else ():
        if path.is_file() and path.stat().st_size < 200 and b"git-lfs" in path.read_bytes():
            why = f"{path.name} is a Git-LFS pointer, not the weights: run git lfs pull"
    parser.exit(2, f"error: {place}: {why}\n")
dev_columns = [dev[name].tolist() for name in columns]
evaluate = EmbeddingSimilarityEvaluator(*dev_columns, similarity_fn_names=["cosine"])
print(f"{len(train)} training pairs, {len(dev)} dev pairs")
print(f"before: {100 * evaluate(model)['spearman_cosine']:.2f}", flush=True)
options = Arguments(args.output, save_strategy="no", report_to="none")
# What the model puts before every sentence, in training too.
options.prompts = model.prompts.get(model.default_prompt_name) or None
options.num_train_epochs, options.per_device_train_batch_size = args.num_epochs, 32
data = Dataset.from_pandas(train, preserve_index=False)
Trainer(model, options, data, loss=CoSENTLoss(model)).train()
print(f"after: {100 * evaluate(model)['spearman_cosine']:.2f}")
model.save_pretrained(f"{args.output}.unfinished", create_model_card=False)  # it would quote you
os.replace(f"{args.output}.unfinished", args.output)
