"""Fine-tuning: from a corpus and a model to a folder with the best state, its scores and its card."""

import contextlib
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerState

from hfkit import console, processes, runs
from hfkit.adapters import add_adapter
from hfkit.checkpoints import Stop, find_fault, find_newest, list_checkpoints, step_of
from hfkit.corpus.documents import Corpora
from hfkit.corpus.labelled import gather_labelled_data
from hfkit.corpus.sequences import TrainingData, gather_training_data
from hfkit.corpus.templates import give_task, make_task
from hfkit.declaration import divide
from hfkit.errors import HfkitError, OptionError, StoppedError
from hfkit.fitting import Job, fit, is_done
from hfkit.models.architecture import check_head, choose_device, head_of
from hfkit.models.loading import load_config, load_tokenizer, load_weights, load_with_head
from hfkit.models.sources import ModelFiles, count_parameters, find_model
from hfkit.monitoring import best_step
from hfkit.options import DataOptions, ModelOptions, TrainOptions
from hfkit.outcomes import make_metrics
from hfkit.planning import Plan, block_size_for, make_plan
from hfkit.report import describe_plan
from hfkit.reporting.pages import make_files
from hfkit.storage import lock


@dataclass(frozen=True)
class Run:
    """A finished training run."""

    output_dir: str  # a model as transformers saves it
    metrics: dict[str, Any]  # metrics.json

    @property
    def perplexity(self) -> float | None:
        """Of the held-out part, for the model that was kept; None if nothing was held out."""
        return self.metrics.get("perplexity")


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
    inputs = [source for sources in (corpus, data.eval_file, model.model) for source in runs.sources_of(sources or [])]
    with reserve(corpus, train, dry_run, inputs) as (folder, train):
        source = find_model(model)
        if train.overwrite:
            runs.check_not_input(folder, [source.folder, source.adapter or source.folder])
        tokenizer, config = load_tokenizer(source), load_config(source)
        train = _choose_head(source, config, train)
        _check_model(source, config, model, train, data)
        block_size = block_size_for(config, data.block_size)
        with processes.first_one_first():
            if train.head:
                material = gather_headed(corpus, config, tokenizer, data, train, block_size)
            else:
                material = gather_training_data(corpus, tokenizer, data, block_size, train.seed)
        if task := make_task(data):
            give_task(tokenizer, task)
        device = choose_device(model, source)
        plan = make_plan(
            config, count_parameters(source), material.sequences, material.length, train, device,
            processes=processes.count,
        )  # fmt: skip
        job = Job(
            "finetune", source.name, corpus, folder,
            runs.describe(corpus, replace(model, model=source.name), data, plan.options),
            material.fingerprint | {"model_bytes": source.size, "processes": processes.count}, tokenizer,
            lambda: make_trainable(source, model, plan, tokenizer, material), material, plan, block_size, data,
            callbacks,
        )  # fmt: skip
        describe_plan(material.report, plan)
        return None if dry_run else run(job)


@contextlib.contextmanager
def reserve(
    corpus: Corpora, train: TrainOptions, dry_run: bool, inputs: Iterable[str | Path]
) -> Iterator[tuple[Path, TrainOptions]]:
    """The run's folder, held for this process, and its options; what a run to be resumed decided is in them.

    inputs: what the run reads, which the folder must not lose.
    """
    folder = runs.folder_for(corpus, train)
    with contextlib.ExitStack() as held:
        if not dry_run and processes.rank == 0:
            runs.check(folder, resume=train.resume, overwrite=train.overwrite, inputs=inputs)
            held.enter_context(lock(folder))
        processes.gather([])
        yield folder, runs.settle(folder, train)


def _choose_head(source: ModelFiles, config: Any, train: TrainOptions) -> TrainOptions:
    """The head that is asked for, or else that of the model; none for a model that writes text."""
    if train.head:
        return train
    check_head(source.name, config, "text", "classification", "question-answering")
    return train if head_of(config) == "text" else replace(train, head=head_of(config))


