"""An optimizer for two tasks that take turns."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from transformers import TrainerCallback


class AdamWPerTask(torch.optim.AdamW):
    """AdamW with moments of its own for each of two tasks that share the parameters."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        self.task, self.moments = 0, [self.state, defaultdict(dict)]

    def step(self, closure: Any = None) -> Any:
        self.state = self.moments[self.task]
        return super().step(closure)

    def state_dict(self) -> dict[str, Any]:
        tasks = []
        for moments in self.moments:
            self.state = moments
            tasks.append(super().state_dict())
        return {"tasks": tasks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for task, state in enumerate(state_dict["tasks"]):
            super().load_state_dict(state)
            self.moments[task] = self.state


class TakeTurns(TrainerCallback):
    """Tells the optimizer whose step it is: NLI's, then STS's."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["optimizer"].optimizer.task = state.global_step % 2
