"""Scores sentence encoders on KorSTS-test (or KLUE-STS dev), and keeps the results.

    python benchmark.py                                   # the published models and the baselines
    python benchmark.py jhgan/ko-sroberta-multitask output/my-run onnx/models/model.onnx
    python benchmark.py --matryoshka_model output/my-run --matryoshka_dims 768,256,64
    python benchmark.py --compare output/my-run klue/roberta-base
    python benchmark.py --update_readme                   # tables and plots from results/*.json

Each model gets one file in results/: NAME.json with slashes as `--`; NAME.int8.json or
NAME.binary.json for quantised embeddings, NAME.klue-sts.json for the other data set, and
NAME.published.json for a result that was read, not measured. Keys:

    name, link      the row's name; its page on the Hub, or null for a local model
    source          "measured" or "published"
    published_in    address where a published result was read
    dataset         "korsts" (test) or "klue-sts" (dev)
    scores          cosine_pearson, cosine_spearman, euclidean_..., manhattan_..., dot_...: -1 to 1
                    at full precision; for klue-sts also f1 (positive from 5 x cosine >= 3.0 on)
    dims            {dimension: {scores, intervals}} of a Matryoshka model's slices
and where it was measured
    intervals       for each score, the ends of its 95% bootstrap interval over the pairs
    data            file, blob_id (git's), published (is it the published file), rows,
                    distinct_sentences
    model           revision (the Hub's commit, or null), weights {file: sha256}, size_bytes,
                    parameters (null for ONNX), dimension, max_seq_length, pooling_added (true: a
                    plain encoder, here given mean pooling)
    prompt, embedding_precision, precision (of the computation), device, threads
    sentences_per_second    distinct sentences, tokenising included, loading left out
    versions, date (UTC), command (paths cut to their last part)
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import onnxruntime
import pandas as pd
import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from matplotlib import font_manager
from sentence_transformers import SentenceTransformer
from sentence_transformers.util.quantization import quantize_embeddings
from tokenizers import Tokenizer
from tqdm import tqdm

from data_util import DATA_DIR, UserError, command_line, file_record, read_klue_sts, read_korsts
from evaluation_util import SCORE_KEYS, bootstrap, correlations, f1, interval
from model_util import load_encoder

REPOSITORY = Path(__file__).resolve().parent
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
MATRYOSHKA_DIMS = [768, 512, 256, 128, 64, 32]
PACKAGES = ("sentence-transformers", "transformers", "torch", "onnxruntime", "tokenizers", "numpy")
# Sentences are sorted by their number of tokens and encoded so many tokens at a time: hardly any
# padding, and on a CPU the fastest of 256 to 2,048.
BATCH_TOKENS = 16_384 if torch.cuda.is_available() else 1_024
PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")
KOREAN_FONTS = {"NanumGothic", "Noto Sans CJK KR", "Malgun Gothic", "AppleGothic"}
KLUE_FILE = "klue-sts-v1.1_dev.json"
KLUE_ON_THE_HUB = "sts/validation-00000-of-00001.parquet"
KLUE_KEYS = ("cosine_pearson", "cosine_spearman", "f1")


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
    add("--matryoshka_model", metavar="M", help="a MODEL, scored at several dims, encoded once")
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
    add("--compare", nargs=2, metavar=("A", "B"), help=compare_help)
    leave_out_help = (
        "with --compare: leave out the pairs that occur in KorSTS's train or dev file in either "
        "order, or all pairs with one of their sentences"
    )
    add("--leave_out", choices=("pairs", "sentences"), help=leave_out_help)
    add("--trust_remote_code", action="store_true", help="run Python code that a model carries")
    readme_help = "write the tables between the markers of README.md, and the plots to results_dir"
    readme = REPOSITORY / "README.md"
    add("--update_readme", nargs="?", type=Path, const=readme, metavar="FILE", help=readme_help)
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
    if args.matryoshka_model and args.matryoshka_model not in args.models:
        args.models.append(args.matryoshka_model)
    if not (args.models or args.update_readme or args.compare):
        args.models = MODELS
    if args.name and len(args.models) != 1:
        raise UserError("--name names the row of one MODEL")
    names = [args.name or row_name(model) for model in args.models]
    for name in names:
        if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
            raise UserError(f"{name}: no such folder, and no name for a row: give --name")
        if names.count(name) > 1:
            raise UserError(f"two rows would be named {name}: run one at a time, with --name")
    return args


def is_local(model: str) -> bool:
    """Tells a folder or .onnx file from a name on the Hub."""
    return model.endswith(".onnx") or Path(model).expanduser().is_dir()


def row_name(model: str) -> str:
    """Names a row: the Hub name, or the last part of a local path. No path is stored."""
    name = Path(model).expanduser().resolve().name if is_local(model) else model
    return name.removesuffix(".onnx")


def stored_command() -> str:
    """Returns the command line with paths cut to their last part."""

    def shorten(argument: str) -> str:
        option, equals, value = (
            argument.rpartition("=") if argument[:2] == "--" else ("", "", argument)
        )
        looks_local = value.startswith((".", "~", os.sep)) or Path(value).exists()
        return option + equals + (Path(value).expanduser().resolve().name if looks_local else value)

    return shlex.join(["python", "benchmark.py", *map(shorten, sys.argv[1:])])


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
        except (OSError, httpx2.HTTPError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"no {path}, and klue/klue cannot be downloaded: {reason}") from None
        table = pd.read_parquet(path)
        labels = pd.DataFrame(list(table["labels"]))
        table["score"], table["label"] = labels["real-label"] / 5, labels["binary-label"]
    record = file_record(path, len(table))
    record["distinct_sentences"] = len(set(table["sentence1"]) | set(table["sentence2"]))
    del record["rows_left_out"]
    return table, record


def leave_out_seen(table: pd.DataFrame, data_dir: Path, what: str) -> pd.DataFrame:
    """Returns the test pairs that are not in the train and dev files: as pairs, or by sentence."""
    columns = ["sentence1", "sentence2"]
    files = [data_dir / "KorSTS" / f"sts-{name}.tsv" for name in ("train", "dev")]
    seen = pd.concat([read_korsts(file) for file in files])[columns]
    if what == "sentences":
        is_seen = table[columns].isin(pd.unique(seen.to_numpy().ravel())).any(axis=1)
    else:
        known = set(map(frozenset, seen.to_numpy()))
        is_seen = pd.Series([frozenset(pair) in known for pair in table[columns].to_numpy()])
    print(f"left out, in sts-train.tsv or sts-dev.tsv: {is_seen.sum():,} pairs")
    return table[~is_seen.to_numpy()].reset_index(drop=True)


# --- 3. Models -------------------------------------------------------------------------------


class OnnxEncoder:
    """A file that onnx/export_onnx.py wrote, with the part of SentenceTransformer used here."""

    default_prompt_name = None

    def __init__(self, path: Path) -> None:
        self.path = path
        settings, tokenizer = (
            path.with_name(path.stem + end) for end in (".json", ".tokenizer.json")
        )
        for file in (path, settings, tokenizer):
            if not file.is_file():
                raise UserError(f"{file}: no such file; onnx/export_onnx.py writes three")
        providers = [name for name in PROVIDERS if name in onnxruntime.get_available_providers()]
        try:
            self.settings = json.loads(settings.read_text(encoding="utf-8"))
            self.max_seq_length = self.settings["max_seq_length"]
            self.tokenizer = Tokenizer.from_file(str(tokenizer))
            self.session = onnxruntime.InferenceSession(path, providers=providers)
        except Exception as error:  # the errors of onnxruntime and tokenizers have no other base
            reason = str(error).splitlines()[0]
            raise UserError(f"{path}: cannot be loaded: {reason}") from None
        self.device = torch.device("cuda" if "CUDA" in self.session.get_providers()[0] else "cpu")

    def preprocess(
        self, sentences: list[str], prompt: str | None = None
    ) -> dict[str, torch.Tensor]:
        encoded = self.tokenizer.encode_batch([(prompt or "") + sentence for sentence in sentences])
        return {
            "input_ids": torch.tensor([item.ids for item in encoded]),
            "attention_mask": torch.tensor([item.attention_mask for item in encoded]),
            "token_type_ids": torch.tensor([item.type_ids for item in encoded]),
        }

    def encode(self, sentences: list[str], prompt: str | None = None, **_: object) -> np.ndarray:
        features = self.preprocess(sentences, prompt)
        feed = {item.name: features[item.name].numpy() for item in self.session.get_inputs()}
        return self.session.run(["sentence_embedding"], feed)[0]


Encoder = SentenceTransformer | OnnxEncoder


def load(model: str, args: argparse.Namespace) -> tuple[Encoder, str]:
    """Returns the encoder and its prompt: the user's, else what the model declares as default."""
    if model.endswith(".onnx"):
        encoder = OnnxEncoder(Path(model).expanduser())
        declared = encoder.settings.get("prompt") or ""
    else:
        encoder = load_encoder(model, trust_remote_code=args.trust_remote_code)
        declared = encoder.prompts.get(encoder.default_prompt_name) or ""
        others = {name: text for name, text in encoder.prompts.items() if text}
        if others and not declared and args.prompt is None:
            print(f"{model}: no prompt is its default, none used of {others}", file=sys.stderr)
    return encoder, declared if args.prompt is None else args.prompt


