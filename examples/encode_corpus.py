"""Encodes a text column of Parquet or JSON lines files with Ray Data: cores, GPUs, machines.

    pip install "ray[data]==2.60.*" "sentence-transformers==6.2.*"
    python encode_corpus.py corpus.parquet --output embeddings

Writes embeddings/part-corpus-000000.parquet and so on: one part for each --rows_per_part rows of a
file, with all its columns and `embedding`; `pandas.read_parquet("embeddings")` reads them all.
Prints the rows of each file, and at the end what was encoded, how fast, and where it is.

- A text that is null or no string keeps its row, with a null embedding, and is counted.
- Stopped, even by kill -9, it goes on from the finished parts when the same command is given again;
  _manifest.json holds what must stay the same (model, options, content of the files).
- int8 takes 255 steps between the lowest and highest value that each dimension has in the first
  1,000 texts (`ranges` in the manifest); values beyond them get the first or last step.
- JSON lines become the columns that their keys name. A key has one type in all lines; a text that
  is no string is written as its JSON.
- On a cluster (--ray_address) every machine must see the files, the output and a model's folder at
  the same paths.

This file needs nothing else of its repository.
"""

import argparse
import functools
import hashlib
import io
import json
import logging
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from ray.exceptions import RayError
from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer
from sentence_transformers.util.quantization import quantize_embeddings
from tqdm import tqdm

CALIBRATION_TEXTS = 1_000


class InputError(Exception):
    """Something that the user can put right: one line."""


# --- 1. Files: which rows make which part ------------------------------------------------------


def scan_parquet(path: Path, column: str, rows_per_part: int) -> tuple[pa.Schema, list[int], int]:
    """Returns the columns, the first row of each part, and the number of null texts."""
    file = pq.ParquetFile(path)
    schema = file.schema_arrow
    if column in schema.names:
        kind = schema.field(column).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not any(pa.types.__dict__[f"is_{name}"](kind) for name in
                   ("string", "large_string", "string_view", "null")):  # fmt: skip
            raise InputError(f"{path}: column {column} holds {kind}, not strings")
        nulls = sum(batch.column(0).null_count for batch in file.iter_batches(columns=[column]))
    return schema, list(range(0, file.metadata.num_rows, rows_per_part)), nulls
