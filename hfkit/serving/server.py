"""Runs the server: binds the port, serves, and stops gracefully."""

import asyncio
import signal
import socket
from typing import Any

import uvicorn

from hfkit.console import note
from hfkit.errors import HfkitError, first_line
from hfkit.inference.batches import end_compute_threads
from hfkit.models.loading import LanguageModel
from hfkit.serving.app import Server
from hfkit.serving.guard import Settings

_LAST_SECONDS = 5.0  # to send what is done, after the grace


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to the address; it does not listen yet.

    Raises:
        HfkitError: the address is taken, or not of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        return listener
    except (OSError, UnicodeError, OverflowError) as error:
        where = f"{host}, port {port}"
        raise HfkitError(f"cannot listen at {where}: {first_line(error)}: choose another --port or --host") from error


class _Uvicorn(uvicorn.Server):
    """uvicorn that says when it is ready, and ends the texts of its last requests when the grace is over."""

    def __init__(self, config: uvicorn.Config, server: Server, greeting: str, grace: float) -> None:
        super().__init__(config)
        self._served, self._greeting, self._grace = server, greeting, grace

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        note(self._greeting)  # whoever reads it may connect at once, or send a signal

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._served.is_stopping = True
        waiting = asyncio.create_task(self._end_texts())
        await super().shutdown(sockets)
        waiting.cancel()

    async def _end_texts(self) -> None:
        await asyncio.sleep(self._grace)
        await asyncio.to_thread(self._served.stop)

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._served.failure is not None


def serve(models: list[LanguageModel], listener: socket.socket, settings: Settings, grace: float = 30.0) -> None:
    """Serve these models until SIGINT or SIGTERM, then `grace` seconds more for what has been begun.

    Raises:
        HfkitError: the device failed; only a new process can use it again.
    """
    end_compute_threads()  # those that loaded the models
    server = Server(models, settings)
    config = uvicorn.Config(
        server.guard,
        log_config=None, log_level="critical", lifespan="off", server_header=False, timeout_keep_alive=10,
        timeout_graceful_shutdown=int(grace + _LAST_SECONDS), h11_max_incomplete_event_size=32_768,
    )  # fmt: skip
    host, port = listener.getsockname()[:2]
    names = ", ".join(lm.name for lm in models)
    greeting = f"serving {names} at http://{f'[{host}]' if ':' in host else host}:{port}; Ctrl-C ends it"
    # uvicorn raises the signal again once it has stopped; it has been handled by then.
    before: dict[signal.Signals, Any] = {
        number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        _Uvicorn(config, server, greeting, grace).run(sockets=[listener])
    finally:
        server.stop()
        for number, handler in before.items():
            signal.signal(number, handler)
    if server.failure:
        raise HfkitError(f"{server.failure}: start the server again")
