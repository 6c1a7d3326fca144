"""Models from the Hub: a small one of our own, on this machine, that can also misbehave."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from support.models import shard

from hfkit.options import ModelOptions

COMMIT = "c" * 40

# Finds each model in turn, prints what came of it. huggingface_hub reads its environment when it is imported.
FIND = """
import json, sys, time
from hfkit.errors import HfkitError
from hfkit.options import ModelOptions
from hfkit.models.sources import find_model as find
for options in json.loads(sys.argv[1]):
    start, found, error = time.monotonic(), "", ""
    try:
        found = str(find(ModelOptions(**options)).folder)
    except HfkitError as refused:
        error = str(refused)
    print(json.dumps([found, error, time.monotonic() - start]))
"""


class Hub(ThreadingHTTPServer):
    """The part of the Hub's protocol that loading a model needs; `broken` maps a model to its fault."""

    daemon_threads = True

    def __init__(self, models: Path, broken: dict[str, str]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.models, self.broken, self.log = models, broken, []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def asked(self) -> Counter:
        """Names of the files that were sent, and how often."""
        return Counter(path.rsplit("/", 1)[1] for method, path in self.log if method == "GET" and "/resolve/" in path)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments) -> None:
        pass

    def do_HEAD(self) -> None:
        self.server.log.append((self.command, self.path))
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts == [""]:
            self.answer(200)
        elif parts[0] == "api" and len(parts) >= 4:
            self.describe("/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main")
        elif len(parts) > 4 and parts[2] == "resolve":
            self.send("/".join(parts[:2]), "/".join(parts[4:]))
        else:
            self.answer(404)

    do_GET = do_HEAD

    def answer(self, status: int, body: bytes = b"", **headers) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def describe(self, name: str, revision: str) -> None:
        fault = self.server.broken.get(name, "")
        if fault.isdigit():
            self.answer(int(fault))
        elif fault == "html":
            self.answer(200, b"<html>please log in to this network</html>")
        elif fault == "stall":
            time.sleep(20)
        elif fault == "gated":
            self.answer(403, X_Error_Code="GatedRepo")
        elif not (self.server.models / name).is_dir():
            self.answer(404, X_Error_Code="RepoNotFound")
        elif revision not in ("main", "v1", COMMIT):
            self.answer(404, X_Error_Code="RevisionNotFound")
        else:
            folder = self.server.models / name
            files = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
            info = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]}
            self.answer(200, json.dumps(info).encode())

    def send(self, name: str, file: str) -> object:
        path, fault = self.server.models / name / file, self.server.broken.get(name, "")
        if fault == "gated files":
            return self.answer(403, X_Error_Code="GatedRepo")
        if not path.is_file():
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        body = path.read_bytes()
        if self.command == "GET" and file == "model.safetensors" and fault.startswith("cut"):
            if self.server.asked()[file] == 1:
                self.close_connection = True
                half = body[: len(body) // 2]
                return self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + half)
            if fault == "cut and gone":
                return self.answer(410)
        return self.answer(200, body, ETag=f'"{zlib.crc32(body):x}"', X_Repo_Commit=COMMIT)


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny) -> Path:
    """What the Hub holds."""
    folder = tmp_path_factory.mktemp("hub")
    for name in ("good", "sharded", "cut", "gated", "code"):
        shutil.copytree(tiny, folder / "fake" / name)
    for name in ("pytorch_model.bin", "consolidated.safetensors", "training_args.bin", "README.md", "onnx/model.onnx"):
        for model in ("good", "sharded"):
            (folder / "fake" / model / name).parent.mkdir(exist_ok=True)
            (folder / "fake" / model / name).write_bytes(b"not wanted")
    shard(folder / "fake" / "sharded")
    (folder / "fake" / "code" / "modeling.py").write_text("raise SystemExit('ran')")
    for name, file in {"pickle": "pytorch_model.bin", "lora": "x.safetensors", "bare": "model.safetensors"}.items():
        (folder / "fake" / name).mkdir()
        (folder / "fake" / name / file).write_bytes(b"")
    return folder


@pytest.fixture
def hub(models):
    with serving(models) as server:
        yield server


