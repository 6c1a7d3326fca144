"""Checks that come before every route: host, API key, number of requests, time limits."""

import asyncio
import hmac
import re
import secrets
import time
from collections import Counter
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hfkit import console
from hfkit.errors import ContextLengthError, HfkitError, NotFiniteError, first_line
from hfkit.serving.rows import UnavailableError

_OPEN = ("/health", "/")  # need no key: neither reveals anything about a model
_STALLED = 30.0  # seconds until a client that neither sends nor reads is disconnected
_OUR_HOSTS = ("localhost", "127.0.0.1", "[::1]")
_ID = re.compile("[A-Za-z0-9-]{1,64}")


@dataclass(frozen=True)
class Settings:
    """How a server is run."""

    api_key: str | None = None
    hosts: tuple[str, ...] = _OUR_HOSTS  # host names that are accepted; none: any
    max_requests: int = 256  # at a time; further ones get a 429
    request_timeout: float = 600.0  # seconds for one request
    max_body: int = 2_000_000  # bytes
    logs_prompts: bool = False


@dataclass
class Counts:
    """Counts of all requests, for /metrics."""

    requests: Counter[tuple[str, int]] = field(default_factory=Counter)  # by path and status
    seconds: float = 0.0
    in_flight: int = 0


def error_reply(status: int, message: str, code: str | None = None, param: str | None = None) -> JSONResponse:
    """An error as OpenAI's API returns it, so that its client raises its own exceptions."""
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status)
    kind = kind or ("server_error" if status >= 500 else "invalid_request_error")
    error = {"message": message, "type": kind, "param": param, "code": code}
    headers = {"retry-after": "1"} if status in (429, 503) else {}
    return JSONResponse({"error": error}, status, headers)


def explain(error: Exception) -> tuple[int, str, str | None]:
    """HTTP status, message and code for an error."""
    match error:
        case ClientDisconnect():
            return 499, "the client disconnected", None
        case UnavailableError():
            return 503, str(error), None
        case ContextLengthError():
            return 400, str(error), "context_length_exceeded"
        case HfkitError():
            return (500 if isinstance(error, NotFiniteError) else 400), str(error), None
        case MemoryError() | RuntimeError() if "memory" in str(error):
            return 503, "out of memory: ask for fewer or shorter texts", None
    console.note(f"a request failed: {type(error).__name__}: {first_line(error)}")
    return 500, "this should not happen: see the server's messages", None


def explain_body(errors: Sequence[Any], body: Any) -> tuple[str, str | None]:
    """Message and field for the first fault that FastAPI finds in the body of a request."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return f"the body is not valid JSON (character {first['loc'][1] + 1}: {first['ctx']['error']})", None
    # A field of several types has errors for each of them. The type that accepts most of the value was meant.
    reasons: dict[tuple[Any, ...], tuple[Any, str]] = {}  # how far, and why not further, by the types that were tried
    for error in errors:
        if error["loc"][1:2] == first["loc"][1:2]:
            place, types = _divide_place(error, body)
            numbers = [part for part in place if isinstance(part, int)]
            progress = (len(place), not error["type"].endswith("_type"), numbers, place)
            reasons.setdefault(types, (progress, str(error["msg"])))
    furthest = max(progress for progress, _ in reasons.values())
    head, *more = dict.fromkeys(reason for progress, reason in reasons.values() if progress == furthest)
    reason = " or ".join([head, *(each.removeprefix("Input should be ") for each in more)])
    names = [str(part)[:40] for part in furthest[-1]]
    message = f"{'.'.join(names) or 'the body'}: {reason[:300]}".encode("ascii", "backslashreplace").decode()
    return message, names[0] if names else None


def _divide_place(error: Any, body: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Divide pydantic's place of an error: names and numbers that lead there, and types that it tried on the way."""
    place, types, parts = [], [], error["loc"][1:]
    missing = parts[-1:] if error["type"] == "missing" else ()
    for part in parts[: len(parts) - len(missing)]:
        if part in (body if isinstance(body, dict) else range(len(body)) if isinstance(body, list) else ()):
            body = body[part]
            place.append(part)
        else:
            types.append(part)
    return (*place, *missing), tuple(types)


