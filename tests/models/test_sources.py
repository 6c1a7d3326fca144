"""A model's name leads to a safe folder, or to one sentence."""

import json
import os
import pickle
import random
import shutil
import socket
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from support.models import shard, write_index
from support.shell import edit_json

from hfkit.console import printable
from hfkit.errors import HfkitError
from hfkit.models.sources import BUNDLED
from hfkit.models.sources import find_model as find
from hfkit.options import ModelOptions


def fails(**options) -> str:
    """The one line with which `find` refuses."""
    with pytest.raises(HfkitError) as error:
        find(ModelOptions(**options))
    line = printable(str(error.value))
    assert "\n" not in line
    return line


@pytest.fixture
def no_network(monkeypatch):
    """Every connection fails the test, even one that the code under test would hide; the Hub is not switched off."""
    calls = []

    def refuse(*arguments, **keywords):
        calls.append(arguments)
        raise OSError("a test without network")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert not calls


class Touch:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


# names


def test_find_model_default(monkeypatch, tiny):
    """Without a name it is $HFKIT_MODEL, or else the bundled model."""
    assert find().folder == find(ModelOptions(model="bundled")).folder == BUNDLED
    monkeypatch.setenv("HFKIT_MODEL", tiny)
    assert find().name == str(find().folder) == tiny
    assert find(ModelOptions(model="bundled")).folder == BUNDLED
    monkeypatch.setenv("HFKIT_MODEL", "")
    assert find().folder == BUNDLED


def test_model_files_size(tiny):
    """The size is that of the weights."""
    assert find(ModelOptions(model=tiny)).size == os.path.getsize(f"{tiny}/model.safetensors")


BAD_NAMES = [
    *("", " ", "../../etc/nothing", "a//b", "a/b/c", "/no/such/folder", "./nope", "~/no-such-model", "~nobody/model"),
    *("C:\\x", "a\\b", "\\\\server\\share", "file:///etc/passwd", "https://huggingface.co/gpt2", "hf://gpt2", "gpt2/"),
    *(
        "a" * 97,
        "a/" + "b" * 300,
        "x" * 5000,
        "two\nlines",
        "two\r\nlines",
        "\x1b[31mred",
        "a\x00b",
        "gpt 2",
        "gpt2\t",
    ),
    *(
        "-gpt2",
        "gpt2-",
        "a..b",
        "a--b",
        "gpt2.git",
        "é",
        "模型",
        "gpt2?x=1",
        "gpt2#x",
        "%2e%2e",
        "$(id)",
        "@",
        "\ud800",
    ),
]


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_find_model_bad_name(no_network, name):
    """A bad name is refused without the network."""
    line = fails(model=name)
    wanted = {"": "--model is '': it must not be empty", "\ud800": "it is not UTF-8 text"}.get(name, "no model")
    assert wanted in line and line.isprintable()


def test_find_model_remote_code(no_network):
    """Remote code from the Hub needs a commit, before any request."""
    for revision in (None, "main", "v1.0", "a" * 39, "A" * 40):
        assert "40 characters of a commit" in fails(model="gpt2", trust_remote_code=True, revision=revision)


def test_find_model_offline(monkeypatch, tmp_path):
    """Offline and not cached: the error says both."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert "not cached and HF_HUB_OFFLINE is set" in fails(model="owner/name")


def test_find_model_missing_folder(monkeypatch, tmp_path):
    """A folder that is missing is said to be missing, with the one that may be meant; the network comes second."""
    monkeypatch.chdir(tmp_path)
    for name in ("runs/corpus", "runs/poems", "gpt-two"):
        (tmp_path / name).mkdir(parents=True)
    for offline in (True, False):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
        for name, hint in {"runs/corpsu": " (did you mean runs/corpus?)", "gpt-tw": " (did you mean gpt-two?)",
                           "runs/nosuch": "", "elsewhere/poems": ""}.items():  # fmt: skip
            line = fails(model=name)
            assert line.startswith(f"no folder '{name}' here{hint}, and "), line
            assert ("HF_HUB_OFFLINE" if offline else "cannot be reached (http://127.0.0.1:9)") in line


def test_download_without_home(monkeypatch, tmp_path):
    """Without a home directory nothing is written into a folder called ~."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "~/.cache/huggingface/hub")
    assert "no home directory" in fails(model="owner/name")
    assert not list(tmp_path.iterdir())


