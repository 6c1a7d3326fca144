"""One text in progress: its controls, random numbers, stop strings and log-probabilities."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from transformers.generation import logits_process

from hfkit.declaration import set_fields
from hfkit.errors import HfkitError, NotFiniteError
from hfkit.inference.batches import logits_processors
from hfkit.inference.controls import endings, is_plain, is_sampled
from hfkit.inference.decoding import Completion, complete
from hfkit.inference.text import Detokenizer, Request, cut_at_stop, held_back
from hfkit.models.loading import LanguageModel
from hfkit.options import GenerateOptions
from hfkit.serving.cache import can_share_steps

# Processors that look at nothing but the scores: they are applied to all rows with the same options at once.
_MEMORYLESS = tuple(
    getattr(logits_process, name)
    for name in ("TemperatureLogitsWarper TopKLogitsWarper TopPLogitsWarper MinPLogitsWarper TopHLogitsWarper "
                 "TypicalLogitsWarper EpsilonLogitsWarper EtaLogitsWarper SuppressTokensLogitsProcessor "
                 "LogitNormalization InfNanRemoveLogitsProcessor").split()
)  # fmt: skip
_ONE_TEXT = ("seed", "max_new_tokens", "stop_strings", "max_time", "truncate", "raw")  # change no score


class UnavailableError(HfkitError):
    """The server cannot answer now: it is stopping, or the request has waited too long."""


class Token(NamedTuple):
    """A token, its log-probability in nats before any control, and the likeliest ones in its place with theirs."""

    id: int
    logprob: float
    top: list[tuple[int, float]]


class Delta(NamedTuple):
    """New text, and the tokens since the previous piece."""

    text: str
    tokens: list[Token]


class Result(NamedTuple):
    """The end of a text. tokens: of all of it; none where the model's own loop does not give them."""

    completion: Completion
    tokens: list[Token]
    prompt_tokens: list[Token | None]  # of the prompt, where their scores are wanted; the first has none


Event = Delta | Result | Exception


@dataclass(frozen=True)
class Wishes:
    """What a client wants in addition to `GenerateOptions`."""

    streams: bool = False
    top: int | None = None  # likeliest tokens to tell of each place; None: no log-probabilities
    scores_prompt: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)


class Row:
    """A text from its prompt to its end. Any thread may set `is_cancelled`; the engine does the rest."""

    def __init__(
        self,
        lm: LanguageModel,
        request: Request,
        options: GenerateOptions,
        wishes: Wishes,
        emit: Callable[[Event], None],
        seconds: float = math.inf,
    ) -> None:
        """request: with its seed. emit: called with each Delta, if wanted, then a Result or an error."""
        self.request, self.options, self.wishes, self.emit = request, options, wishes, emit
        self.is_cancelled = False  # no longer wanted
        self.tokens: list[Token] = []
        self.prompt_tokens: list[Token | None] = []
        self._lm, self._ends = lm, endings(lm, options)
        self._deadline = time.monotonic() + min(seconds, options.max_time or math.inf)
        self._detokenizer = Detokenizer(lm.tokenizer, request.ids)
        self._text, self._shown, self._told = "", 0, 0
        self._generator: torch.Generator | None = None
        if is_sampled(lm, options):
            self._generator = torch.Generator(lm.model.device).manual_seed(request.seed or 0)
        # Whether the text needs one of transformers' own loops, where it runs alone.
        self.is_special = not (can_share_steps(lm) and is_plain(lm, options))
        self.processors: Sequence[Any] = []
        if request.new_tokens and not self.is_special:
            self.processors = logits_processors(lm, request, options)
        # Rows of one kind get their scores from the same processors.
        self.kind: object = self
        if all(isinstance(processor, _MEMORYLESS) for processor in self.processors):
            values = {name: value for name, value in set_fields(options).items() if name not in _ONE_TEXT}
            self.kind = str(sorted(values.items()))

    @property
    def seed(self) -> int | None:
        """What gives the same text again; None where nothing is random."""
        return None if self._generator is None else self.request.seed

    @property
    def ids(self) -> list[int]:
        """The prompt and what has been written."""
        return self.request.ids + [token.id for token in self.tokens]

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the time limit; None without one."""
        return self._deadline - time.monotonic() if self._deadline < math.inf else None

    @property
    def is_late(self) -> bool:
        return self._deadline <= time.monotonic()

    def penalize(self, scores: torch.Tensor) -> None:
        """Apply what OpenAI's options add to the scores, (vocabulary,), in place."""
        wishes = self.wishes
        if wishes.logit_bias:
            scores[list(wishes.logit_bias)] += torch.tensor(list(wishes.logit_bias.values()), device=scores.device)
        if self.tokens and (wishes.presence_penalty or wishes.frequency_penalty):
            written = torch.tensor([token.id for token in self.tokens], device=scores.device)
            tokens, counts = torch.unique(written, return_counts=True)
            scores[tokens] -= wishes.presence_penalty + wishes.frequency_penalty * counts

    def pick(self, scores: torch.Tensor) -> torch.Tensor:
        """The next token, (1,), given the scores of all, (vocabulary,)."""
        if self._generator is None:
            return scores.argmax(-1, keepdim=True)
        return torch.multinomial(scores.softmax(-1), 1, generator=self._generator)

    def take(self, token: Token) -> bool:
        """Append a token. Returns whether the text ends here; then the result has been emitted."""
        self.tokens.append(token)
        if math.isnan(token.logprob):
            self.emit(NotFiniteError.of(self._lm.name))
            return True
        ended = token.id in self._ends.tokens
        if self.wishes.streams or self._ends.strings:
            self._text += self._detokenizer.push(token.id)
            ended = ended or cut_at_stop(self._text, self._ends.strings)[1]
            if not ended:
                self._show(len(self._text) - held_back(self._text, self._ends.strings))
        if ended or len(self.tokens) >= self.request.new_tokens:
            self.finish()
            return True
        return False

    def _show(self, end: int) -> None:
        if self.wishes.streams and end > self._shown:
            self.emit(Delta(self._text[self._shown : end], self.tokens[self._told :]))
            self._shown, self._told = end, len(self.tokens)

    def finish(self) -> None:
        """Emit the text so far as the result."""
        logprobs = torch.tensor([token.logprob for token in self.tokens], dtype=torch.double)
        ids = [token.id for token in self.tokens]
        completion = complete(self._lm.tokenizer, self.request.ids, ids, self._ends, logprobs)
        self._text = completion.text
        self._show(len(self._text))
        self.emit(Result(completion, self.tokens[: len(completion.tokens)], self.prompt_tokens))

    def end_early(self) -> None:
        """End before the text is complete: with what there is so far, or an error if that is nothing."""
        if self.tokens:
            self.finish()
        else:
            self.emit(UnavailableError("there was no time to begin this text: try again later"))
