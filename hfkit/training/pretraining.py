"""Pretraining: a tokenizer and a model from nothing, trained as `finetune` trains."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.trainers import WordPieceTrainer
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    PreTrainedTokenizerBase,
    TrainerCallback,
)

from hfkit import console, processes
from hfkit.corpus.documents import Piece, read_records
from hfkit.corpus.encoding import content_of, number_documents
from hfkit.corpus.files import Corpora, Corpus, find_corpus
from hfkit.corpus.labelled import classification_rows, gather_labelled_data, question_rows
from hfkit.corpus.training_data import gather_training_data, hold_out_texts
from hfkit.declaration import divide, set_fields
from hfkit.errors import HfkitError, OptionError
from hfkit.models.architecture import choose_device
from hfkit.models.integrity import LOADING
from hfkit.options import DataOptions, ModelOptions, SizeOptions, TrainOptions
from hfkit.training import run_folder
from hfkit.training.finetuning import set_training_mode
from hfkit.training.plan import Job, Plan, describe_plan, make_plan
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
    inputs = [*run_folder.sources_of(corpus), *(data.eval_file or [])]
    line = run_folder.command_line("pretrain", corpus, shape, data, train, ModelOptions(device=device))
    with reserve("pretrain", corpus, train, dry_run, inputs) as (folder, train):
        files = find_corpus(corpus, data, folder)
        resumed = train.resume and not train.overwrite and run_folder.is_begun(folder)
        tokenizer = _load_tokenizer(folder) if resumed else _train_tokenizer_once(files, shape, data, train)
        sizes = shape_of(shape)
        block_size = data.block_size or sizes["n_positions"]
        if block_size > sizes["n_positions"]:
            raise OptionError(f"--block-size is {block_size}: raise --n-positions, {sizes['n_positions']}, as well")
        with processes.first_one_first():
            if train.head:
                dataset = gather_labelled_data(files, tokenizer, data, train.head, block_size, train.seed, None)
                config: Any = make_bert(sizes, tokenizer, dataset.labels)
            else:
                dataset = gather_training_data(files, tokenizer, data, block_size, train.seed)
                config = make_config(sizes, tokenizer)
        with torch.device("meta"):  # counts parameters without memory for them
            parameters = new_model(config, train.head).num_parameters()
        target = choose_device(ModelOptions(device=device))
        plan = make_plan(
            config, parameters, dataset.sequences, dataset.length, train, target, fresh=True,
            processes=processes.count,
        )  # fmt: skip
        describe_plan(dataset.report, plan)
        if dry_run:
            return None
        job = Job(
            command="pretrain", name="a new BERT" if train.head else "a new GPT-2", files=files, folder=folder,
            recipe=run_folder.make_recipe(corpus, shape, data, plan.options) | {"device": device},
            facts=dataset.fingerprint | {"processes": processes.count, "command": line}, tokenizer=tokenizer,
            make_model=partial(_make_trainable, config, plan),
            dataset=dataset, plan=plan, block_size=block_size, data=data, callbacks=callbacks,
        )  # fmt: skip
        return execute(job, keep=partial(tokenizer.save_pretrained, folder / _TOKENIZER))


def new_model(config: Any, head: str | None) -> Any:
    """A model with random weights."""
    with LOADING:
        if not head:
            return GPT2LMHeadModel(config)
        kind = AutoModelForSequenceClassification if head == "classification" else AutoModelForQuestionAnswering
        return kind.from_config(config)  # type: ignore[no-untyped-call]


def _make_trainable(config: Any, plan: Plan) -> Any:
    model = new_model(config, plan.options.head).to(plan.device)
    set_training_mode(model, plan)
    return model


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
        texts = list(row_texts(corpus, data, train.head))
        tokenizer = train_wordpiece(texts, size.vocab_size or _vocabulary(size, sum(map(len, texts))))
    elif processes.rank == 0:
        tokenizer = train_tokenizer(corpus, size, data, train.seed)
    trained: PreTrainedTokenizerBase = processes.gather([tokenizer])[0]
    return trained


def _vocabulary(size: SizeOptions, characters: int) -> int:
    """One token for each 300 characters of the corpus at most: with more, the rarest would hardly be seen."""
    return max(512, min(_SIZES[size.size][-1], characters // 300))


def train_tokenizer(
    corpus: Corpora | Corpus, size: SizeOptions, data: DataOptions, seed: int
) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer, trained on the part of the corpus that the model will be trained on.

    Raises:
        HfkitError: the corpus does not consist of texts.
    """
    files = find_corpus(corpus, data)
    rows = np.array(
        [(number, content_of(piece.text), len(piece.text.encode())) for number, _, piece in _pieces(files, data)],
        np.int64,
    )
    if not len(rows):
        raise HfkitError("the corpus holds no text: there is nothing to learn")
    documents, contents, sizes = rows.T
    fraction = 0.0 if data.eval_file else data.eval_fraction
    held = hold_out_texts(documents, contents, sizes, fraction, seed)
    vocabulary = size.vocab_size or _vocabulary(size, int(sizes.sum()))
    console.note(f"training a tokenizer of {vocabulary:,} tokens")
    texts = (
        piece.text[: round(len(piece.text) * (1 - share))]
        for share, (*_, piece) in zip(held, _pieces(files, data), strict=True)
    )
    blank: Any = GPT2Tokenizer()
    tokenizer: PreTrainedTokenizerBase = blank.train_new_from_iterator(texts, vocabulary, show_progress=False)
    return tokenizer