# files


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "adapter_model.bin"])
def test_find_model_pickle(copy, tiny, tmp_path, name):
    """A pickle is refused and never run."""
    folder, mark = copy(tiny), tmp_path / "mark"
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Touch(mark)))
    assert f"only {name}, which is not safetensors" in fails(model=str(folder))
    assert not mark.exists()
    pickle.loads((folder / name).read_bytes()).close()  # noqa: S301 - the trap works
    assert mark.exists()


def test_find_adapter_pickle(tmp_path, tiny):
    """An adapter in a pickle is refused."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": tiny}))
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(Touch(tmp_path / "mark")))
    assert "only safetensors are loaded" in fails(model=str(tmp_path))
    assert not (tmp_path / "mark").exists()


def test_find_model_missing_files(tmp_path, copy, tiny):
    """A folder without a model: the error says what is missing."""
    assert "no config.json" in fails(model=str(tmp_path))
    folder = copy(tiny)
    (folder / "model.safetensors").unlink()
    assert "no model.safetensors" in fails(model=str(folder))
    (tmp_path / "words.txt").write_text("hello")
    assert "give a .gguf file or a folder" in fails(model=str(tmp_path / "words.txt"))


def test_find_model_without_tokenizer(copy, tiny):
    """A folder without tokenizer files is an error."""
    folder = copy(tiny)
    (folder / "tokenizer.json").unlink()
    assert "no tokenizer files" in fails(model=str(folder))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "config.json cannot be read"),
        ("[1]", "not a JSON object"),
        ("", "config.json cannot be read"),
        ("\xff\xfe", "config.json cannot be read"),
        ('{"a":' * 100_000, "config.json cannot be read"),
        (json.dumps({"_attn_implementation_internal": "owner/kernel"}), "asks for code"),
        (json.dumps({"attn_implementation": {"": "owner/kernel"}}), "asks for code"),
        (json.dumps({"text_config": {"attn_implementation": "owner/kernel"}}), "asks for code"),
        (json.dumps({"architectures": 3}), "architectures is 3"),
        (json.dumps({"architectures": "GPT2LMHeadModel"}), "architectures is"),
        (json.dumps({"architectures": ["GPT2LMHeadModel", 3]}), "architectures is"),
        (json.dumps({"transformers_weights": "other.safetensors.index.json"}), "transformers_weights"),
        (json.dumps({"auto_map": {"AutoConfig": "code.Config"}}), "its own Python code"),
    ],
)
def test_find_model_bad_config(copy, tiny, text, words):
    """A bad config is one sentence."""
    folder = copy(tiny)
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    assert words in fails(model=str(folder))


def test_check_code_of_another_repository(copy, tiny):
    """Trusted code may not come from another repository."""
    for file in ("config.json", "tokenizer_config.json"):
        folder = copy(tiny)
        edit_json(folder / file, auto_map={"AutoTokenizer": [None, "owner/name--code.Class"]})
        assert "another repository" in fails(model=str(folder), trust_remote_code=True)
        shutil.rmtree(folder)


# weights


def rewrite(path, change) -> None:
    """Change the header of a safetensors file, not its data."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    text = json.dumps(change(header) or header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def first(header) -> dict:
    return next(value for name, value in header.items() if name != "__metadata__")


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes()[:100]),
        lambda path: path.write_bytes(path.read_bytes() + b"\0"),
        lambda path: path.write_bytes(struct.pack("<Q", 2**63) + path.read_bytes()[8:]),
        lambda path: path.write_bytes(struct.pack("<Q", 2**64 - 1) + path.read_bytes()[8:]),
        lambda path: rewrite(path, lambda header: first(header).update(data_offsets=[0, 1])),
        lambda path: rewrite(path, lambda header: first(header).update(data_offsets=[-8, 8])),
        lambda path: rewrite(path, lambda header: first(header).update(data_offsets=[2**62, 2**62 + 8])),
        lambda path: rewrite(path, lambda header: first(header).update(dtype="F16")),
        lambda path: rewrite(path, lambda header: first(header).update(dtype="F99")),
        lambda path: rewrite(path, lambda header: first(header).update(shape=[2**32, 2**32])),
        lambda path: rewrite(path, lambda header: first(header).update(shape=[-1])),
        lambda path: rewrite(path, lambda header: {"a": first(header), "b": first(header)}),
        lambda path: rewrite(path, lambda header: [1]),
    ],
)
def test_check_header_damaged(copy, tiny, damage):
    """Damaged weights are one sentence."""
    folder = copy(tiny)
    damage(folder / "model.safetensors")
    assert "the weights are damaged" in fails(model=str(folder))


