"""Replies to clients that may disconnect early."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from hfkit.console import to_json
from hfkit.serving.guard import error_reply, explain

_T = TypeVar("_T")


async def until_gone(request: Request, work: Awaitable[_T]) -> _T:
    """The result of `work`, which is cancelled if the client disconnects."""
    task = asyncio.ensure_future(work)

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    watch = asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        watch.cancel()


async def to_events(pieces: AsyncIterator[dict[str, Any]], named: bool = False) -> AsyncIterator[str]:
    """Server-sent events. An error becomes an event; the last one is [DONE]."""
    try:
        async for piece in pieces:
            name = f"event: {piece['type']}\n" if named else ""
            yield f"{name}data: {to_json(piece)}\n\n"
    except Exception as error:  # noqa: BLE001, the status has been sent already
        status, message, code = explain(error)
        body = json.loads(bytes(error_reply(status, message, code=code).body))
        if named:
            body = {"type": "error", "sequence_number": 0, **body["error"]}
        yield "event: error\n" * named + f"data: {to_json(body)}\n\n"
    yield "data: [DONE]\n\n"
