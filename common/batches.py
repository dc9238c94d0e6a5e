"""Orders of rows: shuffled, without duplicates, shared among processes; and batches on their way.

In an order a batch is a list of row numbers. What a row holds is the recipe's business.
"""

from __future__ import annotations

import functools
import itertools
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from multiprocessing import get_all_start_methods, parent_process
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from sentence_transformers.base.sampler import NoDuplicatesBatchSampler
from sentence_transformers.sentence_transformer.data_collator import (
    SentenceTransformerDataCollator,
)
from torch.utils.data import get_worker_info

from common.command_line import UserError

MASK = "attention_mask"
HOST_MASK = "attention_mask_on_host"  # of a GPU's batch, the same as the CPU has it


def shuffled_batches(
    rows: int, batch_size: int, seed: int, world_size: int = 1
) -> Iterator[list[int]]:
    """Returns batches of row numbers without end, each pass over the rows in a new order.

    The last batch of a pass is what is left, as in the original's loader; of it, rows that
    world_size processes cannot share equally wait for the next pass.

    Raises:
        UserError: fewer rows than processes, at the call.
    """
    if rows < world_size:
        raise UserError(f"{rows} pairs to train on cannot be shared by {world_size} processes")
    generator = np.random.default_rng(seed)
    kept = rows - rows % world_size
    orders = (generator.permutation(rows)[:kept].tolist() for _ in itertools.count())
    return (
        order[start : start + batch_size]
        for order in orders
        for start in range(0, kept, batch_size)
    )


def no_duplicates_batches(
    triplets: pd.DataFrame, batch_size: int, seed: int
) -> Iterator[list[int]]:
    """Yields full batches in which no text occurs twice, without end, pass after pass.

    Texts are compared stripped and in lower case, as sentence-transformers 2.7 did: a duplicate
    would be its own in-batch negative.

    Raises:
        UserError: the triplets (or pairs) cannot fill one batch.
    """
    normalised = triplets.apply(lambda column: column.str.strip().str.lower())
    sampler = NoDuplicatesBatchSampler(
        Dataset.from_pandas(normalised, preserve_index=False),
        batch_size=batch_size,
        drop_last=True,
        precompute_hashes=True,
        precompute_num_proc=0,  # in this process: a worker outlives a run that is killed
        generator=torch.Generator(),
        seed=seed,
    )
    for epoch in range(sys.maxsize):
        sampler.set_epoch(epoch)
        empty = True
        for batch in sampler:
            empty = False
            yield batch
        if empty:
            what = "triplets" if "negative" in triplets.columns else "pairs"
            raise UserError(
                f"{len(triplets):,} {what} cannot fill one batch of {batch_size} "
                "without a text twice: more data or a smaller batch (--batch_size; "
                "of multi-task --nli_batch_size) is needed"
            )


def check_accumulation(accumulation: int, batches: int) -> None:
    """Raises `UserError` where an optimizer step would go through the data more than once.

    Args:
        accumulation: batches an optimizer step.
        batches: those of an epoch.
    """
    if accumulation > max(1, batches):
        raise UserError(
            f"--gradient_accumulation_steps {accumulation}: an epoch has {batches:,} batches: at "
            "most as many, or smaller batches"
        )


def share(batches: Iterable[list[int]], offset: int, world_size: int) -> Iterator[list[int]]:
    """Yields each batch as world_size equal shares, of row numbers counted from offset.

    accelerate deals one share to each process in turn: a step sees the whole batch.
    """
    for batch in batches:
        size = len(batch) // world_size
        for rank in range(world_size):
            yield [offset + row for row in batch[rank * size : (rank + 1) * size]]


def tokenizing_processes() -> int:
    """Returns how many processes are to tokenize beside a GPU's steps: none without a GPU.

    They are forked (`RecipeTrainer._build_dataloader`). One takes several of a GPU's steps for a
    batch, so that half of the cores do it, but two at least and no more than eight.
    """
    if not torch.cuda.is_available() or "fork" not in get_all_start_methods():
        return 0
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(max(2, cores // 2), 8)


@functools.cache  # once a process
def end_with_parent() -> None:
    """Has this process end as soon as the one that forked it is gone.

    torch's tokenizing processes look for it too, but not while they hold a batch that nobody
    takes: those of a run that is killed would stay for ever.
    """

    def wait() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


class ArrayCollator(SentenceTransformerDataCollator):
    """Tokenizes batches to arrays, which a process that does it sends through a pipe.

    Tensors would come one by one, each over a connection of its own, and hold the GPU's process up.
    """

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        if get_worker_info() is not None:
            end_with_parent()
        batch = super().__call__(features)
        return {
            name: value.numpy() if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
        }


def move_batch(batch: dict[str, Any], device: torch.device, masks_on_host: bool) -> dict[str, Any]:
    """Returns an `ArrayCollator`'s batch with tensors on the device, without waiting for CUDA.

    Args:
        masks_on_host: a GPU's batch also has each attention mask as `HOST_MASK`, on the CPU.
    """
    moved = dict(batch)
    for name, array in batch.items():
        if not isinstance(array, np.ndarray):
            continue
        tensor = torch.from_numpy(array)
        if device.type != "cuda":
            # Waiting: MPS reads an array that is gone by then, and trains on what is there instead
            # (https://github.com/pytorch/pytorch/issues/189690).
            moved[name] = tensor.to(device)
            continue
        if name.endswith(MASK) and masks_on_host:
            moved[name.removesuffix(MASK) + HOST_MASK] = tensor
        moved[name] = tensor.pin_memory().to(device, non_blocking=True)
    return moved
