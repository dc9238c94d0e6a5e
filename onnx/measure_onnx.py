"""Measures exported files beside sentence-transformers: size, speed, score.

What is measured becomes results/onnx/NAME.json, and from all of these the table of README.md
(`python benchmark.py --update_readme`).
"""

from __future__ import annotations

import collections
import datetime
import importlib.metadata
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pandas as pd
import torch
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import pairwise_cos_sim
from tokenizers import Tokenizer

from common.command_line import stored_command, write_json
from common.encoders import default_prompt, model_folder, weight_files
from common.evaluation import bootstrap, correlations, interval
from common.exported import embed, files_of
from common.machine import instruction_sets
from common.scoring import distinct_sentences

Encode = Callable[[list[str], int, str | None], np.ndarray]
ROUNDS = 3
SENTENCES = {32: 1024, 1: 128}  # timed in a round, by batch size
FIRST_EMBEDDING = {  # run in new processes; each prints when it has embedded one sentence
    "sentence-transformers": """
import sys, time
from sentence_transformers import SentenceTransformer
trust = sys.argv[2] == "True"
SentenceTransformer(sys.argv[1], device="cpu", trust_remote_code=trust).encode("첫 문장")
print(time.time())""",
    "onnxruntime": """
import sys, time
import numpy, onnxruntime, tokenizers
session = onnxruntime.InferenceSession(sys.argv[1])
tokenizer = session.get_modelmeta().custom_metadata_map["tokenizer"]
tokens = tokenizers.Tokenizer.from_str(tokenizer).encode("첫 문장")
feeds = {"input_ids": tokens.ids, "attention_mask": tokens.attention_mask,
         "token_type_ids": tokens.type_ids}
session.run(None, {item.name: numpy.array([feeds[item.name]]) for item in session.get_inputs()})
print(time.time())""",
}


def first_embedding_seconds(library: str, model: Path, trust_remote_code: bool = False) -> float:
    """Returns the time from a process's start to its first embedding, the best of three."""
    seconds, arguments = [], [str(model), str(trust_remote_code)]
    # Arguments pass in the console's encoding, which may have no Korean.
    code = FIRST_EMBEDDING[library].encode("ascii", "backslashreplace").decode()
    for _ in range(ROUNDS):
        command = [sys.executable, "-c", code, *arguments]
        start = time.time()
        result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        seconds.append(float(result.stdout.split()[-1]) - start)
    return min(seconds)


