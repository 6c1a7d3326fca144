"""An export is the model, whole, in the precision that was asked for; or what was there before is there still."""

import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file
from support import trials
from support.shell import assert_fails, call, edit_json
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import hfkit
from hfkit import storage
from hfkit.errors import HfkitError, OptionError

pytestmark = pytest.mark.usefixtures("brisk")
IDS = torch.arange(40)[None]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


@pytest.fixture(scope="module")
def adapter(tiny, corpus, tmp_path_factory) -> str:
    """A run that left a LoRA adapter which makes a difference."""
    folder = tmp_path_factory.mktemp("runs") / "adapter"
    return hfkit.finetune(
        corpus, model=tiny, output_dir=folder, lora=True, **trials.SMALL | {"learning_rate": 0.05}
    ).output_dir


def test_export_merged_adapter(tiny, adapter, tmp_path, capfdbinary):
    """A merged adapter computes what model and adapter compute together."""
    from peft import AutoPeftModelForCausalLM

    result = call(capfdbinary, "export", adapter, "-o", tmp_path / "whole")
    assert (result.returncode, result.stdout.decode()) == (0, f"{tmp_path / 'whole'}\n")
    assert result.stderr.decode() == f"hfkit: next: hfkit generate -m {tmp_path / 'whole'}\n"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    together = AutoPeftModelForCausalLM.from_pretrained(adapter)
    torch.testing.assert_close(logits(merged), logits(together), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(merged), logits(AutoModelForCausalLM.from_pretrained(tiny)), atol=0.1)
    file = hfkit.export(adapter, output_dir=tmp_path / "whole.gguf")
    torch.testing.assert_close(logits(hfkit.load(file, device="cpu").model), logits(merged), rtol=1e-4, atol=1e-4)
    assert (Path(file).unlink(), Path(file).with_suffix(".Modelfile").unlink()) == (None, None)
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "whole").get_vocab()
        == AutoTokenizer.from_pretrained(tiny).get_vocab()
    )
    found = {path.name for path in (tmp_path / "whole").iterdir()}
    assert "metrics.json" in found and not [name for name in found if "adapter" in name]
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_export_card_names_the_export(tiny, tmp_path, copy):
    """What the card says to type loads the export, not the run that it came from."""
    run = copy(tiny)
    for old in ("runs/a", "'runs/my model'"):
        (run / "README.md").write_text(f"# a\n\n    hfkit generate -m {old} 'Once upon'\n\nhfkit generate -m runs/a")
        hfkit.export(str(run), output_dir=tmp_path / "my export", overwrite=True)
        card = (tmp_path / "my export" / "README.md").read_text()
        assert (
            card == f"# a\n\n    hfkit generate -m '{tmp_path / 'my export'}' 'Once upon'\n\nhfkit generate -m runs/a"
        )


