"""A job's options as Trainer takes them, and what holds for the process only while it trains."""

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import TrainingArguments

from hfkit import processes
from hfkit.declaration import set_fields
from hfkit.errors import OptionError
from hfkit.options import TrainOptions
from hfkit.training.plan import Job, Plan
from hfkit.training.schedule import schedule_arguments


@contextlib.contextmanager
def freed_memory_kept(plan: Plan) -> Iterator[None]:
    """On a CPU, keep the memory that a step frees for the next step.

    By default the C library returns large blocks to the system at once and gets them again page by page, which takes
    a third of a step on a virtual machine. C libraries without mallopt(3) are left alone.
    """
    libc: Any = ctypes.CDLL(None) if plan.device.type == "cpu" and os.name == "posix" else None
    if not (hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")):
        yield
        return
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    libc.mallopt(trim_threshold, 2**31 - 1)
    libc.mallopt(mmap_max, 0)
    try:
        yield
    finally:
        libc.mallopt(trim_threshold, 128 * 1024)  # glibc's defaults
        libc.mallopt(mmap_max, 65536)
        libc.malloc_trim(0)


def attention_kernels(plan: Plan) -> contextlib.AbstractContextManager[Any]:
    """Leave out cuDNN's attention, which is torch's first choice on new GPUs: its gradients can be NaN.

    See pytorch/pytorch#196678 and NVIDIA/cudnn-frontend#160.
    """
    if plan.device.type != "cuda":
        return contextlib.nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


@contextlib.contextmanager
def private_environment(job: Job) -> Iterator[None]:
    """Keep what TrainingArguments sets in this process, and hfkit's own variables, from what runs here next."""
    before, deterministic = dict(os.environ), torch.are_deterministic_algorithms_enabled()
    os.environ["HF_HUB_OFFLINE"] = "1"  # peft would ask the Hub for the base model at each save
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(job.folder / "tensorboard"))  # not into the checkpoints
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def training_arguments(job: Job, rows: int, accumulation: int) -> TrainingArguments:
    """rows: sequences at a time. accumulation: batches that make a step."""
    plan, options = job.plan, job.plan.options
    if plan.device.type == "cuda" and processes.count == 1 and (number := plan.device.index):
        raise OptionError(f"--device cuda:{number}: Trainer takes the first GPU, so set CUDA_VISIBLE_DEVICES={number}")
    known = {field.name for field in fields(TrainingArguments)}
    values = {name: value for name, value in set_fields(options).items() if name in known}
    # Below is what means something else to Trainer, or what it gets in another form.
    values |= {
        "output_dir": str(job.checkpoints),
        "max_steps": plan.steps,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": accumulation,
        "report_to": options.report_to or "none",
        "use_cpu": plan.device.type == "cpu",
        "bf16": plan.precision == "bfloat16",
        "fp16": plan.precision == "float16",
        "torch_compile": plan.compile,
        "dataloader_pin_memory": plan.device.type == "cuda",
        "accelerator_config": {"non_blocking": plan.device.type == "cuda"},
        "remove_unused_columns": False,
        "label_names": ["start_positions", "end_positions"]
        if job.dataset.head == "question-answering"
        else ["labels"],
        "disable_tqdm": True,
        "save_strategy": "no",  # StepCallback decides when to save, and what to keep
        "save_total_limit": None,
        "load_best_model_at_end": False,
        "logging_nan_inf_filter": False,  # a NaN ends the run
    }
    if options.optim == "muon":
        del values["optim"]  # see `optimizer_class`
    if options.lr_scheduler_kwargs:
        values["lr_scheduler_kwargs"] = schedule_arguments(options, plan.steps)
    if options.fsdp_config:
        values["fsdp"] = True
    if processes.count > 1:
        values["ddp_find_unused_parameters"] = False
    arguments = TrainingArguments(**values)
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one process drives one GPU; several GPUs take several processes
    return arguments


def optimizer_class(options: TrainOptions) -> tuple[Any, dict[str, Any]] | None:
    """What Trainer's `optimizer_cls_and_kwargs` takes; None leaves the choice to `optim`."""
    if options.optim != "muon":
        return None
    betas = (options.adam_beta1 or 0.9, options.adam_beta2 or 0.95)
    adam = {"betas": betas, "eps": options.adam_epsilon or 1e-8}
    return MuonFactory, {"lr": options.learning_rate, "weight_decay": options.weight_decay, **adam}


class Muon(torch.optim.Optimizer):
    """torch's Muon for the matrices of the hidden layers and AdamW for everything else, as one optimizer.

    One learning rate serves both: Muon's step is scaled to the size of AdamW's.
    """

    def __init__(self, matrices: Iterable[nn.Parameter], groups: list[dict[str, Any]], **options: Any) -> None:
        """matrices: (in, out) or (out, in) weights of hidden layers. groups: AdamW's parameter groups."""
        lr, decay = options["lr"], options["weight_decay"]
        muon = torch.optim.Muon(list(matrices), lr=lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        adam = torch.optim.AdamW(groups, lr=lr, betas=options["betas"], eps=options["eps"], fused=True)
        self._parts = [muon, adam]
        super().__init__([*muon.param_groups, *adam.param_groups], {"lr": lr})
        self._share_groups()

    def _share_groups(self) -> None:
        """Expose the parts' own groups, so that a scheduler sets the learning rate of both."""
        self.param_groups = [group for part in self._parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # overloads
        loss = None if closure is None else closure()
        for part in self._parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for part, part_state in zip(self._parts, state["parts"], strict=True):
            part.load_state_dict(part_state)
        self._share_groups()


class MuonFactory:
    """Makes a Muon from a model: Trainer passes it one instead of a list of parameters."""

    def __call__(self, model: nn.Module, **options: Any) -> Muon:
        embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        head = getattr(model, "get_output_embeddings", lambda: None)()
        if head is not None:
            embeddings.add(id(head.weight))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        matrices = [p for p in trained if p.ndim == 2 and id(p) not in embeddings]
        others = [p for p in trained if p.ndim != 2 or id(p) in embeddings]
        return Muon(matrices, [{"params": others, "weight_decay": 0.0}], **options)
