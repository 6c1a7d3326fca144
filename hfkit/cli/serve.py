"""`hfkit serve`: models over HTTP, as OpenAI's API."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from hfkit.cli.flags import flags
from hfkit.errors import HfkitError, OptionError
from hfkit.models.sources import find_model
from hfkit.options import ManyModelsOptions, ModelOptions


@flags
def serve(
    model: ManyModelsOptions,
    host: Annotated[
        str, typer.Option(help="Address to listen at; others than this machine need a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", "-p", min=0, max=65535, help="Port; 0: any free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="HFKIT_API_KEY", show_envvar=True, help="Key that clients must send.")
    ] = None,
    allowed_host: Annotated[
        list[str] | None, typer.Option(help="Name by which clients call the server; may be repeated.")
    ] = None,
    max_requests: Annotated[int, typer.Option(min=1, help="Requests at a time; more are told to come again.")] = 256,
    request_timeout: Annotated[float, typer.Option(min=1, help="Most seconds for one request.")] = 600,
    grace: Annotated[float, typer.Option(min=0, help="Seconds to finish what has begun, after Ctrl-C.")] = 30,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Print each request with its prompts.")] = False,
) -> None:
    """Serve models over HTTP, as OpenAI's API, with a page to try them on."""
    options = [ModelOptions(**{**vars(model), "model": name}) for name in model.model or (None,)]
    sources = [find_model(each) for each in options]  # report a wrong name before torch is imported
    if len({source.name for source in sources}) < len(sources):
        raise OptionError("--model names one model twice: leave one of them out")
    try:
        from hfkit.serving import server
        from hfkit.serving.guard import Settings
    except ImportError as error:
        raise HfkitError("'hfkit serve' needs fastapi and uvicorn: pip install 'hfkit[serve]'") from error
    from hfkit.models.loading import load

    server.check_address(host, api_key)
    settings = Settings(
        api_key=api_key, max_requests=max_requests, request_timeout=request_timeout, logs_prompts=log_prompts
    )
    # Behind a key, a server may have any name unless some are given.
    is_local = host in ("127.0.0.1", "localhost", "::1")
    hosts = (*settings.hosts, *(allowed_host or [])) if is_local or allowed_host else ()
    listener = server.bind(host, port)
    server.serve([load(each) for each in options], listener, replace(settings, hosts=hosts), grace)