def _pieces(files: Corpus, data: DataOptions) -> Iterator[tuple[int, bool, Piece]]:
    records = read_records(files, data)
    first = next(records, None)
    if not isinstance(first, Piece):
        raise HfkitError("a new model learns from texts, not from examples: pretrain on texts, then finetune on these")
    yield from number_documents(chain([first], records))  # type: ignore[arg-type]  # all records are of one kind


def shape_of(size: SizeOptions) -> dict[str, Any]:
    """The sizes by GPT-2's names; no dropout unless asked for.

    Raises:
        OptionError: they do not go together.
    """
    shape: dict[str, Any] = dict(zip(("n_layer", "n_embd", "n_head", "n_positions"), _SIZES[size.size], strict=False))
    shape |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    shape |= {name: value for name, value in set_fields(size).items() if name in shape}
    if shape["n_embd"] % shape["n_head"]:
        raise OptionError(f"--n-embd is {shape['n_embd']}: it must be a multiple of --n-head, {shape['n_head']}")
    return shape


def make_config(shape: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> GPT2Config:
    """GPT-2's configuration of these sizes."""
    end = tokenizer.eos_token_id
    return GPT2Config(**shape, vocab_size=len(tokenizer), bos_token_id=end, eos_token_id=end)


def row_texts(corpus: Corpora | Corpus, data: DataOptions, head: str) -> Iterable[str]:
    """All texts of the rows that a head is trained on."""
    if head == "classification":
        return [text for text, _ in classification_rows(corpus, data)]
    return [text for row in question_rows(corpus, data) for text in (row.question, row.context)]


_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # of BERT, in the order of their ids


def train_wordpiece(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerBase:
    """A lower-casing WordPiece tokenizer as BERT has it: [CLS] text [SEP], or [CLS] question [SEP] text [SEP]."""
    backend = BertTokenizer().backend_tokenizer
    texts = [backend.normalizer.normalize_str(text) for text in texts]
    words = {word for text in texts for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)}
    # The trainer numbers the letters inside of words in the order of a hash table, which differs from process to
    # process. Numbered beforehand, they always give the same vocabulary.
    letters = [f"##{letter}" for letter in sorted({letter for word in words for letter in word[1:]})]
    trainer = WordPieceTrainer(vocab_size=vocabulary, special_tokens=[*_SPECIAL, *letters], show_progress=False)
    trained = Tokenizer(WordPiece())
    trained.pre_tokenizer = backend.pre_tokenizer
    trained.train_from_iterator(texts, trainer)
    tokenizer: PreTrainedTokenizerBase = BertTokenizer(vocab=trained.get_vocab())
    return tokenizer


def make_bert(shape: dict[str, Any], tokenizer: PreTrainedTokenizerBase, labels: Iterable[str]) -> BertConfig:
    """BERT's configuration of the sizes that GPT-2 calls n_layer, n_embd, n_head and n_positions."""
    names: Any = dict(enumerate(labels))
    return BertConfig(
        vocab_size=len(tokenizer), num_hidden_layers=shape["n_layer"], hidden_size=shape["n_embd"],
        num_attention_heads=shape["n_head"], intermediate_size=4 * shape["n_embd"],
        max_position_embeddings=shape["n_positions"], hidden_dropout_prob=shape["resid_pdrop"],
        attention_probs_dropout_prob=shape["attn_pdrop"], pad_token_id=tokenizer.pad_token_id,
        **({"id2label": names, "label2id": {label: index for index, label in names.items()}} if names else {}),
    )  # fmt: skip
