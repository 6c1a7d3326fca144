"""Pretraining: a tokenizer and a model from nothing, trained with the same machinery as `finetune`."""

import functools
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from hfkit import console, processes
from hfkit.corpus.documents import END, Corpora, Corpus, Piece, find_corpus, read_records
from hfkit.corpus.encoding import number_documents
from hfkit.corpus.labelled import classification_rows, gather_labelled_data, question_rows
from hfkit.corpus.sequences import gather_training_data
from hfkit.corpus.splitting import content_of, hold_out_texts
from hfkit.declaration import divide, set_fields
from hfkit.errors import HfkitError, OptionError
from hfkit.models.architecture import choose_device
from hfkit.options import DataOptions, ModelOptions, SizeOptions, TrainOptions
from hfkit.training import run_folder
from hfkit.training.finetuning import make_ready
from hfkit.training.plan import Job, describe_plan, make_plan
from hfkit.training.runs import Run, execute, reserve

# n_layer, n_embd, n_head, n_positions, vocab_size
_SIZES = {
    "tiny": (4, 128, 4, 256, 2048),
    "mini": (6, 320, 5, 512, 4096),
    "small": (12, 768, 12, 1024, 50257),
    "medium": (24, 1024, 16, 1024, 50257),
    "large": (36, 1280, 20, 1024, 50257),
    "xl": (48, 1600, 25, 1024, 50257),
}
_TOKENIZER = f"{run_folder.CHECKPOINTS}/tokenizer"  # for a run that is resumed


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
    if isinstance(size, str):
        overrides, size = overrides | {"size": size}, None
    groups = ((SizeOptions, size), (DataOptions, data), (TrainOptions, train))
    size, data, train = divide(overrides, *groups)
    if train.lora or data.streaming:
        raise OptionError("a new model is trained whole and from files: leave --lora and --streaming out")
    if (size.architecture == "bert") != bool(train.head):
        raise OptionError("a new BERT is trained with a --head, and a new GPT-2 without: say --architecture bert")
    inputs = [source for sources in (corpus, data.eval_file) for source in run_folder.sources_of(sources or [])]
    with reserve(corpus, train, dry_run, inputs) as (folder, train):
        resumed = train.resume and not train.overwrite and run_folder.is_begun(folder)
        tokenizer = _load_tokenizer(folder) if resumed else _train_tokenizer_once(corpus, size, data, train)
        shape = shape_of(size)
        block_size = min(data.block_size or shape["n_positions"], shape["n_positions"])
        with processes.first_one_first():
            if train.head:
                material = gather_labelled_data(corpus, tokenizer, data, train.head, block_size, train.seed, None)
                config: Any = make_bert(shape, tokenizer, material.labels)
            else:
                material = gather_training_data(corpus, tokenizer, data, block_size, train.seed)
                config = make_config(shape, tokenizer)
        make = functools.partial(new_model, config, train.head) if train.head else lambda: GPT2LMHeadModel(config)
        with torch.device("meta"):  # sizes without values
            parameters = make().num_parameters()
        where = choose_device(ModelOptions(device=device))
        plan = make_plan(
            config, parameters, material.sequences, material.length, train, where, fresh=True,
            processes=processes.count,
        )  # fmt: skip
        describe_plan(material.report, plan)
        if dry_run:
            return None

        def new() -> Any:
            model = make().to(where)
            make_ready(model, plan)
            return model

        job = Job(
            "pretrain", "a new BERT" if train.head else "a new GPT-2", corpus, folder,
            run_folder.make_recipe(corpus, size, data, plan.options) | {"device": device},
            material.fingerprint | {"processes": processes.count}, tokenizer, new, material, plan, block_size, data,
            callbacks,
        )  # fmt: skip
        return execute(job, keep=lambda: tokenizer.save_pretrained(folder / _TOKENIZER))


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a run; a finished one has it where every model has it."""
    kept = folder / _TOKENIZER
    return AutoTokenizer.from_pretrained(kept if kept.is_dir() else folder)


def _train_tokenizer_once(
    corpus: Corpora, size: SizeOptions, data: DataOptions, train: TrainOptions
) -> PreTrainedTokenizerBase:
    """A new tokenizer, trained in the first process; the others get what it made."""
    made = None
    if processes.rank == 0 and train.head:
        texts = list(row_texts(corpus, data, train.head))
        made = train_wordpiece(texts, size.vocab_size or _vocabulary(size, sum(len(text) for text in texts)))
    elif processes.rank == 0:
        made = train_tokenizer(corpus, size, data, train.seed)
    return processes.gather([made])[0]


def _vocabulary(size: SizeOptions, characters: int) -> int:
    """A token for each 300 bytes of text at most: rarer ones would hardly be seen."""
    return max(512, min(_SIZES[size.size][-1], characters // 300))


def train_tokenizer(corpus: Corpora, size: SizeOptions, data: DataOptions, seed: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE from the part of the corpus that the model will be trained on, too.

    Raises:
        HfkitError: the corpus is not made of texts.
    """
    found = find_corpus(corpus)
    rows = np.array([(number, content_of(piece.text), len(piece.text.encode()))
                     for number, _, piece in _pieces(found, data)], np.int64)  # fmt: skip
    if not len(rows):
        raise HfkitError("the corpus holds no text: there is nothing to learn")
    held = np.zeros(len(rows)) if data.eval_file else hold_out_texts(*rows.T, data.eval_fraction, seed)
    vocabulary = size.vocab_size or _vocabulary(size, int(rows[:, 2].sum()))
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )  # fmt: skip
    console.note(f"training a tokenizer of {vocabulary:,} tokens")
    texts = (piece.text[: round(len(piece.text) * (1 - share))]
             for share, (*_, piece) in zip(held, _pieces(found, data), strict=True))  # fmt: skip
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


