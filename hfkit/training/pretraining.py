"""Pretraining: a tokenizer and a model from nothing, trained as `finetune` trains."""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TrainerCallback

from hfkit import console, processes
from hfkit.corpus.documents import Piece, read_records
from hfkit.corpus.encoding import content_of, number_documents
from hfkit.corpus.files import Corpora, Corpus, find_corpus
from hfkit.corpus.labelled import classification_rows, question_rows
from hfkit.corpus.training_data import hold_out_texts
from hfkit.declaration import divide
from hfkit.errors import HfkitError, OptionError
from hfkit.models.architecture import choose_device
from hfkit.options import DataOptions, ModelOptions, SizeOptions, TrainOptions
from hfkit.training import run_folder
from hfkit.training.models import SIZES, make_bert, make_gpt2, make_new, new_model, shape_of
from hfkit.training.plan import Job, gather_data, make_plan
from hfkit.training.runs import Run, run_job
from hfkit.training.vocabulary import train_bytes, train_characters, train_wordpiece

_TOKENIZER = f"{run_folder.CHECKPOINTS}/tokenizer"  # kept for when the run is resumed


def pretrain(
    corpus: Corpora,
    *,
    size: str | SizeOptions | None = None,
    data: DataOptions | None = None,
    train: TrainOptions | None = None,
    device: str = "auto",
    callbacks: Sequence[TrainerCallback] = (),
    dry_run: bool = False,
    **overrides: Any,
) -> Run | None:
    """Train a byte-level BPE tokenizer and a GPT-2 on a corpus, from nothing; or a BERT and its head on rows.

    Args:
        corpus: as for `finetune`; plain texts or a text column.
        size: a name, or `SizeOptions`; its fields, such as `n_layer`, are keywords, too.
        device: as `load` takes it.

    The other arguments, the result and the errors are those of `finetune`.
    """
    shape: SizeOptions
    shape, data, train = divide(overrides, (SizeOptions, size), (DataOptions, data), (TrainOptions, train))
    if train.lora or data.streaming:
        raise OptionError("a new model is trained whole and from files: leave --lora and --streaming out")
    if (shape.architecture == "bert") != bool(train.head):
        raise OptionError("a new BERT is trained with a --head, and a new GPT-2 without: say --architecture bert")
    placement = ModelOptions(device=device)
    with run_folder.reserve("pretrain", corpus, train, data.eval_file or [], dry_run=dry_run) as (folder, settled):
        job = _make_job(corpus, shape, data, settled, placement, folder)
        command = run_folder.command_line("pretrain", corpus, shape, data, train, placement)
        return run_job(job, command, callbacks, dry_run=dry_run)


def _make_job(
    corpus: Corpora, size: SizeOptions, data: DataOptions, train: TrainOptions, placement: ModelOptions, folder: Path
) -> Job:
    files = find_corpus(corpus, data, folder)
    resumed = train.resume and not train.overwrite and run_folder.is_begun(folder)
    tokenizer = _load_tokenizer(folder) if resumed else _train_tokenizer_once(files, size, data, train)
    shape = shape_of(size)
    block_size = data.block_size or shape["n_positions"]
    if block_size > shape["n_positions"]:
        raise OptionError(f"--block-size is {block_size}: raise --n-positions, {shape['n_positions']}, as well")
    dataset = gather_data(files, tokenizer, data, train, block_size, None)
    config = make_bert(shape, tokenizer, dataset.labels) if train.head else make_gpt2(shape, tokenizer)
    with torch.device("meta"):  # counts parameters without memory for them
        parameters = new_model(config, train.head).num_parameters()
    device = choose_device(placement)
    plan = make_plan(config, parameters, dataset.sequences, dataset.length, train, device, fresh=True)
    return Job(
        command="pretrain",
        name="a new BERT" if train.head else "a new GPT-2",
        files=files,
        folder=folder,
        recipe=run_folder.make_recipe(corpus, size, data, plan.options) | {"device": placement.device},
        facts=dataset.fingerprint | {"processes": processes.count},
        tokenizer=tokenizer,
        make_model=partial(make_new, config, plan),
        dataset=dataset,
        plan=plan,
        block_size=block_size,
        data=data,
        keep=lambda folder: tokenizer.save_pretrained(folder / _TOKENIZER),
    )


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a run; a finished run has it beside the model."""
    kept = folder / _TOKENIZER
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(kept if kept.is_dir() else folder)
    return tokenizer


def _train_tokenizer_once(
    corpus: Corpus, size: SizeOptions, data: DataOptions, train: TrainOptions
) -> PreTrainedTokenizerBase:
    """A new tokenizer, trained in the first process and sent to the others."""
    tokenizer = None
    if processes.rank == 0 and train.head:
        texts = _row_texts(corpus, data, train.head)
        tokenizer = train_wordpiece(texts, size.vocab_size or _vocabulary(size, sum(map(len, texts))))
    elif processes.rank == 0:
        tokenizer = train_tokenizer(corpus, size, data, train.seed)
    trained: PreTrainedTokenizerBase = processes.gather([tokenizer])[0]
    return trained


def _vocabulary(size: SizeOptions, characters: int) -> int:
    """One token for each 300 characters of the corpus at most: with more, the rarest would hardly be seen."""
    return max(512, min(SIZES[size.size][-1], characters // 300))


def train_tokenizer(
    corpus: Corpora | Corpus, size: SizeOptions, data: DataOptions, seed: int
) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer, trained on the part of the corpus that the model will be trained on.

    Raises:
        HfkitError: the corpus does not consist of texts.
    """
    files = find_corpus(corpus, data)
    rows = np.array(
        [
            (number, content_of(piece.text), len(piece.text.encode()), len(piece.text))
            for number, _, piece in _pieces(files, data)
        ],
        np.int64,
    )
    if not len(rows):
        raise HfkitError("the corpus holds no text: there is nothing to learn")
    documents, contents, sizes, lengths = rows.T
    held = hold_out_texts(documents, contents, sizes, 0.0 if data.eval_file else data.eval_fraction, seed)
    vocabulary = size.vocab_size or _vocabulary(size, int(sizes.sum()))
    console.note(f"training a tokenizer of {vocabulary:,} tokens")
    texts = (
        piece.text[: round(len(piece.text) * (1 - share))]
        for share, (*_, piece) in zip(held, _pieces(files, data), strict=True)
    )
    # In a script of three bytes a character, such as Chinese, bytes alone would leave most characters in pieces.
    return (train_characters if sizes.sum() > 2 * lengths.sum() else train_bytes)(texts, vocabulary)


def _pieces(files: Corpus, data: DataOptions) -> Iterator[tuple[int, bool, Piece]]:
    records = read_records(files, data)
    first = next(records, None)
    if not isinstance(first, Piece):
        raise HfkitError("a new model learns from texts, not from examples: pretrain on texts, then finetune on these")
    yield from number_documents(chain([first], records))  # type: ignore[arg-type]  # all records are of one kind


def _row_texts(corpus: Corpora | Corpus, data: DataOptions, head: str) -> list[str]:
    """All texts of the rows that a head is trained on."""
    if head == "classification":
        return [text for text, _ in classification_rows(corpus, data)]
    return [text for row in question_rows(corpus, data) for text in (row.question, row.context)]
