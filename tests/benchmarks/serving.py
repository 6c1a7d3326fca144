"""Serving, side by side with `transformers serve` and with hfkit's own batch: `python tests/benchmarks/serving.py`.

A model of GPT-2-small's size with random weights, or the folder given with `--model`. Every figure is a ratio of
measurements that took turns in this one run. Prints a Markdown table; `--fast` makes fewer rounds.
"""

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from generation import in_turn, make_small, timed

os.environ["HF_HUB_OFFLINE"] = "1"
CLIENTS, TOKENS = 16, 32
CLIENT = httpx.Client(
    timeout=600, limits=httpx.Limits(max_connections=None)
)  # one: to make it takes longer than a step
PROMPTS = [f"Hello {i}" + " and so" * (i % 3) for i in range(CLIENTS)]


@contextlib.contextmanager
def started(command: list[str], port: int) -> Iterator[str]:
    """The address of a server that has answered."""
    address = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                CLIENT.get(f"{address}/health", timeout=1).raise_for_status()
                break
            time.sleep(0.5)
        assert process.poll() is None, f"{command[0]} ended with {process.returncode}"
        yield address
    finally:
        process.terminate()
        process.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def complete(address: str, model: str, prompt: str) -> None:
    body = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
    reply = CLIENT.post(f"{address}/v1/completions", json=body)
    assert reply.status_code == 200 and reply.json()["usage"]["completion_tokens"] == TOKENS, reply.text


def complete_all(address: str, model: str) -> Callable[[], float]:
    def run() -> float:
        with ThreadPoolExecutor(CLIENTS) as pool:
            return timed(lambda: list(pool.map(lambda prompt: complete(address, model, prompt), PROMPTS)))

    return run


def first_token(address: str, model: str) -> float:
    """Seconds until the first text of a stream."""
    body = {"model": model, "prompt": "Hello, my name is", "max_tokens": 2, "stream": True, "seed": 1}
    started = time.perf_counter()
    with CLIENT.stream("POST", f"{address}/v1/completions", json=body) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["text"]:
                return time.perf_counter() - started
    raise AssertionError("no text came")


@contextlib.contextmanager
def others(address: str, model: str, count: int) -> Iterator[None]:
    """So many clients whose texts are being written."""
    is_over = False

    def one(number: int) -> None:
        body = {"model": model, "prompt": PROMPTS[number], "max_tokens": 400, "stream": True}
        while not is_over:
            with CLIENT.stream("POST", f"{address}/v1/completions", json=body) as reply:
                for _ in reply.iter_lines():
                    if is_over:
                        return

    with ThreadPoolExecutor(count) as pool:
        clients = [pool.submit(one, number) for number in range(count)]
        while f'hfkit_texts_running{{model="0"}} {count}' not in CLIENT.get(f"{address}/metrics").text:
            time.sleep(0.1)
        yield
        is_over = True
        for client in clients:
            client.result()


def compare_first_tokens(rounds: int, address: str, model: str) -> tuple[float, float, float]:
    """Median seconds under load and alone, and their ratio."""
    under_load, alone = [], []
    for _ in range(rounds):
        first_token(address, model)
        alone += [first_token(address, model) for _ in range(10)]
        with others(address, model, CLIENTS - 1):
            under_load += [first_token(address, model) for _ in range(10)]
    loaded, single = statistics.median(under_load), statistics.median(alone)
    return loaded, single, loaded / single


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true", help="one round each")
    parser.add_argument("--model", help="folder of a model")
    arguments = parser.parse_args()
    rounds = 1 if arguments.fast else 3
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.model or make_small(Path(temporary))
        ports = free_port(), free_port()
        plain = [str(Path(sys.executable).with_name("transformers")), "serve", folder, "--port", str(ports[0])]
        ours = [sys.executable, "-m", "hfkit", "serve", "-m", folder, "--port", str(ports[1])]
        with started(plain, ports[0]) as stock, started(ours, ports[1]) as address:
            import hfkit

            lm = hfkit.load(folder)

            def batch() -> float:
                return timed(lambda: hfkit.generate(PROMPTS, model=lm, max_new_tokens=TOKENS, temperature=0))

            served = complete_all(address, folder)
            print("| what | other | hfkit serve | ratio | goal |\n|---|---|---|---|---|", flush=True)
            for what, other, goal in (
                ("16 clients, beside `transformers serve`", complete_all(stock, folder), "≥ 4"),
                ("16 clients, beside hfkit's own batch of 16", batch, "≥ 0.9"),
            ):
                theirs, mine, ratio = in_turn(rounds, other, served)
                print(f"| {what} | {theirs:.2f} s | {mine:.2f} s | {ratio:.2f} | {goal} |", flush=True)
            loaded, alone, ratio = compare_first_tokens(rounds, address, folder)
            print(
                f"| first token among 15 others, beside alone | {alone:.3f} s | {loaded:.3f} s | {ratio:.2f} | ≤ 2 |"
            )


if __name__ == "__main__":
    main()