def test_check_header_mutants(copy, tiny):
    """A random change to a safetensors file is refused in one line, unless the file still loads."""
    from hfkit.models.loading import LanguageModel, load_tokenizer, load_weights

    folder, draw, outcomes = copy(tiny), random.Random(0), set()
    path, options = folder / "model.safetensors", ModelOptions(model=str(folder), device="cpu")
    tokenizer, whole = load_tokenizer(find(options)), path.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(header if draw.random() < 0.7 else len(data))
            match draw.randrange(4):
                case 0:
                    data[at] ^= 1 << draw.randrange(8)
                case 1:
                    data[at] = draw.choice(b'0123456789-,:{}[]"')
                case 2:
                    del data[at : at + draw.randint(1, 20)]
                case 3:
                    data[at:at] = draw.randbytes(draw.randint(1, 8))
        path.unlink()  # a loaded model still maps the file
        path.write_bytes(data)
        try:
            outcomes.add(type(load_weights(find(options), options, tokenizer)))
        except HfkitError as error:
            assert "\n" not in printable(str(error))
            outcomes.add(HfkitError)
    assert outcomes == {HfkitError, LanguageModel}


def test_load_shards(copy, tiny):
    """A sharded model is the same model."""
    from hfkit.models.loading import load

    folder = copy(tiny)
    shard(folder)
    expected = load(tiny, device="cpu").model.state_dict()
    assert all((expected[name] == value).all() for name, value in load(str(folder)).model.state_dict().items())
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "a part of the weights is missing" in fails(model=str(folder))


@pytest.mark.parametrize(
    "where", ["../outside.safetensors", "absolute", "link", "sub/inside.safetensors", "..", "a\0b", "\ud800"]
)
def test_find_shard_outside(copy, tiny, tmp_path, where):
    """A shard outside of the folder is refused."""
    folder, outside = copy(tiny), tmp_path / "outside.safetensors"
    weight_map = shard(folder)
    (folder / "sub").mkdir()
    for target in (outside, folder / "sub" / "inside.safetensors"):
        shutil.copy(folder / "model-00001-of-00002.safetensors", target)
    if where == "link":
        (folder / "link").symlink_to(outside)
    name = str(outside) if where == "absolute" else where
    write_index(folder, {key: name for key in weight_map})
    assert "outside of the model's folder" in fails(model=str(folder))


def test_find_link(copy, tiny, tmp_path):
    """A link to weights elsewhere is refused, unless it is one of the Hub's cache."""
    folder = copy(tiny)
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    assert "outside of the model's folder" in fails(model=str(folder))
    snapshot, blob = tmp_path / "models--a" / "snapshots" / "0", tmp_path / "models--a" / "blobs" / "0"
    shutil.copytree(folder, snapshot, ignore=shutil.ignore_patterns("*.safetensors"))
    blob.parent.mkdir()
    (tmp_path / "elsewhere.safetensors").rename(blob)
    (snapshot / "model.safetensors").symlink_to("../../blobs/0")
    assert find(ModelOptions(model=str(snapshot))).folder == snapshot


