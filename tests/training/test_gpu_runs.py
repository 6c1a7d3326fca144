"""What a GPU changes in a run, seen on a CPU that says that it is one. `tests/gpu` runs on a real one."""

import math

import pytest
import torch
from support import trials
from support.gpus import pretend
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback

import hfkit
from hfkit.errors import DivergedError, OptionError
from hfkit.models import architecture
from hfkit.options import TrainOptions
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


def test_attention_of_a_gpu_run(still, corpus, tmp_path, gpu):
    """Not cuDNN's, whose gradients can be NaN; only while it trains."""
    allowed = []

    class Watch(TrainerCallback):
        def on_step_begin(self, *args, **kwargs) -> None:
            cuda = torch.backends.cuda
            allowed.append((cuda.cudnn_sdp_enabled(), cuda.flash_sdp_enabled(), cuda.math_sdp_enabled()))

    assert torch.backends.cuda.cudnn_sdp_enabled()
    hfkit.finetune(corpus, model=still, output_dir=tmp_path / "run", callbacks=[Watch()], **OPTIONS)
    assert set(allowed) == {(False, True, True)} and torch.backends.cuda.cudnn_sdp_enabled()


def test_diverged_on_a_gpu(still, corpus, tmp_path, gpu, monkeypatch):
    """A loss that no step looks at is looked at when it is logged."""
    monkeypatch.setattr(_Trainer, "compute_loss", lambda self, *a, **k: Trainer.compute_loss(self, *a, **k) * math.nan)
    with pytest.raises(DivergedError, match="the loss is nan at step 1"):
        hfkit.finetune(corpus, model=still, output_dir=tmp_path / "run", **OPTIONS)


@pytest.mark.parametrize("units", [True, False])
def test_precision_of_a_gpu(brisk, monkeypatch, units):
    """And a word about the GPUs that stand by."""
    pretend(monkeypatch, count=2, bfloat16=units)
    made = plan.make_plan(GPT2Config(n_layer=1), 10**6, 100, 64.0, TrainOptions(torch_compile=False), GPU, shared_by=1)
    assert made.precision == ("bfloat16" if units else "float16")
    assert "one of 2 GPUs: --num-processes 2 uses all of them" in made.why


def test_second_gpu_is_refused(still, corpus, tmp_path, gpu, monkeypatch):
    """Trainer would train on the first one."""
    monkeypatch.setattr(finetuning, "choose_device", lambda options: torch.device("cuda", 1))
    with pytest.raises(OptionError, match="set CUDA_VISIBLE_DEVICES=1"):
        hfkit.finetune(corpus, model=still, output_dir=tmp_path / "run", **OPTIONS)


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
