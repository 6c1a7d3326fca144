"""Tokens to text while they are generated.

transformers' own loop does the decoding. hfkit adds what it lacks through its `custom_generate` hook:

- Each row has random numbers of its own. A text does not depend on its batch, and its seed alone gives it again.
- Log-probabilities do not need the logits of every step.
- Stop strings neither match the prompt nor stay in the text.
- Banned texts never come, however they are divided into tokens.
"""

import functools
import threading
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, cast

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from hfkit.inference import graphs
from hfkit.inference.text import Detokenizer, cut_at_stop, held_back, special_token_ids, token_writer


class Endings(NamedTuple):
    """What ends a text: end-of-text tokens, and strings, which are left out of the text."""

    tokens: Collection[int] = ()
    strings: Sequence[str] = ()


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
    ends: Endings,
    logprobs: torch.Tensor,
) -> Completion:
    """A row's `tokens`, generated after `context`, as a Completion up to its end-of-text token or stop string.

    logprobs: (at least as many as tokens,), in nats.
    """
    count = next((number for number, token in enumerate(tokens, 1) if token in ends.tokens), len(tokens))
    text, stopped = "".join(_pieces(tokenizer, context, [tokens[:count]])), False
    # Token by token where it matters: which one completes a stop string, and how a stream shows incomplete characters.
    if "\ufffd" in text or any(stop in text for stop in ends.strings):
        pieces = _pieces(tokenizer, context, [[token] for token in tokens[:count]])
        text, stopped = cut_at_stop("".join(pieces), ends.strings)
        while stopped and cut_at_stop("".join(pieces[: count - 1]), ends.strings)[1]:
            count -= 1
    reason = "stop" if stopped or (count and tokens[count - 1] in ends.tokens) else "length"
    return Completion(text, reason, list(tokens[:count]), logprobs[:count].sum().item())


def _pieces(tokenizer: PreTrainedTokenizerBase, context: Sequence[int], chunks: Sequence[Sequence[int]]) -> list[str]:
    """What a stream shows after `context` when it is given the tokens in these chunks."""
    detokenizer = Detokenizer(tokenizer, context)
    return [*(detokenizer.push(*chunk) for chunk in chunks), detokenizer.finish()]


class Rows(StoppingCriteria):
    """The rows of one batch while they grow.

    At each step transformers calls `record` and `pick` as logits processors, then the object as a stopping criterion.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        contexts: Sequence[Sequence[int]],
        ends: Endings,
        *,
        seeds: Sequence[int] | None,
        on_text: Callable[[str], None] | None = None,
    ) -> None:
        """contexts: each row's prompt tokens. seeds: one for each row, None for greedy. on_text: for a single row."""
        self.cancelled = threading.Event()
        self.reads_text = bool(ends.strings or on_text)  # at each step
        self._tokenizer, self._contexts, self._ends = tokenizer, contexts, ends
        self._seeds, self._on_text = seeds, on_text
        self._drawing: list[torch.Generator] = []
        self._raw = torch.empty(0)  # this step's log-probabilities, (rows, vocabulary)
        self._chosen: list[torch.Tensor] = []  # a (rows,) tensor a step
        self._logprobs: list[torch.Tensor] = []
        self._seen = 0  # steps whose tokens were looked at
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
            chosen = draw(scores.softmax(-1), self._generators(scores.device))
        self._logprobs.append(self._raw.gather(1, chosen).squeeze(1))
        self._chosen.append(chosen.squeeze(1))
        return scores.scatter(1, chosen, torch.inf)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Which rows end here, (rows,). Token ids leave the device only where the text matters."""
        if self.reads_text:
            self._read()
        count, device = len(input_ids), input_ids.device
        if not self._stopped or self.cancelled.is_set():
            return torch.full((count,), self.cancelled.is_set(), device=device)  # unlike a copy, it does not wait
        return torch.tensor([row in self._stopped for row in range(count)], device=device)

    # The loop of a CUDA graph calls the next four methods instead of the three above.

    def room_for_noise(self, logits: torch.Tensor) -> torch.Tensor | None:
        """A tensor for the random numbers of a step, (rows, vocabulary); None if nothing is drawn."""
        return None if self._seeds is None else torch.empty_like(logits[:, -1], dtype=torch.float32)

    def fill(self, noise: torch.Tensor | None) -> None:
        """Draw the random numbers of a step."""
        if noise is not None:
            graphs.fill(noise, self._generators(noise.device))

    def keep(self, tokens: torch.Tensor, nats: torch.Tensor) -> None:
        """Each row's token and its log-probability, (rows, 1) each, which are overwritten by the next step."""
        self._chosen.append(tokens.squeeze(1).clone())
        self._logprobs.append(nats.squeeze(1).clone())

    def have_ended(self) -> bool:
        """Whether no row needs another token. It waits for the device."""
        self._read()
        return self.cancelled.is_set() or len(self._stopped) == len(self._contexts)

    def _generators(self, device: torch.device) -> list[torch.Generator]:
        """One for each row; they go on where they are."""
        self._drawing = self._drawing or [torch.Generator(device).manual_seed(seed) for seed in self._seeds or ()]
        return self._drawing

    def _read(self) -> None:
        """Look at the tokens since the last look: which rows end, and what a stream shows."""
        for tokens in torch.stack(self._chosen[self._seen :]).tolist():
            for row, token in enumerate(tokens):
                if row in self._stopped:
                    continue
                if self.reads_text:
                    self._texts[row] += self._detokenizers[row].push(token)
                if token in self._ends.tokens or cut_at_stop(self._texts[row], self._ends.strings)[1]:
                    self._stopped.add(row)
        self._seen = len(self._chosen)
        self._show(final=False)

    def _show(self, final: bool) -> None:
        if self._on_text:
            text, stopped = cut_at_stop(self._texts[0], self._ends.strings)
            end = len(text) - (0 if final or stopped else held_back(text, self._ends.strings))
            if end > self._shown:
                self._on_text(text[self._shown : end])
                self._shown = end

    def results(self) -> list[Completion]:
        """Each row's result. Call once, after the loop has ended."""
        tokens = torch.stack(self._chosen, 1).tolist()
        logprobs = torch.stack(self._logprobs, 1).double().cpu()
        rows = zip(self._contexts, tokens, logprobs, strict=True)
        completions = [complete(self._tokenizer, context, ids, self._ends, nats) for context, ids, nats in rows]
        self._texts[0] += self._detokenizers[0].finish()
        self._show(final=True)
        return completions


