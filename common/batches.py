"""Orders of rows: shuffled, without duplicates, shared among processes.

A batch is a list of row numbers. What a row holds is the recipe's business.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from sentence_transformers.base.sampler import NoDuplicatesBatchSampler

from common.command_line import UserError


def shuffled_batches(
    rows: int, batch_size: int, seed: int, world_size: int = 1
) -> Iterator[list[int]]:
    """Yields batches of row numbers without end, each pass over the rows in a new order.

    The last batch of a pass is what is left, as in the original's loader; of it, rows that
    world_size processes cannot share equally wait for the next pass.
    """
    generator = np.random.default_rng(seed)
    while True:
        order = generator.permutation(rows)[: rows - rows % world_size].tolist()
        for start in range(0, len(order), batch_size):
            yield order[start : start + batch_size]


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


def share(batches: Iterable[list[int]], offset: int, world_size: int) -> Iterator[list[int]]:
    """Yields each batch as world_size equal shares, of row numbers counted from offset.

    accelerate deals one share to each process in turn: a step sees the whole batch.
    """
    for batch in batches:
        size = len(batch) // world_size
        for rank in range(world_size):
            yield [offset + row for row in batch[rank * size : (rank + 1) * size]]
