"""Requests to a server that speaks OpenAI's protocol: the key, tries, streams, and one line for what goes wrong."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import time
from collections.abc import Iterator
from typing import Any

import httpx2

from hfkit.console import detail, note
from hfkit.errors import HfkitError, OptionError, first_line, hide_passwords
from hfkit.options import ServerOptions

OPENAI = "https://api.openai.com/v1"
_TRIES, _FIRST_WAIT, _LONGEST_WAIT = 6, 0.5, 60  # the waits between tries are in seconds, and double
MISSING = (404, 405, 501)  # status codes of a server that has no such route


class RefusedError(HfkitError):
    """The server does not take this request. It may take another one."""


class Connection:
    """The address of a server and the key for it. Several threads may use it."""

    def __init__(self, options: ServerOptions) -> None:
        """Check the address; nothing is sent yet.

        Raises:
            OptionError: this is no address, or no key.
        """
        address = (options.server or "").rstrip("/")
        self.url = OPENAI if address == "openai" else address if "://" in address else f"http://{address}"
        try:
            parts = httpx2.URL(self.url)
        except httpx2.InvalidURL:
            parts = httpx2.URL()
        if parts.scheme not in ("http", "https") or not parts.host:
            raise OptionError(f"--server is {hide_passwords(address)!r}: write http://HOST:PORT, or openai")
        if parts.path == "/":
            self.url += "/v1"
        self.shown_url = hide_passwords(self.url)
        # OpenAI's own key goes to OpenAI and nowhere else, and no other one goes there.
        variable = "OPENAI_API_KEY" if self.url == OPENAI else "HFKIT_API_KEY"
        self._key = (options.api_key or os.environ.get(variable) or "").strip()
        if not re.fullmatch("[!-~]*", self._key):  # the HTTP client would show it in an error
            raise OptionError(f"the API key has characters that no key has: check --api-key or {variable}")
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._client = httpx2.Client(headers=headers, timeout=httpx2.Timeout(600, connect=5))

    def send(self, route: str, body: dict[str, Any] | None = None, returned: tuple[int, ...] = ()) -> httpx2.Response:
        """The response to a GET, or to a POST of `body`. What may go well later is tried again.

        Args:
            route: below /v1; with a slash in front, beside it.
            returned: status codes whose response is returned instead of raised.

        A streamed response is returned before it ends.
        """
        url = self.url.removesuffix("/v1") + route if route.startswith("/") else f"{self.url}/{route}"
        content = None if body is None else json.dumps(body)
        for attempt in range(1, _TRIES + 1):
            wait = _FIRST_WAIT * 2 ** (attempt - 1) * random.uniform(1, 1.5)  # noqa: S311, no secret
            try:
                request = self._client.build_request("POST" if body else "GET", url, content=content)
                response = self._client.send(request, stream=True)
                if not _is_stream(response):
                    response.read()
            except httpx2.HTTPError as failure:
                error = self.error(f"no answer: {first_line(failure)}", "is the server running?")
                may_pass = body is not None and not isinstance(failure, httpx2.ReadTimeout)
            else:
                if response.is_success or response.status_code in returned:
                    return response
                error = self.refusal(response)
                may_pass = response.status_code in (408, 429) or response.status_code >= 500
                asked = response.headers.get("retry-after", "")
                wait = max(wait, int(asked) if asked.isdecimal() else 0)
            if not may_pass or attempt == _TRIES or wait > _LONGEST_WAIT:
                break
            (note if wait > 2 else detail)(f"{error}; trying again in {wait:.1f} s")
            time.sleep(wait)
        raise error

    def post(self, route: str, body: dict[str, Any]) -> Any:
        """The JSON that comes back."""
        with self.named_errors():
            return self.send(route, body).json()

    @contextlib.contextmanager
    def named_errors(self) -> Iterator[None]:
        """One line for an answer that is cut, is not JSON, or is another JSON than was expected."""
        try:
            yield
        except httpx2.HTTPError as error:
            raise self.error(f"the answer broke off: {first_line(error)}", "try again") from error
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            if isinstance(error, OptionError):
                raise
            raise self.error("the answer is not in OpenAI's format", "check --server") from error

    def refusal(self, response: httpx2.Response) -> HfkitError:
        """The error for a status code, with what the server says about it."""
        try:
            reason = message_of(response.json())
        except ValueError:
            reason = response.reason_phrase
        remedy = "set HFKIT_API_KEY, or for openai OPENAI_API_KEY" if response.status_code == 401 else ""
        kind = RefusedError if response.status_code in (400, 413, 422) else HfkitError
        return self.error(f"HTTP status {response.status_code} for {response.url.path}: {reason}", remedy, kind)

    def error(self, what: str, remedy: str = "", kind: type[HfkitError] = HfkitError) -> HfkitError:
        """An error in one line, without the key, which a server may repeat."""
        text = " ".join(what.split())[:500] + f" ({self.shown_url})" + (f": {remedy}" if remedy else "")
        return kind(text.replace(self._key, "***") if self._key else text)


def events_of(response: httpx2.Response) -> Iterator[Any]:
    """The objects of a stream of server-sent events, or the one object of another response."""
    if not _is_stream(response):
        yield response.json()
        return
    rest = b""
    for chunk in response.iter_bytes():
        # Not iter_lines: it ends lines at characters that a text may hold, such as U+2028.
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                data = line.removeprefix(b"data:").strip()
                if data == b"[DONE]":
                    return
                yield json.loads(data)


def _is_stream(response: httpx2.Response) -> bool:
    return response.is_success and "event-stream" in response.headers.get("content-type", "")


def message_of(body: Any) -> str:
    """The text of an error, whose shape differs between servers."""
    for name in ("error", "detail", "message"):
        if isinstance(body, dict) and body.get(name):
            body = body[name]
    return body if isinstance(body, str) else json.dumps(body)
