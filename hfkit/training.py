"""Fine-tuning: transformers' Trainer with its loss put right, checkpoints that survive, and the best state kept."""

import contextlib
import gc
import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from hfkit import console, processes, runs
from hfkit.adapters import add_adapter
from hfkit.checkpoints import Saving, Stop, find_newest, list_checkpoints, step_of
from hfkit.corpora import Corpora
from hfkit.errors import HfkitError, OptionError, StoppedError
from hfkit.models import choose_device, load_config, load_tokenizer, load_weights
from hfkit.monitoring import Measuring, Progress, best_step, is_stale, scores
from hfkit.optimizers import MuonFactory
from hfkit.options import DataOptions, ModelOptions, TrainOptions, divide, set_fields
from hfkit.planning import Plan, block_size_for, make_plan, summarize
from hfkit.report import describe_plan, make_card
from hfkit.sequences import Collator, Examples, Material, gather_material
from hfkit.sources import Source, count_parameters, find
from hfkit.storage import lock

# Options of ours that mean something else to Trainer, or that it gets in another form.
_OWN = ("output_dir", "resume", "overwrite", "num_train_epochs", "max_steps", "optim", "eval_steps", "save_steps",
        "save_total_limit", "bf16", "fp16", "torch_compile", "load_best_model_at_end", "lr_scheduler_kwargs",
        "fsdp_config")  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A finished training run."""

    output_dir: str  # a model as transformers saves it
    metrics: dict[str, Any]  # metrics.json

    @property
    def perplexity(self) -> float | None:
        """Of the held-out part, for the model that was kept; None if nothing was held out."""
        return self.metrics["perplexity"]


@dataclass(frozen=True)
class Job:
    """What is to be trained, whichever command asks for it."""

    command: str
    name: str  # of the model it begins with
    corpus: Corpora
    folder: Path
    recipe: dict[str, Any]
    facts: dict[str, Any]  # that a resumed run must share
    tokenizer: PreTrainedTokenizerBase
    make_model: Callable[[], Any]  # anew, in float32
    material: Material
    plan: Plan
    block_size: int
    callbacks: Sequence[TrainerCallback] = ()


def finetune(
    corpus: Corpora,
    *,
    model: str | ModelOptions | None = None,
    data: DataOptions | None = None,
    train: TrainOptions | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    dry_run: bool = False,
    **overrides: Any,
) -> Run | None:
    """Go on training a model on a corpus.

    Args:
        corpus: files, folders, globs, `hf://NAME`, or a folder that `prepare` made.
        model: what `load` takes. Default: $HFKIT_MODEL, else "bundled".
        data, train: options; every field of `ModelOptions`, `DataOptions` and `TrainOptions` is a keyword, too.
        callbacks: transformers' `TrainerCallback`s.
        dry_run: say what the run would be, and stop there.

    Returns:
        The run, with its folder and scores; None after a dry run.

    Raises:
        HfkitError: the corpus, the model or the folder are not as they should be, or the loss is no number.
        StoppedError: Ctrl-C or SIGTERM; the state is saved, and `resume=True` goes on.
    """
    if not isinstance(model, ModelOptions):
        overrides, model = overrides | ({"model": model} if model else {}), None
    model, data, train = divide(overrides, (ModelOptions, model), (DataOptions, data), (TrainOptions, train))
    with reserve(corpus, train, dry_run) as (folder, finished):
        if finished:
            return finished
        source = find(model)
        tokenizer, config = load_tokenizer(source), load_config(source)
        _check_model(source, config, model, train, data)
        block_size = block_size_for(config, data.block_size)
        material = gather_material(corpus, tokenizer, data, block_size, train.seed)
        device = choose_device(model, source)
        plan = make_plan(
            config, count_parameters(source), material.sequences, material.length, train, device,
            processes=processes.count,
        )  # fmt: skip
        job = Job(
            "finetune", source.name, corpus, folder, runs.describe(corpus, model, data, plan.options),
            material.fingerprint | {"model_bytes": source.size, "processes": processes.count}, tokenizer,
            lambda: make_trainable(source, model, plan, tokenizer), material, plan, block_size, callbacks,
        )  # fmt: skip
        describe_plan(material.report, plan)
        return None if dry_run else run(job)


@contextlib.contextmanager
def reserve(corpus: Corpora, train: TrainOptions, dry_run: bool) -> Iterator[tuple[Path, Run | None]]:
    """The run's folder, held for this process; and the run itself, if it is finished already."""
    folder = runs.folder_for(corpus, train)
    if dry_run:
        yield folder, None
        return
    state = runs.check(folder, resume=train.resume, overwrite=train.overwrite)
    with lock(folder) if processes.rank == 0 else contextlib.nullcontext():
        if state == "finished":
            console.note(f"{folder} is finished: there is nothing to resume")
        yield folder, Run(str(folder), runs.read_metrics(folder)) if state == "finished" else None


