"""Fine-tuning: from a corpus and a model to a folder with the best state, its scores and its card."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback

from hfkit import processes
from hfkit.corpus.documents import Corpora, Corpus
from hfkit.corpus.labelled import gather_labelled_data
from hfkit.corpus.sequences import TrainingData, gather_training_data
from hfkit.corpus.templates import give_task, make_task
from hfkit.declaration import divide
from hfkit.errors import HfkitError, OptionError, first_line
from hfkit.models.architecture import check_head, choose_device, context_length, head_of
from hfkit.models.loading import load_config, load_tokenizer, load_weights, load_with_head
from hfkit.models.sources import ModelFiles, count_parameters, find_model
from hfkit.options import DataOptions, ModelOptions, TrainOptions
from hfkit.training import run_folder
from hfkit.training.plan import Job, Plan, block_size_for, describe_plan, make_plan
from hfkit.training.runs import Run, execute, reserve


def finetune(
    corpus: Corpora,
    *,
    model: str | Path | ModelOptions | None = None,
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
        HfkitError: the corpus, the model or the folder cannot be used, or the loss is not finite.
        StoppedError: Ctrl-C or SIGTERM; the state is saved, and `resume=True` continues from it.
    """
    options: ModelOptions
    options, data, train = divide(overrides, (ModelOptions, model), (DataOptions, data), (TrainOptions, train))
    inputs = [*run_folder.sources_of(corpus), *(data.eval_file or []), *filter(None, [options.model])]
    with reserve("finetune", corpus, train, dry_run, inputs) as (folder, settled):
        job = make_job(corpus, options, data, settled, folder)
        job.facts["command"] = run_folder.command_line("finetune", corpus, options, data, train)
        describe_plan(job.dataset.report, job.plan)
        return None if dry_run else execute(replace(job, callbacks=callbacks))


def make_job(corpus: Corpora, options: ModelOptions, data: DataOptions, train: TrainOptions, folder: Path) -> Job:
    """What `finetune` would do in `folder`, decided: the corpus is tokenized, nothing is written there."""
    files, source = run_folder.find_files(corpus, folder), find_model(options)
    if train.overwrite:
        run_folder.check_not_input(folder, [source.folder, source.adapter or source.folder])
    tokenizer, config = load_tokenizer(source), load_config(source)
    train = _choose_head(source, config, train)
    _check_model(source, config, options, train, data)
    block_size = block_size_for(context_length(config), data.block_size)
    with processes.first_one_first():
        if train.head:
            dataset = _gather_labelled(files, config, tokenizer, data, train, block_size)
        else:
            dataset = gather_training_data(files, tokenizer, data, block_size, train.seed)
    if task := make_task(data):
        give_task(tokenizer, task)
    plan = make_plan(
        config, count_parameters(source), dataset.sequences, dataset.length, train, choose_device(options),
        processes=processes.count,
    )  # fmt: skip
    return Job(
        command="finetune", name=source.name, files=files, folder=folder,
        recipe=run_folder.make_recipe(corpus, replace(options, model=source.name), data, plan.options),
        facts=dataset.fingerprint | {"model_bytes": source.size, "processes": processes.count}, tokenizer=tokenizer,
        make_model=partial(make_trainable, source, options, plan, tokenizer, dataset),
        dataset=dataset, plan=plan, block_size=block_size, data=data,
    )  # fmt: skip


def _choose_head(source: ModelFiles, config: Any, train: TrainOptions) -> TrainOptions:
    """`train` with the head that the model has, unless another one is asked for; no head for a model of text."""
    if train.head:
        return train
    check_head(source.name, config, "text", "classification", "question-answering")
    head: Any = head_of(config)
    return train if head == "text" else replace(train, head=head)


def _gather_labelled(
    files: Corpora | Corpus,
    config: Any,
    tokenizer: PreTrainedTokenizerBase,
    data: DataOptions,
    train: TrainOptions,
    size: int,
) -> TrainingData:
    """Rows for a head; the tokenizer gets a token to pad with if it has none."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    labels = [config.id2label[i] for i in range(config.num_labels)] if head_of(config) == train.head else None
    return gather_labelled_data(files, tokenizer, data, str(train.head), size, train.seed, labels)


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
    source: ModelFiles, options: ModelOptions, plan: Plan, tokenizer: PreTrainedTokenizerBase, dataset: TrainingData
) -> Any:
    """The model of `source` in float32, with its head, or with an adapter around it if the plan has LoRA."""
    if dataset.head:
        model = load_with_head(source, options, tokenizer, dataset.head, dataset.labels)
    else:
        model = load_weights(source, replace(options, dtype="float32"), tokenizer).model
    model.name_or_path = source.name if source.name == "bundled" else str(source.folder)
    model.requires_grad_(not plan.options.lora)  # merging an adapter has frozen the weights
    set_training_mode(model, plan)
    return add_adapter(model, source, options.revision, plan.options) if plan.options.lora else model


def set_training_mode(model: Any, plan: Plan) -> None:
    """Set what is not in a model's weights: how its loss is counted, and its dropout while it trains."""
    if not plan.options.head:
        # Without this, Trainer counts the labels unshifted: loss and gradients come out too small.
        model.loss_type = "ForCausalLM"
    for module in model.modules():
        if plan.options.dropout is not None and isinstance(module, torch.nn.Dropout):
            module.p = plan.options.dropout
        if not plan.attention_dropout and isinstance(getattr(module, "attn_dropout", None), torch.nn.Dropout):
            module.attn_dropout.p = 0.0


def add_adapter(model: Any, source: ModelFiles, revision: str | None, options: TrainOptions) -> Any:
    """`model` with a new adapter around it; only the adapter is trained."""
    try:
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    except ImportError as error:
        raise HfkitError("--lora needs peft: pip install 'hfkit[lora]'") from error
    # Record the base so that peft and transformers find it from any folder.
    is_on_hub = not source.folder.is_dir() or source.folder.parent.name == "snapshots"
    model.name_or_path = source.name if is_on_hub else str(source.folder.resolve())
    config = LoraConfig(
        revision=revision, r=options.lora_r, lora_alpha=options.lora_alpha or 2 * options.lora_r,
        lora_dropout=options.lora_dropout, target_modules=options.lora_target_modules or "all-linear",
        task_type="CAUSAL_LM", fan_in_fan_out=model.config.model_type == "gpt2",  # its Conv1D keeps (in, out)
    )  # fmt: skip
    if getattr(model, "is_quantized", False):
        model = prepare_model_for_kbit_training(model)  # type: ignore[no-untyped-call]
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise OptionError(f"--lora-target-modules: {first_line(error)}") from error
