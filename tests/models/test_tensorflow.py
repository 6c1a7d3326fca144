"""A TensorFlow checkpoint computes what TensorFlow computes with it, or one sentence says what is wrong with it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from support import trials
from support.shell import call, edit_json

import hfkit
from hfkit.corpus.files import find_corpus
from hfkit.errors import HfkitError
from hfkit.models.bundle import read_index
from hfkit.models.sources import find_model
from hfkit.options import DataOptions

DATA = Path(__file__).parent / "data"  # see write_checkpoints.py there, which wrote it with TensorFlow
FOLDERS = ["gpt2", "gpt2-h5", "bert", "bert-h5", "bert-classifier", "bert-squad"]
IDS = torch.tensor([[40, 3, 17, 99, 257, 5, 5, 61, 130, 2]])
BERT = {"attention_mask": torch.tensor([[1] * 8 + [0] * 2]), "token_type_ids": torch.tensor([[0] * 5 + [1] * 5])}

pytestmark = pytest.mark.usefixtures("brisk")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """Where the converted models of a test are."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "hfkit"


@pytest.fixture
def checkpoint(tmp_path):
    """Copy a folder of the data, to break it: `folder = checkpoint("gpt2")`."""
    return lambda name: Path(shutil.copytree(DATA / name, tmp_path / name))


def fails(path, *words: str) -> None:
    """One line with these words, and nothing converted."""
    with pytest.raises(HfkitError) as error:
        find_model(str(path))
    line = str(error.value)
    assert "\n" not in line and all(word in line for word in words), line


def assert_equals_original(folder: Path) -> None:
    """All logits of the model in `folder` are those that TensorFlow computed."""
    source = find_model(str(folder))
    kind = getattr(transformers, source.config["architectures"][0])
    model, report = kind.from_pretrained(source.folder, output_loading_info=True)
    assert not any(report.values())
    family = source.config["model_type"]
    with torch.no_grad():
        output = model.eval()(IDS % source.config["vocab_size"], **(BERT if family == "bert" else {}))
    expected = np.load(folder / "expected.npz")
    assert len(expected.files) == sum("logits" in name for name in output)
    for name in expected:
        logits = torch.tensor(expected[name]).squeeze()
        assert logits.std() > 0.1
        torch.testing.assert_close(output[name].squeeze(), logits, rtol=1e-4, atol=1e-4)


# what TensorFlow computes


@pytest.mark.parametrize("name", FOLDERS)
def test_logits(name):
    """GPT-2 and BERT with each head; the checkpoints of TensorFlow 1 and the tf_model.h5 of transformers 4."""
    assert_equals_original(DATA / name)


@pytest.mark.slow
def test_logits_of_new_checkpoints(tmp_path):
    """The same for checkpoints that TensorFlow writes now, with weights of another shape; each number is equal."""
    python = os.environ.get("HFKIT_TENSORFLOW_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import tensorflow"], capture_output=True).returncode:
        pytest.skip(f"{python} has no tensorflow: HFKIT_TENSORFLOW_PYTHON may name a Python that has")
    subprocess.run([python, DATA / "write_checkpoints.py", tmp_path / "new", "24"], check=True, capture_output=True)
    read = (
        "import sys, numpy, tensorflow as tf; reader = tf.train.load_checkpoint(sys.argv[1])\n"
        "numpy.savez(sys.argv[2], **{name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()})"
    )
    for folder in (tmp_path / "new").iterdir():
        assert_equals_original(folder)
        for index in folder.glob("*.index"):
            prefix = index.with_suffix("")
            subprocess.run([python, "-c", read, prefix, tmp_path / "all.npz"], check=True, capture_output=True)
            expected, tensors = np.load(tmp_path / "all.npz"), read_index(prefix)
            assert tensors.keys() == {*expected.files}
            for name in expected:
                np.testing.assert_array_equal(np.asarray(tensors[name]), expected[name], strict=True)