def gather_headed(
    corpus: Corpora, config: Any, tokenizer: PreTrainedTokenizerBase, data: DataOptions, train: TrainOptions, size: int
) -> TrainingData:
    """Material for a head; the tokenizer gets a token to pad with if it has none."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    known = [config.id2label[i] for i in range(config.num_labels)] if head_of(config) == train.head else None
    return gather_labelled_data(corpus, tokenizer, data, str(train.head), size, train.seed, known)


def _check_model(source: ModelFiles, config: Any, model: ModelOptions, train: TrainOptions, data: DataOptions) -> None:
    if config.is_encoder_decoder:
        raise HfkitError(f"{source.name} has an encoder: choose a causal model, such as gpt2")
    if train.head and (train.lora or data.streaming or source.adapter):
        raise OptionError("--head trains a whole model from files: leave --lora, --streaming and adapters out")
    if train.lora and source.adapter:
        raise HfkitError(f"{source.name} is an adapter: 'hfkit export' merges it, then train another one on top")
    if train.lora and source.gguf:
        raise HfkitError(f"{source.name} is a file, an adapter would not find it: 'hfkit export' makes a folder of it")
    if model.quantize and not (train.lora and torch.cuda.is_available()):
        raise OptionError("--quantize trains with --lora and on a GPU only: leave it out")
    if data.streaming and not train.max_steps:
        raise OptionError("--streaming does not know how long the corpus is: add --max-steps")


def make_trainable(
    source: ModelFiles, options: ModelOptions, plan: Plan, tokenizer: PreTrainedTokenizerBase, material: TrainingData
) -> Any:
    """The model of `source`, in float32, with its head, or with an adapter around it if the plan has LoRA."""
    if material.head:
        model = load_with_head(source, options, tokenizer, material.head, material.labels)
    else:
        model = load_weights(source, replace(options, dtype="float32"), tokenizer).model
    model.name_or_path = source.name if source.name == "bundled" else str(source.folder)
    model.requires_grad_(not plan.options.lora)  # a merged adapter leaves it frozen
    make_ready(model, plan)
    return add_adapter(model, source, options.revision, plan.options) if plan.options.lora else model


def make_ready(model: Any, plan: Plan) -> None:
    """Set what is not in a model's weights: how its loss is counted, and dropout for the time of the training."""
    if not plan.options.head:
        # Without this Trainer counts the labels unshifted and its loss and gradients come out too small.
        model.loss_type = "ForCausalLM"
    for module in model.modules():
        if plan.options.dropout is not None and isinstance(module, torch.nn.Dropout):
            module.p = plan.options.dropout
        if not plan.attention_dropout and isinstance(getattr(module, "attn_dropout", None), torch.nn.Dropout):
            module.attn_dropout.p = 0.0


def run(job: Job, keep: Callable[[], Any] = lambda: None) -> Run:
    """Train as `job` says, from its newest checkpoint if there is one, and leave the best state in its folder.

    keep: puts into a new run's folder what a resumed one will need.
    """
    if processes.rank == 0:
        if runs.is_begun(job.folder) and not job.plan.options.overwrite:
            runs.compare(job.folder, job.recipe, job.facts)
        else:
            runs.begin(job.folder, job.command, job.recipe, job.facts, keep)
    processes.gather([])
    if metrics := runs.read_metrics(job.folder):
        console.note(f"{job.folder} is finished: there is nothing to resume")
        runs.clear(job.folder)
        return Run(str(job.folder), metrics)
    with Stop() as stop:
        state = fit(job, stop)
        stopped = state is None or (stop.asked() and not is_done(state, job.plan))
    if stopped:
        newest = find_newest(job.folder / runs.CHECKPOINTS) if processes.rank == 0 else None
        saved = f"step {step_of(newest)} of {job.plan.steps} is saved" if newest else "nothing was saved yet"
        raise StoppedError(
            f"stopped as asked: {saved} ({job.folder}), --resume goes on", stop.signal or signal.SIGTERM
        )
    return _leave(job, state)


def _leave(job: Job, state: TrainerState) -> Run:
    """The best state as a model, its scores and its card, in the run's folder."""
    best = best_step(state.log_history) if job.plan.options.load_best_model_at_end else None
    metrics = None
    if processes.rank == 0:
        kept = _find_kept(job.folder / runs.CHECKPOINTS, best)
        metrics = make_metrics(job, state, kept)
        runs.finish(job.folder, kept, make_files(metrics), metrics)
    return Run(str(job.folder), processes.gather([metrics])[0])


def _find_kept(folder: Path, best: int | None) -> Path:
    """The checkpoint of step `best`, or else the newest, that is whole."""
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        raise HfkitError("a callback stopped the training before anything was saved: lower --save-steps")
    for checkpoint in sorted(checkpoints, key=lambda path: step_of(path) != best):
        if not (fault := find_fault(checkpoint)):
            return checkpoint
        console.note(f"{checkpoint} is left out: {fault}")
    raise HfkitError(f"no checkpoint is whole ({folder}): --overwrite begins anew")
