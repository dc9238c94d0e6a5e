"""Scores sentence encoders on KorSTS-test (or KLUE-STS dev), and keeps the results.

    python benchmark.py                                   # the published models and the baselines
    python benchmark.py jhgan/ko-sroberta-multitask output/my-run onnx/models/model.onnx
    python benchmark.py --matryoshka_model output/my-run --matryoshka_dims 768,256,64
    python benchmark.py --compare output/my-run klue/roberta-base
    python benchmark.py --update_readme                   # tables and plots from results/*.json

Each model gets one file in results/; common/results.py says what is in it.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import math
import re
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.util.quantization import quantize_embeddings

from common import experiment_log, plots, results, whole_runs
from common.command_line import (
    REPOSITORY,
    Once,
    UserError,
    command_line,
    expanded,
    file_sha256,
    first_line,
    stored_command,
)
from common.data import DATA_DIR, file_record, read_klue_sts, read_korsts
from common.encoders import HUB_ERRORS, POOLINGS, default_prompt, load_encoder, weight_files
from common.evaluation import bootstrap, correlations, f1, interval
from common.exported import OnnxEncoder, files_of
from common.machine import device_name
from common.scoring import Encoder, check_pairs, encode_pairs
from common.splits import overlap

MODELS = [
    "jhgan/ko-sroberta-multitask",
    "jhgan/ko-sbert-multitask",
    "jhgan/ko-sroberta-nli",
    "jhgan/ko-sbert-nli",
    "jhgan/ko-sroberta-sts",
    "jhgan/ko-sbert-sts",
    "jhgan/ko-sroberta-multitask-mrl",
    "jhgan/ko-sroberta-nli-mrl",
    "jhgan/ko-sroberta-sts-mrl",
    "sentence-transformers/paraphrase-multilingual-mpnet-base-v2",
    "sentence-transformers/distiluse-base-multilingual-cased-v1",
    "sentence-transformers/distiluse-base-multilingual-cased-v2",
    "sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2",
]
MEASUREMENTS = REPOSITORY / "measurements"
MATRYOSHKA_DIMS = [768, 512, 256, 128, 64, 32]
PACKAGES = ("sentence-transformers", "transformers", "torch", "onnxruntime", "tokenizers", "numpy")
KLUE_FILE = "klue-sts-v1.1_dev.json"
KLUE_ON_THE_HUB = "sts/validation-00000-of-00001.parquet"


# --- 1. Arguments ----------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    """Reads the command line. Raises `UserError` for what does not fit together."""
    parser = argparse.ArgumentParser(
        description="Eight correlations of sentence encoders with human scores, with intervals.",
        epilog="Without MODEL: the six published models, the three -mrl ones, four baselines.",
    )
    add = parser.add_argument
    add("models", nargs="*", metavar="MODEL", help="Hub name, folder, or .onnx file")
    add("--name", help="the row's name; default: the Hub name, or the last part of the path")
    add("--dataset", choices=("korsts", "klue-sts"), default="korsts")
    klue_help = f"folder of KorSTS/sts-test.tsv, or of {KLUE_FILE} (if not there: from the Hub)"
    add("--data_dir", type=Path, default=DATA_DIR, help=klue_help)
    add("--results_dir", type=Path, default=REPOSITORY / "results", help="default: results/ here")
    matryoshka_help = "a MODEL, scored at several dims, encoded once; may be given several times"
    many = {"action": "append", "default": []}
    add("--matryoshka_model", **many, metavar="M", help=matryoshka_help)
    add("--matryoshka_dims", help="falling, with commas; default 768,512,256,128,64,32")
    add("--prompt", help="put before each sentence; default: what the model declares")
    precision_help = "embeddings as an index keeps them (int8: in the ranges of these sentences)"
    precisions = ("float32", "int8", "binary")
    add("--embedding_precision", choices=precisions, default="float32", help=precision_help)
    compare_help = (
        "print score A - score B with its paired bootstrap interval; writes no file. The interval "
        "is over the pairs of the corpus: another training seed may differ by more. A1,A2,... "
        "stands for the mean of the scores of several models, such as the seeds of one recipe"
    )
    once = {"action": Once, "const": "one comparison at a time"}
    add("--compare", **once, nargs=2, metavar=("A", "B"), help=compare_help)
    leave_out_help = (
        "with --compare: leave out the pairs that occur in KorSTS's train or dev file in either "
        "order, or all pairs with one of their sentences"
    )
    add("--leave_out", choices=("pairs", "sentences"), help=leave_out_help)
    pooling_help = "of plain encoders, whose folders declare none (default: mean)"
    add("--pooling", choices=POOLINGS, help=pooling_help)
    add("--trust_remote_code", action="store_true", help="run Python code that a model carries")
    readme_help = (
        "write the generated tables of all Markdown files here (or of FILE) from results/ and "
        "measurements/, and the plots to results_dir"
    )
    files = {"action": "extend", "nargs": "*", "type": Path, "metavar": "FILE"}
    add("--update_readme", **files, help=readme_help)
    args = parser.parse_args()

    if args.matryoshka_dims and not args.matryoshka_model:
        raise UserError("--matryoshka_dims goes with --matryoshka_model")
    if args.compare and (args.models or args.matryoshka_model or args.name):
        raise UserError("--compare takes its two models and no others, and no --name")
    if args.leave_out and not (args.compare and args.dataset == "korsts"):
        raise UserError("--leave_out goes with --compare, on KorSTS")
    args.dims = MATRYOSHKA_DIMS
    if args.matryoshka_dims:
        is_list = re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", args.matryoshka_dims)
        args.dims = [int(dim) for dim in args.matryoshka_dims.split(",")] if is_list else []
        if not is_list or args.dims != sorted(set(args.dims), reverse=True):
            raise UserError(f"--matryoshka_dims {args.matryoshka_dims}: not like 768,256,64")
    args.models += [model for model in args.matryoshka_model if model not in args.models]
    if not (args.models or args.compare) and args.update_readme is None:
        args.models = MODELS
    if args.name and len(args.models) != 1:
        raise UserError("--name names the row of one MODEL")
    names = [args.name or row_name(model) for model in args.models]
    for model, name in zip(args.models, names, strict=True):
        if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
            is_there = args.name or is_local(model)
            reason = "no name" if is_there else "no such folder, and no name"
            raise UserError(f"{name}: {reason} for a row (letters, digits, - . _): give --name")
        if names.count(name) > 1:
            raise UserError(f"two rows would be named {name}: run one at a time, with --name")
    return args


def is_local(model: str) -> bool:
    """Tells a folder or .onnx file from a name on the Hub."""
    return model.endswith(".onnx") or expanded(model).is_dir()


def row_name(model: str) -> str:
    """Names a row: the Hub name, or the last part of a local path. No path is stored."""
    name = expanded(model).resolve().name if is_local(model) else model
    return name.removesuffix(".onnx")


# --- 2. Data ---------------------------------------------------------------------------------


def read_data(dataset: str, data_dir: Path) -> tuple[pd.DataFrame, dict]:
    """Returns sentence1, sentence2, score (and label for KLUE-STS), and what describes the file."""
    if dataset == "korsts":
        path = data_dir / "KorSTS" / "sts-test.tsv"
        table = read_korsts(path)
    elif (path := data_dir / KLUE_FILE).is_file():
        table = read_klue_sts(path)
    else:
        print(f"{path}: not there; KLUE-STS comes from the Hub, klue/klue", file=sys.stderr)
        try:
            path = Path(hf_hub_download("klue/klue", KLUE_ON_THE_HUB, repo_type="dataset"))
        except HUB_ERRORS as error:
            reason = first_line(error)
            raise UserError(f"no {path}, and klue/klue cannot be downloaded: {reason}") from None
        table = read_klue_sts(path)
    check_pairs(table, str(path))
    record = file_record(path, len(table))
    record["distinct_sentences"] = len(set(table["sentence1"]) | set(table["sentence2"]))
    del record["rows_left_out"]
    return table, record


def leave_out_seen(table: pd.DataFrame, data_dir: Path, what: str) -> pd.DataFrame:
    """Returns the test pairs that are not in the train and dev files: as pairs, or by sentence."""
    files = [data_dir / "KorSTS" / f"sts-{name}.tsv" for name in ("train", "dev")]
    has_pair, has_sentence = overlap(
        table[["sentence1", "sentence2"]], [read_korsts(file) for file in files]
    )
    is_seen = has_sentence if what == "sentences" else has_pair
    print(f"left out, in sts-train.tsv or sts-dev.tsv: {is_seen.sum():,} pairs")
    table = table[~is_seen].reset_index(drop=True)
    check_pairs(table, f"what --leave_out {what} leaves")
    return table


# --- 3. Models -------------------------------------------------------------------------------


def load(model: str, args: argparse.Namespace) -> tuple[Encoder, str]:
    """Returns the encoder and its prompt: the user's, else what the model declares as default."""
    if model.endswith(".onnx"):
        if args.pooling:
            raise UserError(f"--pooling {args.pooling}: {model} has its own pooling")
        encoder = OnnxEncoder(expanded(model))
        declared = encoder.settings.get("prompt") or ""
    else:
        encoder = load_encoder(
            model,
            pooling=args.pooling,
            trust_remote_code=args.trust_remote_code,
        )
        declared = default_prompt(encoder)
        others = {name: text for name, text in encoder.prompts.items() if text}
        if others and not declared and args.prompt is None:
            print(f"{model}: no prompt is its default, none used of {others}", file=sys.stderr)
    return encoder, declared if args.prompt is None else args.prompt


