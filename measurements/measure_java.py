"""Measures examples/java beside onnxruntime of Python, lap by lap in turn.

    cd examples/java && mvn -q verify
    python measurements/measure_java.py --onnx onnx/models/RUN.onnx --data_dir KorNLUDatasets

Two processes with two threads each hold the same file and take turns: 64 sentences of KorSTS-test
in batches of 32, then 16 one by one, tokenising included, as often as --repeats says after five
laps that are not counted (Java compiles what it repeats). Who is first changes each time. The
ratio is the median of those of neighbouring laps, since a shared machine's speed changes from one
second to the next.
RUN-int8.onnx is measured where it lies beside. What was found goes to java.json beside this script.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.append(str(REPOSITORY))

from common.command_line import UserError, command_line, write_json  # noqa: E402
from common.data import read_korsts  # noqa: E402

THREADS = 2
SENTENCES = {32: 64, 1: 16}  # in a lap, by batch size
NOT_COUNTED = 5
LIBRARIES = ("onnxruntime", "tokenizers")


def sentences(path: Path) -> list[str]:
    """Returns distinct sentences of a KorSTS file, from all of it, sorted by length."""
    distinct = read_korsts(path)["sentence1"].unique().tolist()
    count = max(SENTENCES.values())
    if len(distinct) < count:
        raise UserError(f"{path}: fewer than {count} sentences")
    return sorted(distinct[:: len(distinct) // count][:count], key=len)


def answer(path: Path, texts: list[str]) -> None:
    """The Python side, as MeasureJava.java: prints seconds for each line of stdin."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    session = onnxruntime.InferenceSession(path, options)
    metadata = session.get_modelmeta().custom_metadata_map
    tokenizer = Tokenizer.from_str(metadata["tokenizer"])
    keys = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
    names = [item.name for item in session.get_inputs()]
    for line in sys.stdin:
        size, count = map(int, line.split())
        start = time.perf_counter()
        for place in range(0, count, size):
            batch = [metadata["prompt"] + text for text in texts[place : place + size]]
            tokens = tokenizer.encode_batch(batch)
            feeds = {
                name: np.array([getattr(item, keys[name]) for item in tokens]) for name in names
            }
            session.run(["sentence_embedding"], feeds)
        print(time.perf_counter() - start, flush=True)


def measure(commands: dict[str, list[str]], repeats: int) -> dict[int, dict[str, list[float]]]:
    """Returns seconds of all laps by batch size and side; the sides take turns."""
    with contextlib.ExitStack() as stack:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        sides = {
            side: stack.enter_context(subprocess.Popen(command, **pipes))
            for side, command in commands.items()
        }
        laps = {size: {side: [] for side in sides} for size in SENTENCES}
        for repeat in range(NOT_COUNTED + repeats):
            for size, count in SENTENCES.items():
                for side in sorted(sides, reverse=repeat % 2 == 1):
                    process = sides[side]
                    print(size, count, file=process.stdin, flush=True)
                    line = process.stdout.readline()
                    if not line:
                        raise UserError(f"{side}: ended before its lap; see above")
                    if repeat >= NOT_COUNTED:
                        laps[size][side].append(float(line))
        for process in sides.values():
            process.stdin.close()
    return laps


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--onnx", type=Path, required=True)
    jar = REPOSITORY / "examples/java/target/semantic-search.jar"
    parser.add_argument("--jar", type=Path, default=jar, help="default: that of examples/java")
    parser.add_argument("--data_dir", type=Path, default=REPOSITORY / "KorNLUDatasets")
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--side", type=Path, help=argparse.SUPPRESS)
    output = Path(__file__).with_name("java.json")
    parser.add_argument("--output", type=Path, default=output, help="default: beside this script")
    args = parser.parse_args()
    if args.side:
        answer(args.onnx, args.side.read_text(encoding="utf-8").splitlines())
        return
    for path in (args.onnx, args.jar):
        if not path.is_file():
            raise UserError(f"{path}: no such file")
    files = {"fp32": args.onnx, "int8": args.onnx.with_stem(f"{args.onnx.stem}-int8")}
    texts = sentences(args.data_dir / "KorSTS/sts-test.tsv")
    libraries = args.jar.parent / "lib"
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder) / "sentences.txt"
        listed.write_text("\n".join(texts), encoding="utf-8")
        java = ["java", "-cp", f"{args.jar}{os.pathsep}{libraries}/*"]
        java.append(str(Path(__file__).with_name("MeasureJava.java")))
        for precision, path in files.items():
            if not path.is_file():
                continue
            python = [sys.executable, __file__, "--onnx", path, "--side", listed]
            commands = {"Python": python, "Java": [*java, path, str(THREADS), listed]}
            for size, laps in measure(commands, args.repeats).items():
                row: dict[str, object] = {"precision": precision, "batch_size": size}
                for side, seconds in laps.items():
                    row[f"{side}, sentences/s"] = SENTENCES[size] / statistics.median(seconds)
                ratios = [one / two for one, two in zip(laps["Python"], laps["Java"], strict=True)]
                row |= {"Java / Python": statistics.median(ratios), "seconds": laps}
                rows.append(row)
    jars = {
        name: file.stem.removeprefix(f"{name}-")
        for name in LIBRARIES
        for file in libraries.glob(f"{name}-[0-9]*.jar")
    }
    report = {
        "model": args.onnx.stem,
        "threads": THREADS,
        "versions": {
            "Python": {name: importlib.metadata.version(name) for name in LIBRARIES},
            "Java": jars,
        },
        "rows": rows,
    }
    write_json(args.output, report)
    for row in rows:
        print({name: value for name, value in row.items() if name != "seconds"})


if __name__ == "__main__":
    with command_line():
        main()
