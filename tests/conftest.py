"""Tiny models, made here: no network, no time."""

import gc
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from support import trials
from support.models import byte_vocabulary
from support.shell import edit_json

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that wants a Hub starts one of its own, in another process
os.environ.pop("HFKIT_MODEL", None)
gc.set_threshold(50_000, 20, 20)  # torch and transformers are a million objects to look through
# hundreds of processes import hfkit: it is compiled once, as on a user's machine
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
CACHE = tempfile.mkdtemp(prefix="hfkit-tests-")
os.environ["HF_DATASETS_CACHE"] = CACHE  # what is tokenized here is for nobody else
# Threads that wait for each other are slower than one with so little to do.
os.environ.setdefault("OMP_NUM_THREADS", "1")


os.fsync = lambda descriptor: None  # no test cuts the power


@pytest.fixture(scope="module", autouse=True)
def frozen_imports():
    """What is there by now stays: Trainer collects garbage in each run, and would look through all of torch."""
    gc.freeze()


def pytest_sessionfinish() -> None:
    shutil.rmtree(CACHE, ignore_errors=True)


@pytest.fixture(scope="module")
def brisk():
    """Small runs that take half the time."""
    with pytest.MonkeyPatch.context() as patch:
        trials.make_brisk(patch.setattr)
        yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> str:
    """A random two-layer GPT-2 of 64 positions with a byte tokenizer, in a folder."""
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer, set_seed

    folder = tmp_path_factory.mktemp("models") / "tiny"
    vocabulary = byte_vocabulary()
    end = "<|endoftext|>"
    tokenizer = GPT2Tokenizer(vocab=vocabulary, merges=[], unk_token=end, bos_token=end, eos_token=end)
    set_seed(0)
    config = GPT2Config(
        vocab_size=len(vocabulary), n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=256, eos_token_id=256
    )
    model = GPT2LMHeadModel(config)
    for parameter in model.parameters():
        parameter.data *= 4  # a random model is nearly uniform: make its choices differ
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def still(tmp_path_factory, tiny) -> str:
    """`tiny` without dropout: what is computed twice is the same."""
    folder = Path(shutil.copytree(tiny, tmp_path_factory.mktemp("models") / "still"))
    edit_json(folder / "config.json", attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    return str(folder)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> str:
    """A text file of 24 documents of some 200 bytes."""
    return trials.write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.txt")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> str:
    """A random two-layer Llama of 128 positions with a byte-fallback SentencePiece-like tokenizer, in a folder."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    letters = [*"▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,!?'\"-\n0123456789"]
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, "▁t", "▁th", "▁the"]
    bpe = models.BPE(
        {word: i for i, word in enumerate(words)},
        [("▁", "t"), ("▁t", "h"), ("▁th", "e")],
        unk_token="<unk>",  # noqa: S106
        byte_fallback=True,
    )
    backend = Tokenizer(bpe)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    set_seed(1)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data *= 4
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_chinese(tmp_path_factory) -> str:
    """A random GPT-2 with BERT's vocab.txt and settings that name no end of a text, as Chinese models have it."""
    from transformers import GPT2Config, GPT2LMHeadModel, set_seed

    folder = tmp_path_factory.mktemp("models") / "tiny-chinese"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(trials.CHINESE)), "gp", "##t", "rain", "2020"]
    set_seed(4)
    config = GPT2Config(
        vocab_size=len(words), n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None
    )
    model = GPT2LMHeadModel(config)
    for parameter in model.parameters():
        parameter.data *= 4
    model.save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):  # where an id is missing, transformers takes OpenAI's
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({key: settings[key] for key in settings if "token_id" not in key}))
    edit_json(folder / "config.json", tokenizer_class="BertTokenizer")
    (folder / "vocab.txt").write_text("\n".join(words), "utf-8")
    return str(folder)


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory, tiny) -> str:
    """A random encoder-decoder model with the byte tokenizer, in a folder."""
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration, set_seed

    folder = tmp_path_factory.mktemp("models") / "tiny-t5"
    set_seed(2)
    config = T5Config(
        vocab_size=257, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=256,
        pad_token_id=256, eos_token_id=256, bos_token_id=256,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory) -> str:
    """A random BERT of 64 positions that fills masks, without a pooler, and its WordPiece tokenizer, in a folder."""
    from transformers import BertForMaskedLM, set_seed

    from hfkit.training.models import make_bert
    from hfkit.training.vocabulary import train_wordpiece

    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    tokenizer = train_wordpiece([" ".join(trials.WORDS), "abcdefghijklmnopqrstuvwxyz 0123456789 .,?!"] * 9, 300)
    shape = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64, "resid_pdrop": 0.0, "attn_pdrop": 0.0}
    set_seed(3)
    model = BertForMaskedLM(make_bert(shape, tokenizer, ()))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= 4
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def _bundled():
    from hfkit.models.loading import load_tokenizer
    from hfkit.models.sources import find_model as find
    from hfkit.options import ModelOptions

    return load_tokenizer(find(ModelOptions(model="bundled")))


@pytest.fixture
def bundled(_bundled):
    """The tokenizer of the bundled model, as it comes: without a chat template."""
    _bundled.chat_template = None
    return _bundled


@pytest.fixture
def datasets_cache(tmp_path, monkeypatch) -> Path:
    """A cache of the test's own, for what is tokenized."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def copy(tmp_path):
    """Copy a model's folder, to break it: `folder = copy(tiny)`."""

    def make(model: str) -> Path:
        return Path(shutil.copytree(model, tmp_path / "model"))

    return make
