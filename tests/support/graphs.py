"""A CUDA graph on a CPU: what it records it does again."""

import contextlib

from hfkit.inference.graphs import Step


class FakeGraph:
    def __init__(self, events: list) -> None:
        self._events, self._step = events, None

    def replay(self) -> None:
        """Do what was recorded, into the tensor that recording returned."""
        self._events.append("replayed")
        self._step._logits.copy_(self._forward())

    @staticmethod
    @contextlib.contextmanager
    def recorded(graph: "FakeGraph", *, capture_error_mode: str):
        """As `torch.cuda.graph`: nothing that is recorded happens now."""
        assert capture_error_mode == "thread_local"
        forward = Step.forward

        def record(step):
            graph._step, graph._forward = step, lambda: forward(step)
            graph._events.append("recorded")
            return step._logits.clone()

        Step.forward = record
        try:
            yield
        finally:
            Step.forward = forward