@pytest.mark.parametrize("linked", ["blobs", "model", "snapshot"])
def test_find_link_to_another_disk(copy, tiny, tmp_path, linked):
    """Parts of the Hub's cache may be links to another disk; a link to anywhere else is refused as ever."""
    model, disk = tmp_path / "cache" / "models--a", tmp_path / "disk"
    snapshot, blobs = model / "snapshots" / "0", model / "blobs"
    snapshot.parent.mkdir(parents=True)
    copy(tiny).rename(snapshot)
    blobs.mkdir()
    (snapshot / "model.safetensors").rename(blobs / "0")
    (snapshot / "model.safetensors").symlink_to(blobs / "0")
    moved = {"blobs": blobs, "model": model, "snapshot": snapshot}[linked]
    moved.rename(disk)
    moved.symlink_to(disk)
    assert find(ModelOptions(model=str(snapshot))).folder == snapshot
    (tmp_path / "0").write_bytes((blobs / "0").read_bytes())
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(tmp_path / "0")
    assert "outside of the model's folder" in fails(model=str(snapshot))


def test_check_header_unreadable(copy, tiny, monkeypatch):
    """Weights of another user are not damaged."""
    folder, plain = copy(tiny), Path.open

    def refuse(path, *arguments, **options):
        if path.suffix == ".safetensors":
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    line = fails(model=str(folder))
    assert f"the weights cannot be read ({folder}/model.safetensors): Permission denied" in line


@pytest.mark.parametrize("base", ["folder", "owner/name"])
def test_find_adapter_trusts_no_base(copy, tiny, tmp_path, monkeypatch, base):
    """--trust-remote-code is about the adapter that was named, not about the base that its author chose."""
    from hfkit.models.loading import load

    mark, adapter = tmp_path / "mark", tmp_path / "adapter"
    folder = copy(tiny)
    (folder / "code.py").write_text(f"open({str(mark)!r}, 'w')")
    config = json.loads((folder / "config.json").read_text()) | {"auto_map": {"AutoConfig": "code.Config"}}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "unheard-of"}))
    if base == "owner/name":
        monkeypatch.setattr("hfkit.models.sources.from_hub", lambda name, revision: folder)
    adapter.mkdir()
    name = base if base == "owner/name" else str(folder)
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": name, "revision": "a" * 40}))
    save_file({"a": np.zeros(1, np.float32)}, adapter / "adapter_model.safetensors")
    with pytest.raises(HfkitError, match="needs its own Python code"):
        load(adapter, trust_remote_code=True)
    assert not mark.exists()
    config.pop("model_type")
    (folder / "config.json").write_text(json.dumps(config))
    line = fails(model=str(adapter), trust_remote_code=True)
    assert "no base model for the adapter" in line
    assert "(which covers the model that -m names, not the base of an adapter)" in line
    edit_json(folder / "config.json", auto_map=None, model_type="gpt2")  # a base without code is as good as ever
    assert not find(ModelOptions(model=str(adapter), trust_remote_code=True)).trust_remote_code


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {"a": 1}}, []])
def test_find_index_without_map(copy, tiny, index):
    """An index without a map is one sentence."""
    folder = copy(tiny)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model.safetensors.index.json" in fails(model=str(folder))


# adapters


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "does not name its base model"),
        ({"base_model_name_or_path": 7}, "does not name its base model"),
        ({"base_model_name_or_path": "/no/such/base"}, "no base model for the adapter"),
        ({"base_model_name_or_path": "owner/base", "revision": 7}, "no base model for the adapter"),
        ({"base_model_name_or_path": "itself"}, "is an adapter too"),
    ],
)
def test_find_adapter_without_base(tmp_path, config, words):
    """An adapter without its base is one sentence."""
    if config.get("base_model_name_or_path") == "itself":
        config = {"base_model_name_or_path": str(tmp_path)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "adapter_model.safetensors")
    assert words in fails(model=str(tmp_path))
