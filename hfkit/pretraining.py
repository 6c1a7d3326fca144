"""Pretraining: a tokenizer and a GPT-2 from nothing, trained with the same machinery as `finetune`."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer, PreTrainedTokenizerBase, TrainerCallback

from hfkit import console, processes, runs
from hfkit.corpora import END, Corpora, Corpus, Piece, find_corpus, read_records
from hfkit.data import number_documents
from hfkit.declaration import divide, set_fields
from hfkit.errors import HfkitError, OptionError
from hfkit.fitting import Job
from hfkit.models import choose_device
from hfkit.options import DataOptions, ModelOptions, SizeOptions, TrainOptions
from hfkit.planning import Plan, make_plan
from hfkit.report import describe_plan
from hfkit.sequences import gather_material, hold_out
from hfkit.training import Run, make_ready, reserve, run

# n_layer, n_embd, n_head, n_positions, vocab_size
_SIZES = {
    "tiny": (4, 128, 4, 256, 2048),
    "mini": (6, 320, 5, 512, 4096),
    "small": (12, 768, 12, 1024, 50257),
    "medium": (24, 1024, 16, 1024, 50257),
    "large": (36, 1280, 20, 1024, 50257),
    "xl": (48, 1600, 25, 1024, 50257),
}
_TOKENIZER = f"{runs.CHECKPOINTS}/tokenizer"  # for a run that is resumed


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
    """Train a byte-level BPE tokenizer and a GPT-2 on a corpus, from nothing.

    Args:
        corpus: as for `finetune`; plain texts or a text column.
        size: a name, or `SizeOptions`; its fields, such as `n_layer`, are keywords, too.
        device: as `load` takes it.

    The other arguments, the result and the errors are those of `finetune`.
    """
    if isinstance(size, str):
        overrides, size = overrides | {"size": size}, None
    groups = ((SizeOptions, size), (DataOptions, data), (TrainOptions, train))
    size, data, train = divide(overrides, *groups)
    if train.lora or data.streaming:
        raise OptionError("a new model is trained whole and from files: leave --lora and --streaming out")
    with reserve(corpus, train, dry_run) as (folder, train):
        resumed = train.resume and not train.overwrite and runs.is_begun(folder)
        tokenizer = _load_tokenizer(folder) if resumed else _train_tokenizer_once(corpus, size, data, train.seed)
        config = make_config(size, tokenizer)
        with torch.device("meta"):  # sizes without values
            parameters = GPT2LMHeadModel(config).num_parameters()
        block_size = min(data.block_size or config.n_positions, config.n_positions)
        with processes.first_one_first():
            material = gather_material(corpus, tokenizer, data, block_size, train.seed)
        where = choose_device(ModelOptions(device=device))
        plan = make_plan(
            config, parameters, material.sequences, material.length, train, where, fresh=True,
            processes=processes.count,
        )  # fmt: skip
        describe_plan(material.report, plan)
        if dry_run:
            return None
        job = Job(
            "pretrain", "a new GPT-2", corpus, folder,
            runs.describe(corpus, size, data, plan.options) | {"device": device},
            material.fingerprint | {"processes": processes.count}, tokenizer,
            lambda: _new_model(config, plan), material, plan, block_size, data, callbacks,
        )  # fmt: skip
        return run(job, keep=lambda: tokenizer.save_pretrained(folder / _TOKENIZER))


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a run; a finished one has it where every model has it."""
    kept = folder / _TOKENIZER
    return GPT2Tokenizer.from_pretrained(kept if kept.is_dir() else folder)


def _train_tokenizer_once(*arguments: Any) -> PreTrainedTokenizerBase:
    """`train_tokenizer` in the first process; the others get what it made."""
    return processes.gather([train_tokenizer(*arguments) if processes.rank == 0 else None])[0]


def train_tokenizer(corpus: Corpora, size: SizeOptions, data: DataOptions, seed: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE from the part of the corpus that the model will be trained on, too.

    Raises:
        HfkitError: the corpus is not made of texts.
    """
    found = find_corpus(corpus)
    rows = np.array([(number, len(piece.text.encode())) for number, _, piece in _pieces(found, data)], np.int64)
    if not len(rows):
        raise HfkitError("the corpus holds no text: there is nothing to learn")
    kept = np.ones(len(rows), bool)
    if not data.eval_file:
        kept[hold_out(rows[:, 0], rows[:, 1], data.eval_fraction, seed)[1]] = False
    # A token for each 300 bytes of text at most: rarer ones would hardly be seen.
    vocabulary = size.vocab_size or max(512, min(_SIZES[size.size][-1], int(rows[:, 1].sum()) // 300))
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )  # fmt: skip
    console.note(f"training a tokenizer of {vocabulary:,} tokens")
    texts = (piece.text for used, (*_, piece) in zip(kept, _pieces(found, data), strict=True) if used)
    backend.train_from_iterator(texts, trainer)
    with tempfile.TemporaryDirectory() as folder:  # the same, but to a resumed run, which reads it, it must be equal
        GPT2Tokenizer(tokenizer_object=backend, bos_token=END, eos_token=END, unk_token=END).save_pretrained(folder)
        return GPT2Tokenizer.from_pretrained(folder)


def _pieces(found: Corpus, data: DataOptions) -> Iterator[tuple[int, bool, Piece]]:
    records = read_records(found, data)
    first = next(records, None)
    if not isinstance(first, Piece):
        raise HfkitError("a new model learns from texts, not from examples: pretrain on texts, then finetune on these")
    yield from number_documents(chain([first], records))  # type: ignore[arg-type]


def make_config(size: SizeOptions, tokenizer: PreTrainedTokenizerBase) -> GPT2Config:
    """GPT-2's configuration of a size; no dropout unless asked for.

    Raises:
        OptionError: the sizes do not go together.
    """
    names = ("n_layer", "n_embd", "n_head", "n_positions")
    given = {name: value for name, value in set_fields(size).items() if name in {f.name for f in fields(GPT2Config)}}
    shape = dict(zip(names, _SIZES[size.size], strict=False)) | {
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }
    shape |= given | {"vocab_size": len(tokenizer)}
    if shape["n_embd"] % shape["n_head"]:
        raise OptionError(f"--n-embd is {shape['n_embd']}: it must be a multiple of --n-head, {shape['n_head']}")
    end = tokenizer.eos_token_id
    return GPT2Config(**shape, bos_token_id=end, eos_token_id=end)


def _new_model(config: GPT2Config, plan: Plan) -> GPT2LMHeadModel:
    model = GPT2LMHeadModel(config).to(plan.device)
    make_ready(model, plan)
    return model
