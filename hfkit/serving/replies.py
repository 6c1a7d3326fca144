"""Replies: completions, chat completions and responses, whole or as a stream, to clients that may disconnect early."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, Literal

from starlette import requests

from hfkit.console import to_json
from hfkit.inference.text import Detokenizer, Request, token_writer
from hfkit.models.loading import LanguageModel
from hfkit.serving.guard import error_reply, explain
from hfkit.serving.jobs import TextJob
from hfkit.serving.rows import Delta, Result, Token

_LEAST = -9999.0  # log-probability of an impossible token; JSON has no infinity
_LOOK = 0.5  # seconds between looks whether a client is still there
Kind = Literal["text_completion", "chat.completion"]


class Writer:
    """Writes one choice after another: its tokens as OpenAI spells them, and where they are in the text."""

    def __init__(self, lm: LanguageModel, kind: Kind, prompt: str, context: Sequence[int]) -> None:
        """prompt: the text before the first token, context: its tokens."""
        self._lm, self._kind, self._offset = lm, kind, len(prompt)
        self._detokenizer, self._waiting = Detokenizer(lm.tokenizer, context), ""
        self._write = token_writer(lm.tokenizer)

    def _bytes(self, token: int) -> bytes:
        word = self._lm.tokenizer.convert_ids_to_tokens(token)
        return self._write(word) if isinstance(word, str) else b""

    def _text(self, token: int) -> str:
        return self._bytes(token).decode(errors="replace")

    def scores(self, ids: Sequence[int], tokens: Sequence[Token | None]) -> dict[str, Any]:
        """The `logprobs` of a choice. A token without a score is the first one of a prompt."""
        if self._kind == "chat.completion":
            return {"content": [self._chat_token(token) for token in tokens if token]}
        return {
            "tokens": [self._text(token_id) for token_id in ids],
            "token_logprobs": [max(token.logprob, _LEAST) if token else None for token in tokens],
            "top_logprobs": [self._likeliest(token) if token else None for token in tokens],
            "text_offset": [self._place(token_id) for token_id in ids],
        }

    def _place(self, token: int) -> int:
        """Where the next token begins in the text; where it goes on with a character, the place of that."""
        before, own = self._waiting, self._text(token)
        piece = self._detokenizer.push(token)
        text = piece or self._detokenizer.unfinished
        # Bytes that are not a character yet, or none at all, are U+FFFD until the text is known.
        goes_on = before.endswith("\ufffd") and own.startswith("\ufffd") and len(text) < len(before) + len(own)
        place = self._offset + len(before) - goes_on
        self._offset, self._waiting = self._offset + len(piece), "" if piece else text
        return place

    def _likeliest(self, token: Token) -> dict[str, float]:
        """The likeliest tokens by their text. Where two are written alike, the likelier one."""
        texts: dict[str, float] = {}
        for token_id, logprob in token.top:
            texts.setdefault(self._text(token_id), max(logprob, _LEAST))
        return texts

    def _chat_token(self, token: Token) -> dict[str, Any]:
        top = [self._entry(token_id, logprob) for token_id, logprob in token.top]
        return self._entry(token.id, token.logprob) | {"top_logprobs": top}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self._text(token), "logprob": max(logprob, _LEAST), "bytes": list(self._bytes(token))}


class Reply:
    """The reply to a completion or a chat: `n` choices for each prompt, those with the best score of all samples."""

    def __init__(
        self, lm: LanguageModel, kind: Kind, job: TextJob, n: int, has_usage: bool, echo: bool = False
    ) -> None:
        """has_usage: whether a stream ends with the number of tokens."""
        self._lm, self._kind, self._job, self._n, self._has_usage, self._echo = lm, kind, job, n, has_usage, echo
        self.plan = job.plan
        self._frame = {
            "id": f"{'cmpl' if kind == 'text_completion' else 'chatcmpl'}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": lm.name,
        }
        self._completion_tokens = 0

    def _request(self, number: int) -> Request:
        return self.plan.requests[number // self.plan.samples]

    def _writer(self, number: int) -> Writer:
        if self.plan.wishes.scores_prompt:
            return Writer(self._lm, self._kind, "", [])
        request = self._request(number)
        return Writer(self._lm, self._kind, str(request.prompt), request.ids)

    def _prompt(self, number: int) -> str:
        return str(self._request(number).prompt) if self._echo else ""

    def _usage(self) -> dict[str, Any]:
        prompt = sum(len(request.ids) for request in self.plan.requests)
        written = self._completion_tokens
        return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}

    def _scores(self, number: int, writer: Writer, result: Delta | Result) -> dict[str, Any] | None:
        if self.plan.wishes.top is None:
            return None
        tokens: list[Token | None] = list(result.tokens)
        ids = [token.id for token in result.tokens]
        if isinstance(result, Result) and self.plan.wishes.scores_prompt:
            tokens = result.prompt_tokens + tokens
            ids = self._request(number).ids + ids
        return writer.scores(ids, tokens)

    async def whole(self) -> dict[str, Any]:
        """The reply as one object."""
        results = await self._job.results()
        completions = [result.completion for result in results]
        self._completion_tokens = sum(len(completion.tokens) for completion in completions)
        chosen: list[int] = []
        for first in range(0, len(results), self.plan.samples):
            numbers = list(range(first, first + self.plan.samples))
            if self._n < len(numbers):  # by the mean score of a token, as OpenAI chooses
                numbers.sort(key=lambda number: -completions[number].logprob / max(1, len(completions[number].tokens)))
            chosen += numbers[: self._n]
        choices = []
        for index, number in enumerate(chosen):
            text = completions[number].text.lstrip() if self.plan.strip else completions[number].text
            content: dict[str, Any] = {"text": self._prompt(number) + text}
            if self._kind == "chat.completion":
                content = {"message": {"role": "assistant", "content": text, "refusal": None}}
            scores = self._scores(number, self._writer(number), results[number])
            choices.append(self._choice(index, number, content, scores, completions[number].finish_reason))
        return self._frame | {"choices": choices, "usage": self._usage()}

    def _choice(
        self, index: int, number: int, content: dict[str, Any], scores: Any = None, reason: str | None = None
    ) -> dict[str, Any]:
        seed = {"seed": self._job.rows[number].seed} if reason else {}
        return {"index": index, **content, "logprobs": scores, "finish_reason": reason, **seed}

    async def pieces(self) -> AsyncIterator[dict[str, Any]]:
        """The reply as a stream of objects."""
        is_chat = self._kind == "chat.completion"
        frame = self._frame | ({"usage": None} if self._has_usage else {})
        frame |= {"object": "chat.completion.chunk"} if is_chat else {}
        writers = {number: self._writer(number) for number in range(len(self._job.rows))}
        begun: set[int] = set()
        told = dict.fromkeys(writers, 0)
        for number in writers:  # what comes before the first token
            if is_chat:
                role = {"delta": {"role": "assistant", "content": ""}}
                yield frame | {"choices": [self._choice(number, number, role)]}
            elif self._echo:
                yield frame | {"choices": [self._choice(number, number, {"text": self._prompt(number)})]}
        async for number, event in self._job.events():
            text, reason = "", None
            if isinstance(event, Delta):
                told[number] += len(event.tokens)
                text = event.text if number in begun or not self.plan.strip else event.text.lstrip()
                begun |= {number} if text else set()
            else:
                self._completion_tokens += len(event.completion.tokens)
                event, reason = event._replace(tokens=event.tokens[told[number] :]), event.completion.finish_reason
            content = {"text": text} if not is_chat else {"delta": {"content": text} if text else {}}
            scores = self._scores(number, writers[number], event)
            yield frame | {"choices": [self._choice(number, number, content, scores, reason)]}
        if self._has_usage:
            yield frame | {"choices": [], "usage": self._usage()}


class Response:
    """The reply to POST /v1/responses: one message."""

    def __init__(self, lm: LanguageModel, job: TextJob, repeated: dict[str, Any]) -> None:
        """repeated: fields of the request that the reply repeats."""
        self._job, self.plan = job, job.plan
        self._item_id, self._number = f"msg_{secrets.token_hex(12)}", 0
        self._frame: dict[str, Any] = {
            "id": f"resp_{secrets.token_hex(12)}", "object": "response", "created_at": int(time.time()),
            "model": lm.name, "error": None, "incomplete_details": None,
            "parallel_tool_calls": False, "tool_choice": "none", "tools": [], **repeated,
        }  # fmt: skip

    def _item(self, text: str | None, status: str) -> dict[str, Any]:
        content = [] if text is None else [self._part(text)]
        return {"id": self._item_id, "type": "message", "role": "assistant", "status": status, "content": content}

    def _part(self, text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _finished(self, result: Result) -> dict[str, Any]:
        text = result.completion.text.lstrip() if self.plan.strip else result.completion.text
        is_whole = result.completion.finish_reason == "stop"
        status = "completed" if is_whole else "incomplete"
        read, written = len(self.plan.requests[0].ids), len(result.completion.tokens)
        return self._frame | {
            "status": status,
            "incomplete_details": None if is_whole else {"reason": "max_output_tokens"},
            "output": [self._item(text, status)],
            "usage": {
                "input_tokens": read, "output_tokens": written, "total_tokens": read + written,
                "input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0},
            },
        }  # fmt: skip

    async def whole(self) -> dict[str, Any]:
        """The reply as one object."""
        return self._finished((await self._job.results())[0])

    async def pieces(self) -> AsyncIterator[dict[str, Any]]:
        """The reply as a stream of numbered events."""
        begun = self._frame | {"status": "in_progress", "output": [], "usage": None}
        place: dict[str, Any] = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        yield self._event("response.created", response=begun)
        yield self._event("response.in_progress", response=begun)
        yield self._event("response.output_item.added", output_index=0, item=self._item(None, "in_progress"))
        yield self._event("response.content_part.added", **place, part=self._part(""))
        text = ""
        async for _, event in self._job.events():
            if isinstance(event, Delta):
                piece = event.text if text or not self.plan.strip else event.text.lstrip()
                text += piece
                if piece:
                    yield self._event("response.output_text.delta", **place, delta=piece, logprobs=[])
                continue
            done = self._finished(event)
            (item,) = done["output"]
            (part,) = item["content"]
            yield self._event("response.output_text.done", **place, text=part["text"], logprobs=[])
            yield self._event("response.content_part.done", **place, part=part)
            yield self._event("response.output_item.done", output_index=0, item=item)
            yield self._event(f"response.{done['status']}", response=done)

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **fields}


async def until_gone(request: requests.Request, work: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
    """The result of `work`, which is cancelled if the client disconnects."""
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait({task}, timeout=_LOOK))[0]:
            if await request.is_disconnected():
                raise requests.ClientDisconnect
        return task.result()
    finally:
        task.cancel()


async def to_events(pieces: AsyncIterator[dict[str, Any]], named: bool = False) -> AsyncIterator[str]:
    """Server-sent events. An error becomes an event; the last one is [DONE]."""
    try:
        async for piece in pieces:
            name = f"event: {piece['type']}\n" if named else ""
            yield f"{name}data: {to_json(piece)}\n\n"
    except Exception as error:  # noqa: BLE001, the status has been sent already
        body = json.loads(bytes(error_reply(*explain(error)).body))
        if named:
            body = {"type": "error", "sequence_number": 0, **body["error"]}
        yield "event: error\n" * named + f"data: {to_json(body)}\n\n"
    yield "data: [DONE]\n\n"
