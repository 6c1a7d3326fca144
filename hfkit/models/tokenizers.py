"""Read a tokenizer as it was saved. transformers would pick its class by the type of the model instead."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, BertTokenizer, GPT2Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hfkit.console import note
from hfkit.models.folder import read_json
from hfkit.models.sources import ModelFiles

# It goes through everything in which kinds of tokenizers differ: case, spaces, digits, accents, unknown signs.
_PROBE = "Hello, World! It's 2024:  the CAT's\n\n\tdéjà-vu 你好 <|endoftext|>"


def read_tokenizer(source: ModelFiles) -> PreTrainedTokenizerBase:
    """The tokenizer in the folder of `source`; that of an adapter, if it has one, else of its base.

    GPT-2's is a `GPT2Tokenizer`, where tokenizer.json, config.json and tokenizer_config.json say nothing else.
    """
    folder, options = source.tokenizer_folder, {"trust_remote_code": source.trust_remote_code}
    if source.gguf and folder == source.folder:
        return AutoTokenizer.from_pretrained(folder, gguf_file=source.gguf, **options)
    file = folder / "tokenizer_config.json"
    settings = read_json(file, source.name) if file.is_file() else {}
    declared = settings.get("tokenizer_class") or source.config.get("tokenizer_class")
    kind: Any = AutoTokenizer
    if source.config.get("model_type") == "gpt2" and declared in (None, "GPT2Tokenizer", "GPT2TokenizerFast"):
        names = {path.name for path in folder.iterdir()}
        if declared is None and "vocab.txt" in names and not names & {"tokenizer.json", "vocab.json"}:
            note(f"{source.name}: vocab.txt is read as the vocabulary of a BertTokenizer, as nothing says what it is")
            kind = BertTokenizer
        else:
            kind = GPT2Tokenizer
    tokenizer: PreTrainedTokenizerBase = kind.from_pretrained(folder, **options)
    # GPT2Tokenizer rebuilds a byte-level BPE from the vocabulary, whatever else tokenizer.json says.
    is_set = settings.get("add_prefix_space") or settings.get("add_bos_token")  # these change what the file says
    if isinstance(tokenizer, GPT2Tokenizer) and not is_set and _differs(tokenizer, folder):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    if tokenizer.is_fast:
        clear_limits(tokenizer.backend_tokenizer)
    return tokenizer


def clear_limits(backend: Tokenizer) -> None:
    """Turn off truncation and padding, as the first call does: there the change fails while another thread encodes."""
    backend.no_truncation()
    backend.no_padding()


def _differs(tokenizer: PreTrainedTokenizerBase, folder: Path) -> bool:
    file = folder / "tokenizer.json"
    if not file.is_file():
        return False
    clear_limits(backend := Tokenizer.from_file(str(file)))
    return bool(backend.encode(_PROBE).ids != tokenizer(_PROBE)["input_ids"])