def describe(model: str, encoder: Encoder) -> dict:
    """Returns what identifies the model: see `model` in the schema above."""
    if isinstance(encoder, OnnxEncoder):
        weights, parameters, pooling_added = [encoder.path], None, False
        dimension, revision = encoder.session.get_outputs()[0].shape[-1], None
    else:
        folder = Path(model).expanduser() if is_local(model) else cached_folder(model)
        revision = None if is_local(model) else folder.name
        weights = [*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors")]
        weights = weights or [*folder.glob("*.bin"), *folder.glob("*/*.bin")]
        parameters = sum(parameter.numel() for parameter in encoder.parameters())
        pooling_added = not (folder / "modules.json").is_file()
        dimension = encoder.get_embedding_dimension()
    hashes = {}
    for path in sorted(weights):
        with path.open("rb") as file:
            hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "revision": revision,
        "weights": hashes,
        "size_bytes": sum(path.stat().st_size for path in weights),
        "parameters": parameters,
        "dimension": dimension,
        "max_seq_length": encoder.max_seq_length,
        "pooling_added": pooling_added,
    }


def cached_folder(name: str) -> Path:
    """Returns the folder of a model that was just loaded from the Hub: snapshots/COMMIT."""
    files = (try_to_load_from_cache(name, file) for file in ("modules.json", "config.json"))
    return next(Path(file).parent for file in files if isinstance(file, str))