def test_gpt2_tokenizer():
    """encoder.json and vocab.bpe: " the" is Ġ, t, h, e, then Ġ, th, e, then Ġ, the."""
    lm = hfkit.load(DATA / "gpt2")
    encoder = json.loads((DATA / "gpt2" / "encoder.json").read_text())
    assert type(lm.tokenizer) is transformers.GPT2Tokenizer
    ids = [encoder[word] for word in ["the", "Ġ", "the", "Ġt", "o", "<|endoftext|>"]]
    assert lm.tokenizer("the the to<|endoftext|>")["input_ids"] == ids
    assert lm.model.config.eos_token_id == lm.tokenizer.eos_token_id == encoder["<|endoftext|>"]
    assert lm.context == 64


@pytest.mark.parametrize(("word", "words"), [("dog", ["the", "dog"]), ("Dog", ["[UNK]", "Dog"])])
def test_bert_tokenizer(checkpoint, capfd, word, words):
    """A vocabulary with capital letters is that of a cased model, and the note says so."""
    folder = checkpoint("bert")
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text(vocabulary.read_text().replace("dog\n", f"{word}\n"))
    tokenizer = hfkit.load(folder).tokenizer
    assert tokenizer.tokenize("The Dog") == words
    case = "no capital letters: text is lower-cased" if word == "dog" else "capital letters: text keeps its own"
    assert f"vocab.txt has {case}" in capfd.readouterr().err


# commands


