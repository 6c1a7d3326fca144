"""`hfkit serve`: models over HTTP, as OpenAI's API."""

from __future__ import annotations

import ipaddress
from dataclasses import replace
from typing import Literal

from hfkit.cli.flags import flags
from hfkit.declaration import option
from hfkit.errors import HfkitError, OptionError
from hfkit.models.sources import find_model
from hfkit.options import ModelsOptions


@flags
def serve(
    model: ModelsOptions,
    host: str = option("127.0.0.1", "Address to listen at; others than this machine need a key."),
    port: int = option(8000, "Port; 0: any free one.", short="-p", min=0, max=65535),
    api_key: str | None = option(
        None, "Key that clients must send. [default: $HFKIT_API_KEY]", secret=True, envvar="HFKIT_API_KEY"
    ),
    allowed_host: list[str] | None = option(None, "Name by which clients call the server; may be repeated."),
    max_requests: int = option(256, "Requests at a time; more are told to come again.", min=1),
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
    sources = [find_model(each) for each in model.each()]  # a wrong name is an error before torch is imported
    if len({source.name for source in sources}) < len(sources):
        raise OptionError("--model names one model twice: leave one of them out")
    check_address(host, api_key)
    if engine == "vllm":
        from hfkit.serving.vllm import serve_with_vllm

        if len(sources) > 1 or (allowed_host, max_requests, request_timeout, log_prompts) != (None, 256, 600, False):
            raise OptionError("vLLM takes one model, --host, --port and --api-key: leave the other flags out")
        serve_with_vllm(model.each()[0], host, port, api_key)
    try:
        from hfkit.serving import server
        from hfkit.serving.guard import Settings
    except ImportError as error:
        raise HfkitError("'hfkit serve' needs fastapi and uvicorn: pip install 'hfkit[serve]'") from error
    from hfkit.models.loading import load

    settings = Settings(
        api_key=api_key, max_requests=max_requests, request_timeout=request_timeout, logs_prompts=log_prompts
    )
    # Behind a key, a server that others reach may have any name unless some are given.
    own_names = (*settings.hosts, f"[{host}]" if ":" in host else host.lower())
    hosts = (*own_names, *(allowed_host or [])) if is_loopback(host) or allowed_host else ()
    listener = server.bind(host, port)
    server.serve([load(each) for each in model.each()], listener, replace(settings, hosts=hosts), grace)


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
