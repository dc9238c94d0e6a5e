"""Checks exported files against sentence-transformers: shapes, masks, odd text."""

from __future__ import annotations

import contextlib
import json
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer

from common.command_line import first_line, write_text
from common.encoders import default_prompt
from common.exported import OnnxEncoder, embed

OPSET = 17
TOLERANCES = {"fp32": 1e-5, "fp16": 1e-2}
CHECK_SENTENCES = (
    "한 남자가 음식을 먹는다.",
    "",
    "가",
    "A man is eating 파스타 at 7시 30분.",
    "나는 학교에 갔다 😀👍🏽🇰🇷",
    "大韓民國의 首都는 서울特別市이다.",
    "그 이름에는 이𠮷수처럼 드문 漢字가 있다.",
    "그는 'TV'를 \"켰다\"\t그리고  껐다.",
    unicodedata.normalize("NFD", "한글을 낱낱이 풀어 쓴다."),
    " \n",
    "아주 긴 문장은 끝에서 잘린다. " * 200,
)


class CheckFailed(Exception):
    """The exported file does not give what the model gives, or loses too much."""


@contextlib.contextmanager
def runs(path: Path) -> Iterator[None]:
    """Raises `CheckFailed` for what onnxruntime cannot do with a file."""
    try:
        yield
    except Exception as error:  # onnxruntime's errors have no other base
        raise CheckFailed(
            f"{path.name}: onnxruntime cannot run it: {first_line(error)}; not written"
        ) from None


def check_file(
    path: Path, model: SentenceTransformer, tokenizer: Tokenizer, dim: int, precision: str
) -> None:
    """Compares a file with sentence-transformers; raises `CheckFailed` where they differ."""
    tolerance = TOLERANCES[precision]
    onnx.checker.check_model(path, full_check=True)
    proto = onnx.load(path, load_external_data=False)
    if [(item.domain, item.version) for item in proto.opset_import] != [("", OPSET)]:
        raise CheckFailed(f"{path.name}: not standard operators of opset {OPSET} alone")
    with runs(path):
        session = onnxruntime.InferenceSession(path)
    prompt = default_prompt(model)
    texts = [prompt + text for text in CHECK_SENTENCES]
    # One by one: padded to the longest, the others would take most of the check's time.
    options = {"batch_size": 1, "truncate_dim": dim, "show_progress_bar": False}
    expected = model.encode(list(CHECK_SENTENCES), **options)
    for batch_size in (1, 2, 3):
        with runs(path):
            found = embed(session, tokenizer, texts, batch_size)
        check_close(path, f"batches of {batch_size}", found, expected, tolerance)
    # Without the longest: 64 times its 3,000 tokens would want 70 GB of bge-m3's attention.
    with runs(path):
        found = embed(session, tokenizer, texts[:-1] * 8, 64)
    check_close(path, "batches of 64", found, np.concatenate([expected[:-1]] * 8), tolerance)

    generator = np.random.default_rng(0)
    ids = generator.integers(0, model[0].model.config.vocab_size, size=(3, 16))
    holes = generator.integers(0, 2, size=ids.shape)
    holes[:, 8] = 1  # no row without any token
    left = (np.arange(16) >= np.array([[0], [5], [15]])).astype(np.int64)
    for case, mask in (("left padding", left), ("holes in the mask", holes)):
        features = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        feeds = {item.name: features[item.name] for item in session.get_inputs()}
        with torch.inference_mode():
            outputs = model({name: torch.from_numpy(values) for name, values in feeds.items()})
        expected = outputs["sentence_embedding"][:, :dim].numpy()
        with runs(path):
            found = session.run(None, feeds)[0]
        check_close(path, case, found, expected, tolerance)


def check_close(
    path: Path, case: str, found: np.ndarray, expected: np.ndarray, tolerance: float
) -> None:
    difference = float(np.abs(found - expected).max())
    if not difference <= tolerance:  # NaN too
        raise CheckFailed(
            f"{path.name}: {case}: differs from sentence-transformers by {difference:.1e}, "
            f"more than {tolerance:.0e}; not written"
        )


def write_golden(path: Path, files: Sequence[Path]) -> None:
    """Writes what other programs have to get from exported files of one model, as JSON.

    Keys: what a consumer needs to know (as in NAME.json), `sentences`, and `vectors`: by the name
    of each file, a list of `dimension` numbers for each sentence, computed one by one. The prompt
    is not yet before the sentences. int8 depends on the CPU in its last steps.
    """
    encoders = [OnnxEncoder(file) for file in files]
    settings = encoders[0].settings
    vectors = {
        file.name: encoder.encode(list(CHECK_SENTENCES), settings["prompt"], 1).tolist()
        for file, encoder in zip(files, encoders, strict=True)
    }
    kept = ("model", "revision", "max_seq_length", "dimension", "prompt")
    content = {name: settings[name] for name in kept}
    content |= {"sentences": CHECK_SENTENCES, "vectors": vectors}
    write_text(path, json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n")