def test_generate(capfdbinary, checkpoint, cache):
    """A folder, a prefix and a file of a checkpoint are the same model, converted once."""
    folder = checkpoint("gpt2")
    arguments = ["the dog", "--seed", 1, "--max-new-tokens", 8, "--json", "-m"]
    first = call(capfdbinary, "generate", *arguments, folder)
    assert first.returncode == 0 and b"converted from TensorFlow, once\n" in first.stderr
    written = [path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")]
    text = json.loads(first.stdout)["completion"]
    for name in ("model-20", "model-20.index", "model-20.data-00000-of-00001"):
        again = call(capfdbinary, "generate", *arguments, folder / name)
        assert json.loads(again.stdout)["completion"] == text
        assert b"converted" not in again.stderr
    assert [path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")] == written
    assert len(written) == 1


@pytest.mark.parametrize("name", ["gpt2", "gpt2-h5"])
def test_export(name, tmp_path, capfdbinary):
    """An export is the model as safetensors."""
    assert call(capfdbinary, "export", DATA / name, "-o", tmp_path / "export").returncode == 0
    shutil.copy(DATA / name / "expected.npz", tmp_path / "export")
    assert_equals_original(tmp_path / "export")


def test_finetune(corpus, tmp_path, datasets_cache):
    """A run begins with the weights of the checkpoint and learns."""
    options = trials.SMALL | {"learning_rate": 0.01, "max_steps": 4}
    run = hfkit.finetune(corpus, model=DATA / "gpt2", output_dir=tmp_path / "run", seed=1, block_size=32, **options)
    before, after = (hfkit.evaluate(corpus, model=model).perplexity for model in (DATA / "gpt2", run.output_dir))
    assert after < 0.8 * before


def test_finetune_head_and_classify(tmp_path, datasets_cache):
    """A checkpoint of Google's repository learns labels; one that has learned some there knows them."""
    rows = tmp_path / "rows.jsonl"
    texts = {"good": "the dog sang in the house", "bad": "a cat ran under red tree"}
    rows.write_text("".join(json.dumps({"text": texts[label], "label": label}) + "\n" for label in texts) * 8)
    options = trials.SMALL | {"learning_rate": 0.02, "max_steps": 12}
    run = hfkit.finetune(
        rows, model=DATA / "bert", output_dir=tmp_path / "run", head="classification", seed=1, **options
    )
    for label, text in texts.items():
        assert hfkit.classify(text, model=run.output_dir).label == label
    labels = hfkit.classify("the dog", model=DATA / "bert-classifier").probabilities
    assert len(labels) == 3 and sum(labels.values()) == pytest.approx(1)


def test_lora(corpus, tmp_path):
    """An adapter needs a base that others find, which a folder in the cache is not."""
    with pytest.raises(HfkitError, match="'hfkit export' makes a folder of it"):
        hfkit.finetune(corpus, model=DATA / "gpt2", output_dir=tmp_path / "run", lora=True)


def test_corpus_is_no_checkpoint():
    """The folder of a model is not trained on by mistake."""
    for name in ("gpt2", "bert", "gpt2-h5"):
        with pytest.raises(HfkitError, match="model"):
            find_corpus(DATA / name, DataOptions())


# several checkpoints


def test_newest(checkpoint):
    """A folder means the checkpoint that TensorFlow's own file calls the newest, wherever it was written."""
    folder = checkpoint("gpt2")
    for file in folder.glob("model-20.*"):
        shutil.copy(file, folder / file.name.replace("20", "100"))
    (folder / "checkpoint").write_text('model_checkpoint_path: "/content/checkpoint/run1/model-100"\n')
    assert find_model(str(folder)).checkpoint == folder / "model-100"
    assert find_model(str(folder / "model-20")).checkpoint == folder / "model-20"
    (folder / "checkpoint").write_text('model_checkpoint_path: "model-30"\n')
    fails(folder, "model-30.index", "copy")
    (folder / "checkpoint").unlink()
    fails(folder, "2 checkpoints", "name one", str(folder / "model-20"))


def test_changed_checkpoint(checkpoint, capfd):
    """A checkpoint that was written again is converted again; another one beside it has a copy of its own."""
    folder = checkpoint("gpt2")
    for file in folder.glob("model-20.*"):
        shutil.copy(file, folder / file.name.replace("20", "21"))
    first, other = find_model(str(folder / "model-20")), find_model(str(folder / "model-21"))
    assert first.folder != other.folder
    before = first.fingerprint
    assert capfd.readouterr().err.count("converted") == 2
    edit_json(folder / "hparams.json", n_ctx=64)  # the same content, written now
    os.utime(folder / "hparams.json")
    assert find_model(str(folder / "model-20")).fingerprint == before
    assert capfd.readouterr().err.count("converted") == 1


def test_conversion_fails(checkpoint, cache, monkeypatch):
    """What is interrupted leaves nothing behind, and what a killed process left goes."""
    folder = checkpoint("gpt2")
    with monkeypatch.context() as patch:
        patch.setattr("hfkit.storage.os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        fails(folder, "cannot", "No space left")
    assert {path.name for path in cache.iterdir()} == {".hfkit.lock"}
    (cache / ".model.999999.hfkit").mkdir()
    source = find_model(str(folder))
    assert {path.name for path in cache.iterdir()} == {".hfkit.lock", source.folder.name}


# what is wrong


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)


def rename(name: str):
    return lambda folder: (folder / name).rename(folder / "elsewhere")


BREAKS = [
    ("gpt2", rename("model-20.data-00000-of-00001"), ("model-20.data-00000-of-00001", "copy it here")),
    ("gpt2", lambda folder: cut(folder / "model-20.data-00000-of-00001", 9000), ("cut off", "copy it again")),
    ("gpt2", lambda folder: flip(folder / "model-20.data-00000-of-00001", 9000), ("damaged", "copy it again")),
    ("gpt2", rename("model-20.index"), ("model-20.index", "copy its .index and .data files")),
    ("gpt2", lambda folder: cut(folder / "model-20.index", 500), ("damaged", "model-20.index", "copy it again")),
    ("gpt2", rename("vocab.bpe"), ("no vocab.bpe", "copy it from the model")),
    ("gpt2", rename("hparams.json"), ("hparams.json (GPT-2) or bert_config.json (BERT)", "copy it")),
    ("gpt2", lambda folder: (folder / "hparams.json").write_text('{"n_vocab": 260}'), ("does not say n_ctx",)),
    (
        "gpt2",
        lambda folder: edit_json(folder / "hparams.json", n_ctx=32),
        ("model/wpe is [64, 8], by hparams.json [32, 8]",),
    ),
    ("gpt2", lambda folder: edit_json(folder / "hparams.json", n_layer=3), ("missing transformer.h.2.attn",)),
    ("gpt2", lambda folder: edit_json(folder / "hparams.json", n_layer=1), ("unexpected model/h1/attn",)),
    ("gpt2", lambda folder: edit_json(folder / "hparams.json", n_head=3), ("cannot be loaded",)),
    ("bert", rename("vocab.txt"), ("no vocab.txt", "copy it from the model")),
    ("bert", lambda folder: edit_json(folder / "bert_config.json", vocab_size=7), ("word_embeddings is [82, 8]",)),
    ("bert", lambda folder: [file.unlink() for file in folder.glob("*ckpt*")], ("no checkpoint", ".index")),
    ("gpt2-h5", lambda folder: cut(folder / "tf_model.h5", 30_000), ("damaged", "tf_model.h5", "copy it again")),
    ("gpt2-h5", rename("config.json"), ("no config.json",)),
    ("gpt2-h5", lambda folder: edit_json(folder / "config.json", n_layer=3), ("missing transformer.h.2.attn",)),
    ("gpt2-h5", lambda folder: edit_json(folder / "config.json", model_type="t5"), ("tf_model.h5", "not t5")),
    ("gpt2-h5", lambda folder: edit_json(folder / "config.json", _attn_implementation="a/b"), ("code from the Hub",)),
    ("bert", lambda folder: edit_json(folder / "bert_config.json", attn_implementation="a/b"), ("code from the Hub",)),
    (
        "gpt2-h5",
        lambda folder: (folder / "tf_model.h5").rename(folder / "flax_model.msgpack"),
        ("only flax_model.msgpack, which is not safetensors (", "save_pretrained"),
    ),
]


@pytest.mark.parametrize(("name", "damage", "words"), BREAKS)
def test_broken(checkpoint, cache, name, damage, words):
    """Whatever is missing, cut or does not fit: one line says so, and nothing is left in the cache."""
    folder = checkpoint(name)
    damage(folder)
    fails(folder, *words)
    assert not list(cache.glob("[!.]*"))


def test_keras_checkpoint(monkeypatch):
    """A checkpoint of TensorFlow 2's objects has other names for everything."""
    tensors = {"model/layer-1/kernel/.ATTRIBUTES/VARIABLE_VALUE": None}
    monkeypatch.setattr("hfkit.models.tensorflow.read_index", lambda _: tensors)
    fails(DATA / "bert", "of a Keras model", "only those of TensorFlow 1")


@pytest.mark.parametrize(("name", "package"), [("gpt2", "google-crc32c"), ("bert-h5", "h5py")])
def test_missing_extra(monkeypatch, name, package):
    """One line names what to install."""
    monkeypatch.setattr("hfkit.models.tensorflow.importlib.util.find_spec", lambda _: None)
    fails(DATA / name, f"needs {package}: pip install 'hfkit[tensorflow]'")


def test_index_mutants(monkeypatch):
    """No changed byte of an index goes unnoticed, except in the empty part of its last 48 bytes."""
    prefix = DATA / "gpt2" / "model-20"
    content, original = prefix.with_name("model-20.index").read_bytes(), read_index(prefix)
    refused = 0
    for position in range(len(content)):
        mutant = bytearray(content)
        mutant[position] ^= 4
        monkeypatch.setattr(Path, "read_bytes", lambda _, mutant=mutant: bytes(mutant))
        try:
            assert read_index(prefix) == original
        except HfkitError:
            refused += 1
    assert refused > len(content) - 60
