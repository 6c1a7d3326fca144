"""Threads that share a model get what each would get alone, and leave model, tokenizer and process as they were."""

import asyncio
import copy
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification, AutoTokenizer, set_seed
from transformers.utils import logging

import hfkit
from hfkit.inference.likelihood import precise_head, score_batches
from hfkit.models.loading import loaded, share_weights

ROUNDS = [8, pytest.param(50, marks=pytest.mark.slow)]


def save_with_head(folder: Path, base: str, kind) -> str:
    set_seed(5)
    model = kind.from_pretrained(base)
    for name, parameter in model.named_parameters():
        if name.startswith(("classifier", "qa_outputs")):
            parameter.data *= 30
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def models(tiny, tiny_bert, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("shared")
    labels = save_with_head(folder / "labels", tiny_bert, AutoModelForSequenceClassification)
    answers = save_with_head(folder / "answers", tiny_bert, AutoModelForQuestionAnswering)
    return {"text": hfkit.load(tiny), "labels": hfkit.load(labels), "answers": hfkit.load(answers)}


def generate(lm, **options):
    return lambda number: str(hfkit.generate("the cat", model=lm, max_new_tokens=5, seed=number, **options))


def likelihood(lm):
    ids = torch.arange(40).view(2, 20)
    batch = ids[:, :-1], ids[:, 1:], np.zeros((2, 19), int)
    return lambda number: score_batches(precise_head(lm.model), [batch]).loss


def calls(models) -> dict:
    lm, words = models["text"], "rain and the light "
    return {
        "greedy": generate(lm, temperature=0),
        "sampled": generate(lm),
        "beams": generate(lm, num_beams=3, temperature=1.5),
        "lookup": generate(lm, prompt_lookup_num_tokens=3, temperature=1.5),
        "streamed": lambda number: "".join(hfkit.stream("a", model=lm, seed=number, max_new_tokens=5)),
        "head": lambda number: hfkit.classify(words * (number % 30), model=models["labels"]).probabilities,
        "labels": lambda number: hfkit.classify(words, model=lm, labels=["rain", "snow"]).probabilities,
        "answer": lambda number: hfkit.answer("what?", words * (1 + number % 9), model=models["answers"]),
        "likelihood": likelihood(lm),
        "attention": lambda number: hfkit.inspect("the cat", model=lm, attention=True).bits,
    }


PAIRS = [("greedy", "sampled"), ("sampled", "sampled"), ("beams", "beams"), ("beams", "lookup"), ("lookup", "sampled"),
         ("head", "head"), ("labels", "labels"), ("answer", "answer"), ("likelihood", "greedy"),
         ("attention", "greedy"), ("attention", "likelihood"), ("streamed", "beams")]  # fmt: skip


@pytest.mark.parametrize("rounds", ROUNDS)
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_threads_get_what_each_gets_alone(models, first, second, rounds):
    jobs = (calls(models)[first], range(rounds)), (calls(models)[second], range(rounds, 0, -1))
    alone = [[function(number) for number in numbers] for function, numbers in jobs]
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(lambda job=job: [job[0](number) for number in job[1]]) for job in jobs]
        assert [future.result() for future in futures] == alone


def test_threads_leave_the_process_and_the_model_as_they_were(models):
    lm = models["text"]
    before = (
        logging.get_verbosity(), logging.is_progress_bar_enabled(), list(warnings.filters), torch.get_rng_state(),
        copy.deepcopy(lm.model.generation_config), lm.model.config._attn_implementation, lm.model.lm_head.forward,
        copy.deepcopy(vars(models["labels"].tokenizer)["_tokenizer"].truncation),
    )  # fmt: skip
    functions = list(calls(models).values())
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda function: [function(number) for number in range(5)], functions))
    after = (
        logging.get_verbosity(), logging.is_progress_bar_enabled(), list(warnings.filters), torch.get_rng_state(),
        lm.model.generation_config, lm.model.config._attn_implementation, lm.model.lm_head.forward,
        vars(models["labels"].tokenizer)["_tokenizer"].truncation,
    )  # fmt: skip
    assert before[:3] == after[:3] and torch.equal(before[3], after[3]) and before[4:] == after[4:]


def test_stream_lets_warnings_of_its_reader_pass(models):
    with pytest.warns(UserWarning, match="mine"):
        for _ in hfkit.stream("a", model=models["text"], max_new_tokens=3, seed=1):
            warnings.warn("mine", UserWarning, stacklevel=1)


def test_asyncio_tasks_share_a_model(models):
    async def gather():
        prompts = [("the", 1), ("a", 2), ("no", 3)]
        tasks = (
            asyncio.to_thread(hfkit.generate, text, model=models["text"], seed=seed, max_new_tokens=5)
            for text, seed in prompts
        )
        return await asyncio.gather(*tasks)

    expected = [
        hfkit.generate(text, model=models["text"], seed=seed, max_new_tokens=5)
        for text, seed in (("the", 1), ("a", 2), ("no", 3))
    ]
    assert asyncio.run(gather()) == expected


# copies that share weights


def test_share_weights_copies_modules_and_no_weights(models):
    model = models["text"].model
    twin = share_weights(model)
    assert [p.data_ptr() for p in twin.parameters()] == [p.data_ptr() for p in model.parameters()]
    assert twin.lm_head.weight is twin.transformer.wte.weight is model.lm_head.weight
    assert twin.transformer.h[0] is not model.transformer.h[0] and twin.config is not model.config
    assert twin.transformer.h[0].attn.config is twin.config


def test_loaded_leaves_a_model_that_trains_in_train_mode(tiny):
    """Its texts are those of eval mode, each time the same."""
    lm = hfkit.load(tiny)
    how = {"seed": 1, "max_new_tokens": 8}
    expected = str(hfkit.generate("the", model=lm, **how)), hfkit.inspect("the cat", model=lm).bits
    expected += (hfkit.classify("rain", model=lm, labels=["a", "b"]).probabilities,)
    assert loaded(lm).model is lm.model
    lm.model.train()
    for _ in range(3):
        model = tuple(lm)  # as a user has it
        assert str(hfkit.generate("the", model=model, **how)) == expected[0]
        assert "the" + "".join(hfkit.stream("the", model=model, **how)) == expected[0]
        assert hfkit.inspect("the cat", model=model).bits == expected[1]
        assert hfkit.classify("rain", model=model, labels=["a", "b"]).probabilities == expected[2]
    assert all(module.training for module in lm.model.modules())