def describe(model: str, encoder: Encoder) -> dict:
    """Returns what identifies the model: see `model` in the schema above."""
    if isinstance(encoder, OnnxEncoder):
        folder, weights = encoder.path.parent, files_of(encoder.path)
        parameters, pooling_added, pooling = None, False, encoder.settings.get("pooling")
        dimension, revision = encoder.dimension, None
    else:
        folder = expanded(model) if is_local(model) else cached_folder(model)
        revision = None if is_local(model) else folder.name
        weights = weight_files(folder)
        parameters = sum(parameter.numel() for parameter in encoder.parameters())
        pooling_added = not (folder / "modules.json").is_file()
        pooling = next((m.pooling_mode for m in encoder if isinstance(m, Pooling)), None)
        dimension = encoder.get_embedding_dimension()
    length = encoder.max_seq_length
    return {
        "revision": revision,
        "weights": {p.relative_to(folder).as_posix(): file_sha256(p) for p in weights},
        "size_bytes": sum(path.stat().st_size for path in weights),
        "parameters": parameters,
        "dimension": dimension,
        "max_seq_length": length if math.isfinite(length) else None,  # static embeddings: any
        "pooling_added": pooling_added,
        "pooling": pooling,
    }


def cached_folder(name: str) -> Path:
    """Returns the folder of a model that was just loaded from the Hub: snapshots/COMMIT."""
    files = (try_to_load_from_cache(name, file) for file in ("modules.json", "config.json"))
    return next(Path(file).parent for file in files if isinstance(file, str))