def device_name(device: torch.device) -> str:
    """Returns the GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.is_file() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


# --- 4. Embeddings and scores ----------------------------------------------------------------


def encode_distinct(
    encoder: Encoder,
    sentences: list[str],
    prompt: str = "",
    progress: str | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> np.ndarray:
    """Encodes sentences in batches of about equal length and about `batch_tokens` tokens.

    Returns:
        (sentences, dimension) float32, in the order given.
    """
    mask = encoder.preprocess(sentences, prompt=prompt).get("attention_mask")
    lengths = np.array([len(text) for text in sentences]) if mask is None else mask.sum(1).numpy()
    order = np.argsort(-lengths, kind="stable")
    # A batch ends where the running number of tokens passes a multiple of batch_tokens.
    ends = np.flatnonzero(np.diff(np.cumsum(lengths[order]) // batch_tokens)) + 1
    vectors = []
    with tqdm(total=len(sentences), desc=progress, unit=" sentences", disable=not progress) as bar:
        for batch in np.split(order, ends):
            texts = [sentences[index] for index in batch]
            options = {"batch_size": len(batch), "show_progress_bar": False}
            vectors.append(encoder.encode(texts, prompt=prompt, **options))
            bar.update(len(batch))
    return np.concatenate(vectors).astype(np.float32, copy=False)[np.argsort(order)]


def encode_pairs(
    encoder: Encoder, table: pd.DataFrame, prompt: str = "", progress: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Encodes each distinct sentence of the corpus once, however often it occurs.

    Returns:
        (sentences, dimension) float32 embeddings, and the rows of each pair's two as (2, pairs).
    """
    codes, sentences = pd.factorize(pd.concat([table["sentence1"], table["sentence2"]]))
    return encode_distinct(encoder, sentences.tolist(), prompt, progress), codes.reshape(2, -1)


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
        "threads": torch.get_num_threads(),
        "sentences_per_second": round(len(embeddings) / seconds, 2),
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": stored_command(),
    }


