"""Measures the exported files against OpenVINO, one run, in turn.

    python measurements/measure_openvino.py --openvino_python OV/bin/python --model RUN \
        --onnx onnx/models/RUN.onnx --data_dir KorNLUDatasets

OV is an environment with openvino, nncf, tokenizers and pandas. OpenVINO gets the same fp32 file,
once as it computes by default (in bfloat16 where the CPU has it), once in float32, and once as its
static int8 (nncf's defaults, 300 sentences of KorSTS-train). Each lap is a process of its own with
two threads: 1,024 sentences of KorSTS-test sorted by length in batches of 32, then 200 one by one,
tokenising included. Medians go to openvino.json beside this script. Give it a machine with nothing
else to do.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.append(str(REPOSITORY))

from common.command_line import UserError, command_line, write_json  # noqa: E402

THREADS = 2


def sentences(path: Path) -> list[str]:
    """Returns the distinct sentences of a KorSTS file."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return list(dict.fromkeys(row[key] for key in ("sentence1", "sentence2") for row in rows))


def features(tokenizer: Any, texts: list[str], names: list[str]) -> dict[str, np.ndarray]:
    """Returns the inputs that a model has, by name."""
    tokens = tokenizer.encode_batch(texts)
    keys = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
    return {name: np.array([getattr(item, keys[name]) for item in tokens]) for name in names}


def sentence_transformer(model: Path) -> Callable[[list[str]], object]:
    """Returns what embeds sentences with sentence-transformers."""
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(THREADS)
    encoder = SentenceTransformer(str(model), device="cpu")
    return lambda texts: encoder.encode(texts, batch_size=32, show_progress_bar=False)


def onnxruntime_session(path: Path) -> Callable[[list[str]], object]:
    """Returns what embeds sentences with an exported file, through onnxruntime."""
    import onnxruntime
    from tokenizers import Tokenizer

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    session = onnxruntime.InferenceSession(path, options)
    tokenizer = Tokenizer.from_str(session.get_modelmeta().custom_metadata_map["tokenizer"])
    names = [item.name for item in session.get_inputs()]
    return lambda texts: session.run(None, features(tokenizer, texts, names))


def openvino_model(
    path: Path, tokenizer_file: Path, float32: bool
) -> Callable[[list[str]], object]:
    """Returns what embeds sentences with a file, through OpenVINO."""
    import openvino
    from tokenizers import Tokenizer

    options = {"INFERENCE_NUM_THREADS": THREADS, "PERFORMANCE_HINT": "LATENCY"}
    if float32:
        options["INFERENCE_PRECISION_HINT"] = "f32"
    compiled = openvino.Core().compile_model(path, "CPU", options)
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    names = [item.get_any_name() for item in compiled.inputs]
    return lambda texts: compiled(features(tokenizer, texts, names))


def quantize(path: Path, tokenizer_file: Path, texts: list[str], output: Path) -> None:
    """Writes OpenVINO's static int8 of a file, with nncf's defaults."""
    import nncf
    import openvino
    from tokenizers import Tokenizer

    model = openvino.Core().read_model(path)
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    names = [item.get_any_name() for item in model.inputs]
    data = nncf.Dataset(texts, lambda text: features(tokenizer, [text], names))
    kind = nncf.ModelType.TRANSFORMER
    openvino.save_model(nncf.quantize(model, data, model_type=kind, subset_size=300), output, False)


def lap(embed: Callable[[list[str]], object], texts: list[str]) -> dict[str, float]:
    """Returns sentences a second, in batches of 32 and one by one."""
    texts = sorted(texts[::2][:1024], key=len)
    batches = [texts[start : start + 32] for start in range(0, len(texts), 32)]
    singles = [[text] for text in texts[:: len(texts) // 200][:200]]
    found = {}
    for name, work in (("batch_32", batches), ("batch_1", singles)):
        embed(work[len(work) // 2])
        start = time.perf_counter()
        for batch in work:
            embed(batch)
        found[name] = sum(map(len, work)) / (time.perf_counter() - start)
    return found


def child(args: argparse.Namespace) -> None:
    """Quantises, or measures one side in this process and prints what it found."""
    side, tokenizer = args.side, args.onnx.with_suffix(".tokenizer.json")
    int8 = args.onnx.with_stem(f"{args.onnx.stem}-int8")
    korsts = args.data_dir / "KorSTS"
    if side == "quantize":
        quantize(args.onnx, tokenizer, sentences(korsts / "sts-train.tsv")[:300], args.work)
        return
    if side == "SentenceTransformer fp32":
        embed = sentence_transformer(args.model)
    elif side.startswith("onnxruntime"):
        embed = onnxruntime_session(int8 if side.endswith("int8") else args.onnx)
    else:
        path = args.work if side.endswith("int8") else args.onnx
        embed = openvino_model(path, tokenizer, side.endswith("fp32"))
    print(json.dumps(lap(embed, sentences(korsts / "sts-test.tsv"))))


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--openvino_python", default=sys.executable)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--onnx", type=Path, required=True)
    parser.add_argument("--data_dir", type=Path, default=REPOSITORY / "KorNLUDatasets")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    output = Path(__file__).with_name("openvino.json")
    parser.add_argument("--output", type=Path, default=output, help="default: beside this script")
    args = parser.parse_args()
    if args.side:
        child(args)
        return
    for path in (args.model, args.onnx):
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
    for name in ("sts-train.tsv", "sts-test.tsv"):
        sentences(args.data_dir / "KorSTS" / name)  # what is missing is said before anything runs
    rounds: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:

        def run(side: str) -> str:
            python = args.openvino_python if side[:2] in ("Op", "qu") else sys.executable
            command = [python, __file__, *sys.argv[1:], "--side", side]
            command += ["--work", str(Path(folder) / "int8.xml")]
            return subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout

        run("quantize")
        for _ in range(args.repeats):
            for side in (
                "SentenceTransformer fp32", "onnxruntime fp32", "OpenVINO fp32",
                "OpenVINO default precision", "onnxruntime int8", "OpenVINO int8",
            ):  # fmt: skip
                found = json.loads(run(side).splitlines()[-1])
                rounds.setdefault(side, []).append(found)
                print(side, found, file=sys.stderr)
    medians = {
        side: {key: statistics.median(one[key] for one in laps) for key in laps[0]}
        for side, laps in rounds.items()
    }
    packages = "import importlib.metadata as m; print(m.version('openvino'), m.version('nncf'))"
    versions = subprocess.run(
        [args.openvino_python, "-c", packages], stdout=subprocess.PIPE, check=True, text=True
    ).stdout.split()
    from common.machine import device_name, instruction_sets  # torch: not in OV

    report = {
        "model": args.onnx.stem,
        "machine": device_name("cpu"),
        "instruction_sets": instruction_sets(),
        "threads": THREADS,
        "versions": dict(zip(("openvino", "nncf"), versions, strict=True)),
        "sentences_per_second": medians,
        "rounds": rounds,
    }
    write_json(args.output, report)
    print(json.dumps(medians, indent=2))


if __name__ == "__main__":
    with command_line():
        main()
