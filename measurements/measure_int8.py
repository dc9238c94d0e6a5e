"""Measures what int8 loses, of several models.

    python measurements/measure_int8.py --data_dir KorNLUDatasets "v2=output/v2" \
        "Matryoshka, 64 of 384=output/mrl:64"

A model is NAME=FOLDER, or NAME=FOLDER:DIM for a slice of its embeddings. Each is exported as
`export_onnx.py --quantize int8` does it, which decides on KorSTS-dev alone; then fp32 and int8 are
scored on the pairs of KorSTS-dev that it decides on, and on KorSTS-test. Sizes, scores and losses
(paired bootstrap) go to int8.json beside this script.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path += [str(REPOSITORY), str(REPOSITORY / "onnx")]

from measure_onnx import score_files  # noqa: E402
from quantize_onnx import dev_pairs  # noqa: E402

from common.command_line import UserError, command_line, read_json, write_json  # noqa: E402
from common.data import DATA_DIR, read_korsts  # noqa: E402
from common.machine import device_name, instruction_sets  # noqa: E402


def measure(name: str, model: str, dim: str, data_dir: Path) -> dict[str, Any]:
    """Exports a model; returns its row of int8.json: losses in points."""
    with tempfile.TemporaryDirectory() as folder:
        fp32, int8 = (Path(folder) / f"model{kind}.onnx" for kind in ("", "-int8"))
        command = [sys.executable, REPOSITORY / "onnx/export_onnx.py", "--model", model]
        command += ["--output", fp32, "--data_dir", data_dir, "--quantize", "int8", "--no_speed"]
        command += ["--max_loss", "100", *(["--dim", dim] if dim else [])]
        subprocess.run(list(map(str, command)), stdout=subprocess.DEVNULL, check=True)
        settings = read_json(int8.with_suffix(".json"))
        tokenizer = Tokenizer.from_file(str(int8.with_suffix(".tokenizer.json")))
        row = {
            "name": name,
            "dimension": settings["dimension"],
            "prompt": settings["prompt"],
            "float32_layers": settings["float32_layers"],
            "size_ratio": int8.stat().st_size / fp32.stat().st_size,
        }
        test = read_korsts(data_dir / "KorSTS/sts-test.tsv")
        for part, pairs in {"dev": dev_pairs(data_dir), "test": test}.items():
            files = {"fp32": fp32, "int8": int8}
            before, after = score_files(tokenizer, files, pairs, settings["prompt"])
            row[part] = {
                "fp32": 100 * before["cosine_spearman"],
                "int8": 100 * after["cosine_spearman"],
                "lost": 100 * after["lost"],
                "lost_interval": [100 * end for end in after["lost_interval"]],
            }
    return row


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="NAME=FOLDER[:DIM]")
    parser.add_argument("--data_dir", type=Path, default=DATA_DIR)
    args = parser.parse_args()
    rows = []
    for model in args.models:
        name, equals, place = model.partition("=")
        folder, _, dim = place.partition(":")
        if not equals or not Path(folder).is_dir():
            raise UserError(f"{model}: not NAME=FOLDER with a folder that exists")
        rows.append(measure(name, folder, dim, args.data_dir))
        print(json.dumps(rows[-1], ensure_ascii=False), file=sys.stderr)
    report = {
        "date": datetime.date.today().isoformat(),
        "command": "python measurements/measure_int8.py NAME=FOLDER[:DIM] ...",
        "machine": device_name("cpu"),
        "instruction_sets": instruction_sets(),
        "threads": torch.get_num_threads(),
        "rows": rows,
    }
    write_json(REPOSITORY / "measurements/int8.json", report)


if __name__ == "__main__":
    with command_line():
        main()
