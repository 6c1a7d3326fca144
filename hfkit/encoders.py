"""A new BERT with a head: its WordPiece tokenizer and its sizes, for rows that are labelled or asked about."""

from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    BertConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from hfkit.corpus.documents import Corpora
from hfkit.corpus.labelled import classification_rows, question_rows
from hfkit.options import DataOptions

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
