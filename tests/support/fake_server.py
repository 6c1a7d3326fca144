"""A server of OpenAI's protocol that misbehaves as it is told."""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-secret-0123456789"


def text_for(prompt: str, seed: int | None = None) -> str:
    """What the model of this server says: characters that a careless reader of lines would trip over."""
    return f" a b\u2028c é 🙂\n{prompt[::-1]} {seed}"


class Fake:
    """Answers each POST by the next of `faults`, as long as there are any, and then rightly.

    A fault is a function of the handler and the request body; it returns True if a right answer may follow.
    """

    def __init__(self, models=("fake",), owner="vllm", routes=("completions", "chat/completions", "responses")):
        self.models = [{"id": name, "owned_by": owner, "max_model_len": 64} for name in models]
        self.routes, self.faults, self.requests = routes, [], []  # requests: (path, headers, body)
        self.busy = self.most_busy = 0
        self.lock = threading.Lock()
        self.delay = 0.0  # seconds that an answer takes

    def __enter__(self):
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                fake.requests.append((self.path, dict(self.headers), None))
                send_json(self, {"object": "list", "data": fake.models} if self.path == "/v1/models" else {}, 200)

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with fake.lock:
                    fake.requests.append((self.path, dict(self.headers), body))
                    fault = fake.faults.pop(0) if fake.faults else None
                    fake.busy += 1
                    fake.most_busy = max(fake.busy, fake.most_busy)
                time.sleep(fake.delay)
                with contextlib.suppress(OSError):
                    if fault is None or fault(self, body):
                        fake.answer(self, body)
                with fake.lock:
                    fake.busy -= 1

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()

    def answer(self, handler, body):
        route = handler.path.removeprefix("/v1/")
        if route == "classify" and self.models[0]["owned_by"] == "hfkit":
            data = [{"text": body["input"], "label": "good", "probabilities": {"good": 0.75, "bad": 0.25}}]
            send_json(handler, {"data": data}, 200)
        elif route == "/tokenize" in self.routes:
            send_json(handler, {"tokens": [1, 2, 3]}, 200)
        elif route not in self.routes:
            send_json(handler, {"error": {"message": "This is a chat model", "code": None}}, 404)
        elif body.get("stream"):
            send_events(handler, events_for(route, body))
        else:
            send_json(handler, whole_for(route, body), 200)


def send_json(handler, value, status, **headers):
    send_bytes(handler, json.dumps(value).encode(), status, "application/json", **headers)


def send_bytes(handler, content, status=200, kind="text/html", **headers):
    handler.send_response(status)
    handler.send_header("Content-Type", kind)
    handler.send_header("Content-Length", str(len(content)))
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(content)


def send_events(handler, events, done=b"data: [DONE]\n\n", pause=None):
    """pause: seconds between bytes; None sends each event at once."""
    handler.send_response(200)
    handler.send_header("Content-Type", "text/event-stream; charset=utf-8")
    handler.send_header("Connection", "close")
    handler.end_headers()
    content = b"".join(b"data: " + json.dumps(event, ensure_ascii=False).encode() + b"\n\n" for event in events) + done
    step = len(content) if pause is None else 1
    for start in range(0, len(content), step):
        handler.wfile.write(content[start : start + step])
        handler.wfile.flush()
        time.sleep(pause or 0)
    handler.close_connection = True


def _said(route, body):
    prompt = str(body.get("prompt") or "") or (body.get("messages") or body["input"])[-1]["content"]
    return text_for(prompt, body.get("seed"))


def whole_for(route, body):
    text = _said(route, body)
    if route == "responses":
        content = [{"type": "output_text", "text": text}]
        output = [{"type": "message", "content": content}]
        return {"object": "response", "status": "completed", "output": output, "usage": {"output_tokens": 7}}
    usage = {"completion_tokens": 7}
    if route == "chat/completions":
        return {"choices": [{"message": {"content": text}, "finish_reason": "stop"}], "usage": usage}
    logprobs = {"token_logprobs": [-0.5] * 7}
    if body.get("echo"):  # every token of the prompt was the likeliest, and had this log-probability
        scored = len(body["prompt"]) - 1
        logprobs = {"token_logprobs": [None] + [-0.5] * scored, "top_logprobs": [None] + [{"a": -0.5}] * scored}
    return {"choices": [{"text": text, "finish_reason": "length", "logprobs": logprobs}], "usage": usage}


def events_for(route, body):
    whole, text = whole_for(route, body), _said(route, body)
    pieces = [text[i : i + 3] for i in range(0, len(text), 3)]
    if route == "responses":
        yield {"type": "response.created", "response": whole | {"status": "in_progress", "output": []}}
        for piece in pieces:
            yield {"type": "response.output_text.delta", "delta": piece}
        yield {"type": "response.completed", "response": whole}
        return
    for piece in pieces:
        part = {"delta": {"content": piece}} if route == "chat/completions" else {"text": piece}
        yield {"choices": [part | {"finish_reason": None}]}
    choice = whole["choices"][0] | {"text": "", "message": {}}
    yield {"choices": [choice]}
    yield {"choices": [], "usage": whole["usage"]}


def status(code, message="no", **headers):
    """A fault: this status code, with an error that repeats the key."""

    def fault(handler, body):
        send_json(handler, {"error": {"message": f"{message} {KEY}", "code": code}}, code, **headers)

    return fault


def drop(handler, body):
    """A fault: the connection ends without an answer."""
    handler.connection.shutdown(2)
    handler.close_connection = True


def cut(handler, body):
    """A fault: a stream, or an answer, ends in its middle."""
    if body.get("stream"):
        send_events(handler, list(events_for(handler.path.removeprefix("/v1/"), body))[:3], done=b'data: {"cho')
    else:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b'{"choices": [')
        handler.close_connection = True


def error_inside(handler, body):
    """A fault: a stream that ends with an error, or an error with status 200."""
    events = [{"choices": [{"text": "begun", "finish_reason": None}]}, {"error": {"message": f"out of memory {KEY}"}}]
    if body.get("stream"):
        send_events(handler, events)
    else:
        send_json(handler, events[1], 200)


def page(handler, body):
    """A fault: HTML in place of JSON."""
    send_bytes(handler, b"<html>hello</html>")


def other_json(handler, body):
    """A fault: JSON of another kind."""
    send_json(handler, [{"choices": 3}, None], 200)


def wrong_stream(handler, body):
    """A fault: events of another kind."""
    send_events(handler, [["choices"], {"choices": "many"}])


def slowly(handler, body):
    """A fault: a byte at a time."""
    route = handler.path.removeprefix("/v1/")
    send_events(handler, events_for(route, body), pause=0.0001) if body.get("stream") else send_json(
        handler, whole_for(route, body), 200
    )