def test_export_card_of_adapter(adapter, tmp_path):
    """The card of a merged adapter is that of a whole model."""
    (Path(adapter) / "README.md").write_text("---\nlibrary_name: peft\n---\n# A run")
    hfkit.export(adapter, output_dir=tmp_path / "whole")
    assert (tmp_path / "whole" / "README.md").read_text() == "---\nlibrary_name: transformers\n---\n# A run"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_export_precision(tiny, tmp_path, dtype):
    """The precision is the one that was asked for, else that of the model."""
    first = hfkit.export(tiny, output_dir=tmp_path / "first", dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(first)
    assert model.dtype == getattr(torch, dtype)
    expected = AutoModelForCausalLM.from_pretrained(tiny).to(model.dtype)
    for (name, a), b in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    again = AutoModelForCausalLM.from_pretrained(hfkit.export(first, output_dir=tmp_path / "again"))
    assert again.dtype == model.dtype


@pytest.mark.parametrize("model", ["tiny", "tiny_llama"])
def test_export_float8(model, corpus, tmp_path, request):
    """A byte for each number of a matrix, in a file that transformers reads, and hfkit trains on, as any other."""
    source = AutoModelForCausalLM.from_pretrained(original := request.getfixturevalue(model))
    source.get_input_embeddings().weight.data[3, :2] = torch.tensor([1e4, -1e4])  # more than float8 can hold
    source.save_pretrained(tmp_path / "source")
    AutoTokenizer.from_pretrained(original).save_pretrained(tmp_path / "source")
    folder = hfkit.export(tmp_path / "source", output_dir=tmp_path / "export", dtype="float8_e4m3fn")
    saved = load_file(f"{folder}/model.safetensors")
    for name, tensor in saved.items():
        assert tensor.dtype == (torch.float8_e4m3fn if tensor.ndim > 1 else torch.bfloat16), name
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype == torch.bfloat16
    for (name, tensor), expected in zip(loaded.named_parameters(), source.parameters(), strict=True):
        # Three bits after the leading one, or steps of 2 ** -9.
        error = (tensor.float() - expected.clamp(-448, 448)).abs() - expected.abs() / 16
        assert error.max() <= 2**-10, name
    run = hfkit.finetune(corpus, model=folder, output_dir=tmp_path / "run", **trials.SMALL | {"max_steps": 1})
    assert {tensor.dtype for tensor in load_file(f"{run.output_dir}/model.safetensors").values()} == {torch.float32}


def test_export_float8_bundled(corpus, tmp_path):
    """Half of bfloat16's size, and nearly the same probabilities; the model's own weights stay what they are."""
    assert hfkit.evaluate(corpus, model="bundled").bits_per_byte == hfkit.evaluate(
        corpus, model=hfkit.export("bundled", output_dir=tmp_path / "same", dtype="float8_e4m3fn")
    ).bits_per_byte  # fmt: skip
    lm = hfkit.load("bundled", device="cpu", dtype="float32")
    torch.manual_seed(0)
    with torch.no_grad():
        for weights in lm.model.parameters():
            weights *= 1 + 0.06 * (2 * torch.rand_like(weights) - 1)  # float8 has only one number in 6 to 12 per cent
    lm.model.save_pretrained(tmp_path / "varied")
    lm.tokenizer.save_pretrained(tmp_path / "varied")
    half, quarter = (hfkit.export(tmp_path / "varied", output_dir=tmp_path / dtype, dtype=dtype)
                     for dtype in ("bfloat16", "float8_e4m3fn"))  # fmt: skip
    sizes = [(Path(folder) / "model.safetensors").stat().st_size for folder in (half, quarter)]
    assert sizes[1] < 0.51 * sizes[0]
    bits = [hfkit.evaluate(corpus, model=folder).bits_per_byte for folder in (half, quarter)]
    assert bits[0] != bits[1] == pytest.approx(bits[0], abs=0.02)


def test_export_llama_and_gguf(tiny_llama, tmp_path):
    """Other models and GGUF files are exported as well."""
    from support.models import write_gguf

    lm = hfkit.load(tiny_llama, device="cpu")
    file = write_gguf(lm.model, lm.tokenizer, tmp_path / "model.gguf")
    for source in (tiny_llama, file):
        found = AutoModelForCausalLM.from_pretrained(hfkit.export(source, output_dir=tmp_path / "out", overwrite=True))
        torch.testing.assert_close(logits(found), logits(lm.model), rtol=1e-4, atol=1e-4)


# places


def test_export_overwrite(tiny, still, tmp_path, capfdbinary):
    """What exists is replaced only if asked, and only if it is a model."""
    target = tmp_path / "out"
    for _ in range(2):
        hfkit.export(tiny, output_dir=target) if not target.exists() else None
        assert_fails(call(capfdbinary, "export", still, "-o", target), 1, str(target), "--overwrite replaces it")
    (target / "stale").touch()
    assert_fails(call(capfdbinary, "export", still, "-o", target, "--overwrite"), 1, "holds stale, which")
    (target / "stale").unlink()
    hfkit.export(still, output_dir=target, overwrite=True)
    assert json.loads((target / "config.json").read_text())["attn_pdrop"] == 0
    other = tmp_path / "other"
    other.mkdir()
    hfkit.export(tiny, output_dir=other)  # an empty folder is free
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "text").write_text("ten years")
    result = call(capfdbinary, "export", tiny, "-o", tmp_path / "thesis", "--overwrite")
    assert_fails(result, 1, "holds text, which hfkit did not write")
    assert (tmp_path / "thesis" / "text").read_text() == "ten years"


