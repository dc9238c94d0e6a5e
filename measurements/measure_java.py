"""Measures examples/java beside onnxruntime of Python, one run, in turn.

    cd examples/java && mvn -q verify
    python measurements/measure_java.py --onnx onnx/models/RUN.onnx --data_dir KorNLUDatasets

Each lap is a process of its own with two threads: sentences of KorSTS-test sorted by length, in
batches of 32, then a quarter of them one by one, tokenising included, after half as many that are
not counted (Java compiles what it repeats). RUN-int8.onnx is measured where it lies beside.
Medians go to java.json beside this script. Give it a machine with nothing else to do.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.append(str(REPOSITORY))

from common.command_line import UserError, command_line, write_json  # noqa: E402

THREADS = 2
BATCH_SIZES = (32, 1)
LIBRARIES = ("onnxruntime", "tokenizers")  # of both sides; their versions differ


def sentences(path: Path, count: int) -> list[str]:
    """Returns as many distinct sentences of a KorSTS file, sorted by length."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    distinct = list(dict.fromkeys(row[key] for key in ("sentence1", "sentence2") for row in rows))
    return sorted(distinct[::2][:count], key=len)


def python_encoder(path: Path) -> Callable[[list[str]], object]:
    """Returns what embeds sentences with an exported file, through onnxruntime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    session = onnxruntime.InferenceSession(path, options)
    metadata = session.get_modelmeta().custom_metadata_map
    tokenizer = Tokenizer.from_str(metadata["tokenizer"])
    keys = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
    names = [item.name for item in session.get_inputs()]

    def embed(texts: list[str]) -> object:
        tokens = tokenizer.encode_batch([metadata["prompt"] + text for text in texts])
        feeds = {name: np.array([getattr(item, keys[name]) for item in tokens]) for name in names}
        return session.run(["sentence_embedding"], feeds)

    return embed


def lap(embed: Callable[[list[str]], object], texts: list[str], size: int) -> float:
    """Returns the seconds that these sentences take."""
    start = time.perf_counter()
    for place in range(0, len(texts), size):
        embed(texts[place : place + size])
    return time.perf_counter() - start


def python_laps(path: Path, texts: list[str]) -> dict[str, float]:
    """Returns sentences a second of this process; MeasureJava.java does the same."""
    embed = python_encoder(path)
    found = {}
    for size in BATCH_SIZES:
        used = texts[:: 4 if size == 1 else 1]
        lap(embed, used[: len(used) // 2], size)
        found[f"batch_{size}"] = len(used) / lap(embed, used, size)
    return found


def java_versions(libraries: Path) -> dict[str, str]:
    """Returns the versions of the jars that Maven copied."""
    return {
        name: path.stem.removeprefix(f"{name}-")
        for name in LIBRARIES
        for path in libraries.glob(f"{name}-[0-9]*.jar")
    }


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--onnx", type=Path, required=True)
    jar = REPOSITORY / "examples/java/target/semantic-search.jar"
    parser.add_argument("--jar", type=Path, default=jar, help="default: that of examples/java")
    parser.add_argument("--data_dir", type=Path, default=REPOSITORY / "KorNLUDatasets")
    parser.add_argument("--sentences", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--lap", type=Path, help=argparse.SUPPRESS)
    output = Path(__file__).with_name("java.json")
    parser.add_argument("--output", type=Path, default=output, help="default: beside this script")
    args = parser.parse_args()
    if args.lap:
        texts = args.lap.read_text(encoding="utf-8").splitlines()
        print(json.dumps(python_laps(args.onnx, texts)))
        return
    for path in (args.onnx, args.jar):
        if not path.is_file():
            raise UserError(f"{path}: no such file")
    if not zipfile.is_zipfile(args.jar):
        raise UserError(f"{args.jar}: no jar")
    files = {"fp32": args.onnx, "int8": args.onnx.with_stem(f"{args.onnx.stem}-int8")}
    files = {precision: path for precision, path in files.items() if path.is_file()}
    texts = sentences(args.data_dir / "KorSTS/sts-test.tsv", args.sentences)
    rounds: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder) / "sentences.txt"
        listed.write_text("\n".join(texts), encoding="utf-8")
        java = ["java", "-cp", f"{args.jar}{os.pathsep}{args.jar.parent / 'lib'}/*"]
        java.append(str(Path(__file__).with_name("MeasureJava.java")))
        sizes = [str(size) for size in BATCH_SIZES]
        for _ in range(args.repeats):
            for precision, path in files.items():
                for side, command in (
                    ("Python", [sys.executable, __file__, "--onnx", path, "--lap", listed]),
                    ("Java", [*java, path, str(THREADS), listed, *sizes]),
                ):
                    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
                    found = json.loads(done.stdout.splitlines()[-1])
                    rounds.setdefault(f"{side} {precision}", []).append(found)
                    print(side, precision, found, file=sys.stderr)
    medians = {
        side: {key: statistics.median(one[key] for one in laps) for key in laps[0]}
        for side, laps in rounds.items()
    }
    ratios = {
        precision: {
            key: medians[f"Java {precision}"][key] / value
            for key, value in medians[f"Python {precision}"].items()
        }
        for precision in files
    }
    python = {name: importlib.metadata.version(name) for name in LIBRARIES}
    report = {
        "model": args.onnx.stem,
        "threads": THREADS,
        "sentences": len(texts),
        "versions": {"Python": python, "Java": java_versions(args.jar.parent / "lib")},
        "sentences_per_second": medians,
        "Java / Python": ratios,
        "rounds": rounds,
    }
    write_json(args.output, report)
    print(json.dumps(ratios, indent=2))


if __name__ == "__main__":
    with command_line():
        main()
