"""The routes of the server."""

import asyncio
import re
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from importlib.resources import files
from typing import Any

import fastapi
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse

import hfkit
from hfkit.corpus.templates import CHAT_TEMPLATE
from hfkit.errors import HfkitError, OptionError
from hfkit.inference.batches import end_compute_threads
from hfkit.inference.controls import continues
from hfkit.inference.scores import jsonable
from hfkit.models.architecture import head_of
from hfkit.models.loading import LanguageModel, vocabulary_size
from hfkit.options import GenerateOptions
from hfkit.reporting.templates import script_hash
from hfkit.serving import protocol
from hfkit.serving.engine import Engine
from hfkit.serving.guard import Counts, Guard, Settings, error_reply, explain, explain_body
from hfkit.serving.jobs import AS_GENERATE, TextJob, TextPlan, chat_prompt, plan_texts
from hfkit.serving.replies import Reply, Response, to_events, until_gone
from hfkit.serving.steps import make_engine

router = fastapi.APIRouter()


class Server:
    """The served models and the state of the server. `guard` is its ASGI application."""

    def __init__(self, models: list[LanguageModel], settings: Settings) -> None:
        self.models = {lm.name: lm for lm in models}
        self.engines: dict[str, Engine] = {
            lm.name: make_engine(lm) for lm in models if head_of(lm.model.config) == "text"
        }
        self.settings, self.counts = settings, Counts()
        self.is_stopping = False
        self.started = int(time.time())
        self.one_at_a_time = asyncio.Lock()  # for work that no engine does
        app = fastapi.FastAPI(
            docs_url=None, redoc_url=None, openapi_url=None, max_body_size=settings.max_body,
            exception_handlers={HfkitError: _on_error, Exception: _on_error, HTTPException: _on_http,
                                RequestValidationError: _on_invalid},
        )  # fmt: skip
        app.include_router(router)
        app.state.server = self
        self.guard = Guard(app, settings, self.counts)

    def find(self, name: str | None) -> LanguageModel:
        """The model of this name, by default the first one; a 404 if there is none."""
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            raise HTTPException(404, f"the model {name!r:.100} is not served here: see /v1/models")
        return self.models[name]

    def engine(self, name: str | None) -> Engine:
        """The engine of a model; HfkitError if it does not write text."""
        lm = self.find(name)
        if lm.name not in self.engines:
            raise OptionError(f"{lm.name} writes no text: use /v1/classify or /v1/answer")
        return self.engines[lm.name]

    @property
    def failure(self) -> str | None:
        """Why the process must be restarted; None if it need not be."""
        return next((engine.failure for engine in self.engines.values() if engine.failure), None)

    def stop(self) -> None:
        """End all texts early, each with what it has so far."""
        self.is_stopping = True
        for engine in self.engines.values():  # of all models at once: to wait for a thread takes time
            engine.end_texts()
        for engine in self.engines.values():
            engine.stop()


def _server(request: fastapi.Request) -> Server:
    server: Server = request.app.state.server
    return server


async def _on_error(request: fastapi.Request, error: Exception) -> JSONResponse:
    return error_reply(*explain(error))


async def _on_invalid(request: fastapi.Request, error: RequestValidationError) -> JSONResponse:
    message, param = explain_body(error.errors(), error.body)
    return error_reply(400, message, param=param)


async def _on_http(request: fastapi.Request, error: HTTPException) -> JSONResponse:
    code = "model_not_found" if "is not served here" in error.detail else None
    return error_reply(error.status_code, error.detail, code)


async def _start(request: fastapi.Request, engine: Engine, plan: Callable[[], TextPlan]) -> TextJob:
    with engine.expecting():
        job = TextJob(await asyncio.to_thread(plan))  # it encodes the prompts
        request.state.job = job
        await job.start(engine, _server(request).settings.request_timeout)
    return job


async def _send(request: fastapi.Request, reply: Reply | Response) -> Any:
    if reply.plan.wishes.streams:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        events = to_events(reply.pieces(), named=isinstance(reply, Response))
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)
    return JSONResponse(await until_gone(request, reply.whole()))


@router.post("/v1/completions")
async def _complete(request: fastapi.Request, body: protocol.CompletionBody) -> Any:
    body.check()
    engine = _server(request).engine(body.model)
    lm, most = engine.lm, 0 if body.max_tokens == 0 else AS_GENERATE if body.fit else 16

    def plan() -> TextPlan:
        scores_prompt = body.echo and body.logprobs is not None
        wishes = body.wishes(vocabulary_size(lm.model), body.logprobs, scores_prompt)
        return plan_texts(lm, body.prompts, body.options(body.max_tokens), wishes, body.samples, most)

    job = await _start(request, engine, plan)
    has_usage = body.stream_options.include_usage
    return await _send(request, Reply(lm, "text_completion", job, body.n, has_usage, echo=body.echo))


def _chat_plan(
    lm: LanguageModel,
    body: protocol.ChatBody | protocol.ResponseBody,
    most: int | None,
    samples: int = 1,
    top: int | None = None,
) -> TextPlan:
    prompt, stops = chat_prompt(lm, [message.to_dict() for message in body.messages])
    wishes = body.wishes(vocabulary_size(lm.model), top)
    plan = plan_texts(lm, [prompt], body.options(most, stops), wishes, samples, None)
    return replace(plan, strip=bool(stops))


@router.post("/v1/chat/completions")
async def _chat(request: fastapi.Request, body: protocol.ChatBody) -> Any:
    body.check()
    engine = _server(request).engine(body.model)
    most, top = body.max_completion_tokens or body.max_tokens, body.top_logprobs if body.logprobs else None
    job = await _start(request, engine, lambda: _chat_plan(engine.lm, body, most, body.n, top))
    reply = Reply(engine.lm, "chat.completion", job, body.n, body.stream_options.include_usage)
    return await _send(request, reply)