def test_export_over_itself(tiny, adapter, copy, tmp_path, capfdbinary):
    """A model is not exported over itself or over a folder that holds it."""
    folder = copy(tiny)
    own = shutil.copytree(adapter, tmp_path / "adapter")
    edit_json(own / "adapter_config.json", base_model_name_or_path=str(folder))
    (tmp_path / "link").symlink_to(folder)
    for source, target in (
        (folder, folder),
        (folder, tmp_path),
        (own, own),
        (own, folder),
        (folder, f"{folder}/../model"),
    ):
        assert_fails(call(capfdbinary, "export", source, "-o", target, "--overwrite"), 1, "holds the model itself")
    assert_fails(call(capfdbinary, "export", folder, "-o", tmp_path / "link", "--overwrite"), 1, "is not a folder")
    assert hfkit.load(folder) and hfkit.load(own)


def test_export_unwritable_place(tiny, tmp_path, capfdbinary):
    """A place that cannot be written is one line."""
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    for place in ("file", "file/out", "loop", "loop/out", "x" * 256, "a\0b"):
        assert_fails(call(capfdbinary, "export", tiny, "-o", f"{tmp_path}/{place}"), 1, "name another")
    for place in ("/proc/out", "/dev/null"):
        assert_fails(call(capfdbinary, "export", tiny, "-o", place), 1, "name another")
    assert hfkit.load(hfkit.export(tiny, output_dir=tmp_path / ("ä" * 127)))
    with pytest.raises(OptionError, match="export needs a place"):
        hfkit.export(tiny)


