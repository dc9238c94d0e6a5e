"""Runs exported files with onnxruntime, and measures them beside sentence-transformers.

What is measured becomes results/onnx/NAME.json, and from all of these the table of README.md.
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import pandas as pd
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Encoding, Tokenizer

from data_util import UserError
from evaluation_util import bootstrap, correlations, interval

ROUNDS = 3
SENTENCES = {32: 1024, 1: 128}  # timed in a round, by batch size
INSTRUCTION_SETS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "amx_int8", "asimddp", "i8mm")
FIRST_EMBEDDING = {  # run in new processes; each prints when it has embedded one sentence
    "sentence-transformers": """
import sys, time
from sentence_transformers import SentenceTransformer
SentenceTransformer(sys.argv[1], device="cpu").encode("첫 문장")
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
MARKERS = "<!-- results:onnx -->", "<!-- /results:onnx -->"
HEADER = "| 파일 | MB | 문장/초, 배치 32 | 배치 1 | 첫 임베딩(초) | KorSTS-test | 손실 [95%] |"


def feed(
    session: onnxruntime.InferenceSession, encodings: Sequence[Encoding]
) -> dict[str, np.ndarray]:
    """Returns the inputs that the session asks for, int64 (batch, length)."""
    features = {
        "input_ids": [item.ids for item in encodings],
        "attention_mask": [item.attention_mask for item in encodings],
        "token_type_ids": [item.type_ids for item in encodings],
    }
    return {item.name: np.array(features[item.name]) for item in session.get_inputs()}


def embed(
    session: onnxruntime.InferenceSession,
    tokenizer: Tokenizer,
    sentences: Sequence[str],
    batch_size: int = 32,
) -> np.ndarray:
    """Returns float32 (sentences, dimension) embeddings; batches hold sentences of like length."""
    feeds = feed(session, tokenizer.encode_batch(list(sentences)))
    mask = feeds["attention_mask"]
    order = np.argsort(-mask.sum(axis=1), kind="stable")
    parts = []
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        used = mask[rows].any(axis=0)
        batch = {name: values[rows][:, used] for name, values in feeds.items()}
        parts.append(session.run(["sentence_embedding"], batch)[0])
    return np.concatenate(parts)[np.argsort(order)]


def instruction_sets() -> list[str]:
    """Returns those of the CPU's instruction sets that decide int8 speed (none where unknown)."""
    with contextlib.suppress(OSError):
        words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
        return [name for name in INSTRUCTION_SETS if name in words]
    return []


def first_embedding_seconds(library: str, model: Path) -> float:
    """Returns the time from a process's start to its first embedding, the best of three."""
    seconds = []
    for _ in range(ROUNDS):
        command = [sys.executable, "-c", FIRST_EMBEDDING[library], str(model)]
        start = time.time()
        result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        seconds.append(float(result.stdout.split()[-1]) - start)
    return min(seconds)