@contextlib.contextmanager
def serving(models: Path, **broken: str):
    server = Hub(models, {f"fake/{name.replace('_', '-')}": fault for name, fault in broken.items()})
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def start(endpoint: str, home: Path, *options: dict) -> subprocess.Popen:
    environment = {key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_VERBOSITY": "error"}
    environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "*"}
    command = [sys.executable, "-c", FIND, json.dumps(options)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def outcomes(process: subprocess.Popen) -> list[tuple[str, str, float]]:
    """(folder, error, seconds) of each model."""
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0 and err == "", err
    return [tuple(json.loads(line)) for line in out.splitlines()]


def test_download_once(hub, tmp_path, monkeypatch):
    """A model is downloaded once and then needs no network."""
    from hfkit.models.loading import load

    wanted = [{"model": "fake/good"}, {"model": "fake/sharded"}, {"model": "fake/good", "revision": "v1"}]
    found = outcomes(start(hub.url, tmp_path, *wanted))
    assert [error for _, error, _ in found] == [""] * 3
    folder = Path(found[0][0])
    assert sorted(path.name for path in folder.iterdir()) == [
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    ]
    assert found[2][0] == str(folder) and folder.name == COMMIT
    assert set(hub.asked().values()) <= {1, 2} and "consolidated.safetensors" not in hub.asked()
    hub.shutdown()
    hub.server_close()
    log = len(hub.log)
    again = outcomes(start(hub.url, tmp_path, *wanted, {"model": "fake/good", "revision": COMMIT}))
    assert [outcome[:2] for outcome in again] == [outcome[:2] for outcome in [*found, found[0]]]
    assert len(hub.log) == log
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("fake/good", "fake/sharded"):
        lm = load(name, device="cpu")
        assert lm.name == name and lm.model.lm_head.weight.shape == (257, 32)


def test_download_completes_cache(hub, tmp_path):
    """A cache that lacks a file is completed."""
    ((folder, _, _),) = outcomes(start(hub.url, tmp_path, {"model": "fake/good"}))
    (Path(folder) / "model.safetensors").resolve().unlink()
    (Path(folder) / "tokenizer.json").unlink()
    hub.log.clear()
    assert outcomes(start(hub.url, tmp_path, {"model": "fake/good"}))[0][:2] == (folder, "")
    assert hub.asked()["model.safetensors"] == 1 and (Path(folder) / "model.safetensors").is_file()


def test_download_refused(models, tmp_path):
    """What the Hub refuses is one sentence."""
    broken = {"private": "401", "absent": "404", "broken": "500", "gated": "gated files", "terms": "gated"}
    expected = {
        "fake/missing": "neither a folder here nor on",
        "fake/private": "hf auth login",
        "fake/absent": "neither a folder here nor on",
        "fake/broken": "HTTP status 500",
        "fake/gated": "is gated: accept its terms",
        "fake/terms": "is gated: accept its terms",
        "fake/portal": "is not a Hub",
        "fake/pickle": "has no safetensors weights",
        "fake/lora": "has no safetensors weights",
        "fake/bare": "has no config.json",
    }
    with serving(models, **broken, portal="html") as hub:
        wanted = [*({"model": name} for name in expected), {"model": "fake/good", "revision": "v9"}]
        found = outcomes(start(hub.url, tmp_path, *wanted))
    words = [*expected.values(), "has no revision 'v9'"]
    assert [(folder, word in error) for (folder, error, _), word in zip(found, words, strict=True)] == [
        ("", True) for _ in words
    ], found
    assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("*.bin"))


def unreachable(models: Path, folder: Path) -> list[tuple[str, str, str, float]]:
    """Hubs that cannot be reached: (URL, folder, error, seconds) of a search for a model on each."""
    with socket.socket() as silent, socket.socket() as closed, serving(models, good="stall") as stalling:
        silent.bind(("127.0.0.1", 0))
        silent.listen()  # accepts and never answers
        closed.bind(("127.0.0.1", 0))
        endpoints = [stalling.url, *(f"http://127.0.0.1:{s.getsockname()[1]}" for s in (silent, closed))]
        endpoints += ["http://no-such-host.invalid", "nonsense"]
        processes = [start(url, folder / str(i), {"model": "fake/good"}) for i, url in enumerate(endpoints)]
        return [(url, *outcomes(process)[0]) for url, process in zip(endpoints, processes, strict=True)]


def test_reach_hub_unreachable(models, tmp_path):
    """A Hub that cannot be reached is one sentence with the ways out."""
    for url, folder, error, _ in unreachable(models, tmp_path):
        assert folder == "" and "cannot be reached" in error and url in error, error
        assert all(way in error for way in ("-m bundled", "HF_ENDPOINT", "a local folder"))


@pytest.mark.slow
def test_reach_hub_time(models, tmp_path):
    """It takes five seconds at most; the Hub's own client would try for 23."""
    (_, _, _, stalling), *others = unreachable(models, tmp_path)
    # One that answers the probe and nothing more is also asked which agents it knows, for three seconds.
    assert stalling < 6 and max(seconds for *_, seconds in others) < 5


@pytest.mark.parametrize("fault", ["404", "500", "html", "stop"])
def test_endpoint_password(models, tmp_path, fault):
    """The user and password of HF_ENDPOINT are not in any error."""
    with serving(models, good=fault) as hub:
        url = hub.url.replace("://", "://user:s3cr%40et@")
        if fault == "stop":
            hub.shutdown()
            hub.server_close()
        ((folder, error, _),) = outcomes(start(url, tmp_path, {"model": "fake/good"}))
    assert folder == "" and hub.url in error and "s3cr" not in error and "user" not in error


def test_download_cut(models, tmp_path):
    """A download that is cut continues or says so, and never harms the cache."""
    with serving(models, cut="cut and gone") as hub:
        ((folder, error, _),) = outcomes(start(hub.url, tmp_path, {"model": "fake/cut"}))
        assert folder == "" and "HTTP status 410" in error
        assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("*.incomplete"))
        hub.broken["fake/cut"] = "cut"
        hub.log.clear()
        ((folder, error, _),) = outcomes(start(hub.url, tmp_path, {"model": "fake/cut"}))
        assert error == "" and hub.asked() == {"model.safetensors": 2}
    sent = (models / "fake" / "cut" / "model.safetensors").read_bytes()
    assert (Path(folder) / "model.safetensors").read_bytes() == sent


def test_download_code(hub, tmp_path):
    """The code of a pinned model is downloaded and not run."""
    wanted = {"model": "fake/code", "revision": COMMIT, "trust_remote_code": True}
    ((folder, error, _),) = outcomes(start(hub.url, tmp_path, wanted))
    assert error == "" and (Path(folder) / "modeling.py").is_file()
    assert ModelOptions(**wanted).trust_remote_code