def draw(probabilities: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """A token for each row, (rows, 1): what transformers draws for a row that is alone, after torch.manual_seed.

    probabilities: (rows, vocabulary).
    """
    if probabilities.device.type == "cpu":
        rows = zip(probabilities, generators, strict=True)
        return torch.stack([torch.multinomial(row, 1, generator=generator) for row, generator in rows])
    return _draw_without_waiting(probabilities, generators)


def _draw_without_waiting(probabilities: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """What torch.multinomial computes for each row, without its check of each row, which waits for the GPU."""
    return graphs.draw_with(probabilities, graphs.fill(torch.empty_like(probabilities), generators))


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
    """`model.generate(custom_generate=decode, rows=Rows(...))`: transformers' loop around `rows`, or a graph's."""
    generation_config.do_sample = False  # generate() works on a copy of its own, and rows.pick samples
    if isinstance(kwargs.get("cache"), graphs.FixedCache):
        return graphs.sample(model, input_ids, logits_processor, generation_config, rows, **kwargs)
    processors = _Processors([rows.record, *logits_processor, rows.pick])
    criteria = StoppingCriteriaList([*stopping_criteria, rows])
    # The loop that generate() would have run. It is private, but generate() calls a custom_generate function in its
    # place and with its arguments; a loop of our own would be a copy of it.
    return cast(torch.Tensor, model._sample(input_ids, processors, criteria, generation_config, **kwargs))


class StopTexts(StoppingCriteria):
    """Ends rows whose new text has a stop string in it. transformers' own criterion looks at the prompt, too."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: Sequence[int], start: int, stops: Sequence[str]):
        """context: the tokens that all rows continue. start: position of a row's first new token."""
        self._tokenizer, self._context, self._start, self._stops = tokenizer, context, start, stops

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        rows = [row[self._start :] for row in input_ids.tolist()]
        texts = ["".join(_pieces(self._tokenizer, self._context, [row])) for row in rows]
        return torch.tensor([cut_at_stop(text, self._stops)[1] for text in texts], device=input_ids.device)


class BannedTexts(LogitsProcessor):
    """Bans every token that would complete one of `texts` in what is generated, however it is divided into tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], start: int) -> None:
        """start: position of a row's first generated token."""
        self._written, self._start = _written(tokenizer), start
        self._completing = [_completing(tokenizer, text) for text in texts]
        self._longest = max(len(text.encode(errors="replace")) for text in texts)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> Any:
        scores = scores.clone()
        for row, ids in enumerate(input_ids[:, self._start :].tolist()):
            end = self._end_of(ids)
            for completing in self._completing:
                for before, tokens in completing.items():
                    if end.endswith(before):
                        scores[row, tokens.to(scores.device)] = -torch.inf
        return scores

    def _end_of(self, ids: Sequence[int]) -> bytes:
        """The last bytes that `ids` write, as many as may begin a banned text."""
        end = b""
        for token in reversed(ids):
            if len(end) >= self._longest:
                break
            end = (self._written[token] if token < len(self._written) else b"") + end
        return end


@functools.lru_cache(maxsize=1)
def _written(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """What each token writes, by id; nothing for special tokens."""
    write, special = token_writer(tokenizer), set(special_token_ids(tokenizer).values())
    words = cast(list[str | None], tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))))
    return [b"" if word is None or index in special else write(word) for index, word in enumerate(words)]


@functools.lru_cache(maxsize=128)
def _completing(tokenizer: PreTrainedTokenizerBase, text: str) -> dict[bytes, torch.Tensor]:
    """Tokens that complete `text`, by the part of it that must come directly before them; ids: (tokens,)."""
    whole, written = text.encode(errors="replace"), _written(tokenizer)
    completing = {b"": [index for index, part in enumerate(written) if whole in part]}
    completing[b""] += [index for name, index in special_token_ids(tokenizer).items() if name == text]
    likely = [(index, part) for index, part in enumerate(written) if part and part[0] in whole[1:]]
    for length in range(1, len(whole)):
        rest = whole[length:]
        completing[whole[:length]] = [index for index, part in likely if part.startswith(rest)]
    return {before: torch.tensor(ids) for before, ids in completing.items() if ids}