class Guard:
    """The outermost ASGI application. It alone admits requests."""

    def __init__(self, app: ASGIApp, settings: Settings, counts: Counts) -> None:
        self._app, self._settings, self._counts = app, settings, counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)  # startup and shutdown
            return
        started, status = time.perf_counter(), 500
        headers = Headers(scope=scope)
        request_id = headers.get("x-request-id", "")
        request_id = request_id if _ID.fullmatch(request_id) else secrets.token_hex(8)
        state: dict[str, Any] = {}
        scope["state"] = state

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            async with asyncio.timeout(_STALLED):
                await send(message)

        takes_place = scope["method"] == "POST"
        refusal = self._refusal(scope, headers)
        if not refusal and takes_place and self._counts.in_flight >= self._settings.max_requests:
            refusal = error_reply(429, "the server is busy: try again later", code="server_busy")
        if refusal:
            await refusal(scope, receive, send_on)
        else:
            self._counts.in_flight += takes_place
            try:
                await self._app(scope, _in_time(receive, headers), send_on)
            except Exception as error:  # noqa: BLE001, the application has answered, if anybody is there to read it
                console.detail(f"{request_id} ended early: {type(error).__name__}")
            finally:
                self._counts.in_flight -= takes_place
                if "job" in state:
                    state["job"].cancel()
        seconds = time.perf_counter() - started
        # Only known paths: a client must not fill the memory with names.
        route = getattr(scope.get("route"), "path", "other")
        self._counts.requests[route, status] += 1
        self._counts.seconds += seconds
        line = f"{scope['method']} {scope['path']!r:.80} {status} {seconds:.3f} s {request_id}"
        if self._settings.logs_prompts:
            requests = state["job"].plan.requests if "job" in state else []
            console.note(f"{line} {console.to_json([request.prompt for request in requests])}")
        else:
            console.detail(line)

    def _refusal(self, scope: MutableMapping[str, Any], headers: Headers) -> JSONResponse | None:
        """The reply to a request that is not admitted; None for others."""
        host = re.sub(r":\d*$", "", headers.get("host", "")).lower()
        # DNS rebinding: a page of another site can point a name of its own at this server.
        if self._settings.hosts and host not in self._settings.hosts:
            return error_reply(403, "this host name is not allowed: use the address that the server printed")
        origin = headers.get("origin")
        if origin and origin.partition("://")[2] != headers.get("host"):
            return error_reply(403, "a page of another site may not call this server")
        is_open = scope["method"] == "GET" and scope["path"] in _OPEN
        if self._settings.api_key and not is_open and not self._has_key(headers):
            return error_reply(401, "the API key is missing or wrong", code="invalid_api_key")
        content = headers.get("content-type", "").partition(";")[0].strip()
        if scope["method"] == "POST" and content != "application/json":
            return error_reply(415, "the body is not JSON: send it with content-type application/json")
        if int(headers.get("content-length", 0)) > self._settings.max_body:
            return error_reply(413, f"the body is larger than {self._settings.max_body} bytes: send less")
        return None

    def _has_key(self, headers: Headers) -> bool:
        values = headers.getlist("authorization")
        kind, _, key = (values[0] if len(values) == 1 else "").partition(" ")
        expected = (self._settings.api_key or "").encode()
        return hmac.compare_digest(key.encode("latin-1"), expected) and kind.lower() == "bearer"


def _in_time(receive: Receive, headers: Headers) -> Receive:
    """`receive` with a time limit for the body of the request."""
    waits = headers.get("content-length") not in (None, "0") or "transfer-encoding" in headers

    async def receive_soon() -> Message:
        nonlocal waits
        async with asyncio.timeout(_STALLED if waits else None):
            message = await receive()
        waits = waits and bool(message.get("more_body"))
        return message

    return receive_soon
