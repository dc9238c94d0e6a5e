"""Checkpoints of a run on disk: which are whole, which are needed, reading one back."""

from __future__ import annotations

import math
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer

from common.command_line import UserError, file_sha256, read_json, write_json
from common.encoders import check_embeddings, lift_code, load_encoder

MANIFEST = "manifest.json"
EMBEDDINGS = "embeddings.npy"  # what the model gave when it was written
MEAN = "mean.safetensors"  # of --average_checkpoints, so far
# What a run goes on from, beside the weights.
STATE_FILES = ("optimizer*", "scheduler.pt", "scaler.pt", "rng_state*.pth", MEAN)


def checkpoints(folder: Path) -> list[Path]:
    """Returns the checkpoint folders, whole or not, the oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r".*-\d+", path.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Returns the step that a checkpoint's name says."""
    return int(checkpoint.name.rsplit("-", 1)[1])


def seal_checkpoint(checkpoint: Path, best_step: int | None, keep_last: int) -> None:
    """Makes a written checkpoint count, and removes those that are no longer needed.

    A checkpoint counts once its manifest is there, which names each file's sha256; the best and
    the last `keep_last` stay, but only the newest keeps what a run goes on from: the optimizer's
    moments are twice the weights, and the mean so far is as large as they are.
    """
    lift_code(checkpoint)
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as pool:  # hashing keeps no other thread waiting
        digests = pool.map(file_sha256, files)
    names = [path.relative_to(checkpoint).as_posix() for path in files]
    hashes = dict(zip(names, digests, strict=True))
    write_json(checkpoint / MANIFEST, hashes)
    *older, _ = found = checkpoints(checkpoint.parent)
    for other in found[:-keep_last]:
        if step_of(other) != best_step:
            # The manifest goes first: half a checkpoint must not look like a whole one.
            (other / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(other)
    for other in filter(Path.exists, older):
        state = [path for pattern in STATE_FILES for path in other.glob(pattern)]
        if state:
            hashes = read_json(other / MANIFEST)
            write_json(other / MANIFEST, {n: hashes[n] for n in hashes if other / n not in state})
            for path in state:
                path.unlink()


def last_checkpoint(folder: Path) -> Path | None:
    """Returns the last whole checkpoint, and removes what a kill left half-written after it.

    Raises:
        UserError: a checkpoint was whole and is damaged or gone now.
    """
    for checkpoint in reversed(checkpoints(folder)):
        if not (checkpoint / MANIFEST).is_file():
            shutil.rmtree(checkpoint)
            continue
        if changed := changed_file(checkpoint):
            raise UserError(
                f"{changed}: damaged: its content is not what was saved: train again in another "
                "folder"
            )
        if not any(checkpoint.glob("optimizer*")):
            raise UserError(
                f"{checkpoint}: weights alone: the newest checkpoint, from which a run goes on, "
                "is gone: train again in another folder"
            )
        return checkpoint
    return None


def changed_file(checkpoint: Path) -> Path | None:
    """Returns the first file of a checkpoint that is not what its manifest says, or the manifest
    where it says nothing: cut off, as after a power failure."""
    try:
        hashes = dict(read_json(checkpoint / MANIFEST))
    except (ValueError, TypeError):
        return checkpoint / MANIFEST
    for name, expected in hashes.items():
        path = checkpoint / name
        if not path.is_file() or file_sha256(path) != expected:
            return path
    return None


def read_back(
    checkpoint: Path, score: float, max_seq_length: int, *, trust_remote_code: bool
) -> SentenceTransformer:
    """Returns a checkpoint's model.

    Exits with status 1 unless the files are those that were written, the model gives the
    embeddings that were written beside them, and the dev score it was chosen by is finite.
    """
    if changed := changed_file(checkpoint):
        sys.exit(f"error: {changed}: damaged: its content is not what was saved")
    model = load_encoder(str(checkpoint), max_seq_length, trust_remote_code=trust_remote_code)
    expected, found = np.load(checkpoint / EMBEDDINGS), check_embeddings(model)
    # Another machine, number of threads or batching rounds differently (1e-6 was seen).
    difference = np.abs(expected - found).max() / np.abs(expected).max()
    if not difference <= 1e-4 or not math.isfinite(score):
        sys.exit(
            f"error: {checkpoint} (dev {score}) gives other embeddings when read back than when "
            f"it was written (by {difference:.1e} of the largest value)"
        )
    return model
