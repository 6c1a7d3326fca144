"""A CUDA graph on a CPU: what it records it does again."""

import contextlib

import torch
from torch.utils._pytree import tree_leaves, tree_map

from hfkit.inference.graphs import Step


class FakeGraph:
    def __init__(self, events: list) -> None:
        self._events, self._step = events, None

    def replay(self) -> None:
        """Do what was recorded, into the tensors that recording returned."""
        self._events.append("replayed")
        for target, result in zip(tree_leaves(self._step._result), tree_leaves(self._forward()), strict=True):
            target.copy_(result)

    @staticmethod
    @contextlib.contextmanager
    def recorded(graph: "FakeGraph", *, capture_error_mode: str):
        """As `torch.cuda.graph`: nothing that is recorded happens now."""
        assert capture_error_mode == "thread_local"
        forward = Step.forward

        def record(step):
            graph._step, graph._forward = step, lambda: forward(step)
            graph._events.append("recorded")
            return tree_map(torch.clone, step._result)

        Step.forward = record
        try:
            yield
        finally:
            Step.forward = forward