def shape_of(size: SizeOptions) -> dict[str, Any]:
    """The sizes by GPT-2's names; no dropout unless asked for.

    Raises:
        OptionError: they do not go together.
    """
    shape = dict(zip(("n_layer", "n_embd", "n_head", "n_positions"), _SIZES[size.size], strict=False))
    shape |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    shape |= {name: value for name, value in set_fields(size).items() if name in shape}
    if shape["n_embd"] % shape["n_head"]:
        raise OptionError(f"--n-embd is {shape['n_embd']}: it must be a multiple of --n-head, {shape['n_head']}")
    return shape


def make_config(shape: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> GPT2Config:
    """GPT-2's configuration of these sizes."""
    end = tokenizer.eos_token_id
    return GPT2Config(**shape, vocab_size=len(tokenizer), bos_token_id=end, eos_token_id=end)


_SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]",
            "mask_token": "[MASK]"}  # fmt: skip


def row_texts(corpus: Corpora, data: DataOptions, head: str) -> Iterable[str]:
    """All texts of the rows that a head is trained on."""
    if head == "classification":
        return [text for text, _ in classification_rows(corpus, data)]
    return [text for row in question_rows(corpus, data) for text in (row.question, row.context)]


def train_wordpiece(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerBase:
    """A lower-casing WordPiece tokenizer as BERT has it: [CLS] text [SEP], or [CLS] question [SEP] text [SEP]."""
    backend = Tokenizer(models.WordPiece(unk_token=_SPECIAL["unk_token"]))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary, special_tokens=list(_SPECIAL.values()), show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    begin, end = _SPECIAL["cls_token"], _SPECIAL["sep_token"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}",
        pair=f"{begin} $A {end} $B:1 {end}:1",
        special_tokens=[(begin, backend.token_to_id(begin)), (end, backend.token_to_id(end))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_input_names=["input_ids", "token_type_ids", "attention_mask"], **_SPECIAL
    )


def make_bert(shape: dict[str, Any], tokenizer: PreTrainedTokenizerBase, labels: Iterable[str]) -> BertConfig:
    """BERT's configuration of the sizes that GPT-2 calls n_layer, n_embd, n_head and n_positions."""
    names = dict(enumerate(labels))
    return BertConfig(
        vocab_size=len(tokenizer), num_hidden_layers=shape["n_layer"], hidden_size=shape["n_embd"],
        num_attention_heads=shape["n_head"], intermediate_size=4 * shape["n_embd"],
        max_position_embeddings=shape["n_positions"], hidden_dropout_prob=shape["resid_pdrop"],
        attention_probs_dropout_prob=shape["attn_pdrop"], pad_token_id=tokenizer.pad_token_id,
        **({"id2label": names, "label2id": {label: index for index, label in names.items()}} if names else {}),
    )  # fmt: skip


def new_model(config: BertConfig, head: str) -> Any:
    kind = AutoModelForSequenceClassification if head == "classification" else AutoModelForQuestionAnswering
    return kind.from_config(config)
