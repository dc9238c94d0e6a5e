"""The export command on a tiny encoder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from encoders import write_plain_encoder
from tokenizers import Tokenizer

from model_util import load_encoder

REPOSITORY = Path(__file__).resolve().parent.parent


def export(model: Path, output: Path) -> subprocess.CompletedProcess:
    script = str(REPOSITORY / "onnx/export_onnx.py")
    command = [sys.executable, script, "--model", str(model), "--output", str(output)]
    return subprocess.run(command, capture_output=True, text=True, cwd=output.parent)


def test_the_exported_file_gives_the_sentence_embedding(tmp_path: Path) -> None:
    encoder = write_plain_encoder(tmp_path / "tiny")
    files = [tmp_path / "first.onnx", tmp_path / "again" / "first.onnx"]
    files[1].parent.mkdir()
    for file in files:
        done = export(encoder, file)
        assert done.returncode == 0, done.stderr
    assert files[0].read_bytes() == files[1].read_bytes()
    sentences = ["비행기가 이륙하고 있다.", "가", "한 남자가 큰 플루트를 연주하고 있다."]
    tokenizer = Tokenizer.from_file(str(tmp_path / "first.tokenizer.json"))
    encodings = tokenizer.encode_batch(sentences)
    session = onnxruntime.InferenceSession(files[0], providers=["CPUExecutionProvider"])
    given = {
        "input_ids": np.array([encoding.ids for encoding in encodings]),
        "attention_mask": np.array([encoding.attention_mask for encoding in encodings]),
        "token_type_ids": np.array([encoding.type_ids for encoding in encodings]),
    }
    feed = {node.name: given[node.name] for node in session.get_inputs()}
    (embeddings,) = session.run(["sentence_embedding"], feed)
    expected = load_encoder(str(encoder), device="cpu").encode(sentences)
    assert np.abs(embeddings - expected).max() < 1e-5
    assert json.loads((tmp_path / "first.json").read_text())["dimension"] == 32


def test_a_missing_model_leaves_no_file(tmp_path: Path) -> None:
    done = export(tmp_path / "nothing", tmp_path / "nothing.onnx")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'nothing'}: ")
    assert not list(tmp_path.iterdir())