# --- 4. Embeddings and scores ----------------------------------------------------------------


def quantize(embeddings: np.ndarray, precision: str) -> np.ndarray:
    """Quantises as sentence-transformers' evaluator does: normalised first, binary as bits."""
    if precision == "float32":
        return embeddings
    normalized = torch.nn.functional.normalize(torch.from_numpy(embeddings), dim=1).numpy()
    if precision == "binary":
        return np.unpackbits(quantize_embeddings(normalized, "ubinary"), axis=1)
    return quantize_embeddings(normalized, precision)


def score(
    embeddings: np.ndarray, pairs: np.ndarray, table: pd.DataFrame, precision: str
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Returns scores and their bootstrap samples.

    Raises:
        ValueError: NaN or constant embeddings.
    """
    correlations(*embeddings[pairs], table["score"])  # once quantised, NaN would look like a number
    first, second = quantize(embeddings, precision)[pairs]
    scores, labels = correlations(first, second, table["score"]), table.get("label")
    if labels is not None:
        scores["f1"] = f1(first, second, labels)
    return scores, bootstrap(first, second, table["score"], labels)


def benchmark(
    model: str, args: argparse.Namespace, table: pd.DataFrame, data: dict, dims: list[int]
) -> dict:
    """Scores one model, whole and at `dims`. Raises `UserError` naming the model."""
    encoder, prompt = load(model, args)
    description = describe(model, encoder)
    if dims and dims[0] > (dimension := description["dimension"]):
        raise UserError(f"--matryoshka_dims {dims[0]}: {model} has {dimension} dimensions")
    name = args.name or row_name(model)
    row = {"name": name, "dataset": args.dataset, "embedding_precision": args.embedding_precision}
    results.check_file(args.results_dir, row | {"model": description})
    start = time.perf_counter()
    embeddings, pairs = encode_pairs(encoder, table, prompt, progress=name)
    seconds = time.perf_counter() - start

    def entry(embeddings: np.ndarray) -> dict:
        scores, samples = score(embeddings, pairs, table, args.embedding_precision)
        return {"scores": scores, "intervals": {key: interval(samples[key]) for key in scores}}

    try:
        entries = entry(embeddings)
        if dims:
            entries["dims"] = {str(dim): entry(embeddings[:, :dim]) for dim in dims}
    except ValueError as error:
        raise UserError(f"{model}: {error}") from None
    return {
        "name": name,
        "link": None if is_local(model) else f"https://huggingface.co/{model}",
        "source": "measured",
        "dataset": args.dataset,
        **entries,
        "data": data,
        "model": description,
        "prompt": prompt,
        "embedding_precision": args.embedding_precision,
        "precision": "as exported" if isinstance(encoder, OnnxEncoder) else "float32",
        "device": device_name(encoder.device),
        "threads": encoder.threads if isinstance(encoder, OnnxEncoder) else torch.get_num_threads(),
        "sentences_per_second": round(len(embeddings) / seconds, 2),
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": stored_command(),
    }


def compare(args: argparse.Namespace, table: pd.DataFrame) -> None:
    """Prints each score of A and B, their difference and its interval, and a verdict."""
    sides = []
    for side in args.compare:
        found = []
        for model in side.split(","):
            encoder, prompt = load(model, args)
            embeddings, pairs = encode_pairs(encoder, table, prompt, progress=row_name(model))
            try:
                found.append(score(embeddings, pairs, table, args.embedding_precision))
            except ValueError as error:
                raise UserError(f"{model}: {error}") from None
        # All models see the same resamples, so that means of samples are samples of the mean.
        sides.append(
            [{key: np.mean([one[key] for one in part], axis=0) for key in part[0]}
             for part in zip(*found, strict=True)]
        )  # fmt: skip
    (scores_a, samples_a), (scores_b, samples_b) = sides
    print(f"{'x100':20}{'A':>8}{'B':>8}{'A - B':>8}   95% interval")
    for key, a in scores_a.items():
        low, high = interval(samples_a[key] - samples_b[key])
        print(
            f"{key:20}{100 * a:8.2f}{100 * scores_b[key]:8.2f}{100 * (a - scores_b[key]):+8.2f}"
            f"   {100 * low:+.2f} to {100 * high:+.2f}"
        )
    for side, (point, samples) in zip("AB", sides, strict=True):
        low, high = (100 * end for end in interval(samples["cosine_spearman"]))
        print(
            f"{side}: cosine Spearman {100 * point['cosine_spearman']:.2f} [{low:.2f}, {high:.2f}]"
        )
    low, high = interval(samples_a["cosine_spearman"] - samples_b["cosine_spearman"])
    a, b = (",".join(map(row_name, side.split(","))) for side in args.compare)
    verdict = f"{a} is better than {b}" if low > 0 else f"{b} is better than {a}"
    holds_zero = low <= 0 <= high
    print(
        f"cosine Spearman: {'no difference shown, the interval holds 0' if holds_zero else verdict}"
    )


# --- 5. Tables and plots ---------------------------------------------------------------------


def generated_parts(results_dir: Path) -> dict[str, str]:
    """Returns the generated parts of the Markdown files by the name of their marker."""
    rows = results.read_results(results_dir)
    parts = results.tables(rows) | {"onnx": results.onnx_part(results_dir)}
    parts |= experiment_log.generated_parts(results_dir, MEASUREMENTS)
    comparisons = experiment_log.read_comparisons(MEASUREMENTS / "v2.txt")
    return parts | whole_runs.generated_parts(MEASUREMENTS / "whole_run.json", rows, comparisons)


def update_tables(files: list[Path], results_dir: Path) -> None:
    """Writes the generated parts of the Markdown files (none: all of them), and the plots."""
    if not results_dir.is_dir():
        raise UserError(f"--results_dir {results_dir}: no such folder: no tables to write")
    parts = generated_parts(results_dir)
    for file in files or results.markdown_files(REPOSITORY):
        results.write_parts(file, parts)
    rows = results.read_results(results_dir)
    plots.draw_plots([row for row in rows if row["dataset"] == "korsts"], results_dir, MEASUREMENTS)


def main() -> None:
    """Runs what the command line asks for."""
    args = parse_arguments()
    measured, failed = [], False
    if args.models or args.compare:
        table, data = read_data(args.dataset, args.data_dir)
        print(f"{data['file']}: {len(table):,} pairs, {data['distinct_sentences']:,} sentences")
    if args.leave_out:
        table = leave_out_seen(table, args.data_dir, args.leave_out)
    if args.compare:
        compare(args, table)
    for model in args.models:
        is_published_mrl = args.models is MODELS and model.endswith("-mrl")
        dims = args.dims if is_published_mrl or model in args.matryoshka_model else []
        try:
            measured.append(benchmark(model, args, table, data, dims))
        except UserError as error:
            if len(args.models) == 1:
                raise
            print(f"error: {error}", file=sys.stderr)
            failed = True
            continue
        results.write_result(args.results_dir, measured[-1])
    if measured:
        print(results.score_table(measured))
    if rows := [row for row in measured if "dims" in row]:
        print(f"\nCosine Spearman by dimension:\n{results.dims_table(rows)}")
    if args.update_readme is not None:
        update_tables(args.update_readme, args.results_dir)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    with command_line():
        main()
