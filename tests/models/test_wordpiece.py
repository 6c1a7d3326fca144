"""A Chinese GPT-2, whose vocabulary is BERT's: what is written has no spaces, and [SEP] ends a text, not a prompt."""

import random

import httpx
import pytest
import torch
from support.servers import serving
from support.shell import call
from transformers import AutoTokenizer, BertTokenizer, GPT2LMHeadModel

import hfkit
from hfkit.inference.text import Detokenizer, fit_prompt
from hfkit.options import GenerateOptions

pytestmark = pytest.mark.usefixtures("brisk")
TEXT = "从前有座山，山里有个庙。"


@pytest.fixture(scope="module")
def lm(tiny_chinese):
    return hfkit.load(tiny_chinese, device="cpu")


@pytest.fixture(scope="module")
def plain(tiny_chinese):
    """(model, tokenizer) as transformers loads them."""
    return GPT2LMHeadModel.from_pretrained(tiny_chinese).eval(), BertTokenizer.from_pretrained(tiny_chinese)


@pytest.fixture
def texts(tmp_path):
    """A corpus of Chinese documents, and its path."""
    documents = [TEXT, "老和尚在给小和尚讲故事！", "我爱你们，读书写字。"]
    (tmp_path / "corpus.txt").write_text("<|endoftext|>".join(documents), "utf-8")
    return documents, tmp_path / "corpus.txt"


def plain_loss(model, ids: list[int]) -> torch.Tensor:
    """Nats of each token but the first, (tokens - 1,)."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")


def test_make_causal_prompt(lm, plain):
    """A prompt is what BERT makes of it without the [SEP] at its end."""
    request = fit_prompt(TEXT, GenerateOptions(), lm.tokenizer, lm.model.config, lm.name)
    assert request.ids == plain[1](TEXT)["input_ids"][:-1] and request.ids[0] == plain[1].cls_token_id


@pytest.mark.parametrize("text", ["我爱你，山里有个庙。", "rain 2020", "我爱gpt，你爱rain rain！", "“山”……—庙—"])
def test_make_causal_decodes(lm, text):
    """Spaces stand between Latin words alone."""
    assert lm.tokenizer.decode(lm.tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_make_causal_streams(lm):
    """Any tokens give the same text one by one as at once."""
    draw = random.Random(0)
    for _ in range(50):
        ids = draw.choices(range(len(lm.tokenizer)), k=20)
        detokenizer = Detokenizer(lm.tokenizer)
        pieces = [detokenizer.push(token) for token in ids]
        whole = lm.tokenizer.decode(ids, skip_special_tokens=True)
        assert "".join([*pieces, detokenizer.finish()]) == whole


def test_generate_greedy(lm, plain):
    """Greedy text is transformers' own, but for the spaces; streamed and in a batch it is the same."""
    model, tokenizer = plain
    ids = torch.tensor([tokenizer(TEXT)["input_ids"][:-1]])
    end = tokenizer.sep_token_id
    output = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=end, pad_token_id=0)[0]
    words = tokenizer.convert_ids_to_tokens(output[ids.shape[1] :].tolist())
    written = "".join(word for word in words if not word.startswith("["))
    generation = hfkit.generate(TEXT, model=lm, max_new_tokens=20, temperature=0)
    assert generation.completion.replace(" ", "").replace("##", "") == written.replace("##", "") != ""
    assert "".join(hfkit.stream(TEXT, model=lm, max_new_tokens=20, temperature=0)) == generation.completion


def test_generate_ends(lm):
    """Samples end at [SEP], which the settings do not name; banned texts do not come, though spelled in two tokens."""
    prompts = [TEXT] * 8
    samples = hfkit.generate(prompts, model=lm, max_new_tokens=50, seed=1)
    assert {"stop", "length"} == {sample.finish_reason for sample in samples}
    assert all("[" not in sample.completion for sample in samples)
    pair = samples[0].completion[1:3]
    banned = hfkit.generate(prompts, model=lm, max_new_tokens=50, seed=1, bad_words=[pair])
    assert not any(pair in sample.completion for sample in banned)


def test_evaluate_loss(lm, plain, texts):
    """The loss is that of a plain loop over [CLS] and the text."""
    documents, path = texts
    losses = torch.cat([plain_loss(plain[0], plain[1](text)["input_ids"][:-1]) for text in documents])
    assert hfkit.evaluate(path, model=lm).loss == pytest.approx(losses.mean().item(), abs=1e-5)


def test_finetune(tiny_chinese, plain, texts, tmp_path, capfdbinary):
    """It learns [CLS] text [SEP]; plain transformers reads the result, and needs no more than hfkit to continue."""
    documents, path = texts
    dataset = hfkit.prepare(path, model=tiny_chinese).prepared.dataset
    assert dataset["input_ids"][:] == plain[1](documents)["input_ids"]
    run = hfkit.finetune(path, model=tiny_chinese, output_dir=tmp_path / "run", max_steps=2, bf16=False)
    model, tokenizer = GPT2LMHeadModel.from_pretrained(tmp_path / "run"), AutoTokenizer.from_pretrained(run.output_dir)
    assert model.config.eos_token_id == tokenizer.eos_token_id == plain[1].sep_token_id
    ids = tokenizer(TEXT, return_tensors="pt")
    output = model.generate(**ids, max_new_tokens=9, do_sample=False, pad_token_id=0)[0]
    line = ("generate", TEXT, "-m", run.output_dir, "-t", "0", "-n", "9", "--device", "cpu")
    result = call(capfdbinary, *line)
    assert result.stdout.decode().strip() == tokenizer.decode(output, skip_special_tokens=True)


def test_serve(lm):
    """A server writes the same text."""
    body = {"prompt": TEXT, "max_tokens": 20, "seed": 5}
    with serving(lm) as (address, _):
        (choice,) = httpx.post(f"{address}/v1/completions", json=body).json()["choices"]
    assert choice["text"] == hfkit.generate(TEXT, model=lm, max_new_tokens=20, seed=5).completion
