"""The state of the texts that are being generated: tokens to text, random numbers of each row, stop strings.

transformers' own loop does the decoding. hfkit adds what it lacks through its `custom_generate` hook:

- Each row has random numbers of its own. A text does not depend on its batch, and its seed alone gives it again.
- Log-probabilities do not need the logits of every step.
- Stop strings neither match the prompt nor stay in the text.
"""

import threading
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, cast

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)


class Detokenizer:
    """Token ids to text piece by piece. The pieces joined are the text of all, and no piece is ever taken back."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: Sequence[int] = ()) -> None:
        """context: the tokens before the first one that is pushed.

        They decide how it is written: SentencePiece drops the space of a text's first word, and reads a run of byte
        tokens as one.
        """
        self._tokenizer = tokenizer
        self._ids = list(context)
        self._start, self._read = 0, len(self._ids)

    def push(self, *tokens: int) -> str:
        """The text that `tokens` complete; empty in the middle of a character."""
        self._ids += tokens
        return self._advance(final=False)

    def finish(self) -> str:
        """What is left: the bytes of an unfinished character, as U+FFFD."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        before, now = self._decode(self._start, self._read), self._decode(self._start, len(self._ids))
        if len(now) <= len(before) or (now.endswith("\ufffd") and not final):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return now[len(before) :]

    def _decode(self, start: int, end: int) -> str:
        ids = self._ids[start:end]
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return cast(str, text)  # of a flat list


def cut_at_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """`text` up to the first stop string in it, and whether there was one."""
    starts = [start for stop in stops if (start := text.find(stop)) >= 0]
    return (text[: min(starts)], True) if starts else (text, False)


