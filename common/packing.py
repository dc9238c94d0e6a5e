"""One forward without padding for all columns of a batch.

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

from common.batches import HOST_MASK
from common.dropout import draw_by_bytes, drop
from common.encoders import BERT_LIKES, architecture, first_position

# Row length at which attention, which costs its square, costs as much as all else: in rows of 48
# it takes 7% of a step.
EVEN_LENGTH = 700
SHORTEST_ROW = 24
# On a GPU rows' length and number are multiples of these: few shapes, since each needs plans and
# graphs of its own.
GPU_STEPS = (32, 4)


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


def lay_in_rows(
    lengths: list[int], width_step: int = 1, count_step: int = 1
) -> tuple[int, int, list[int]]:
    """Lays sentences side by side into rows of one length, for the least work.

    Longest first, each where it first fits; of all lengths of rows up to twice the shortest one
    that of the least places, longer rows weighed with what their attention costs.

    Args:
        lengths: tokens of each sentence.
        width_step, count_step: W is a multiple of the one, R of the other.

    Returns:
        The tokens of a row W, the rows R, and each sentence's first place among R * W.
    """
    order, tokens = sorted(range(len(lengths)), key=lambda i: -lengths[i]), sum(lengths)

    def work(width: int, rows: int) -> float:
        return rows * width * (1 + width / EVEN_LENGTH)

    def at_best(width: int) -> float:
        return work(width, -(-tokens // width))

    shortest = -(-max(SHORTEST_ROW, *lengths) // width_step) * width_step
    best, least = None, math.inf
    for width in sorted(range(shortest, 2 * shortest, width_step), key=at_best):
        if at_best(width) >= least:
            break
        used: list[int] = []  # of each row, the places taken
        first = [0] * len(lengths)
        row = before = 0
        for sentence in order:
            length = lengths[sentence]
            # Where one as long found no place, this one finds none.
            row = row if length == before else 0
            while row < len(used) and used[row] + length > width:
                row += 1
            if row == len(used):
                used.append(0)
            first[sentence] = row * width + used[row]
            used[row] += length
            before = length
        rows = -(-len(used) // count_step) * count_step
        if work(width, rows) < least:
            best, least = (width, rows, first), work(width, rows)
    return best


def pack_sentences(model: SentenceTransformer) -> None:
    """Makes training forwards skip padding: sentences share rows, each seeing only itself.

    The sentences of a batch are laid into rows (`lay_in_rows`) with positions that start again and
    an attention mask that is block-diagonal; token embeddings come back in the batch's own layout.
    Losses and gradients are the same up to rounding (and the draws of dropout, which on a CPU are
    `common.dropout`'s). For `BERT_LIKES` on a CPU or with CUDA; other encoders, models that use the
    output of all layers, other devices and evaluation keep their padded forwards.
    """
    encoder = model[0].model
    family, on_cpu = architecture(model), encoder.device.type == "cpu"
    if encoder.device.type not in ("cpu", "cuda"):
        return
    if family not in BERT_LIKES:
        print(
            f"note: {family} trains with padding: only {', '.join(BERT_LIKES)} train without",
            file=sys.stderr,
        )
        return
    if encoder.config.output_hidden_states:  # they would be rows to a module that takes them
        print(f"note: {family} trains with padding: the model uses all layers", file=sys.stderr)
        return
    offset = first_position(model)
    if on_cpu:
        # By name and for the whole process: transformers looks "sdpa" up at each call. Other
        # float32 models get what they got (float() changes nothing there, and only packed rows
        # have a mask of numbers); one kept in half precision would get float32 back, and the
        # scripts load none.
        AttentionInterface.register("sdpa", _attention_in_fp32)
        draw_by_bytes(encoder)
    padded_forward = encoder.forward

    @functools.wraps(padded_forward)
    def packed_forward(**inputs: Any) -> Any:
        host_mask = inputs.pop(HOST_MASK, None)
        if not encoder.training:
            return padded_forward(**inputs)
        # Below: S sentences padded to L tokens come in, R rows of W places go through the encoder.
        device = inputs["attention_mask"].device
        # (S, L). All places are found on the CPU: without `HOST_MASK` this waits for all that a GPU
        # was given before. A loss may have cut the other's columns.
        mask = inputs["attention_mask"]
        if host_mask is not None and host_mask.shape == mask.shape:
            mask = host_mask
        mask = mask.cpu().bool()
        if not mask[:, 0].all() or (mask[:, 1:] > mask[:, :-1]).any():  # not padded on the right
            return padded_forward(**inputs)
        lengths = mask.sum(1).tolist()
        width, count, first = lay_in_rows(lengths, *(() if on_cpu else GPU_STEPS))
        sentence, column = mask.nonzero(as_tuple=True)  # of each token, (T,)
        tokens = sentence * mask.shape[1] + column  # its place among S * L
        places = torch.tensor(first)[sentence] + column  # and among R * W

        def lay(values: torch.Tensor, empty: int) -> torch.Tensor:
            """Lays the tokens' values, (T,), into rows, (R * W,)."""
            rows = torch.full((count * width,), empty)
            rows[places] = values
            return rows

        # Whose token each place holds. Empty places are one owner's, -1, and see each other: a
        # place that saw nothing would be a softmax over nothing. No token sees them.
        found = lay(sentence, -1), lay(tokens, 0), lay(column + offset, offset), tokens, places
        if not on_cpu:  # in one copy
            sizes = [len(values) for values in found]
            found = torch.cat(found).pin_memory().to(device, non_blocking=True).split(sizes)
        owner, source, positions, tokens, places = found
        for name in ("input_ids", "token_type_ids"):
            if name in inputs:
                inputs[name] = inputs[name].flatten()[source].view(count, width)
        inputs["position_ids"] = positions.view(count, width)
        owner = owner.view(count, width)
        blocked = owner[:, :, None] != owner[:, None, :]  # (R, W, W)
        half = not on_cpu and torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if half else torch.float32
        inputs["attention_mask"] = torch.zeros_like(blocked, dtype=dtype).masked_fill(
            blocked, torch.finfo(dtype).min
        )[:, None]  # (R, 1, W, W), added to the scores of all heads
        output = padded_forward(**inputs)
        hidden = output.last_hidden_state.flatten(0, 1)  # (R * W, hidden)
        output.last_hidden_state = (
            hidden.new_zeros(mask.numel(), hidden.shape[1])
            .index_copy(0, tokens, hidden.index_select(0, places))
            .view(*mask.shape, -1)
        )  # (S, L, hidden), nothing where there is padding: pooling drops it
        return output

    encoder.forward = packed_forward


def is_packed(model: SentenceTransformer) -> bool:
    """Tells whether `pack_sentences` found an encoder that it can train without padding."""
    return "forward" in vars(model[0].model)


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
