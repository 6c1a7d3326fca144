"""Pretraining: a tokenizer and a model from nothing, trained as `finetune` trains.

The vocabulary is GPT-2's byte-level BPE, with whole characters where that matters, or BERT's WordPiece.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE, WordPiece
from tokenizers.pre_tokenizers import Split
from tokenizers.trainers import BpeTrainer, WordPieceTrainer
from transformers import AutoTokenizer, BertTokenizer, GPT2Tokenizer, PreTrainedTokenizerBase, TrainerCallback
from transformers.convert_slow_tokenizer import bytes_to_unicode

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
from hfkit.training.plan import Job, gather, make_plan
from hfkit.training.runs import Run, run_job

_TOKENIZER = f"{run_folder.CHECKPOINTS}/tokenizer"  # kept for when the run is resumed
_END = "<|endoftext|>"
# How GPT-2 divides a text before it merges bytes.
_WORDS = Regex(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


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
    if train.resume and not train.overwrite and run_folder.is_begun(folder):
        kept = folder / _TOKENIZER  # a finished run has it beside the model
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(kept if kept.is_dir() else folder)
    else:
        tokenizer = _train_tokenizer_once(files, size, data, train)
    shape = shape_of(size)
    block_size = data.block_size or shape["n_positions"]
    if block_size > shape["n_positions"]:
        raise OptionError(f"--block-size is {block_size}: raise --n-positions, {shape['n_positions']}, as well")
    dataset = gather(files, tokenizer, data, train, block_size, None)
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


def _train_tokenizer_once(
    corpus: Corpus, size: SizeOptions, data: DataOptions, train: TrainOptions
) -> PreTrainedTokenizerBase:
    """A new tokenizer, trained in the first process and sent to the others."""
    tokenizer = None
    if processes.rank == 0 and train.head:
        if train.head == "classification":
            texts = [text for text, _ in classification_rows(corpus, data)]
        else:
            texts = [text for row in question_rows(corpus, data) for text in (row.question, row.context)]
        tokenizer = train_wordpiece(texts, size.vocab_size or _vocabulary(size, sum(map(len, texts))))
    elif processes.rank == 0:
        tokenizer = train_tokenizer(corpus, size, data, train.seed)
    return cast(PreTrainedTokenizerBase, processes.gather([tokenizer])[0])


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
    if sizes.sum() > 2 * lengths.sum():
        return train_characters(texts, vocabulary)
    blank: Any = GPT2Tokenizer()
    return cast(PreTrainedTokenizerBase, blank.train_new_from_iterator(texts, vocabulary, show_progress=False))


def _pieces(files: Corpus, data: DataOptions) -> Iterator[tuple[int, bool, Piece]]:
    records = read_records(files, data)
    first = next(records, None)
    if not isinstance(first, Piece):
        raise HfkitError("a new model learns from texts, not from examples: pretrain on texts, then finetune on these")
    yield from number_documents(chain([first], records))  # type: ignore[arg-type]  # all records are of one kind


def train_characters(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerBase:
    """Byte-level BPE that first merges the bytes of each character, and then the most frequent pairs of characters.

    A model that learns from such tokens hardly ever writes a part of a character. Characters take three quarters of
    the vocabulary at most; what is rarer is spelled byte by byte.
    """
    counts: Counter[str] = Counter()

    def counted() -> Iterator[str]:
        for text in texts:
            counts.update(text)
            yield text

    trained = Tokenizer(BPE())
    trained.pre_tokenizer = Split(_WORDS, "isolated")
    trainer = BpeTrainer(vocab_size=vocabulary, limit_alphabet=3 * vocabulary // 4, show_progress=False)
    trained.train_from_iterator(counted(), trainer)
    model = json.loads(trained.to_str())["model"]
    signs: dict[int, str] = bytes_to_unicode()  # type: ignore[no-untyped-call]

    def spell(text: str) -> str:
        return "".join(signs[byte] for byte in text.encode())

    words = [spell(character) for character, _ in counts.most_common() if character in model["vocab"]]
    pairs = [(word[:end], word[end]) for word in words for end in range(1, len(word))]
    pairs += [(spell(left), spell(right)) for left, right in model["merges"]]
    tokens, merges = dict.fromkeys([_END, *sorted(signs.values())]), []
    for left, right in pairs:
        if left + right not in tokens and len(tokens) < vocabulary:
            tokens[left + right] = None
            merges.append((left, right))
    vocab = {token: index for index, token in enumerate(tokens)}
    return cast(PreTrainedTokenizerBase, GPT2Tokenizer(vocab=vocab, merges=cast(Any, merges)))


def train_wordpiece(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerBase:
    """A lower-casing WordPiece tokenizer as BERT has it: [CLS] text [SEP], or [CLS] question [SEP] text [SEP]."""
    backend = BertTokenizer().backend_tokenizer
    texts = [backend.normalizer.normalize_str(text) for text in texts]
    words = {word for text in texts for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)}
    # The trainer numbers the letters inside of words in the order of a hash table, which differs from process to
    # process. Numbered beforehand, they always give the same vocabulary.
    letters = [f"##{letter}" for letter in sorted({letter for word in words for letter in word[1:]})]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]  # in the order of their ids
    trainer = WordPieceTrainer(vocab_size=vocabulary, special_tokens=[*special, *letters], show_progress=False)
    trained = Tokenizer(WordPiece())
    trained.pre_tokenizer = backend.pre_tokenizer
    trained.train_from_iterator(texts, trainer)
    return cast(PreTrainedTokenizerBase, BertTokenizer(vocab=trained.get_vocab()))
