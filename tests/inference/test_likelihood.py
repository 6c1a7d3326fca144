"""Sums over tokens and their errors are what a plain count gives, in whichever order and precision they come."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

import hfkit
from hfkit.corpus.encoding import IGNORED
from hfkit.inference.likelihood import precise_head, score, score_batches, shift
from hfkit.inference.scores import Scores, exp, jsonable, ratio_stderr
from hfkit.models.loading import load


def scores(seed: int, units: int = 300) -> Scores:
    """Of passages of unlike length and difficulty."""
    draw = np.random.default_rng(seed)
    tokens = draw.integers(1, 60, units).astype(float)
    nll = tokens * draw.gamma(4.0, 1.0, units) + draw.normal(0, 1, units) ** 2
    hits = draw.binomial(tokens.astype(int), 0.3).astype(float)
    return Scores(nll, tokens, hits, np.minimum(tokens, hits + 1))


def bootstrap(above: np.ndarray, below: np.ndarray, resamples: int = 4000) -> float:
    draw = np.random.default_rng(1)
    rows = draw.integers(0, len(above), (resamples, len(above)))
    return float(np.std(above[rows].sum(1) / below[rows].sum(1)))


# sums


def test_scores_add():
    """Tokens are summed unit by unit, in any order."""
    draw = np.random.default_rng(0)
    units, nll, rank = draw.integers(0, 9, 500), draw.random(500), draw.integers(0, 12, 500)
    found = Scores()
    for some in np.array_split(draw.permutation(500), 7):
        found.add(units[some], nll[some], rank[some])
    for unit in range(9):
        own = units == unit
        assert found.nll[unit] == pytest.approx(nll[own].sum()) and found.tokens[unit] == own.sum()
        assert found.top1[unit] == (rank[own] == 0).sum() and found.top5[unit] == (rank[own] < 5).sum()
    assert found.count == 500 and found.loss == pytest.approx(nll.mean())


def test_scores_merge_and_join():
    """Merging adds to the same units, joining appends others."""
    one, two = scores(0, 4), scores(1, 7)
    merged, joined = Scores(), Scores()
    for part in (one, two):
        merged.merge(part), joined.join(part)
    assert merged.nll.tolist() == pytest.approx([*(one.nll + two.nll[:4]), *two.nll[4:]])
    assert joined.tokens.tolist() == [*one.tokens, *two.tokens]
    assert merged.count == joined.count == one.count + two.count
    assert merged.loss == pytest.approx(joined.loss)


def test_scores_of_little():
    """Nothing has no loss, and a single unit has no error."""
    assert math.isnan(Scores().loss) and math.isnan(Scores().loss_stderr) and Scores().count == 0
    assert math.isnan(scores(0, 1).loss_stderr) and scores(0, 1).loss > 0
    assert not math.isnan(scores(0, 2).loss_stderr)


def test_exp_is_capped():
    """A perplexity beyond all floats is the largest."""
    assert exp(1e9) == exp(709.0) < math.inf and exp(1.0) == math.e


# errors


@pytest.mark.parametrize("seed", range(3))
def test_ratio_stderr_equals_bootstrap(seed):
    """The error is that of a bootstrap over passages."""
    found = scores(seed)
    assert found.loss_stderr == pytest.approx(bootstrap(found.nll, found.tokens), rel=0.1)
    assert found.perplexity_stderr == pytest.approx(found.perplexity * found.loss_stderr)


def test_ratio_stderr_of_a_difference():
    """The error of a difference is that of the same passages.

    It is much smaller than the errors of both: what is hard for one model is hard for the other.
    """
    one = scores(0)
    other = one.nll * 1.1 + np.random.default_rng(5).normal(0, 2, 300)
    error = ratio_stderr(other - one.nll, one.tokens)
    assert error == pytest.approx(bootstrap(other - one.nll, one.tokens), rel=0.1)
    assert error < one.loss_stderr / 2


def test_ratio_stderr_ignores_empty_units():
    """Passages in which nothing counts do not change the error."""
    found = scores(0)
    empty = np.zeros(50)
    assert ratio_stderr(np.append(found.nll, empty), np.append(found.tokens, empty)) == pytest.approx(
        ratio_stderr(found.nll, found.tokens)
    )


# logits


def test_score():
    """A token is scored by its softmax and its place among all."""
    torch.manual_seed(0)
    logits, targets = torch.randn(3, 5, 11) * 4, torch.randint(0, 11, (3, 5))
    targets[1, 2:] = IGNORED
    nll, rank = score(logits, targets)
    for row in range(3):
        for place in range(5):
            target = int(targets[row, place])
            if target == IGNORED:
                assert nll[row, place] == rank[row, place] == 0
                continue
            shares = logits[row, place].softmax(-1)
            assert nll[row, place].item() == pytest.approx(-math.log(shares[target]), rel=1e-5)
            assert rank[row, place] == shares.argsort(descending=True).tolist().index(target)


def test_shift():
    """Targets are the labels, one place earlier."""
    labels = torch.tensor([[IGNORED, 4, 5], [7, 8, IGNORED]])
    assert shift(labels).tolist() == [[4, 5, IGNORED], [8, IGNORED, IGNORED]]


# precision


def low_logits() -> GPT2LMHeadModel:
    """A model whose logits are near -100, as those of the real GPT-2 are: there bfloat16 has steps of 0.5."""
    set_seed(0)
    config = GPT2Config(vocab_size=200, n_positions=32, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
                        tie_word_embeddings=False)  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        parameter.data *= 4
    # What the last norm always adds, every word of the head takes as far down.
    model.transformer.ln_f.weight.data[0], model.transformer.ln_f.bias.data[0] = 0.0, 10.0
    model.lm_head.weight.data[:, 0] = -10.0
    return model


def test_precise_head_keeps_the_loss():
    """A head in float32 keeps the loss that one in bfloat16 changes."""
    model, ids = low_logits(), torch.randint(0, 200, (8, 32), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert -115 < model(ids).logits.min() < model(ids).logits.max() < -85
    batch = ids[:, :-1], ids[:, 1:], np.arange(8 * 31).reshape(8, 31)  # each token is a unit

    def moved(other: GPT2LMHeadModel) -> tuple[float, float]:
        """By how much a loss is another than the exact one, and that of a token on average."""
        found = score_batches(other, [batch])
        return abs(found.loss / exact.loss - 1), np.abs(found.nll - exact.nll).mean()

    exact, head, half = score_batches(model, [batch]), model.lm_head.forward, low_logits().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        plain = moved(model)[1]
        loss, token = moved(precise_head(model))
        assert loss < 2e-3 and token < plain / 4
        assert moved(model)[1] == plain  # as it was before
    plain = moved(half)[1]
    assert moved(precise_head(half))[1] < plain / 2
    assert model.lm_head.forward == head
    assert moved(precise_head(model)) == (0, 0)  # in float32 it changes nothing


@torch.inference_mode()
@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_precise_head_quantized(tiny, bits):
    """A quantized head keeps its scale."""
    lm = load(tiny, quantize=bits)
    ids = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))
    before = lm.model(ids).logits
    assert torch.allclose(precise_head(lm.model)(ids).logits, before, atol=1e-4)


def test_precise_head_leaves_the_model_as_it_is(tiny):
    lm = hfkit.load(tiny)
    before = lm.model.lm_head.forward
    assert precise_head(lm.model).lm_head.forward != before
    assert lm.model.lm_head.forward == before


# JSON


def test_jsonable():
    """What JSON cannot express is None, and numpy's numbers become Python's."""
    value = {"a": np.float32(0.5), "b": [math.nan, np.inf, (1, "x")], "c": np.array([1, 2]), "d": {"e": np.int64(3)}}
    found = jsonable(value | {"f": None, "g": True})
    assert found == {"a": 0.5, "b": [None, None, [1, "x"]], "c": [1, 2], "d": {"e": 3}, "f": None, "g": True}
    json.dumps(found, allow_nan=False)
