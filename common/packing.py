"""One forward without padding for all columns of a batch (on a CPU).

Of a batch of KorSTS or KorNLI, padded by column, two thirds are padding. Here the sentences of all
columns go through the encoder in one forward, laid side by side into rows without padding.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
from collections.abc import Iterable
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.merged_forward import embed_columns
from sentence_transformers.util import all_gather, all_gather_with_grad
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from common.dropout import draw_by_bytes, drop
from common.encoders import first_position

# Row length at which attention, which costs its square, costs as much as all else: in rows of 48
# it takes 7% of a step.
EVEN_LENGTH = 700
SHORTEST_ROW = 24
# Encoders that take positions and a mask of pairs of tokens: others of that kind go here.
FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert", "electra")


def _attention_in_fp32(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, dropout: float = 0.0, scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Attention in float32, with --precision bf16 too: in bf16 a CPU takes several times as long.

    With dropout on packed rows the draws are `common.dropout`'s. Nothing is lost by that: torch's
    own, with dropout, computes and keeps all probabilities as well.
    """
    with torch.autocast("cpu", enabled=False):
        query, key, value = query.float(), key.float(), value.float()  # (R, heads, W, width)
        packed = attention_mask is not None and attention_mask.is_floating_point()
        if not (dropout and packed and scaling):
            options |= {"dropout": dropout, "scaling": scaling}
            return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        scores = (query * scaling) @ key.transpose(2, 3) + attention_mask  # (R, heads, W, W)
        context = drop(scores.softmax(-1), dropout) @ value
        return context.transpose(1, 2).contiguous(), None


def lay_in_rows(lengths: list[int]) -> tuple[int, int, list[int]]:
    """Lays sentences side by side into rows of one length, for the least work.

    Longest first, each where it first fits; of all lengths of rows up to twice the shortest one
    that of the least places, longer rows weighed with what their attention costs.

    Returns:
        The tokens of a row W, the rows R, and each sentence's first place among R * W.
    """
    order, tokens = sorted(range(len(lengths)), key=lambda i: -lengths[i]), sum(lengths)

    def work(width: int, rows: int) -> float:
        return rows * width * (1 + width / EVEN_LENGTH)

    def at_best(width: int) -> float:
        return work(width, -(-tokens // width))

    shortest = max(SHORTEST_ROW, *lengths)
    best, least = None, math.inf
    for width in sorted(range(shortest, 2 * shortest), key=at_best):
        if at_best(width) >= least:
            break
        used: list[int] = []  # of each row, the places taken
        first = [0] * len(lengths)
        for sentence in order:
            length = lengths[sentence]
            row = next((row for row, n in enumerate(used) if n + length <= width), len(used))
            if row == len(used):
                used.append(0)
            first[sentence] = row * width + used[row]
            used[row] += length
        if work(width, len(used)) < least:
            best, least = (width, len(used), first), work(width, len(used))
    return best


def pack_sentences(model: SentenceTransformer) -> None:
    """Makes training forwards on a CPU skip padding: sentences share rows, each seeing only itself.

    The sentences of a batch are laid into rows (`lay_in_rows`) with positions that start again and
    an attention mask that is block-diagonal; token embeddings come back in the batch's own layout.
    Losses and gradients are the same up to rounding (and the draws of dropout, which are
    `common.dropout`'s). For `FAMILIES`; other encoders, GPUs and evaluation keep their padded
    forwards.
    """
    encoder = model[0].model
    if encoder.device.type != "cpu":
        return
    family = encoder.config.model_type
    if family not in FAMILIES or getattr(encoder.config, "is_decoder", False):
        print(
            f"note: {family} trains with padding: only {', '.join(FAMILIES)} train without",
            file=sys.stderr,
        )
        return
    offset = first_position(model)
    # By name and for the whole process: transformers looks "sdpa" up at each call. Other float32
    # models get what they got (float() changes nothing there, and only packed rows have a mask of
    # numbers); one kept in half precision would get float32 back, and the scripts load none.
    AttentionInterface.register("sdpa", _attention_in_fp32)
    draw_by_bytes(encoder)
    padded_forward = encoder.forward

    @functools.wraps(padded_forward)
    def packed_forward(**inputs: Any) -> Any:
        # Below: S sentences padded to L tokens come in, R rows of W places go through the encoder.
        mask = inputs["attention_mask"].bool()  # (S, L)
        right_padded = mask[:, 0].all() and not (mask[:, 1:] > mask[:, :-1]).any()
        if not encoder.training or not right_padded:
            return padded_forward(**inputs)
        lengths = mask.sum(1).tolist()
        width, count, first = lay_in_rows(lengths)
        column = torch.arange(mask.shape[1])  # (L,)
        # (S, L): each token's place among R * W. Padding takes any sentence's: pooling drops it.
        place = torch.where(mask, torch.tensor(first)[:, None] + column, first[0])

        def lay(values: torch.Tensor, empty: int) -> torch.Tensor:
            """Lays values that expand to (S, L) into rows, (R, W)."""
            rows = torch.full((count * width,), empty)
            rows[place[mask]] = values.expand_as(mask)[mask]
            return rows.view(count, width)

        # Whose token each place holds. Empty places are one owner's, -1, and see each other: a
        # place that saw nothing would be a softmax over nothing. No token sees them.
        owner = lay(torch.arange(len(lengths))[:, None], -1)
        blocked = owner[:, :, None] != owner[:, None, :]  # (R, W, W)
        for name in ("input_ids", "token_type_ids"):
            if name in inputs:
                inputs[name] = lay(inputs[name], 0)
        inputs["position_ids"] = lay(column + offset, offset)
        inputs["attention_mask"] = torch.zeros(blocked.shape).masked_fill(
            blocked, torch.finfo(torch.float32).min
        )[:, None]  # (R, 1, W, W), added to the scores of all heads
        output = padded_forward(**inputs)
        hidden = output.last_hidden_state  # (R, W, hidden)
        output.last_hidden_state = hidden.flatten(0, 1)[place]  # (S, L, hidden)
        return output

    encoder.forward = packed_forward


def takes_embeddings(loss: torch.nn.Module) -> bool:
    """Tells whether a loss has compute_loss_from_embeddings(embeddings, labels).

    Others (GIST, softmax, distillation, those with gradient caches) do more in their `forward`.
    """
    method = getattr(loss, "compute_loss_from_embeddings", None)
    # The distillation losses' takes what their forward makes of the labels.
    return method is not None and "labels" in inspect.signature(method).parameters


class OneForward(torch.nn.Module):
    """Embeds all columns of a batch in one forward: the recipes' are sentences of one kind.

    With `gather` the loss sees the shares of all processes, as one process would.
    """

    def __init__(self, model: SentenceTransformer, loss: torch.nn.Module, gather: bool) -> None:
        super().__init__()
        self.model, self.loss = model, loss  # the trainer puts its DDP model where `model` is
        self.gather = gather

    def forward(
        self, sentence_features: Iterable[dict[str, torch.Tensor]], labels: torch.Tensor | None
    ) -> torch.Tensor:
        # One (batch, dimension) tensor a column.
        embeddings = embed_columns(self.model, sentence_features, separate_first=False)
        if self.gather:
            embeddings = [all_gather_with_grad(column) for column in embeddings]
            labels = all_gather(labels)
        return self.loss.compute_loss_from_embeddings(embeddings, labels)
