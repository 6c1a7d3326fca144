"""Prefill: prompts are read a part at a time."""

from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from hfkit.inference.batches import forward
from hfkit.models.loading import LanguageModel
from hfkit.serving.cache import SHORTEST_PREFIX, Prefixes, common_length
from hfkit.serving.rows import Row, Token


def top_tokens(logprobs: torch.Tensor, count: int | None, token: int) -> list[tuple[int, float]]:
    """The `count` likeliest tokens, and `token` if it is not among them. logprobs: (vocabulary,)."""
    if not count:
        return []
    values, ids = logprobs.topk(min(count, len(logprobs)))
    top = dict(zip(ids.tolist(), values.tolist(), strict=True))
    return list(({**top, token: logprobs[token].item()} if token not in top else top).items())


class Prompts:
    """Prompts that are prefilled together, a part in each round."""

    def __init__(self, lm: LanguageModel, prefixes: Prefixes, row: Row) -> None:
        """row: the first one; `add` takes more, as long as nothing has been read."""
        self.groups = {tuple(row.request.ids): [row]}  # the rows of each prompt
        self.scores = row.wishes.scores_prompt
        self.cache = DynamicCache()
        # A kept prefix comes without the scores of its tokens.
        known = 0 if self.scores else prefixes.length(row.request.ids[:-1])
        self._lm, self._prefixes, self._done = lm, prefixes, known if known >= SHORTEST_PREFIX else 0
        self._ids: torch.Tensor | None = None

    @property
    def rows(self) -> list[Row]:
        return [row for rows in self.groups.values() for row in rows]

    @property
    def count(self) -> int:
        """Tokens that are left to prefill."""
        return sum(map(len, self.groups)) - self._done

    def add(self, row: Row, most: int) -> bool:
        """Add a row if it has one of these prompts, or another one that can be read with them in `most` columns.

        One that begins like one of them, or like an earlier prompt, waits until its beginning is known.
        """
        ids, scores = tuple(row.request.ids), row.wishes.scores_prompt
        if ids in self.groups and scores <= self.scores:
            self.groups[ids].append(row)
            return True
        shared = max(self._prefixes.length(ids), *(common_length(ids, other) for other in self.groups))
        columns = max(len(ids), *map(len, self.groups)) * (len(self.groups) + 1)
        if scores or self.scores or self._done or columns > most or shared >= SHORTEST_PREFIX:
            return False
        self.groups[ids] = [row]
        return True

    def _pad(self) -> torch.Tensor:
        """Token ids, (prompts, columns), padded as `hfkit generate` pads a batch."""
        width, device = max(map(len, self.groups)), self._lm.model.device
        gaps = torch.tensor([[width - len(ids)] for ids in self.groups], device=device)
        self._mask = (torch.arange(width, device=device) >= gaps).long()
        self._positions = (self._mask.cumsum(1) - 1).clamp(min=0)
        return torch.tensor([ids[:1] * (width - len(ids)) + ids for ids in self.groups], device=device)

    def advance(self, count: int) -> torch.Tensor | None:
        """Read `count` more columns. Returns the logits after the last ones, (prompts, vocabulary)."""
        if self._ids is None:
            self._ids = self._pad()
            self.cache = self._prefixes.find(self._ids[0].tolist()) if self._done else self.cache
        columns = slice(self._done, self._done + count)
        keep: dict[str, Any] = {} if self.scores else {"logits_to_keep": 1}
        logits: torch.Tensor = forward(
            self._lm,
            input_ids=self._ids[:, columns],
            attention_mask=self._mask[:, : columns.stop],
            position_ids=self._positions[:, columns],
            cache=self.cache,
            use_cache=True,
            **keep,
        ).logits
        if self.scores:
            self._score(self._ids[0, self._done + 1 : columns.stop + 1].tolist(), logits[0].float().log_softmax(-1))
        self._done = min(columns.stop, self._ids.shape[1])
        return logits[:, -1] if self._done == self._ids.shape[1] else None

    def _score(self, following: list[int], logprobs: torch.Tensor) -> None:
        """Store the log-probabilities of the tokens that follow, for each row as it wishes.

        logprobs: (columns, vocabulary).
        """
        values = logprobs[range(len(following)), following].tolist() if following else []
        scored = [row for row in self.rows if row.wishes.scores_prompt]
        for count in {row.wishes.top for row in scored}:
            tokens: list[Token | None] = [] if self._done else [None]
            for place, (token, value) in enumerate(zip(following, values, strict=True)):
                tokens.append(Token(token, value, top_tokens(logprobs[place], count, token)))
            for row in scored:
                if row.wishes.top == count:
                    row.prompt_tokens += tokens