def measure(
    model: SentenceTransformer,
    tokenizer: Tokenizer,
    files: dict[str, Path],
    test: pd.DataFrame,
    trust_remote_code: bool = False,
) -> list[dict]:
    """Measures sentence-transformers (the first row) and each file.

    Speeds include tokenising and are the best of three rounds in which all take turns, so that a
    disturbance of the machine hits none alone.

    Args:
        files: by the name of their row.
        test: KorSTS-test, as `read_korsts` returns it.
        trust_remote_code: run Python code that the model carries, as when it was loaded.

    Returns:
        For each: encoder, size_bytes, first_embedding_seconds, sentences_per_second_32 and _1,
        cosine_spearman and, against the first row, lost and lost_interval (paired bootstrap).
    """
    prompt = default_prompt(model)
    folder = model_folder(model)
    rows = [
        {
            "encoder": "SentenceTransformer fp32",
            "size_bytes": sum(path.stat().st_size for path in weight_files(folder)),
            "first_embedding_seconds": first_embedding_seconds(
                "sentence-transformers", folder, trust_remote_code
            ),
        }
    ]
    encoders = [
        lambda sentences, batch_size, progress: model.encode(
            sentences, batch_size=batch_size, show_progress_bar=bool(progress)
        )
    ]
    for name, path in files.items():
        seconds = first_embedding_seconds("onnxruntime", path)
        rows.append(file_row(name, path) | {"first_embedding_seconds": seconds})
        encoders.append(file_encoder(path, tokenizer, prompt))

    sentences, _ = distinct_sentences(test)
    for batch_size, count in SENTENCES.items():
        sample = sentences[:: max(1, len(sentences) // count)]
        seconds = collections.defaultdict(list)
        for _ in range(ROUNDS):
            for row, encode in zip(rows, encoders, strict=True):
                start = time.perf_counter()
                calls = [[sentence] for sentence in sample] if batch_size == 1 else [sample]
                for call in calls:
                    encode(call, batch_size, None)
                seconds[row["encoder"]].append(time.perf_counter() - start)
        for row in rows:
            best = min(seconds[row["encoder"]])
            row[f"sentences_per_second_{batch_size}"] = len(sample) / best

    score_rows(rows, encoders, test)
    return rows


def score_files(
    tokenizer: Tokenizer, files: dict[str, Path], test: pd.DataFrame, prompt: str
) -> list[dict]:
    """Returns the rows of `measure` without times, and without sentence-transformers' own row.

    What is lost is against the first file.
    """
    rows = [file_row(name, path) for name, path in files.items()]
    score_rows(rows, [file_encoder(path, tokenizer, prompt) for path in files.values()], test)
    return rows


def expected_loss(
    tokenizer: Tokenizer, reference: Path, pairs: pd.DataFrame, prompt: str
) -> Callable[[onnx.ModelProto], float]:
    """Returns a function that says how many points of Spearman a graph is expected to lose.

    Where its cosines r correlate with those of the reference file, and these rho with the scores,
    both as Spearman: 100 * rho * (1 - r), the loss by changes that know nothing of the scores.
    The loss itself on these pairs scatters several times as far, by chance.

    Args:
        pairs: sentence1, sentence2, score.
    """
    sentences, rows = distinct_sentences(pairs)
    texts = [prompt + sentence for sentence in sentences]

    def cosines(model: Path | bytes) -> np.ndarray:
        what = "int8, dev" if isinstance(model, bytes) else "fp32, dev"
        session = onnxruntime.InferenceSession(model)
        embeddings = embed(session, tokenizer, texts, progress=what)
        return pairwise_cos_sim(*(torch.from_numpy(embeddings[side]) for side in rows)).numpy()

    expected = cosines(reference)
    rho = spearmanr(expected, pairs["score"]).statistic
    return lambda proto: float(
        100 * rho * (1 - spearmanr(expected, cosines(proto.SerializeToString())).statistic)
    )


def score_line(rows: list[dict]) -> str:
    """Returns sizes, scores (x100) and the loss of the last row in a line."""
    sizes = ", ".join(f"{row['encoder']} {row['size_bytes'] / 1e6:.1f} MB" for row in rows)
    scores = ", ".join(f"{100 * row['cosine_spearman']:.2f}" for row in rows)
    low, high = (100 * end for end in rows[-1]["lost_interval"])
    lost = f"{100 * rows[-1]['lost']:.2f} [{low:.2f}, {high:.2f}] lost"
    return f"{sizes}; sts-test.tsv: cosine Spearman {scores}: {lost}"


def file_row(name: str, path: Path) -> dict:
    """Returns the beginning of an exported file's row: encoder and size_bytes."""
    return {"encoder": name, "size_bytes": sum(part.stat().st_size for part in files_of(path))}


def file_encoder(path: Path, tokenizer: Tokenizer, prompt: str) -> Encode:
    """Returns a function of sentences, batch size and a bar's label that gives embeddings."""
    session = onnxruntime.InferenceSession(path)
    return lambda sentences, batch_size, progress: embed(
        session, tokenizer, [prompt + sentence for sentence in sentences], batch_size, progress
    )


def score_rows(rows: list[dict], encoders: list[Encode], test: pd.DataFrame) -> None:
    """Adds cosine_spearman and, against the first row, lost and lost_interval."""
    sentences, pairs = distinct_sentences(test)
    resampled, scores = [], test["score"].to_numpy()
    for row, encode in zip(rows, encoders, strict=True):
        pair = encode(sentences, 32, row["encoder"])[pairs]
        row["cosine_spearman"] = correlations(*pair, scores)["cosine_spearman"]
        resampled.append(bootstrap(*pair, scores)["cosine_spearman"])
        row["lost"] = rows[0]["cosine_spearman"] - row["cosine_spearman"]
        row["lost_interval"] = interval(resampled[0] - resampled[-1])


def write_results(path: Path, model: str, revision: str, rows: list[dict]) -> None:
    """Writes results/onnx/NAME.json, whole or not at all."""
    packages = ("sentence-transformers", "torch", "onnxruntime", "onnx", "tokenizers")
    content = {
        "model": model,
        "revision": revision,
        "date": datetime.date.today().isoformat(),
        "command": stored_command(),
        "machine": platform.machine(),
        "instruction_sets": instruction_sets(),
        "threads": torch.get_num_threads(),
        "versions": {package: importlib.metadata.version(package) for package in packages},
        "rows": rows,
    }
    write_json(path, content)
