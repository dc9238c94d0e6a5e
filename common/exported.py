"""An exported .onnx file as an encoder: fed, run, with the part of SentenceTransformer used here.

Examples and other languages have runners of their own; in this repository this is the only one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from tokenizers import Encoding, Tokenizer
from tqdm import tqdm

from common.command_line import UserError, first_line, read_json

COMPARED = ("revision", "dimension", "max_seq_length")
PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")


def files_of(path: Path) -> list[Path]:
    """Returns the .onnx file and, where it has them (above 2 GB), the weights beside it."""
    weights = path.with_name(f"{path.name}.data")
    return [path, weights] if weights.is_file() else [path]


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
    progress: str | None = None,
) -> np.ndarray:
    """Returns float32 (sentences, dimension) embeddings; batches hold sentences of like length.

    Args:
        progress: what a bar on stderr says that it counts; default: no bar.
    """
    feeds = feed(session, tokenizer.encode_batch(list(sentences)))
    mask = feeds["attention_mask"]
    order = np.argsort(-mask.sum(axis=1), kind="stable")
    parts = []
    starts = range(0, len(order), batch_size)
    for start in tqdm(starts, desc=progress, unit=" batches", disable=not progress):
        rows = order[start : start + batch_size]
        used = mask[rows].any(axis=0)
        batch = {name: values[rows][:, used] for name, values in feeds.items()}
        parts.append(session.run(["sentence_embedding"], batch)[0])
    return np.concatenate(parts)[np.argsort(order)]


class OnnxEncoder:
    """A file that onnx/export_onnx.py wrote, with the part of SentenceTransformer used here.

    Raises:
        UserError: one of the three files is missing, cannot be loaded or is of another export.
    """

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
            self.settings = read_json(settings)
            self.max_seq_length = self.settings["max_seq_length"]
            content = tokenizer.read_text(encoding="utf-8")
            self.tokenizer = Tokenizer.from_str(content)
            # As many as torch takes (a container's share, not the machine's cores): said with
            # every result.
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = self.threads = torch.get_num_threads()
            self.session = onnxruntime.InferenceSession(path, options, providers=providers)
        except Exception as error:  # the errors of onnxruntime and tokenizers have no other base
            raise UserError(f"{path}: cannot be loaded: {first_line(error)}") from None
        # What an exported file says of itself; one that was not exported here says nothing.
        metadata = self.session.get_modelmeta().custom_metadata_map
        found = {name: str(self.settings.get(name)) for name in COMPARED} | {"tokenizer": content}
        for name, value in found.items():
            if metadata.get(name, value) != value:
                file = tokenizer if name == "tokenizer" else settings
                raise UserError(f"{file}: is of another export than {path}")
        self.device = "cuda" if "CUDA" in self.session.get_providers()[0] else "cpu"

    @property
    def dimension(self) -> int:
        """Width of the embeddings."""
        return self.session.get_outputs()[0].shape[-1]

    def preprocess(self, sentences: list[str], prompt: str | None = None) -> dict[str, np.ndarray]:
        """Returns the inputs of the file, int64 (sentences, length)."""
        texts = [(prompt or "") + sentence for sentence in sentences]
        return feed(self.session, self.tokenizer.encode_batch(texts))

    def encode(
        self, sentences: list[str], prompt: str | None = None, batch_size: int = 32, **_: object
    ) -> np.ndarray:
        """Returns float32 (sentences, dimension) embeddings."""
        texts = [(prompt or "") + sentence for sentence in sentences]
        return embed(self.session, self.tokenizer, texts, batch_size)
