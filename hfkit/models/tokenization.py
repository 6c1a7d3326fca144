"""The tokenizer of a model as it was saved, and GPT-2 with the vocabulary of BERT, as most Chinese models have it."""

import re
import tempfile
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Regex, Tokenizer, decoders, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hfkit.console import note
from hfkit.errors import HfkitError
from hfkit.models.folder import ModelFiles, read_json
from hfkit.models.gguf_import import unpack_tokenizer

# A text on which kinds of tokenizers differ: case, spaces, digits, accents, unknown signs.
_PROBE = "Hello, World! It's 2024:  the CAT's\n\n\tdéjà-vu 你好 <|endoftext|>"
# Characters that no space stands before or after: Chinese ones, quotation marks, dashes, full-width punctuation.
_UNSPACED = r"[\u2014\u2018-\u201d\u2026\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef]"
starts_unspaced = re.compile(_UNSPACED).match


def read_tokenizer(source: ModelFiles) -> PreTrainedTokenizerBase:
    """The tokenizer as it was saved. transformers would pick its class by the type of the model instead.

    GPT-2's is a `GPT2Tokenizer`, where tokenizer.json, config.json and tokenizer_config.json say nothing else.
    """
    folder, options = source.tokenizer_folder, {"trust_remote_code": source.trust_remote_code}
    if source.gguf and folder == source.folder:
        with tempfile.TemporaryDirectory() as place:
            if unpacked := unpack_tokenizer(source, Path(place)):
                return read_tokenizer(unpacked)
        return transformers.AutoTokenizer.from_pretrained(folder, gguf_file=source.gguf, **options)
    file = folder / "tokenizer_config.json"
    settings = read_json(file, source.name) if file.is_file() else {}
    declared = settings.get("tokenizer_class") or source.config.get("tokenizer_class")
    kind: Any = transformers.AutoTokenizer
    if source.config.get("model_type") == "gpt2" and declared in (None, "GPT2Tokenizer", "GPT2TokenizerFast"):
        names = {path.name for path in folder.iterdir()}
        if declared is None and "vocab.txt" in names and not names & {"tokenizer.json", "vocab.json"}:
            note(f"{source.name}: vocab.txt is read as the vocabulary of a BertTokenizer, as nothing says what it is")
            kind = transformers.BertTokenizer
        else:
            kind = transformers.GPT2Tokenizer
    tokenizer: PreTrainedTokenizerBase = kind.from_pretrained(folder, **options)
    if source.config.get("model_type") == "gpt2" and isinstance(tokenizer, transformers.BertTokenizer):
        tokenizer = make_causal(tokenizer)
    # GPT2Tokenizer rebuilds a byte-level BPE from the vocabulary, whatever else tokenizer.json says.
    is_set = settings.get("add_prefix_space") or settings.get("add_bos_token")  # these change what the file says
    if isinstance(tokenizer, transformers.GPT2Tokenizer) and not is_set and _differs(tokenizer, folder):
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    if tokenizer.is_fast:
        _clear_limits(tokenizer.backend_tokenizer)
    return tokenizer


def _clear_limits(backend: Tokenizer) -> None:
    """Turn off truncation and padding, as the first call does: there the change fails while another thread encodes."""
    backend.no_truncation()
    backend.no_padding()


def _differs(tokenizer: PreTrainedTokenizerBase, folder: Path) -> bool:
    """Whether a tokenizer gives other tokens than the tokenizer.json that it was made from."""
    if not (file := folder / "tokenizer.json").is_file():
        return False
    _clear_limits(backend := Tokenizer.from_file(str(file)))
    return bool(backend.encode(_PROBE).ids != tokenizer(_PROBE)["input_ids"])


def check_vocabulary(source: ModelFiles, tokenizer: PreTrainedTokenizerBase, size: Any) -> None:
    """Raise HfkitError if a tokenizer has a token for which a model of this vocabulary `size` has no embedding."""
    count = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))
    if isinstance(size, int) and count > size:
        where = source.tokenizer_folder
        raise HfkitError(f"the tokenizer has {count} tokens, the model {size} ({where}): use the model's own")


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
    """Set the tokens that begin and end a text where the settings of a model have those of a larger vocabulary.

    They do where config.json names none: transformers then takes OpenAI's. size: of the model's vocabulary.
    """
    for settings in filter(None, (model.config, getattr(model, "generation_config", None))):
        if isinstance(settings.eos_token_id, int) and settings.eos_token_id >= size:
            settings.bos_token_id, settings.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