def test_export_full_disk(tiny, tmp_path, capfdbinary, monkeypatch):
    """A full disk is one line, and the old export stays."""
    hfkit.export(tiny, output_dir=tmp_path / "out")
    before, limit = trials.digest(tmp_path / "out"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
    try:
        result = call(capfdbinary, "export", tiny, "-o", tmp_path / "out", "--overwrite", "--dtype", "bfloat16")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert_fails(result, 1, f"cannot write {tmp_path / 'out'}")
    assert trials.digest(tmp_path / "out") == before and [path.name for path in tmp_path.iterdir()] == ["out"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    assert_fails(call(capfdbinary, "export", tiny, "-o", tmp_path / "new"), 1, "0 bytes free")


@pytest.mark.parametrize("exists", [True, False])
def test_publish_killed(tmp_path, exists):
    """After a kill at any operation the old export or the new one is there."""
    place = tmp_path / "place"
    for name, text in {"old": "old", ".out.staging": "new"}.items():
        (place / name).mkdir(parents=True)
        for file in ("config.json", "model.safetensors"):
            (place / name / file).write_text(text)
    (place / "old").rename(place / "out") if exists else shutil.rmtree(place / "old")
    seen = []
    act = lambda: storage.publish(place / ".out.staging", place / "out")  # noqa: E731
    for _ in trials.killed_at_each(act, place, tmp_path / "backup"):
        found = {path.read_text() for path in (place / "out").iterdir()} if (place / "out").exists() else set()
        assert found in ({"old"} if exists else set(), {"new"})
        seen.append(found)
    assert seen[0] != seen[-1] == {"new"} and [path.name for path in place.iterdir()] == ["out"]


def test_publish_without_exchange(tmp_path, monkeypatch):
    """Where the system cannot exchange two folders, they are renamed."""
    for name in ("new", "out"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    monkeypatch.setattr(storage.ctypes, "CDLL", lambda name: object())
    storage.publish(tmp_path / "new", tmp_path / "out")
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*")] == [Path("out"), Path("out/new")]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_export_modes(tiny, tmp_path, mask):
    """Files and folder have the modes that the umask gives."""
    before = os.umask(mask)
    try:
        hfkit.export(tiny, output_dir=tmp_path / "out")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o666 & ~mask}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~mask


# the Hub


class Api:
    """A Hub that remembers what it was asked, or refuses."""

    calls: list = []
    error: Exception | None = None

    def create_repo(self, name, **options):
        self.calls.append((name, options))

    def upload_folder(self, *, repo_id, folder_path, **options):
        if self.error:
            raise self.error
        files = sorted(path.name for path in Path(folder_path).iterdir())
        self.calls.append((repo_id, files, hfkit.load(folder_path).model.num_parameters()))


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("hfkit.models.exporting.reach_hub", lambda name: None)
    monkeypatch.setattr(Api, "calls", [])
    return Api


def test_export_head_says_its_command(tiny_bert, tmp_path, capfdbinary):
    """The next command is one that takes the model."""
    with_head = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=2)
    for part in (with_head, AutoTokenizer.from_pretrained(tiny_bert)):
        part.save_pretrained(tmp_path / "model")
    result = call(capfdbinary, "export", tmp_path / "model", "-o", tmp_path / "out")
    assert result.stderr.decode() == f'hfkit: next: hfkit classify -m {tmp_path / "out"} "A text"\n'


def test_push_to_mirror(tiny, hub, tmp_path, monkeypatch):
    """The address is that of the Hub that the model was pushed to."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "ENDPOINT", "https://mirror.example")
    assert hfkit.export(tiny, push_to_hub="owner/name") == "https://mirror.example/owner/name"


def test_push(tiny, hub, tmp_path, monkeypatch, capfdbinary):
    """A model is pushed whole, and private unless asked otherwise."""
    monkeypatch.chdir(tmp_path)
    result = call(capfdbinary, "export", tiny, "--push-to-hub", "owner/name", "--dtype", "bfloat16")
    assert (result.returncode, result.stdout) == (0, b"https://huggingface.co/owner/name\n"), result.stderr
    (created, pushed), size = hub.calls, hfkit.load(tiny).model.num_parameters()
    assert created == ("owner/name", {"private": True, "exist_ok": True})
    assert pushed == ("owner/name", sorted(path.name for path in Path(tiny).iterdir()), size)
    assert not list(tmp_path.iterdir())
    hfkit.export(tiny, push_to_hub="owner/name", private=False, output_dir=tmp_path / "out")
    assert hub.calls[2][1]["private"] is False and hfkit.load(tmp_path / "out")
    hfkit.export(tiny, push_to_hub="owner/name", format="gguf")
    assert hub.calls[5] == ("owner/name", ["Modelfile", "name.gguf"], size)


@pytest.mark.parametrize(
    "error", [OSError("no space"), ValueError("bad name"), RuntimeError("odd\nand more"), Exception()]
)
def test_push_fails(tiny, hub, tmp_path, monkeypatch, capfdbinary, error):
    """A push that fails is one line and leaves nothing behind."""
    monkeypatch.setattr(Api, "error", error)
    result = call(capfdbinary, "export", tiny, "--push-to-hub", "owner/name", "-o", tmp_path / "out")
    assert_fails(result, 1, "cannot push to owner/name", str(error).split("\n")[0] or "Exception", "hf auth login")
    assert not list(tmp_path.iterdir())


def test_push_unreachable(tiny, tmp_path, monkeypatch, capfdbinary):
    """A Hub that cannot be reached is one line, before anything is loaded."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("hfkit.models.exporting.load_weights", lambda *_: pytest.fail("loaded"))
    monkeypatch.chdir(tmp_path)
    result = call(capfdbinary, "export", tiny, "--push-to-hub", "owner/name")
    assert_fails(result, 1, "the Hub cannot be reached (http://127.0.0.1:9)")
    with pytest.raises(HfkitError):
        hfkit.export(tiny, push_to_hub="owner/name")