def compare(args: argparse.Namespace, table: pd.DataFrame) -> None:
    """Prints each score of A and B, their difference and its interval, and a verdict."""
    results = []
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
        results.append(
            [{key: np.mean([one[key] for one in part], axis=0) for key in part[0]}
             for part in zip(*found, strict=True)]
        )  # fmt: skip
    (scores_a, samples_a), (scores_b, samples_b) = results
    print(f"{'x100':20}{'A':>8}{'B':>8}{'A - B':>8}   95% interval")
    for key, a in scores_a.items():
        low, high = interval(samples_a[key] - samples_b[key])
        print(
            f"{key:20}{100 * a:8.2f}{100 * scores_b[key]:8.2f}{100 * (a - scores_b[key]):+8.2f}"
            f"   {100 * low:+.2f} to {100 * high:+.2f}"
        )
    for side, (point, samples) in zip("AB", results, strict=True):
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


# --- 5. Result files -------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a name to write to, then renames: others see the old file whole, or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_result(results_dir: Path, result: dict) -> None:
    """Writes a measured result under the name that the top of this file says."""
    parts = [result["name"].replace("/", "--"), result["embedding_precision"], result["dataset"]]
    name = ".".join([parts[0], *(part for part in parts[1:] if part not in ("float32", "korsts"))])
    text = json.dumps(result, indent=2, ensure_ascii=False) + "\n"
    with replacing(results_dir / f"{name}.json") as file:
        file.write_text(text, encoding="utf-8")


