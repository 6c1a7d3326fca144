"""Prompts while they are read, a part at a time."""

from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from hfkit.models.loading import LanguageModel
from hfkit.serving.cache import forward
from hfkit.serving.rows import Row, Token


def top_tokens(logprobs: torch.Tensor, count: int | None, token: int) -> list[tuple[int, float]]:
    """The `count` likeliest tokens, and `token` if it is not among them. logprobs: (vocabulary,)."""
    if not count:
        return []
    values, ids = logprobs.topk(min(count, len(logprobs)))
    top = dict(zip(ids.tolist(), values.tolist(), strict=True))
    return list(({**top, token: logprobs[token].item()} if token not in top else top).items())


class Prompts:
    """Prompts that are read together, a part in each round."""

    def __init__(
        self, lm: LanguageModel, groups: dict[tuple[int, ...], list[Row]], cache: DynamicCache | None
    ) -> None:
        """groups: the rows of each prompt. cache: of the beginning of the only one, if that is known."""
        self.groups, self.cache = groups, cache or DynamicCache()
        self.rows = [row for rows in groups.values() for row in rows]
        self.scores = self.rows[0].wishes.scores_prompt
        self._lm, self._done = lm, self.cache.get_seq_length()
        width, device = max(map(len, groups)), lm.model.device
        # Padded as `hfkit generate` pads a batch.
        self._ids = torch.tensor([ids[:1] * (width - len(ids)) + ids for ids in groups], device=device)
        gaps = torch.tensor([[width - len(ids)] for ids in groups], device=device)
        self._mask = (torch.arange(width, device=device) >= gaps).long()
        self._positions = (self._mask.cumsum(1) - 1).clamp(min=0)

    def advance(self, count: int) -> torch.Tensor | None:
        """Read `count` more columns. Returns the logits after the last ones, (prompts, vocabulary)."""
        columns = slice(self._done, self._done + count)
        keep: dict[str, Any] = {} if self.scores else {"logits_to_keep": 1}
        logits, _ = forward(
            self._lm, input_ids=self._ids[:, columns], attention_mask=self._mask[:, : columns.stop],
            position_ids=self._positions[:, columns], cache=self.cache, **keep,
        )  # fmt: skip
        if self.scores:
            self._score(logits[0].float().log_softmax(-1))
        self._done = min(columns.stop, self._ids.shape[1])
        return logits[:, -1] if self._done == self._ids.shape[1] else None

    def _score(self, logprobs: torch.Tensor) -> None:
        """Note the scores of the tokens that follow. logprobs: (columns, vocabulary)."""
        following = self._ids[0, self._done + 1 : self._done + 1 + len(logprobs)].tolist()
        values = logprobs[range(len(following)), following].tolist() if following else []
        count = self.rows[0].wishes.top
        tokens: list[Token | None] = [] if self._done else [None]
        for place, (token, value) in enumerate(zip(following, values, strict=True)):
            tokens.append(Token(token, value, top_tokens(logprobs[place], count, token)))
        for row in self.rows:
            row.prompt_tokens += tokens
