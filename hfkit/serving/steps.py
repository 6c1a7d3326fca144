"""Continuous batching: texts join and leave between steps, and no text depends on the others.

One thread makes all steps. Each of its rounds reads a part of the waiting prompts, so that a long one does not stop
the texts that are being written, then gives each of these its next token.
"""

from collections.abc import Sequence

import torch
from transformers.cache_utils import DynamicCache

from hfkit.inference.batches import TOKENS_AT_ONCE, default_size
from hfkit.models.architecture import for_device
from hfkit.models.loading import LanguageModel
from hfkit.serving.cache import Prefixes, Window, can_share_steps
from hfkit.serving.engine import Engine, SoloEngine
from hfkit.serving.reading import Prompts, top_tokens
from hfkit.serving.rows import Row, Token

# Prompt tokens that a round prefills, while texts are in progress and while none is.
_PROMPT_TOKENS = {"cpu": (64, 512), "cuda": (1024, 8192)}


class StepEngine(Engine):
    """Generates all rows together, one token each per step. `_rows` are in the order of the window."""

    def __init__(self, lm: LanguageModel) -> None:
        device = lm.model.device.type
        self._window = Window(len(DynamicCache(config=lm.model.config).layers))
        self._prefixes = Prefixes(device)
        self._reading: Prompts | None = None
        self._most, self._columns = default_size(lm), for_device(TOKENS_AT_ONCE, device)
        self._busy_tokens, self._idle_tokens = for_device(_PROMPT_TOKENS, device)
        self._solo = SoloEngine(lm)  # for beams
        super().__init__(lm)

    @property
    def waiting(self) -> int:
        return super().waiting + self._solo.waiting

    @property
    def running(self) -> int:
        return super().running + (len(self._reading.rows) if self._reading else 0) + self._solo.running

    @property
    def _is_busy(self) -> bool:
        return bool(self._rows or self._reading)

    def submit(self, rows: Sequence[Row]) -> None:
        super().submit([row for row in rows if not row.is_special])
        if special := [row for row in rows if row.is_special]:
            self._solo.submit(special)

    def end_texts(self) -> None:
        self._solo.end_texts()
        super().end_texts()

    def stop(self) -> None:
        super().stop()
        self._solo.stop()

    def _drop_all(self) -> list[Row]:
        reading = self._reading.rows if self._reading else []
        self._reading = None
        self._window.clear()
        return list(dict.fromkeys(super()._drop_all() + reading))

    def _round(self) -> None:
        for row in [row for row in self._rows if row.is_cancelled or row.is_late]:
            self._leave(row)
            if not row.is_cancelled:
                row.finish()
        budget = self._idle_tokens
        if self._rows:  # the more texts wait for each text that is held up, the more is prefilled
            budget = min(budget, self._busy_tokens * max(1, len(self._waiting) // len(self._rows)))
        self._reading = self._reading or self._next_prompts(budget)
        if self._reading:
            if all(row.is_cancelled for row in self._reading.rows):
                self._reading = None
            elif (logits := self._reading.advance(budget)) is not None:
                self._join(self._reading, logits)
        if self._rows:
            logits = self._window.step(self.lm, [row.tokens[-1].id for row in self._rows])
            for row in self._take(self._rows, logits):
                self._leave(row)

    def _next_prompts(self, budget: int) -> Prompts | None:
        """Waiting rows whose prompts are prefilled together: at most `budget` columns, or one longer prompt."""
        prompts: Prompts | None = None
        while self._waiting:
            row = self._waiting[0]
            if row.is_cancelled or row.is_late:
                self._waiting.popleft()
                if not row.is_cancelled:
                    row.end_early()
                continue
            if not self._has_room(row, len(prompts.rows) if prompts else 0):
                break
            if prompts is None:
                prompts = Prompts(self.lm, self._prefixes, row)
            elif not prompts.add(row, budget):
                break
            self._waiting.popleft()
        if prompts:
            self.prompt_tokens += sum(len(row.request.ids) for row in prompts.rows)
            self.prompt_tokens_read += prompts.count
        return prompts

    def _has_room(self, row: Row, more: int) -> bool:
        """Whether a row, after `more` others, stays within the limits of the device for rows and tokens."""
        count = len(self._rows) + more + 1
        longest = max(len(each.request.ids) + each.request.new_tokens for each in [*self._rows, row])
        return count == 1 or (count <= self._most and count * longest <= self._columns)

    def _join(self, prompts: Prompts, logits: torch.Tensor) -> None:
        """Choose the first token after each prompt from the logits, (prompts, vocabulary); move rows to the window."""
        places = [place for place, rows in enumerate(prompts.groups.values()) for _ in rows]
        for place, ids in enumerate(prompts.groups):
            if not prompts.scores:
                self._prefixes.keep(ids, prompts.cache, place)
        pairs = [pair for pair in zip(prompts.rows, places, strict=True) if pair[0].request.new_tokens]
        ended = self._take([row for row, _ in pairs], logits[[place for _, place in pairs]]) if pairs else []
        going_on = [pair for pair in pairs if pair[0] not in ended]
        if going_on:
            lengths = [len(row.request.ids) for row, _ in going_on]
            self._window.add(prompts.cache, [place for _, place in going_on], lengths)
        for row in prompts.rows:
            if not row.request.new_tokens:
                row.finish()
        self._reading, self._rows = None, [*self._rows, *(row for row, _ in going_on)]

    def _leave(self, row: Row) -> None:
        """Remove a row from the window; the last one takes its place."""
        place = self._rows.index(row)
        self._window.remove(place)
        self._rows[place] = self._rows[-1]
        self._rows.pop()

    def _take(self, rows: Sequence[Row], logits: torch.Tensor) -> list[Row]:
        """Give each row its next token. logits: (rows, vocabulary). Returns the rows that end with it."""
        scores = logits.to(torch.float32, copy=True)
        model = scores.log_softmax(-1)  # what the model itself says
        kinds: dict[object, list[int]] = {}
        for place, row in enumerate(rows):
            kinds.setdefault(row.kind, []).append(place)
            row.penalize(scores[place])
        chosen: list[torch.Tensor] = [scores.new_zeros(1, dtype=torch.long)] * len(rows)
        failed: dict[int, Exception] = {}
        for places in kinds.values():
            try:
                first = rows[places[0]]
                part = scores[places] if len(places) < len(rows) else scores
                # Only a row that is the only one of its kind has processors that look at its tokens.
                ids = torch.tensor([first.ids], device=scores.device) if first.kind is first else part.long()[:, :0]
                for processor in first.processors:
                    part = processor(ids, part)
                for place, row_scores in zip(places, part, strict=True):
                    chosen[place] = rows[place].pick(row_scores)
            except torch.AcceleratorError:
                raise
            except Exception as error:  # noqa: BLE001, the other texts go on
                failed |= dict.fromkeys(places, error)
        tokens = torch.stack(chosen)
        logprobs = model.gather(1, tokens).squeeze(1).tolist()
        ended = []
        for place, (row, (token,)) in enumerate(zip(rows, tokens.tolist(), strict=True)):
            if place in failed:
                row.emit(failed[place])
            self.tokens_written += 1
            top = top_tokens(model[place], row.wishes.top, token)
            if place in failed or row.take(Token(token, logprobs[place], top)):
                ended.append(row)
        return ended


def make_engine(lm: LanguageModel) -> Engine:
    """The engine for a model that generates text."""
    return StepEngine(lm) if can_share_steps(lm) else SoloEngine(lm)
