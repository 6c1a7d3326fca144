"""GPT-2 with the vocabulary of BERT, as most Chinese models have it: [CLS] begins a text, [SEP] ends it."""

import re
from typing import Any

from tokenizers import Regex, decoders, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

# Characters that no space stands before or after: Chinese ones, quotation marks, dashes, full-width punctuation.
_UNSPACED = r"[\u2014\u2018-\u201d\u2026\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef]"
starts_unspaced = re.compile(_UNSPACED).match


def make_causal(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The same tokenizer for a model that continues texts.

    BERT's own ends every prompt with [SEP], and reads 我爱你 back as 我 爱 你. The class is another one because a
    `BertTokenizer` does not read what is changed here from its files.
    """
    backend = tokenizer.backend_tokenizer
    spaces = decoders.Replace(Regex(f"(?<={_UNSPACED}) | (?={_UNSPACED})"), "")
    backend.decoder = decoders.Sequence([decoders.WordPiece(cleanup=False), decoders.Fuse(), spaces])
    begin, end = str(tokenizer.cls_token), str(tokenizer.sep_token)
    special = [(begin, tokenizer.cls_token_id)]
    backend.post_processor = processors.TemplateProcessing(f"{begin} $A", special_tokens=special)
    names = {"bos_token": begin, "eos_token": end, **tokenizer.special_tokens_map}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)  # type: ignore[no-untyped-call]


def correct_ends(model: Any, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    """Take BOS and EOS from the tokenizer where a model's settings name an EOS outside of its vocabulary.

    transformers fills in GPT-2's 50256 where config.json names none. size: of the model's vocabulary.
    """
    for settings in filter(None, (model.config, getattr(model, "generation_config", None))):
        if isinstance(settings.eos_token_id, int) and settings.eos_token_id >= size:
            settings.bos_token_id, settings.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
