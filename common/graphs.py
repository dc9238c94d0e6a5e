"""CUDA graphs of an encoder's layers (on a GPU).

A step of these recipes gives a GPU many small kernels, and starting them one by one from Python
takes longer than they do. A graph starts all of a forward's, or of a backward's, at once
(https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).
"""

from __future__ import annotations

import functools
import gc
from typing import Any, NamedTuple

import torch
from sentence_transformers import SentenceTransformer
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from common.packing import is_packed

MOST_SHAPES = 32  # each takes time to record, and memory for what goes in and comes out


class Captured(NamedTuple):
    """The graphs for rows of one shape, and the tensors that they read and write."""

    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    hidden: torch.Tensor
    mask: torch.Tensor
    output: torch.Tensor
    output_gradient: torch.Tensor
    hidden_gradient: torch.Tensor


class Graphs:
    """The graphs of an encoder's layers, one pair for each shape of rows.

    All share their memory, so that only one forward at a time is theirs: until its backward has
    run, others run without graphs.
    """

    def __init__(self, layers: torch.nn.Module) -> None:
        self.layers = layers
        self.parameters = {name: p for name, p in layers.named_parameters() if p.requires_grad}
        self.captured: dict[tuple[Any, ...], Captured] = {}
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()  # one: for each, libraries keep memory of their own
        # All gradients of the parameters: every backward graph writes them here.
        self.gradients = torch.cat(
            [torch.zeros_like(p).flatten() for p in self.parameters.values()]
        )
        self.in_use = False

    def compute(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor | None:
        """Returns the layers' output, (R, W, hidden), of as many rows and their mask.

        None where the graphs are in use, or are as many as there may be.
        """
        key = (hidden.shape, hidden.dtype, mask.dtype, torch.is_autocast_enabled("cuda"))
        is_new = key not in self.captured
        if self.in_use or (is_new and len(self.captured) == MOST_SHAPES):
            return None
        self.in_use = True  # recording runs the layers, which ask here again
        if is_new:
            self.captured[key] = self.capture(hidden, mask)
        captured = self.captured[key]
        return Replay.apply(self, captured, hidden, mask, *self.parameters.values())

    def capture(self, hidden: torch.Tensor, mask: torch.Tensor) -> Captured:
        """Records a forward and its backward; random numbers are drawn as if it had not."""
        random_state = torch.cuda.get_rng_state()
        hidden, mask = hidden.detach().clone(), mask.clone()

        def forward() -> tuple[torch.Tensor, list[torch.Tensor]]:
            """Returns the output, and what has gradients: leaves that no other stream has used."""
            leaves = {name: p.detach().requires_grad_() for name, p in self.parameters.items()}
            start = hidden.detach().requires_grad_()
            named = {"attention_mask": mask}
            output = torch.func.functional_call(self.layers, leaves, (start,), named)
            return output.last_hidden_state, [start, *leaves.values()]

        # A cache of weights in half precision would outlive the step that they are of.
        with torch.autocast(
            "cuda",
            dtype=torch.get_autocast_dtype("cuda"),
            enabled=torch.is_autocast_enabled("cuda"),
            cache_enabled=False,
        ):
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):  # what libraries set up at a first call
                for _ in range(2):
                    output, leaves = forward()
                    torch.autograd.grad(output, leaves, torch.zeros_like(output))
            torch.cuda.current_stream().wait_stream(self.stream)
            graphs = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            # Other threads may go on meanwhile; graphs of a model that is no more may not be freed.
            options = {"pool": self.pool, "capture_error_mode": "thread_local"}
            collects = gc.isenabled()
            gc.disable()
            try:
                with torch.cuda.graph(graphs[0], **options):
                    output, leaves = forward()
                output_gradient = torch.zeros_like(output)
                with torch.cuda.graph(graphs[1], **options):
                    hidden_gradient, *others = torch.autograd.grad(output, leaves, output_gradient)
                    torch.cat([gradient.flatten() for gradient in others], out=self.gradients)
            finally:
                if collects:
                    gc.enable()
        torch.cuda.set_rng_state(random_state)
        return Captured(
            *graphs, hidden, mask, output.detach(), output_gradient.detach(), hidden_gradient
        )


class Replay(torch.autograd.Function):
    """Replays a forward's graph, and its backward's; what they give is copied out."""

    @staticmethod
    def forward(
        ctx: Any,
        graphs: Graphs,
        captured: Captured,
        hidden: torch.Tensor,
        mask: torch.Tensor,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        ctx.graphs, ctx.captured = graphs, captured
        captured.hidden.copy_(hidden)
        captured.mask.copy_(mask)
        captured.forward.replay()
        return captured.output.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, output_gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        graphs, captured = ctx.graphs, ctx.captured
        captured.output_gradient.copy_(output_gradient)
        captured.backward.replay()
        graphs.in_use = False
        # A copy, once for all: gradients of several backwards are added up.
        parameters = graphs.parameters.values()
        parts = graphs.gradients.clone().split([p.numel() for p in parameters])
        gradients = [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]
        return None, None, captured.hidden_gradient.clone(), None, *gradients


def use_graphs(model: SentenceTransformer) -> None:
    """Has the layers of a packed encoder (`pack_sentences`) replay graphs where they train.

    On one GPU, for losses that run one forward a step. The first `MOST_SHAPES` shapes of rows are
    recorded, each when it first comes; others run without graphs.
    """
    encoder = model[0].model
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    layers = getattr(encoder, "encoder", None)
    if encoder.device.type != "cuda" or several or layers is None or not is_packed(model):
        return
    if "forward" in vars(layers):
        return  # they do: a model's second loss
    graphs, layers_forward = Graphs(layers), layers.forward

    @functools.wraps(layers_forward)
    def forward(
        hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **options: Any
    ) -> Any:
        in_rows = attention_mask is not None and attention_mask.is_floating_point()
        if in_rows and layers.training and torch.is_grad_enabled():
            output = graphs.compute(hidden_states, attention_mask)
            if output is not None:
                return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=output)
        return layers_forward(hidden_states, attention_mask=attention_mask, **options)

    layers.forward = forward