def read_results(results_dir: Path) -> list[dict]:
    """Reads the results of a folder, best cosine Spearman first.

    Measured ones count where the data was the published file, so that a stand-in never does.
    """
    results = []
    for path in sorted(results_dir.glob("*.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            result["name"], result["link"], result["dataset"], result["scores"]["cosine_spearman"]
            if measured := result["source"] != "published":
                result["intervals"]["cosine_spearman"], result["model"]["size_bytes"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}: no result of benchmark.py") from None
        if not measured or result["data"]["published"] is not False:
            results.append(result)
    return sorted(results, key=lambda row: (-row["scores"]["cosine_spearman"], row["name"]))


# --- 6. Tables and plots ---------------------------------------------------------------------


def label(result: dict) -> str:
    """Returns the row's name, linked, with what sets it apart from the model as it comes."""
    remarks = []
    if result["source"] == "measured":
        remarks += ["mean pooling added"] * result["model"]["pooling_added"]
        remarks += [f"prompt `{result['prompt']}`"] * bool(result["prompt"])
        precision = result["embedding_precision"]
        remarks += [f"{precision} embeddings"] * (precision != "float32")
    name = f"[{result['name']}]({result['link']})" if result["link"] else result["name"]
    return f"{name} ({', '.join(remarks)})" if remarks else name


def markdown_table(results: list[dict], columns: dict[str, list[float | str | None]]) -> str:
    """Returns a table of results: numbers are scores, shown x100, the best of a column bold."""
    shown = [[label(result) for result in results]]
    for values in columns.values():
        texts = [
            f"{100 * value:.2f}" if isinstance(value, float) else value or "" for value in values
        ]
        scores = [
            float(text) for text, v in zip(texts, values, strict=True) if isinstance(v, float)
        ]
        best = f"{max(scores):.2f}" if len(scores) > 1 else None
        shown.append([f"**{text}**" if text == best else text for text in texts])
    rows = [["Model", *columns], ["---", *["---:"] * len(columns)], *zip(*shown, strict=True)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def score_table(results: list[dict]) -> str:
    """Returns the table of scores; where they were measured with interval, speed and size."""
    measured = results[0]["source"] == "measured"
    keys = SCORE_KEYS if results[0]["dataset"] == "korsts" else KLUE_KEYS
    columns: dict[str, list] = {}
    for key in keys:
        columns[key.replace("_", " ").title()] = [row["scores"][key] for row in results]
        if measured and key == "cosine_spearman":
            ends = [100 * np.array(row["intervals"][key]) for row in results]
            columns["95% interval"] = [f"{low:.2f} to {high:.2f}" for low, high in ends]
    if measured:
        columns["Sentences/s"] = [f"{row['sentences_per_second']:.0f}" for row in results]
        columns["MB"] = [f"{row['model']['size_bytes'] / 1e6:.0f}" for row in results]
    return markdown_table(results, columns)


def dims_table(results: list[dict]) -> str:
    """Returns the table of cosine Spearman by dimension."""
    dims = sorted({int(dim) for row in results for dim in row["dims"]}, reverse=True)
    columns = {
        str(dim): [
            row["dims"].get(str(dim), {}).get("scores", {}).get("cosine_spearman")
            for row in results
        ]
        for dim in dims
    }
    return markdown_table(results, columns)


def tables(results: list[dict]) -> dict[str, str]:
    """Returns the generated parts of the README by marker; published and measured stay apart."""
    parts: dict[str, list[str]] = {"all": [], "matryoshka": [], "klue-sts": []}
    for source in ("published", "measured"):
        rows = [row for row in results if row["source"] == source and row["dataset"] == "korsts"]
        if not rows:
            continue
        origin = {
            row.get("published_in") or f"{row['device']}, {row['threads']} threads" for row in rows
        }
        title = f"{source.capitalize()} ({'; '.join(sorted(origin))})"
        intervals = ", intervals over the test pairs" if source == "measured" else ""
        parts["all"] += [f"{title}, KorSTS-test x100{intervals}:", score_table(rows)]
        if rows := [row for row in rows if "dims" in row]:
            parts["matryoshka"] += [
                f"{title}, cosine Spearman x100 by dimension:",
                dims_table(rows),
            ]
    if rows := [row for row in results if row["dataset"] == "klue-sts"]:
        parts["klue-sts"] += [score_table(rows)]
    return {marker: "\n\n".join(texts or ["Not measured yet."]) for marker, texts in parts.items()}


def update_readme(readme: Path, results_dir: Path) -> None:
    """Writes the tables between `<!-- results:X -->` and `<!-- /results:X -->`; draws the plots."""
    results = read_results(results_dir)
    if not readme.is_file():
        raise UserError(f"{readme}: no such file")
    text = readme.read_text(encoding="utf-8")
    for marker, content in tables(results).items():
        start, end = f"<!-- results:{marker} -->", f"<!-- /results:{marker} -->"
        found = re.findall(f"{start}.*?{end}", text, re.DOTALL)
        if len(found) != 1:
            raise UserError(f"{readme}: should hold {start} ... {end} once")
        text = text.replace(found[0], f"{start}\n{content}\n{end}")
    with replacing(readme) as file:
        file.write_text(text, encoding="utf-8")
    draw_plots([row for row in results if row["dataset"] == "korsts"], results_dir)


def draw_plots(results: list[dict], results_dir: Path) -> None:
    """Draws spearman_by_dimension.png and speed_and_size.png from KorSTS results."""

    def save(figure: plt.Figure, name: str) -> None:
        with replacing(results_dir / name) as file:
            figure.savefig(file, format="png", dpi=150, bbox_inches="tight")
        plt.close(figure)

    fonts = ["DejaVu Sans", *sorted(KOREAN_FONTS.intersection(font_manager.get_font_names()))]
    plt.rcParams.update({"font.family": fonts, "font.size": 11})
    plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.3})
    y_label = "cosine Spearman x100, KorSTS-test"
    if rows := [row for row in results if "dims" in row]:
        figure, axes = plt.subplots(figsize=(8, 4.5))
        for row in rows:
            dims = sorted(map(int, row["dims"]))
            values = [100 * row["dims"][str(dim)]["scores"]["cosine_spearman"] for dim in dims]
            style = "-o" if row["source"] == "measured" else "--s"
            axes.plot(dims, values, style, label=f"{row['name']} ({row['source']})")
        ticks = sorted({int(dim) for row in rows for dim in row["dims"]})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, map(str, ticks))
        axes.set(xlabel="embedding dimension", ylabel=y_label)
        axes.legend(fontsize=9)
        save(figure, "spearman_by_dimension.png")
    if rows := [row for row in results if row["source"] == "measured"]:
        figure, panels = plt.subplots(1, 2, figsize=(10, 4.5), sharey=True)
        several_devices = len({row["device"] for row in rows}) > 1
        for row, marker in zip(rows, itertools.cycle("osD^vP*X<>"), strict=False):
            spearman = 100 * row["scores"]["cosine_spearman"]
            error = np.abs(100 * np.array(row["intervals"]["cosine_spearman"]) - spearman)
            name = f"{row['name']} {row['embedding_precision']}".removesuffix(" float32")
            name += f" ({row['device']})" * several_devices
            speed, megabytes = row["sentences_per_second"], row["model"]["size_bytes"] / 1e6
            for panel, x in zip(panels, (speed, megabytes), strict=True):
                panel.errorbar(x, spearman, error[:, None], fmt=marker, capsize=3, label=name)
        panels[0].set(xlabel="sentences a second", ylabel=y_label)
        panels[1].set(xlabel="size of the weights (MB)")
        for panel in panels:  # from 0, and whole markers at the other end
            panel.set_xlim(0, 1.05 * panel.dataLim.xmax)
        where = {"loc": "lower center", "bbox_to_anchor": (0.5, 0.92)}
        figure.legend(*panels[0].get_legend_handles_labels(), ncols=3, fontsize=9, **where)
        save(figure, "speed_and_size.png")


def main() -> None:
    """Runs what the command line asks for."""
    args = parse_arguments()
    results, failed = [], False
    if args.models or args.compare:
        table, data = read_data(args.dataset, args.data_dir)
        print(f"{data['file']}: {len(table):,} pairs, {data['distinct_sentences']:,} sentences")
    if args.leave_out:
        table = leave_out_seen(table, args.data_dir, args.leave_out)
    if args.compare:
        compare(args, table)
    for model in args.models:
        is_published_mrl = args.models is MODELS and model.endswith("-mrl")
        dims = args.dims if is_published_mrl or model == args.matryoshka_model else []
        try:
            results.append(benchmark(model, args, table, data, dims))
        except UserError as error:
            if len(args.models) == 1:
                raise
            print(f"error: {error}", file=sys.stderr)
            failed = True
            continue
        write_result(args.results_dir, results[-1])
    if results:
        print(score_table(results))
    if rows := [row for row in results if "dims" in row]:
        print(f"\nCosine Spearman by dimension:\n{dims_table(rows)}")
    if args.update_readme:
        update_readme(args.update_readme, args.results_dir)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    with command_line():
        main()