@router.post("/v1/responses")
async def _respond(request: fastapi.Request, body: protocol.ResponseBody) -> Any:
    body.check()
    engine = _server(request).engine(body.model)
    job = await _start(request, engine, lambda: _chat_plan(engine.lm, body, body.max_output_tokens))
    return await _send(request, Response(engine.lm, job, body.repeated))


def _compute(call: Callable[[], Any]) -> Any:
    """What `call` returns, in a thread that leaves the compute threads to the engines."""
    try:
        return call()
    finally:
        end_compute_threads()


@router.post("/v1/classify")
async def _classify(request: fastapi.Request, body: protocol.ClassifyBody) -> Any:
    server = _server(request)
    lm = server.find(body.model)
    body.check_extras()
    async with server.one_at_a_time:
        results = await asyncio.to_thread(_compute, partial(hfkit.classify, body.texts, model=lm, labels=body.labels))
    data = [{"index": index, **result.to_dict()} for index, result in enumerate(results)]
    return JSONResponse({"object": "list", "model": lm.name, "data": jsonable(data)})


@router.post("/v1/answer")
async def _answer(request: fastapi.Request, body: protocol.AnswerBody) -> Any:
    server = _server(request)
    lm = server.find(body.model)
    body.check_extras()
    threshold = body.no_answer_threshold
    call = partial(hfkit.answer, body.question, body.context, model=lm, no_answer_threshold=threshold)
    async with server.one_at_a_time:
        result = await asyncio.to_thread(_compute, call)
    return JSONResponse({"object": "answer", **jsonable(result.to_dict())})


@router.post("/tokenize")
async def _tokenize(request: fastapi.Request, body: protocol.TokenizeBody) -> Any:
    lm = _server(request).find(body.model)
    body.check_extras()
    ids = await asyncio.to_thread(lm.tokenizer.encode, body.prompt, add_special_tokens=body.add_special_tokens)
    return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": lm.context})


@router.post("/detokenize")
async def _detokenize(request: fastapi.Request, body: protocol.DetokenizeBody) -> Any:
    lm = _server(request).find(body.model)
    body.check_extras()
    vocabulary = vocabulary_size(lm.model)
    if not all(0 <= token < vocabulary for token in body.tokens):
        raise OptionError(f"tokens are ids from 0 to {vocabulary - 1}")
    return JSONResponse({"prompt": await asyncio.to_thread(lm.tokenizer.decode, body.tokens)})


@router.get("/tokenizer_info")
async def _tokenizer_info(request: fastapi.Request, model: str | None = None) -> Any:
    tokenizer = _server(request).find(model).tokenizer
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    tokens = {name: getattr(tokenizer, name) for name in names}
    return JSONResponse(tokens | {"chat_template": tokenizer.chat_template or CHAT_TEMPLATE})


def _model(server: Server, lm: LanguageModel) -> dict[str, Any]:
    return {"id": lm.name, "object": "model", "created": server.started, "owned_by": "hfkit",
            "max_model_len": lm.context, "task": head_of(lm.model.config),
            "has_encoder": lm.model.config.is_encoder_decoder,
            "has_chat_template": bool(lm.tokenizer.chat_template),
            "continues": continues(lm, GenerateOptions())}  # fmt: skip


@router.get("/v1/models")
async def _models(request: fastapi.Request) -> Any:
    server = _server(request)
    return JSONResponse({"object": "list", "data": [_model(server, lm) for lm in server.models.values()]})


@router.get("/v1/models/{name:path}")
async def _one_model(request: fastapi.Request, name: str) -> Any:
    server = _server(request)
    return JSONResponse(_model(server, server.find(name)))


@router.get("/health")
async def _health(request: fastapi.Request) -> Any:
    server = _server(request)
    status = server.failure or ("stopping" if server.is_stopping else "ok")
    return JSONResponse({"status": status}, 200 if status == "ok" else 503)


@router.get("/metrics")
async def _metrics(request: fastapi.Request) -> Any:
    server = _server(request)
    lines = [f"hfkit_requests_in_flight {server.counts.in_flight}"]
    lines += [f"hfkit_request_seconds_total {server.counts.seconds:.3f}"]
    for (path, status), count in sorted(server.counts.requests.items()):
        lines.append(f'hfkit_requests_total{{path="{path}",status="{status}"}} {count}')
    for number, engine in enumerate(server.engines.values()):
        label = f'{{model="{number}"}}'  # as /v1/models lists them: a name could hold anything
        lines += [
            f"hfkit_texts_running{label} {engine.running}",
            f"hfkit_texts_waiting{label} {engine.waiting}",
            f"hfkit_tokens_written_total{label} {engine.tokens_written}",
            f"hfkit_prompt_tokens_total{label} {engine.prompt_tokens}",
            f"hfkit_prompt_tokens_computed_total{label} {engine.prompt_tokens_read}",
        ]
    return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")


@router.get("/")
async def _page() -> Any:
    page, headers = _read_page()
    return HTMLResponse(page, headers=headers)


@cache
def _read_page() -> tuple[str, dict[str, str]]:
    """The page, and headers that let a browser run only the scripts in it."""
    page = files("hfkit.serving").joinpath("page.html").read_text("utf-8")

    def hashes(tag: str) -> str:
        texts = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return " ".join(f"'{script_hash(text)}'" for text in texts)

    policy = (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    others = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}
    return page, {"content-security-policy": policy, **others}
