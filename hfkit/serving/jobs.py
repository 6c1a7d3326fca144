"""From a request to the rows that answer it, and from the engine's thread back to the event loop."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

from hfkit.corpus.templates import CHAT_TEMPLATE, task_of
from hfkit.errors import HfkitError, OptionError, first_line
from hfkit.inference.batches import kept_logits
from hfkit.inference.controls import beams, check_controls, check_options
from hfkit.inference.remote import seed_of
from hfkit.inference.text import Request, fit_prompt
from hfkit.models.loading import LanguageModel, vocabulary_size
from hfkit.options import GenerateOptions
from hfkit.serving.engine import Engine
from hfkit.serving.rows import Delta, Event, Result, Row, Wishes

_MOST_LOGITS = 1 << 30  # that one beam search keeps, for all its steps: 4 GB
_TURNS = ("\nUser:", "\nAssistant:", "\nSystem:")  # how a base model goes on with the next turn


@dataclass(frozen=True)
class TextPlan:
    """The texts to generate: one for each prompt and sample, numbered prompt by prompt."""

    requests: list[Request]  # with the seed of the prompt's first sample
    options: GenerateOptions
    wishes: Wishes
    samples: int
    strip: bool = False  # the space with which a base model begins its turn


AS_GENERATE = -1  # for new_tokens of plan_texts


def plan_texts(
    lm: LanguageModel,
    prompts: Sequence[str | list[int]],
    options: GenerateOptions,
    wishes: Wishes,
    samples: int,
    new_tokens: int | None,
) -> TextPlan:
    """Encode the prompts and check all that can be checked. It takes a while, so call it in a thread.

    new_tokens: most of them where `options` says nothing; None: as many as fit; AS_GENERATE: as many as
        `hfkit generate` writes.
    """
    check_options(options)
    check_controls(lm, options)
    seed = seed_of(options)
    requests, vocabulary = [], vocabulary_size(lm.model)
    for number, prompt in enumerate(prompts):
        if isinstance(prompt, list) and not all(0 <= token < vocabulary for token in prompt):
            raise OptionError(f"prompt has a token id that the model does not know: 0 to {vocabulary - 1}")
        request = fit_prompt(prompt, options, lm.tokenizer, lm.model.config, lm.name)
        if options.max_new_tokens is None and new_tokens != AS_GENERATE:
            room = (lm.context or 4096) - (0 if lm.model.config.is_encoder_decoder else len(request.ids))
            request = replace(request, new_tokens=room if new_tokens is None else min(new_tokens, room))
        requests.append(replace(request, seed=seed + number * samples))
    longest, width = max(request.new_tokens for request in requests), beams(lm, options)
    if width > 1 and kept_logits(lm, options, longest) > _MOST_LOGITS:
        raise OptionError(f"{width} beams of {longest} tokens take too much memory: lower num_beams or the length")
    return TextPlan(requests, options, wishes, samples)


def chat_prompt(lm: LanguageModel, messages: list[dict[str, str]]) -> tuple[str | list[int], tuple[str, ...]]:
    """The prompt for the next turn of a conversation, and what ends that turn besides the model's own mark.

    A translator and a model that learned a task get the last turn alone. A base model gets hfkit's plain template.
    HfkitError if the model's template rejects the conversation.
    """
    template = lm.tokenizer.chat_template
    if not template and (lm.model.config.is_encoder_decoder or task_of(lm.tokenizer)):
        return messages[-1]["content"], ()
    try:
        ids = lm.tokenizer.apply_chat_template(
            messages, chat_template=template or CHAT_TEMPLATE, add_generation_prompt=True, return_dict=False
        )
    except Exception as error:  # a template is a program: it can raise anything
        raise HfkitError(f"the chat template of {lm.name} rejects this: {first_line(error)}") from error
    return cast(list[int], ids), () if template else _TURNS


class TextJob:
    """The rows of one request. Each event has the number of its row."""

    def __init__(self, plan: TextPlan) -> None:
        self.plan = plan
        self.rows: list[Row] = []
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    async def start(self, engine: Engine, seconds: float) -> None:
        """Queue the rows; they are cut off after so many seconds."""
        self.rows = await asyncio.to_thread(self._make_rows, engine.lm, seconds)
        if self.plan.wishes != Wishes(streams=self.plan.wishes.streams) and any(row.is_special for row in self.rows):
            raise OptionError(
                "beam search, and a model with an encoder or a state, take no penalties or logit_bias and give no "
                "log-probabilities: leave these out"
            )
        engine.submit(self.rows)

    def _make_rows(self, lm: LanguageModel, seconds: float) -> list[Row]:
        rows: list[Row] = []
        for request in self.plan.requests:
            for k in range(self.plan.samples):
                sample = replace(request, seed=((request.seed or 0) + k) % 2**63)
                emit = partial(self._emit, len(rows))
                rows.append(Row(lm, sample, self.plan.options, self.plan.wishes, emit, seconds))
        return rows

    def _emit(self, number: int, event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop has closed
            self._loop.call_soon_threadsafe(self._events.put_nowait, (number, event))

    async def events(self) -> AsyncIterator[tuple[int, Delta | Result]]:
        """Pieces, where they are wanted, and the result of each row; an error of any row is raised."""
        left = len(self.rows)
        while left:
            number, event = await self._events.get()
            if isinstance(event, Exception):
                raise event
            left -= isinstance(event, Result)
            yield number, event

    async def results(self) -> list[Result]:
        results = {number: event async for number, event in self.events() if isinstance(event, Result)}
        return [results[number] for number in range(len(self.rows))]

    def cancel(self) -> None:
        for row in self.rows:
            row.is_cancelled = True
