"""`hfkit serve`, models over HTTP as OpenAI's API; `hfkit warm`, a process that makes later commands start at once."""

from __future__ import annotations

import ipaddress
import sys
import time
from typing import Any, Literal

from hfkit import console
from hfkit import warm as client
from hfkit.cli.flags import JSON, flags
from hfkit.declaration import option
from hfkit.errors import HfkitError, OptionError, needing
from hfkit.models.sources import find_model
from hfkit.options import ModelsOptions

_LONGEST_START = 120  # seconds


@flags
def serve(
    model: ModelsOptions,
    host: str = option("127.0.0.1", "Address to listen on; one that other machines can reach needs --api-key."),
    port: int = option(8000, "Port; 0: any free one.", short="-p", min=0, max=65535),
    api_key: str | None = option(
        None, "Key that clients must send. [default: $HFKIT_API_KEY]", secret=True, envvar="HFKIT_API_KEY"
    ),
    allowed_host: list[str] | None = option(None, "Name by which clients call the server; may be repeated."),
    max_requests: int = option(256, "Requests at a time; further ones are refused with HTTP status 429.", min=1),
    request_timeout: float = option(600.0, "Most seconds for one request.", min=1),
    grace: float = option(30.0, "Seconds to finish what has begun, after Ctrl-C.", min=0),
    log_prompts: bool = option(False, "Print each request with its prompts."),
    engine: Literal["hfkit", "vllm"] = option("hfkit", "vllm: hand the model to vLLM, for many users and large GPUs."),
) -> None:
    """Serve models over HTTP as OpenAI's API, with a page to try them.

    Examples:
        hfkit serve
        hfkit serve -m gpt2 --port 8080
    """
    sources = [find_model(options) for options in model.each()]  # a wrong name is an error before torch is imported
    if len({source.name for source in sources}) < len(sources):
        raise OptionError("--model names one model twice: leave one of them out")
    check_address(host, api_key)
    if engine == "vllm":
        from hfkit.serving.vllm import serve_with_vllm

        if len(sources) > 1 or (allowed_host, max_requests, request_timeout, log_prompts) != (None, 256, 600, False):
            raise OptionError("vLLM takes one model, --host, --port and --api-key: leave the other flags out")
        serve_with_vllm(model.each()[0], host, port, api_key)
    with needing("'hfkit serve' needs fastapi and uvicorn", "serve"):
        from hfkit.serving import server
        from hfkit.serving.guard import Settings
    from hfkit.models.loading import load

    # Behind a key, a server that others reach may have any name unless some are given.
    own_names = (*Settings.hosts, f"[{host}]" if ":" in host else host.lower())
    hosts = (*own_names, *(allowed_host or [])) if is_loopback(host) or allowed_host else ()
    settings = Settings(api_key, hosts, max_requests, request_timeout, logs_prompts=log_prompts)
    listener = server.bind(host, port)
    server.serve([load(options) for options in model.each()], listener, settings, grace)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_address(host: str, api_key: str | None) -> None:
    """OptionError for an address that others can reach, without a key."""
    if not is_loopback(host) and not api_key:
        raise OptionError(f"--host {host} can be reached from other machines: add --api-key, or leave --host out")


@flags
def warm(
    idle: str = option("10m", "End after this time without a command: 90s, 10m, 2h."),
    stop: bool = option(False, "End the process."),
    status: bool = option(False, "Describe the process."),
    json: bool = JSON,
) -> None:
    """Keep a process ready, so that the next commands start at once.

    It has the libraries imported, and each command is a copy of it. Training and several processes start cold.

    Examples:
        hfkit warm
        hfkit warm --idle 2h
        hfkit warm --stop
    """
    try:
        seconds = client.parse_duration(idle)
    except ValueError as error:
        raise OptionError(f"--idle is {idle!r}: write a time such as 10m, 90s or 2h") from error
    if sys.platform != "linux":
        raise HfkitError("a warm process needs Linux: commands on this system start cold")
    if stop:
        report = client.ask("stop")
        console.note(f"process {report['pid']} has ended" if report else "no process is warm")
    elif status:
        report = client.ask("status")
        if not report:
            raise HfkitError("no process is warm: hfkit warm starts one")
        _describe(report, json)
    else:
        _start(seconds)


def _describe(report: dict[str, Any], json: bool) -> None:
    if json:
        console.write_json(report)
        return
    age, idle = console.duration(report["age"]), console.duration(report["idle"])
    served = console.counted(report["served"], "command")
    size = f"{report['memory'] / 1e6:.0f} MB"
    console.write(f"process {report['pid']}, {size}, {age} old, {served} served, ends after {idle} without one\n")
    if not report["fits"]:
        console.note("it does not serve commands from here: the packages, the settings or the environment differ")


def _start(idle: float) -> None:
    report = client.ask("status")
    if report and report["fits"] and report["idle"] == idle:
        console.note(f"process {report['pid']} is warm already")
        return
    if report:  # one for each user
        client.ask("stop")
    with console.status("importing ..."):
        pid, end = client.start(idle), time.monotonic() + _LONGEST_START
        while not (report := client.ask("status")) or report["pid"] != pid:
            if time.monotonic() > end or client.has_ended(pid):
                raise HfkitError(
                    f"no warm process could start: check that {client.place()} is a folder of yours alone"
                )
            time.sleep(0.05)
    console.note(f"process {pid} is warm for {console.duration(idle)} at a time; hfkit warm --stop ends it")
