"""A model on a server: hfkit's own, vLLM, llama.cpp, OpenAI. Imports no torch."""

from __future__ import annotations

import contextlib
import math
import secrets
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from itertools import islice
from typing import Any

import httpx2

from hfkit.declaration import flag_of, set_fields, unescape
from hfkit.errors import HfkitError, OptionError
from hfkit.inference.connection import MISSING, OPENAI, Connection, RefusedError, events_of, message_of
from hfkit.inference.results import Classification, Generation
from hfkit.options import GenerateOptions, ModelOptions, ServerOptions, TaskOptions

CONCURRENT = 16  # requests at a time
_DEFAULTS = GenerateOptions()
_FALLBACK = {"completions": "chat/completions", "chat/completions": "responses"}
_OPENAI_NAMES = {"max_new_tokens": "max_tokens", "stop_strings": "stop"}
_LOCAL = ("assistant_model", "novel", "novel_words")  # options that read files of this machine
# Options that servers other than hfkit's are known to obey, rather than to ignore.
_COMMON = {"max_new_tokens", "stop_strings", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed"}
_ENDED = {"completed": "stop", "incomplete": "length"}  # status of a response -> why its text ended


class Server:
    """One model on a server. Several threads may use it."""

    def __init__(self, options: ServerOptions, model: Any = None) -> None:
        """Reach the server and choose its model: the one that `model` (see `load`) names, or its only one.

        Raises:
            HfkitError: the server cannot be reached or refuses the key.
            OptionError: it has several models and none was named, or an option is for a model that is loaded here.
        """
        model = None if isinstance(model, tuple) else ModelOptions.make(model)
        if not model or model != ModelOptions(model=model.model):
            raise OptionError(
                "a model is loaded here, or by a server: leave --server (HFKIT_SERVER) out, or --device and the like"
            )
        self.connection = Connection(options)
        self._route = "completions" if self.connection.url != OPENAI else "chat/completions"
        response = self.connection.send("models", returned=MISSING if model.model else ())
        with self.connection.named_errors():
            entries = (response.json().get("data") or []) if response.is_success else []
            names = [str(entry["id"]) for entry in entries]
            if not model.model and len(names) != 1:
                listed = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
                raise OptionError(f"name a model of {self.connection.shown_url} with -m: {listed or 'it lists none'}")
            self.model = model.model or names[0]
            entry: dict[str, Any] = next((entry for entry in entries if entry["id"] == self.model), {})
        self.is_hfkit = entry.get("owned_by") == "hfkit"
        self._answers = not entry.get("continues", True)  # a translator, or a model that learned a task
        self._has_encoder = entry.get("has_encoder", False)
        self.has_chat_template: bool = entry.get("has_chat_template", True)
        self.context: int | None = entry.get("max_model_len")  # in tokens, if the server tells

    def continues(self, options: GenerateOptions) -> bool:
        """Whether a text goes on from its prompt, or answers it."""
        return self._route == "completions" and (options.raw or not self._answers)

    def stream(self, prompt: Any, *, options: GenerateOptions, live: bool = True) -> Generator[str, None, Generation]:
        """As `generation.stream`, of a text; or of a chat's messages, which the server puts into a template.

        live: ask for a stream, not for the whole text.
        """
        options, answer = with_seed(options), _Answer()
        if not isinstance(prompt, str | list):
            raise RefusedError("no prompt: write an object with the key 'prompt' and a text")
        response = self._ask(prompt, options, live)
        with contextlib.closing(response), self.connection.named_errors():
            for event in events_of(response):
                if piece := answer.add(event):
                    yield piece
                if answer.error:
                    break
        if answer.error or not answer.finish_reason:
            raise self.connection.error(answer.error or "the answer broke off", "try again")
        return Generation(
            prompt=prompt if isinstance(prompt, str) else prompt[-1]["content"],
            completion=answer.text,
            finish_reason=answer.finish_reason,
            tokens=answer.tokens or len(answer.logprobs),
            logprob=sum(answer.logprobs) if answer.logprobs else math.nan,
            seed=options.seed if may_sample(options) and self._route != "responses" else None,
            model=self.model,
            echo=self.continues(options),
        )

    def generate(self, prompt: str, *, options: GenerateOptions) -> list[Generation]:
        """The samples of one prompt."""
        _, samples = next(self.generate_each([(0, prompt)], options=options))
        if isinstance(samples, HfkitError):
            raise samples
        return samples

    def generate_each(
        self, prompts: Iterable[tuple[int, Any]], *, options: GenerateOptions, concurrent: int = CONCURRENT
    ) -> Iterator[tuple[int, list[Generation] | HfkitError]]:
        """As `generation.generate_each`, with this many requests at a time."""
        options, samples = with_seed(options), options.num_return_sequences or 1
        if samples > 1 and not may_sample(options):
            raise OptionError(f"--num-return-sequences is {samples}: greedy decoding has one result, so sample")

        def run(row: tuple[int, Any, int]) -> tuple[int, Generation | HfkitError]:
            number, prompt, k = row
            sample = replace(options, num_return_sequences=None, seed=(options.seed or 0) + number * samples + k)
            if isinstance(prompt, HfkitError):
                return number, prompt
            try:
                return number, _result_of(self.stream(prompt, options=sample, live=False))
            except RefusedError as error:  # every other error ends the run
                return number, error

        rows = ((number, prompt, k) for number, prompt in prompts for k in range(samples))
        results = run_ahead(run, rows, concurrent)
        while group := list(islice(results, samples)):
            error = next((result for _, result in group if isinstance(result, HfkitError)), None)
            yield group[0][0], error or [result for _, result in group]

    def classify_each(self, texts: Iterable[Any], options: TaskOptions) -> Iterator[Classification | HfkitError]:
        """As `classification.classify_each`, by hfkit's own server."""
        if options.template or not self.is_hfkit:
            raise OptionError("hfkit's own server labels texts, without --template: leave that out, or --server")

        def run(text: Any) -> Classification | HfkitError:
            if isinstance(text, HfkitError):
                return text
            try:
                reply = self.connection.post(
                    "classify", {"model": self.model, "input": text, "labels": options.labels}
                )
            except RefusedError as error:
                return error
            with self.connection.named_errors():
                (row,) = reply["data"]
                return Classification(row["text"], row["label"], row["probabilities"], self.model)

        return run_ahead(run, texts)

    def _ask(self, prompt: str | list[dict[str, str]], options: GenerateOptions, live: bool) -> httpx2.Response:
        """The answer of the first route that the server has for this model."""
        route = self._route if isinstance(prompt, str) or self._route != "completions" else "chat/completions"
        while True:
            body = {"model": self.model, "stream": live} | self._body(route, prompt, options)
            if live and route != "responses":
                body["stream_options"] = {"include_usage": True}
            response = self.connection.send(route, body, returned=MISSING)
            if response.is_success:
                return response
            if route not in _FALLBACK or "model_not_found" in response.text:
                raise self.connection.refusal(response)
            route = self._route = _FALLBACK[route]

    def _body(self, route: str, prompt: str | list[dict[str, str]], options: GenerateOptions) -> dict[str, Any]:
        """A prompt and options as `route` takes them. OptionError for an option that the server would not obey."""
        fields = {name: value for name, value in set_fields(options).items() if value != getattr(_DEFAULTS, name)}
        fields.pop("num_return_sequences", None)
        if not self.is_hfkit:
            if options.do_sample is False:
                fields["temperature"] = 0
            for name in ["do_sample", "raw"] if route == "completions" else ["do_sample"]:
                fields.pop(name, None)
        for name in fields:
            if name in _LOCAL or not (self.is_hfkit or name in _COMMON):
                where = "on this machine" if name in _LOCAL else "with hfkit's own server"
                raise OptionError(f"{flag_of(name)} works only {where}: leave it out")
        fields = {_OPENAI_NAMES.get(name, name): value for name, value in fields.items()}
        for name in {"stop", "bad_words", "sequence_bias"} & fields.keys():  # a server takes them literally
            fields[name] = [unescape(text) for text in fields[name]]
        if route == "completions":
            # hfkit knows none of these models' and of beams.
            scores = {} if self._has_encoder or (options.num_beams or 1) > 1 else {"logprobs": 1}
            most = {"fit": True} if self.is_hfkit else {"max_tokens": 100}
            return {"prompt": prompt} | most | scores | fields
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if route == "responses":
            fields.pop("seed", None)  # it takes none
            limit = {"max_output_tokens": fields.pop("max_tokens")} if "max_tokens" in fields else {}
            return {"input": messages} | limit | fields
        if self.connection.url == OPENAI and "max_tokens" in fields:  # its reasoning models refuse the older name
            fields["max_completion_tokens"] = fields.pop("max_tokens")
        return {"messages": messages} | fields


class _Answer:
    """A text, as the events of any of the three routes tell it. An answer that is not streamed is one event."""

    def __init__(self) -> None:
        self.text, self.error = "", ""
        self.finish_reason: str | None = None
        self.tokens = 0
        self.logprobs: list[float] = []  # of the tokens, in nats

    def add(self, event: dict[str, Any]) -> str:
        """Read an event and return the text that it adds."""
        kind, whole, piece = event.get("type", ""), event.get("response") or event, ""
        if error := whole.get("error") or (kind == "error" and event):
            self.error = message_of(error)
        if usage := whole.get("usage"):
            self.tokens = usage.get("completion_tokens", usage.get("output_tokens"))
        if kind == "response.output_text.delta":
            piece = event["delta"]
        elif whole.get("object") == "response":
            self.finish_reason = _ENDED.get(whole["status"])
            if not kind:
                parts = [part for item in whole["output"] for part in item.get("content") or []]
                piece = "".join(part["text"] for part in parts if part["type"] == "output_text")
        for choice in event.get("choices") or []:
            part = choice.get("delta") or choice.get("message") or choice
            piece += part.get("content") or part.get("text") or ""
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            self.logprobs += (choice.get("logprobs") or {}).get("token_logprobs") or []
        self.text += piece
        return piece


def _result_of(answer: Generator[str, None, Generation]) -> Generation:
    while True:
        try:
            next(answer)
        except StopIteration as stop:
            result: Generation = stop.value
            return result


def may_sample(options: GenerateOptions) -> bool:
    """Whether tokens are chosen at random, as far as the options tell."""
    if options.temperature == 0 or options.do_sample is False:
        return False
    return (options.num_beams or 1) == 1 or bool(options.do_sample)


def seed_of(options: GenerateOptions) -> int:
    """The seed; a random one if there is none, small enough to type again."""
    return secrets.randbelow(2**31) if options.seed is None else options.seed


def with_seed(options: GenerateOptions) -> GenerateOptions:
    """`options` with the seed of `seed_of`."""
    return replace(options, seed=seed_of(options))


def run_ahead(function: Callable[[Any], Any], items: Iterable[Any], concurrent: int = CONCURRENT) -> Iterator[Any]:
    """`function` of each item, in their order, `concurrent` of them at a time."""
    free, waiting = threading.Semaphore(concurrent), deque[Future[Any]]()

    def run(item: Any, result: Future[Any]) -> None:
        with free:
            try:
                result.set_result(function(item))
            except BaseException as error:  # noqa: BLE001, raised again by the reader
                result.set_exception(error)

    for item in items:
        if len(waiting) == 2 * concurrent:  # a slow one does not hold up all others
            yield waiting.popleft().result()
        waiting.append(Future())
        # A pool's threads would be waited for after Ctrl-C.
        threading.Thread(target=run, args=(item, waiting[-1]), daemon=True).start()
    while waiting:
        yield waiting.popleft().result()
