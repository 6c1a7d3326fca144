"""A server in a thread of this process, and texts straight from an engine."""

import contextlib
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import uvicorn

from hfkit.inference.text import fit_prompt
from hfkit.options import GenerateOptions
from hfkit.serving.app import Server
from hfkit.serving.guard import Settings
from hfkit.serving.rows import Delta, Result, Row, Wishes
from hfkit.serving.server import bind


@contextlib.contextmanager
def serving(*models, **settings) -> Iterator[tuple[str, Server]]:
    """`http://127.0.0.1:PORT` of a server of these loaded models."""
    server = Server(list(models), Settings(**settings))
    config = uvicorn.Config(server.guard, log_config=None, log_level="critical", lifespan="off")
    http = uvicorn.Server(config)
    listener = bind("127.0.0.1", 0)
    thread = threading.Thread(target=http.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    wait_until(lambda: http.started)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", server
    finally:
        http.should_exit = http.force_exit = True
        thread.join(20)
        server.stop()


def wait_until(condition, seconds: float = 30.0) -> None:
    """Return as soon as `condition()` is true; fail if it is not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


class Written:
    """A row that an engine writes, and what it emits."""

    def __init__(self, lm, prompt, options: GenerateOptions, wishes: Wishes | None = None, **how) -> None:
        request = prompt if not isinstance(prompt, str | list) else None
        request = request or fit_prompt(prompt, options, lm.tokenizer, lm.model.config, lm.name)
        if "new_tokens" in how:
            request = replace(request, new_tokens=how.pop("new_tokens"))
        self.events: queue.Queue = queue.Queue()
        self.pieces: list[Delta] = []
        self.row = Row(lm, replace(request, seed=options.seed), options, wishes or Wishes(), self.events.put, **how)

    def result(self) -> Result:
        """Wait for the end; an error is raised."""
        while True:
            event = self.events.get(timeout=60)
            if isinstance(event, Exception):
                raise event
            if isinstance(event, Result):
                return event
            self.pieces.append(event)


def write(engine, lm, prompts: Sequence, options: Sequence[GenerateOptions], wishes: Wishes | None = None) -> list:
    """The results of these prompts, written together."""
    texts = [Written(lm, prompt, each, wishes) for prompt, each in zip(prompts, options, strict=True)]
    engine.submit([text.row for text in texts])
    return [text.result() for text in texts]