def held_back(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of `text` may turn out to begin a stop string."""
    longest = max((len(stop) - 1 for stop in stops), default=0)
    for size in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-size:]) for stop in stops):
            return size
    return 0


class Rows(StoppingCriteria):
    """The rows of one batch while they grow.

    Once a step transformers calls `record` and `pick` as logits processors, then the object as a stopping criterion.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        contexts: Sequence[Sequence[int]],
        *,
        seeds: Sequence[int] | None,
        eos: Collection[int] = (),
        stops: Sequence[str] = (),
        on_text: Callable[[str], None] | None = None,
    ) -> None:
        """contexts: each row's prompt tokens. seeds: one for each row, None for greedy. on_text: for a single row."""
        self.cancelled = threading.Event()
        self._seeds, self._eos, self._stops, self._on_text = seeds, eos, stops, on_text
        self._generators: list[torch.Generator] = []
        self._raw: torch.Tensor | None = None
        self._chosen: list[torch.Tensor] = []  # a (rows,) tensor a step
        self._logprobs: list[torch.Tensor] = []
        self._tokenizer, self._contexts = tokenizer, contexts
        self._detokenizers = [Detokenizer(tokenizer, context) for context in contexts]
        self._texts = ["" for _ in contexts]
        self._shown = 0
        self._stopped: set[int] = set()

    def record(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """First logits processor: keep the model's own log-probabilities. scores: (rows, vocabulary)."""
        self._raw = scores.log_softmax(-1)
        return scores

    def pick(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Last logits processor: choose each row's token, and make the loop's argmax choose the same."""
        if self._seeds is None:
            chosen = scores.argmax(-1, keepdim=True)
        else:
            if not self._generators:
                self._generators = [torch.Generator(scores.device).manual_seed(seed) for seed in self._seeds]
            probabilities = scores.softmax(-1)
            # Row by row: what transformers draws for a row that is alone, after torch.manual_seed(its seed).
            chosen = torch.cat(
                [
                    torch.multinomial(probabilities[row : row + 1], 1, generator=generator)
                    for row, generator in enumerate(self._generators)
                ]
            )
        assert self._raw is not None  # noqa: S101, record() ran before
        self._logprobs.append(self._raw.gather(1, chosen).squeeze(1))
        self._chosen.append(chosen.squeeze(1))
        return scores.scatter(1, chosen, torch.inf)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Which rows end here, (rows,). Token ids leave the device only where the text matters."""
        if self._stops or self._on_text:
            for row, token in enumerate(self._chosen[-1].tolist()):
                if row not in self._stopped:
                    self._texts[row] += self._detokenizers[row].push(token)
                    if token in self._eos or cut_at_stop(self._texts[row], self._stops)[1]:
                        self._stopped.add(row)
            self._show(final=False)
        ended = [self.cancelled.is_set() or row in self._stopped for row in range(len(input_ids))]
        return torch.tensor(ended, device=input_ids.device)

    def _show(self, final: bool) -> None:
        if self._on_text:
            text, stopped = cut_at_stop(self._texts[0], self._stops)
            end = len(text) - (0 if final or stopped else held_back(text, self._stops))
            if end > self._shown:
                self._on_text(text[self._shown : end])
                self._shown = end

    def results(self) -> list["Completion"]:
        """Each row's result. Call once, after the loop has ended."""
        steps = torch.stack(self._chosen, 1).tolist()
        logprobs = torch.stack(self._logprobs, 1).double().cpu()
        completions = [
            complete(self._tokenizer, context, tokens, self._eos, self._stops, scores)
            for context, tokens, scores in zip(self._contexts, steps, logprobs, strict=True)
        ]
        if self._on_text:
            self._texts[0] += self._detokenizers[0].finish()
            self._show(final=True)
        return completions


class Completion(NamedTuple):
    """One row's text, why it ended ("stop" or "length"), its tokens (EOS included), their log-probability in nats."""

    text: str
    finish_reason: str
    tokens: list[int]
    logprob: float


def complete(
    tokenizer: PreTrainedTokenizerBase,
    context: Sequence[int],
    tokens: Sequence[int],
    eos: Collection[int],
    stops: Sequence[str],
    logprobs: torch.Tensor,
) -> Completion:
    """A row's `tokens`, generated after `context`, as a Completion up to its end-of-text token or stop string.

    logprobs: (at least as many as tokens,), in nats.
    """
    count = next((number for number, token in enumerate(tokens, 1) if token in eos), len(tokens))
    text, stopped = "".join(_pieces(tokenizer, context, [tokens[:count]])), False
    # Token by token where it matters: which one completes a stop string, and how a stream shows incomplete characters.
    if "\ufffd" in text or any(stop in text for stop in stops):
        pieces = _pieces(tokenizer, context, [[token] for token in tokens[:count]])
        text, stopped = cut_at_stop("".join(pieces), stops)
        while stopped and cut_at_stop("".join(pieces[: count - 1]), stops)[1]:
            count -= 1
    reason = "stop" if stopped or (count and tokens[count - 1] in eos) else "length"
    return Completion(text, reason, list(tokens[:count]), logprobs[:count].sum().item())


def _pieces(tokenizer: PreTrainedTokenizerBase, context: Sequence[int], chunks: Sequence[Sequence[int]]) -> list[str]:
    """What a stream shows after `context` when it is given the tokens in these chunks."""
    detokenizer = Detokenizer(tokenizer, context)
    return [*(detokenizer.push(*chunk) for chunk in chunks), detokenizer.finish()]


class StopTexts(StoppingCriteria):
    """Ends rows whose new text has a stop string in it. transformers' own criterion looks at the prompt, too."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: Sequence[int], start: int, stops: Sequence[str]):
        """context: the tokens that all rows continue. start: position of a row's first new token."""
        self._tokenizer, self._context, self._start, self._stops = tokenizer, context, start, stops

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        rows = [row[self._start :] for row in input_ids.tolist()]
        texts = ["".join(_pieces(self._tokenizer, self._context, [row])) for row in rows]
        return torch.tensor([cut_at_stop(text, self._stops)[1] for text in texts], device=input_ids.device)


class _Processors(LogitsProcessorList):
    """transformers' own inspects the signature of every processor at every step: a tenth of the time of a token."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        for processor in self:
            scores = processor(input_ids, scores)
        return scores


def decode(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    rows: Rows,
    **kwargs: Any,
) -> torch.Tensor:
    """`model.generate(custom_generate=decode, rows=Rows(...))`: transformers' loop around `rows`."""
    generation_config.do_sample = False  # generate() works on a copy of its own, and rows.pick samples
    processors = _Processors([rows.record, *logits_processor, rows.pick])
    criteria = StoppingCriteriaList([*stopping_criteria, rows])
    # The loop that generate() would have run. It is private, but generate() calls a custom_generate function in its
    # place and with its arguments; a loop of our own would be a copy of it.
    return cast(torch.Tensor, model._sample(input_ids, processors, criteria, generation_config, **kwargs))


def repeats(tokens: Sequence[int], longest: int = 40, least: int = 24) -> bool:
    """Whether `tokens` end in a loop: a run of at most `longest` three times or more, `least` tokens in all."""
    for period in range(1, longest + 1):
        span = max(3 * period, least)
        if len(tokens) >= span and all(tokens[-i] == tokens[-i - period] for i in range(1, span - period + 1)):
            return True
    return False
