"""What a GPU changes in a run, seen on a CPU that says that it is one. `tests/gpu` runs on a real one."""

import copy
import math

import pytest
import torch
from support import trials
from transformers import GPT2LMHeadModel, Trainer

import hfkit
from hfkit.errors import DivergedError
from hfkit.models import architecture, kernels
from hfkit.training import arguments, finetuning, loop, plan
from hfkit.training.loop import _Trainer

GPU = torch.device("cuda")
OPTIONS = {"block_size": 32, "seed": 3, "logging_steps": 1, **trials.SMALL}


@pytest.fixture
def gpu(brisk, monkeypatch):
    """This CPU under a GPU's name, for hfkit; transformers and torch see through it."""
    made = []
    monkeypatch.setattr(finetuning, "choose_device", lambda options: GPU)
    monkeypatch.setattr(architecture, "choose_device", lambda options: GPU)
    monkeypatch.setattr(GPT2LMHeadModel, "to", lambda self, *arguments: self)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")

    def training_arguments(*given):
        made.append(arguments.training_arguments(*given))
        return made[-1]

    monkeypatch.setattr(loop, "training_arguments", training_arguments)
    return made


def test_losses_of_a_gpu_run(still, corpus, tmp_path, brisk, request):
    """The padded vocabulary, the fused activation and the missing logits change nothing but rounding."""
    plain = hfkit.finetune(corpus, model=still, output_dir=tmp_path / "cpu", **OPTIONS)
    made = request.getfixturevalue("gpu")
    run = hfkit.finetune(corpus, model=still, output_dir=tmp_path / "gpu", **OPTIONS)
    assert trials.losses(run.metrics) == pytest.approx(trials.losses(plain.metrics), rel=1e-5)
    assert run.metrics["loss"] == pytest.approx(plain.metrics["loss"], rel=1e-5)
    assert run.metrics["device"] == "a GPU"
    assert made[0].dataloader_pin_memory and made[0].accelerator_config.non_blocking and not made[0].use_cpu
    saved = hfkit.load(run.output_dir).model
    assert type(saved) is GPT2LMHeadModel and saved.config.activation_function == "gelu_new"


def test_diverged_on_a_gpu(still, corpus, tmp_path, gpu, monkeypatch):
    """A loss that no step looks at is looked at when it is logged."""
    monkeypatch.setattr(_Trainer, "compute_loss", lambda self, *a, **k: Trainer.compute_loss(self, *a, **k) * math.nan)
    with pytest.raises(DivergedError, match="the loss is nan at step 1"):
        hfkit.finetune(corpus, model=still, output_dir=tmp_path / "run", **OPTIONS)


def test_loading_for_a_gpu(still, gpu, monkeypatch):
    monkeypatch.setattr(architecture, "choose_dtype", lambda *_: torch.float32)
    plain = GPT2LMHeadModel.from_pretrained(still).eval()
    lm = hfkit.load(still, quantize=None)
    ids = torch.arange(40)[None]
    assert isinstance(lm.model.transformer.h[0].mlp.act, torch.nn.GELU)
    torch.testing.assert_close(lm.model(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("vocabulary", [257, 320])
def test_prepare_training(vocabulary):
    """Loss and gradients are those of the model as it was; a copy has layers of its own."""
    from transformers import GPT2Config

    torch.manual_seed(0)
    shape = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0}
    shape |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    plain = GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, **shape)).train()
    ready, ids = copy.deepcopy(plain), torch.randint(vocabulary, (2, 16))
    kernels.fuse_activations(ready)
    kernels.prepare_training(ready)
    outputs = [model(input_ids=ids, labels=ids) for model in (plain, ready)]
    assert set(outputs[1]) == {"loss"}
    for output in outputs:
        output.loss.backward()
    torch.testing.assert_close(outputs[1].loss, outputs[0].loss)
    gradients = [{name: part.grad for name, part in model.named_parameters()} for model in (plain, ready)]
    torch.testing.assert_close(gradients[1], gradients[0])
    twin = copy.deepcopy(ready).eval()
    assert twin.lm_head.weight is not ready.lm_head.weight
    torch.testing.assert_close(twin(ids).logits, plain.eval()(ids).logits)


@pytest.mark.parametrize(
    ("device", "steps", "every"), [("cpu", 5000, 1), ("cuda", 30, 1), ("cuda", 450, 4), ("cuda", 5000, 10)]
)
def test_logging_steps(device, steps, every):
    assert plan._logging_steps(steps, torch.device(device)) == every


def test_full_determinism_leaves_no_state(still, corpus, tmp_path, brisk, monkeypatch):
    """CUDA reads its variable at the first matrix product, so the plan sets it; the mode itself ends with the run."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    modes = []
    monkeypatch.setattr(plan, "_speed", lambda *_: modes.append(plan.os.environ["CUBLAS_WORKSPACE_CONFIG"]) or 1e9)
    monkeypatch.setattr(_Trainer, "measure", lambda self: modes.append(torch.are_deterministic_algorithms_enabled()))
    hfkit.finetune(
        corpus, model=still, output_dir=tmp_path / "run", full_determinism=True, **OPTIONS | {"max_steps": 1}
    )
    assert modes[0] == ":4096:8" and True in modes
    assert not torch.are_deterministic_algorithms_enabled()