def _check_model(source: Source, config: Any, model: ModelOptions, train: TrainOptions, data: DataOptions) -> None:
    if config.is_encoder_decoder:
        raise HfkitError(f"{source.name} has an encoder: choose a causal model, such as gpt2")
    if train.lora and source.adapter:
        raise HfkitError(f"{source.name} is an adapter: 'hfkit export' merges it, then train another one on top")
    if model.quantize and not (train.lora and torch.cuda.is_available()):
        raise OptionError("--quantize trains with --lora and on a GPU only: leave it out")
    if data.streaming and not train.max_steps:
        raise OptionError("--streaming does not know how long the corpus is: add --max-steps")


def make_trainable(source: Source, options: ModelOptions, plan: Plan, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The model of `source`, in float32, its adapter to train around it if the plan has LoRA."""
    model = load_weights(source, replace(options, dtype="float32"), tokenizer).model
    model.name_or_path = source.name if source.name == "bundled" else str(source.folder)
    make_ready(model, plan)
    return add_adapter(model, source, plan.options) if plan.options.lora else model


def make_ready(model: Any, plan: Plan) -> None:
    # Without this Trainer counts the labels unshifted and its loss and gradients come out too small.
    model.loss_type = "ForCausalLM"
    if not plan.attention_dropout:
        for module in model.modules():
            if isinstance(dropout := getattr(module, "attn_dropout", None), torch.nn.Dropout):
                dropout.p = 0.0


def run(job: Job, keep: Callable[[], Any] = lambda: None) -> Run:
    """Train as `job` says, from its newest checkpoint if there is one, and leave the best state in its folder.

    keep: puts into a new run's folder what a resumed one will need.
    """
    if processes.rank == 0:
        if (job.folder / runs.FACTS).is_file() and not job.plan.options.overwrite:
            runs.compare(job.folder, job.recipe, job.facts)
        else:
            runs.begin(job.folder, job.command, job.recipe, job.facts, keep)
    processes.gather([])
    with Stop() as stop:
        state = _fit(job, stop)
        stopped = stop.asked()
    newest = next(iter(list_checkpoints(job.folder / runs.CHECKPOINTS)), None)
    if stopped and not _is_done(state, job.plan):
        saved = f"step {step_of(newest)} of {job.plan.steps} is saved" if newest else "nothing was saved yet"
        raise StoppedError(
            f"stopped as asked: {saved} ({job.folder}), --resume goes on", stop.signal or signal.SIGTERM
        )
    if not newest:
        raise HfkitError("a callback stopped the training before anything was saved: raise --save-steps")
    return _leave(job, state)


def _is_done(state: TrainerState, plan: Plan) -> bool:
    return state.global_step >= plan.steps or is_stale(state.log_history, plan.options.early_stopping_patience)


def _fit(job: Job, stop: Stop) -> TrainerState:
    """Train until the end, a stop, or an error; with less memory than a batch needs, in smaller ones."""
    folder, plan = job.folder / runs.CHECKPOINTS, job.plan
    rows, accumulation = plan.options.per_device_train_batch_size, plan.options.gradient_accumulation_steps
    while True:
        newest = processes.gather([find_newest(folder) if processes.rank == 0 else None])[0]
        if newest:
            state = TrainerState.load_from_json(str(newest / "trainer_state.json"))
            if _is_done(state, plan):
                return state
        trainer = _build(job, stop, rows, accumulation)
        try:
            with console.quiet_libraries():
                trainer.train(resume_from_checkpoint=str(newest) if newest else None)
            return trainer.state
        except KeyboardInterrupt:
            stop.signal = signal.SIGINT
            return trainer.state
        except torch.OutOfMemoryError as error:
            if rows == 1 or processes.count > 1:
                raise HfkitError(
                    "out of memory: lower --block-size or --per-device-train-batch-size, or add "
                    "--activation-checkpointing or --lora"
                ) from error
        # The same sequences make a step, in more and smaller batches.
        smaller = next(count for count in range(rows // 2, 0, -1) if rows % count == 0)
        rows, accumulation = smaller, accumulation * (rows // smaller)
        console.note(f"out of memory: going on with {rows} sequences at a time, {accumulation} times a step")
        del trainer
        gc.collect()
        torch.cuda.empty_cache()


class _Trainer(Trainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer would log a loss that is not a number as 0, and go on with such weights."""
        result = super().compute_loss(*args, **kwargs)
        loss = result[0] if isinstance(result, tuple) else result
        if not torch.isfinite(loss).all():
            raise HfkitError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}: lower --learning-rate "
                f"(it is {self.args.learning_rate:g}) and --overwrite; the last checkpoint is kept"
            )
        return result