def measure(
    model: SentenceTransformer, tokenizer: Tokenizer, files: dict[str, Path], test: pd.DataFrame
) -> list[dict]:
    """Measures sentence-transformers (the first row) and each file.

    Speeds include tokenising and are the best of three rounds in which all take turns, so that a
    disturbance of the machine hits none alone.

    Args:
        files: by the name of their row.
        test: KorSTS-test, as `read_korsts` returns it.

    Returns:
        For each: encoder, size_bytes, first_embedding_seconds, sentences_per_second_32 and _1,
        cosine_spearman and, against the first row, lost and lost_interval (paired bootstrap).
    """
    prompt = model.prompts.get(model.default_prompt_name) or ""

    def encoder(path: Path) -> Callable[[list[str], int], np.ndarray]:
        session = onnxruntime.InferenceSession(path)
        return lambda sentences, batch_size: embed(
            session, tokenizer, [prompt + sentence for sentence in sentences], batch_size
        )

    folder = Path(model[0].model.name_or_path)
    weights = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
    rows = [
        {
            "encoder": "SentenceTransformer fp32",
            "size_bytes": sum(path.stat().st_size for path in weights),
            "first_embedding_seconds": first_embedding_seconds("sentence-transformers", folder),
        }
    ]
    encoders = [
        lambda sentences, batch_size: model.encode(
            sentences, batch_size=batch_size, show_progress_bar=False
        )
    ]
    for name, path in files.items():
        parts = [path, path.with_name(f"{path.name}.data")]
        rows.append(
            {
                "encoder": name,
                "size_bytes": sum(part.stat().st_size for part in parts if part.is_file()),
                "first_embedding_seconds": first_embedding_seconds("onnxruntime", path),
            }
        )
        encoders.append(encoder(path))

    sentences = list(dict.fromkeys([*test["sentence1"], *test["sentence2"]]))
    for batch_size, count in SENTENCES.items():
        sample = sentences[:: max(1, len(sentences) // count)]
        seconds = collections.defaultdict(list)
        for _ in range(ROUNDS):
            for row, encode in zip(rows, encoders, strict=True):
                start = time.perf_counter()
                calls = [[sentence] for sentence in sample] if batch_size == 1 else [sample]
                for call in calls:
                    encode(call, batch_size)
                seconds[row["encoder"]].append(time.perf_counter() - start)
        for row in rows:
            best = min(seconds[row["encoder"]])
            row[f"sentences_per_second_{batch_size}"] = len(sample) / best

    resampled = []
    for row, encode in zip(rows, encoders, strict=True):
        vectors = dict(zip(sentences, encode(sentences, 32), strict=True))
        pair = [np.stack([vectors[text] for text in test[f"sentence{side}"]]) for side in (1, 2)]
        scores = test["score"].to_numpy()
        row["cosine_spearman"] = correlations(*pair, scores)["cosine_spearman"]
        resampled.append(bootstrap(*pair, scores)["cosine_spearman"])
        row["lost"] = rows[0]["cosine_spearman"] - row["cosine_spearman"]
        row["lost_interval"] = interval(resampled[0] - resampled[-1])
    return rows


def table(rows: Sequence[dict]) -> list[str]:
    """Formats the rows of `measure` as a Markdown table; scores x100."""
    lines = [HEADER, "|---|---:|---:|---:|---:|---:|---:|"]
    for row in rows:
        speeds = []
        for key in ("sentences_per_second_32", "sentences_per_second_1"):
            speeds.append(f"{row[key]:,.0f} ({row[key] / rows[0][key]:.1f}x)")
        low, high = (100 * end for end in row["lost_interval"])
        lost = f"{100 * row['lost']:.2f} [{low:.2f}, {high:.2f}]"
        cells = [
            row["encoder"],
            f"{row['size_bytes'] / 1e6:.1f}",
            *speeds,
            f"{row['first_embedding_seconds']:.2f}",
            f"{100 * row['cosine_spearman']:.2f}",
            "-" if row is rows[0] else lost,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def write_results(path: Path, model: str, revision: str, rows: Sequence[dict]) -> None:
    """Writes results/onnx/NAME.json, whole or not at all."""
    packages = ("sentence-transformers", "torch", "onnxruntime", "onnx", "tokenizers")
    content = {
        "model": model,
        "revision": revision,
        "date": datetime.date.today().isoformat(),
        "command": f"python onnx/export_onnx.py --model {model} --quantize int8",
        "machine": platform.machine(),
        "instruction_sets": instruction_sets(),
        "threads": torch.get_num_threads(),
        "versions": {package: importlib.metadata.version(package) for package in packages},
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(content, ensure_ascii=False, indent=2) + "\n")


def update_readme(readme: Path, results_dir: Path) -> None:
    """Writes the tables of results/onnx/*.json between the README's markers."""
    start, end = MARKERS
    text = readme.read_text(encoding="utf-8")
    if text.count(start) != 1 or text.count(end) != 1:
        raise UserError(f"{readme}: needs one {start} and, after it, one {end}")
    sections = []
    for path in sorted((results_dir / "onnx").glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        machine = ", ".join([result["machine"], *result["instruction_sets"]])
        versions = result["versions"]
        sections += [
            f"`{result['command']}`",
            f"({machine}, 스레드 {result['threads']}개, {result['date']}, "
            f"onnxruntime {versions['onnxruntime']}, torch {versions['torch']})",
            "",
            *table(result["rows"]),
            "",
        ]
    body = "\n".join(["", *sections]).rstrip("\n")
    replace_text(readme, f"{text.split(start)[0]}{start}{body}\n{end}{text.split(end)[1]}")


def replace_text(path: Path, text: str) -> None:
    """Writes a file beside its place and then renames it."""
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    staged.write_text(text, encoding="utf-8")
    os.replace(staged, path)
