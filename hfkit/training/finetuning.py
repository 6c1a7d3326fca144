"""Fine-tuning: from a corpus and a model to a folder with the best state, its scores and its card.

`prepare` tokenizes the corpus beforehand, and says what is in it and what training on it would cost here.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from hfkit import processes
from hfkit.console import counted
from hfkit.corpus.cache import Prepared, corpus_lines, encode_corpus
from hfkit.corpus.documents import read_records
from hfkit.corpus.files import Corpora, find_corpus, is_prepared
from hfkit.corpus.sequences import cut_example, cut_sequences, show_examples
from hfkit.corpus.templates import give_task, make_task
from hfkit.declaration import divide
from hfkit.errors import HfkitError, OptionError
from hfkit.models.architecture import check_causal, check_head, choose_device, context_length, head_of
from hfkit.models.folder import ModelFiles, count_parameters
from hfkit.models.loading import load_config, load_tokenizer
from hfkit.models.sources import find_model
from hfkit.options import DataOptions, ModelOptions, TrainOptions
from hfkit.storage import check_owned, make_writable
from hfkit.training import run_folder
from hfkit.training.models import make_trainable
from hfkit.training.plan import Job, Plan, block_size_for, gather_data, make_plan
from hfkit.training.runs import Run, run_job


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
    """Continue training a model on a corpus.

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
    inputs = [*(data.eval_file or []), *filter(None, [options.model])]
    with run_folder.reserve("finetune", corpus, train, inputs, dry_run=dry_run) as (folder, settled):
        job = make_job(corpus, options, data, settled, folder)
        command = run_folder.command_line("finetune", corpus, options, data, train)
        return run_job(job, command, callbacks, dry_run=dry_run)


def make_job(corpus: Corpora, options: ModelOptions, data: DataOptions, train: TrainOptions, folder: Path) -> Job:
    """What `finetune` would do in `folder`, decided: the corpus is tokenized, nothing is written there."""
    files, source = run_folder.find_files(corpus, data, folder), find_model(options)
    if train.overwrite:
        run_folder.check_not_input(folder, [source.folder, source.adapter or source.folder])
    tokenizer, config = load_tokenizer(source), load_config(source)
    train = _choose_head(source, config, train)
    _check_model(source, config, options, train, data)
    block_size = block_size_for(context_length(config), data.block_size)
    labels = [config.id2label[i] for i in range(config.num_labels)] if head_of(config) == train.head else None
    if train.head and tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    dataset = gather_data(files, tokenizer, data, train, block_size, labels)
    if task := make_task(data):
        give_task(tokenizer, task)
    plan = make_plan(
        config, count_parameters(source), dataset.sequences, dataset.length, train, choose_device(options)
    )
    return Job(
        command="finetune",
        name=source.name,
        files=files,
        folder=folder,
        recipe=run_folder.make_recipe(corpus, replace(options, model=source.name), data, plan.options),
        facts=dataset.fingerprint | source.fingerprint | {"processes": processes.count},
        tokenizer=tokenizer,
        make_model=partial(make_trainable, source, options, plan, tokenizer, dataset),
        dataset=dataset,
        plan=plan,
        block_size=block_size,
        data=data,
    )


def _choose_head(source: ModelFiles, config: Any, train: TrainOptions) -> TrainOptions:
    """`train` with the head that the model has, unless another one is asked for; no head for a model of text."""
    if train.head:
        return train
    check_head(source.name, config, "text", "classification", "question-answering")
    head: Any = head_of(config)
    return train if head == "text" else replace(train, head=head)


def _check_model(source: ModelFiles, config: Any, model: ModelOptions, train: TrainOptions, data: DataOptions) -> None:
    check_causal(source.name, config, "choose a causal model, such as gpt2")
    if train.head and (train.lora or data.streaming or source.adapter):
        raise OptionError("--head trains a whole model from files: leave --lora, --streaming and adapters out")
    if train.lora and source.adapter:
        raise HfkitError(f"{source.name} is an adapter: 'hfkit export' merges it, then train another one on top")
    if train.lora and (source.gguf or source.checkpoint):
        why = "is converted first, so an adapter would not find it: 'hfkit export' makes a folder of it"
        raise HfkitError(f"{source.name} {why}")
    if model.quantize and not (train.lora and torch.cuda.is_available()):
        raise OptionError("--quantize trains with --lora and on a GPU only: leave it out")
    if data.streaming and not train.max_steps:
        raise OptionError("--streaming does not know how long the corpus is: add --max-steps")


@dataclass(frozen=True)
class Preparation:
    """A tokenized corpus: `finetune` takes its folder."""

    prepared: Prepared
    plan: Plan  # of training on all of it with the default options
    blocks: int
    block_size: int
    examples: list[str] = field(default_factory=list)  # as the model sees them

    @property
    def folder(self) -> str:
        return str(self.prepared.folder)

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints. Seconds and bytes of memory are estimates for this machine."""
        names = ("parameters", "steps", "seconds", "memory", "precision")
        cost = {name: getattr(self.plan, name) for name in names} | {"device": self.plan.device.type}
        sizes = {"blocks": self.blocks, "block_size": self.block_size, "folder": self.folder}
        shown = {"examples": self.examples} if self.examples else {}
        return {**asdict(self.prepared.report), **sizes, "training": cost, **shown}

    def lines(self, *, brief: bool = False) -> list[str]:
        """The same figures for people. brief: examples are cut."""
        blocks = f"{counted(self.blocks, 'sequence')} of at most {self.block_size:,} tokens, in {self.folder}"
        lines = [*corpus_lines(self.prepared.report), blocks, *self.plan.lines()]
        for number, example in enumerate(self.examples, 1):
            shown = cut_example(example) if brief else example
            lines += [f"--- sequence {number}: what stands between ⟦ and ⟧ is learned", shown]
        return lines


def prepare(
    corpus: Corpora,
    *,
    model: str | Path | ModelOptions | None = None,
    data: DataOptions | None = None,
    output_dir: str | Path | None = None,
    show: int = 0,
    **overrides: Any,
) -> Preparation:
    """Tokenize a corpus for a model, into `output_dir` or into the cache, where `finetune` finds it again.

    Args:
        corpus: files, folders, globs or `hf://NAME`.
        model: the model whose tokenizer to use, as `load` takes it.
        data: options; every field of `ModelOptions` and `DataOptions` is a keyword, too.
        output_dir: a new folder; `datasets.load_from_disk` reads it, too.
        show: how many sequences the result has in `examples`, as the model sees them.

    Raises:
        HfkitError: the corpus or the model cannot be read, or the folder is not free.
    """
    options: ModelOptions
    options, data = divide(overrides, (ModelOptions, model), (DataOptions, data))
    folder = Path(output_dir) if output_dir else None
    if folder:
        make_writable(folder)
        if not is_prepared(folder):
            check_owned(folder)
    files, source = find_corpus(corpus, data), find_model(options)
    tokenizer, config = load_tokenizer(source), load_config(source)
    prepared = encode_corpus(files, tokenizer, data, folder)
    if prepared.cached:
        next(read_records(files, data), None)  # says what the rows are taken for
    block_size = block_size_for(context_length(config), data.block_size)
    sequences = cut_sequences(prepared, block_size)
    count, length, train = len(sequences), sequences.tokens / max(1, len(sequences)), TrainOptions()
    plan = make_plan(config, count_parameters(source), count, length, train, choose_device(options))
    return Preparation(prepared, plan, count, block_size, show_examples(sequences, tokenizer, show))