def _build(job: Job, stop: Stop, rows: int, accumulation: int) -> Trainer:
    plan, options, material = job.plan, job.plan.options, job.material
    model = job.make_model()
    pad = job.tokenizer.pad_token_id
    pad = pad if pad is not None else job.tokenizer.eos_token_id or 0
    is_static = plan.compile and not isinstance(material.train_set, Examples)
    collator = Collator(pad, (rows, job.block_size) if is_static else None)
    measuring = Measuring(
        _sample(material.held_out, plan), Collator(pad), options.sample_prompt or material.prompt, plan, stop
    )
    saving = Saving(job.folder / runs.CHECKPOINTS, measuring, options, stop)
    environment = dict(os.environ)
    with console.quiet_libraries():
        trainer = _Trainer(
            model=model, args=_arguments(job, rows, accumulation), train_dataset=material.train_set,
            data_collator=collator, processing_class=job.tokenizer,
            callbacks=[Progress(plan, measuring), saving, *job.callbacks],
            optimizer_cls_and_kwargs=_optimizer(options),
        )  # fmt: skip
    # TrainingArguments sets variables for accelerate, which would go on to the next trainer of this process.
    for name in set(os.environ) - set(environment):
        del os.environ[name]
    trainer.remove_callback(PrinterCallback)
    measuring.trainer = trainer
    return trainer


def _sample(held_out: Any, plan: Plan) -> Any:
    """So much of the held-out part, evenly chosen, that measuring costs about a tenth of the training."""
    per_step = (plan.options.per_device_train_batch_size or 1) * plan.options.gradient_accumulation_steps
    most = max(32, int(0.3 * per_step * (plan.options.eval_steps or 1)))
    count = len(held_out)
    return held_out if count <= most else torch.utils.data.Subset(held_out, [i * count // most for i in range(most)])


def _arguments(job: Job, rows: int, accumulation: int) -> TrainingArguments:
    plan, options = job.plan, job.plan.options
    shared = {f.name for f in fields(TrainingArguments)} - set(_OWN)
    given = {name: value for name, value in set_fields(options).items() if name in shared}
    if options.optim != "muon":
        given["optim"] = options.optim
    if options.lr_scheduler_kwargs:
        try:
            given["lr_scheduler_kwargs"] = json.loads(options.lr_scheduler_kwargs)
        except ValueError as error:
            raise OptionError(f"--lr-scheduler-kwargs is no JSON: {error}") from error
    if options.fsdp_config:
        given |= {"fsdp": True, "fsdp_config": options.fsdp_config}
    if processes.count > 1:
        given["ddp_find_unused_parameters"] = False
    own = {
        "output_dir": str(job.folder / runs.CHECKPOINTS),
        "max_steps": plan.steps,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": accumulation,
        "report_to": options.report_to or "none",
        "use_cpu": plan.device.type == "cpu",
        "torch_compile": plan.compile,
        "dataloader_pin_memory": plan.device.type == "cuda",
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "disable_tqdm": True,
        # When to save and to measure is for `Saving` to say; what a NaN means, for `_Trainer`.
        "save_strategy": "no",
        "logging_nan_inf_filter": False,
    }
    try:
        return TrainingArguments(**{**given, **plan.autocast, **own})
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise OptionError(f"Trainer does not take these options: {str(error).splitlines()[0]}") from error


def _optimizer(options: TrainOptions) -> tuple[Any, dict[str, Any]] | None:
    if options.optim != "muon":
        return None
    betas = (options.adam_beta1 or 0.9, options.adam_beta2 or 0.95)
    adam = {"betas": betas, "eps": options.adam_epsilon or 1e-8}
    return MuonFactory, {"lr": options.learning_rate, "weight_decay": options.weight_decay, **adam}


def _leave(job: Job, state: TrainerState) -> Run:
    """The best state as a model, its scores and its card, in the run's folder."""
    folder, plan = job.folder / runs.CHECKPOINTS, job.plan
    best = best_step(state.log_history) if plan.options.load_best_model_at_end else None
    kept = next(path for path in list_checkpoints(folder) if best in (None, step_of(path)))
    metrics = {
        "model": job.name,
        "corpus": job.recipe["corpus"],
        "step": step_of(kept),
        "steps": state.global_step,
        **scores(state.log_history, step_of(kept)),
        **summarize(plan, state),
        "history": state.log_history,
    }
    if processes.rank == 0:
        runs.finish(job.folder, kept, make_card(job, metrics), metrics)
    processes.gather([])
    return Run(str(job.folder), metrics)
