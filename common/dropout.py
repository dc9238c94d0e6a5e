"""Dropout on a CPU: a 64-bit draw decides eight elements.

torch draws a number for each element, one after the other (but on Intel's CPUs): on an AMD EPYC a
fifth of a training step of the offline encoder. Here a byte is compared with the share, so that the
share is a multiple of 1/256 (0.1 becomes 26/256); what is kept is scaled by exactly that. Draws
come from torch's own generator, which a seed sets and a checkpoint holds.
"""

from __future__ import annotations

import torch


def keep_mask(shape: torch.Size, dropped: int) -> torch.Tensor:
    """Draws for each element 0 with a probability of dropped/256, else 1: uint8, on the CPU."""
    draws = torch.empty(-(-shape.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
    numbers = draws.view(torch.uint8)[: shape.numel()].view(shape)
    # Not `numbers >= dropped`: torch makes booleans one by one, these two in vectors.
    return numbers.clamp_(dropped - 1, dropped).sub_(dropped - 1)


def drop(values: torch.Tensor, share: float) -> torch.Tensor:
    """Returns values with about `share` of them at 0 and the others scaled up, as dropout does.

    Where bytes are too coarse (a tenth of the share: most shares below 0.02) torch draws.
    """
    dropped = round(256 * share)
    if dropped == 256 or abs(dropped / 256 - share) > share / 10:
        return torch.nn.functional.dropout(values, share)
    # In float32, for bfloat16 values too: in bfloat16 the scale would be a third of a percent off.
    mask = keep_mask(values.shape, dropped).float().mul_(256 / (256 - dropped))
    return (values * mask).to(values.dtype)


class Dropout(torch.nn.Dropout):
    """torch's module with these draws."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return drop(values, self.p) if self.training and self.p else values


def draw_by_bytes(module: torch.nn.Module) -> None:
    """Replaces all dropouts in a module; attention only reads the share of its own."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.Dropout:
                setattr(parent, name, Dropout(child.p).train(child.training))
