"""Times benchmark.py against the evaluator of sentence-transformers 2.7, as the original used it.

    python measurements/measure_benchmark.py --old_python OLD/bin/python \
        --model models/e5-small-ko --data_dir KorNLUDatasets

OLD is an environment with sentence-transformers 2.7 and transformers 4. Timed are encoding and the
eight scores, of one model and of six Matryoshka dims; loading, warming up and intervals are left
out. Old and new take turns; medians go to benchmark.json beside this script. Give it a
machine with nothing else to do.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.append(str(REPOSITORY))

from common.command_line import UserError, command_line, write_json  # noqa: E402

TIMED = ("one_model", "six_dims")
DIMS = (384, 256, 192, 128, 64, 32)


def time_old(model_folder: str, data_file: str) -> dict[str, float]:
    """The original's way: one evaluator for each dimension, each encoding both columns."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.evaluation import EmbeddingSimilarityEvaluator

    with open(data_file, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    sides = [[row[name] for row in rows] for name in ("sentence1", "sentence2")]
    scores = [float(row["score"]) / 5 for row in rows]
    model = SentenceTransformer(model_folder)
    model.encode(sides[0][:64])

    def evaluate(dim: int | None) -> None:
        EmbeddingSimilarityEvaluator(*sides, scores, truncate_dim=dim, write_csv=False)(model)

    return {"one_model": lap(evaluate, [None]), "six_dims": lap(evaluate, DIMS)}


def time_new(model_folder: str, data_file: str) -> dict[str, float]:
    """The way of benchmark.py: distinct sentences once, slices of the same embeddings."""
    from common.data import read_korsts
    from common.encoders import load_encoder
    from common.evaluation import correlations
    from common.scoring import encode_distinct, encode_pairs

    table = read_korsts(data_file)
    model = load_encoder(model_folder)
    encode_distinct(model, table["sentence1"].tolist()[:64])

    def evaluate(dims: tuple[int | None, ...]) -> None:
        embeddings, pairs = encode_pairs(model, table)
        for dim in dims:
            correlations(*embeddings[pairs][..., :dim], table["score"])

    return {"one_model": lap(evaluate, [(None,)]), "six_dims": lap(evaluate, [DIMS])}


def lap(function: Callable[[Any], None], arguments: Iterable[Any]) -> float:
    """Returns the seconds that calls with each of the arguments take."""
    start = time.perf_counter()
    for argument in arguments:
        function(argument)
    return time.perf_counter() - start


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--old_python", help="interpreter with sentence-transformers 2.7")
    parser.add_argument("--model", required=True)
    parser.add_argument("--data_dir", type=Path, default=REPOSITORY / "KorNLUDatasets")
    parser.add_argument("--repeats", type=int, default=3)
    output = Path(__file__).with_name("benchmark.json")
    parser.add_argument("--output", type=Path, default=output, help="default: beside this script")
    parser.add_argument("--child", choices=("old", "new"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    data_file = str(args.data_dir / "KorSTS" / "sts-test.tsv")
    if not Path(data_file).is_file():
        raise UserError(f"{data_file}: no such file")
    if args.child:
        import torch

        function = {"old": time_old, "new": time_new}[args.child]
        seconds = function(args.model, data_file)
        print(json.dumps(seconds | {"threads": torch.get_num_threads()}))
        return
    if not args.old_python:
        raise UserError("--old_python is needed")
    laps: dict[str, list[dict[str, float]]] = {"old": [], "new": []}
    for _ in range(args.repeats):
        for way, python in (("old", args.old_python), ("new", sys.executable)):
            command = [python, __file__, "--child", way, "--model", args.model]
            command += ["--data_dir", str(args.data_dir)]
            environment = os.environ | {"HF_HUB_OFFLINE": "1"}
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environment)
            laps[way].append(json.loads(done.stdout.splitlines()[-1]))
            print(way, laps[way][-1], file=sys.stderr)
    seconds = {
        way: {key: statistics.median(lap[key] for lap in laps[way]) for key in TIMED}
        for way in laps
    }
    report = {
        "model": Path(args.model).name,
        "data": "sts-test.tsv",
        "repeats": args.repeats,
        "median_seconds": seconds,
        "times_as_fast": {key: seconds["old"][key] / seconds["new"][key] for key in TIMED},
        "laps": laps,
    }
    write_json(args.output, report)
    print(json.dumps({key: report[key] for key in ("median_seconds", "times_as_fast")}, indent=2))


if __name__ == "__main__":
    with command_line():
        main()
