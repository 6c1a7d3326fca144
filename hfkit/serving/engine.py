"""A thread that generates the texts of a model, and the engine that writes one text after another."""

import collections
import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from hfkit.inference.batches import end_compute_threads
from hfkit.inference.decoding import Completion
from hfkit.inference.generation import stream_request
from hfkit.inference.results import Generation
from hfkit.models.loading import LanguageModel
from hfkit.serving.rows import Delta, Result, Row, UnavailableError

_GATHER = 0.1  # seconds that an idle engine waits for rows that are being made
_PATIENCE = 10.0  # seconds until the thread ends: a step cannot be interrupted


class Engine(ABC):
    """Generates the texts of rows, first come, first served. `_round` says how."""

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm
        self.tokens_written = self.prompt_tokens = self.prompt_tokens_read = 0
        self.failure: str | None = None  # why the engine failed; the process must then be restarted
        self._waiting: collections.deque[Row] = collections.deque()
        self._rows: list[Row] = []  # in progress
        self._expected = 0  # requests whose rows are being made
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"engine of {lm.name}")
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Texts that have not started."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Texts in progress."""
        return len(self._rows)

    @property
    def _is_busy(self) -> bool:
        """Whether there is work for the next round even if nothing waits."""
        return bool(self._rows)

    @contextlib.contextmanager
    def expecting(self) -> Iterator[None]:
        """Announce rows that the block will submit. An idle engine waits for them, to prefill them together."""
        with self._changed:
            self._expected += 1
        try:
            yield
        finally:
            with self._changed:
                self._expected -= 1
                self._changed.notify()

    def submit(self, rows: Sequence[Row]) -> None:
        """Queue rows. Each emits its result when it is done. UnavailableError if the engine has stopped."""
        with self._changed:
            if self._stopping or self.failure:
                raise UnavailableError(self.failure or "the server is stopping: try again later")
            self._waiting.extend(rows)
            self._changed.notify()

    def end_texts(self) -> None:
        """End all texts early, each with what it has so far. It does not wait for their ends."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def stop(self) -> None:
        """End all texts early, and the thread."""
        self.end_texts()
        self._thread.join(_PATIENCE)

    def _run(self) -> None:
        with torch.inference_mode():
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._stopping or self._waiting or self._is_busy)
                    if not self._is_busy:
                        self._changed.wait_for(lambda: self._stopping or not self._expected, _GATHER)
                    if self._stopping:
                        break
                try:
                    self._round()
                except Exception as error:  # noqa: BLE001, every text gets an answer
                    if isinstance(error, torch.AcceleratorError):  # no later call can succeed
                        self.failure = f"the device failed: {error}"
                    for row in self._drop_all():
                        row.emit(error)
        for row in [*self._drop_all(), *self._waiting]:
            row.end_early()

    @abstractmethod
    def _round(self) -> None:
        """Do one round of work."""

    def _drop_all(self) -> list[Row]:
        """Remove all rows in progress and return them."""
        rows, self._rows = self._rows, []
        return rows


class SoloEngine(Engine):
    """Generates one row after another, in transformers' own loops: beams, models with an encoder or a state."""

    def _round(self) -> None:
        row = self._waiting.popleft()
        self._rows = [row]
        if row.is_late and not row.is_cancelled:
            row.end_early()
        elif not row.is_cancelled:
            self._write(row)
            end_compute_threads()
        self._rows = []

    def _write(self, row: Row) -> None:
        def is_over() -> bool:
            return row.is_cancelled or row.is_late or self._stopping

        options = replace(row.options, num_return_sequences=None, max_time=row.seconds_left)
        pieces = stream_request(self.lm, row.request, options, is_over)
        try:
            while True:
                piece = next(pieces)
                if row.wishes.streams:
                    row.emit(Delta(piece, []))
        except StopIteration as stop:
            text: Generation = stop.value
            if not text.tokens and is_over():
                row.end_early()
                return
            self.tokens_written += text.tokens
            completion = Completion(text.completion, text.finish_reason, [0] * text.tokens, text.logprob)
            row.emit(Result(completion, [], []))
        finally:
            pieces.close()
