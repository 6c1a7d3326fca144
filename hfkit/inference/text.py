"""Text to tokens and back: a prompt as ids that fit the model, and what tokens write into a text."""

import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hfkit.corpus.encoding import encode, language_token
from hfkit.corpus.templates import Task, task_of
from hfkit.errors import ContextLengthError, HfkitError, OptionError
from hfkit.models.architecture import context_length
from hfkit.models.wordpiece import starts_unspaced
from hfkit.options import GenerateOptions

_NEW_TOKENS = 100  # where the options say nothing
_BYTES: dict[str, int] = {sign: byte for byte, sign in bytes_to_unicode().items()}  # type: ignore[no-untyped-call]
Text = str | Mapping[str, Any]  # a mapping gives the fields of the template of a model that learned a task


@dataclass(frozen=True)
class Request:
    """A prompt that fits the model."""

    prompt: Text
    ids: list[int]
    new_tokens: int  # most that may be generated
    seed: int | None = None


Prompt = Text | Sequence[int] | Request


def list_texts(texts: Any, what: str) -> tuple[list[Any], bool]:
    """`texts` as a list, and whether it was a single one. HfkitError for what is neither a text nor several."""
    if isinstance(texts, str | Mapping | Request):
        return [texts], True
    if isinstance(texts, bytes | bytearray) or not isinstance(texts, Iterable):
        check_text(texts, what)
    return list(texts), False


def check_text(text: Any, what: str) -> None:
    """HfkitError unless `text` is a str or a mapping."""
    if not isinstance(text, str | Mapping):
        kind = type(text).__name__
        raise HfkitError(f"{what} is a str or a mapping of fields, not {kind} ({text!r:.60}): convert it")


def fit_prompt(
    prompt: Prompt, options: GenerateOptions, tokenizer: PreTrainedTokenizerBase, config: Any, name: str
) -> Request:
    """Encode `prompt` and check that it fits a model of this `config`. Needs no weights.

    Raises:
        HfkitError: prompt and new tokens are more than the model takes; the message has the numbers.
    """
    if isinstance(prompt, Request):
        return prompt
    if isinstance(prompt, list | tuple) and prompt and all(isinstance(token, int) for token in prompt):
        ids = list(prompt)
        text: Text = cast(str, tokenizer.decode(ids))
    else:
        check_text(prompt, "a prompt")
        text = cast(Text, prompt)
        ids = _encode(text, options, tokenizer, name)
    limit, wanted = context_length(config) or sys.maxsize, options.max_new_tokens
    if config.is_encoder_decoder:  # prompt and output have a context each
        ids = ids[-limit:] if options.truncate else ids
        if len(ids) > limit:
            message = f"the text has {len(ids)} tokens, {name} takes {limit}: shorten it, or --truncate"
            raise ContextLengthError(message)
        if wanted and wanted > limit:
            raise HfkitError(f"{name} writes at most {limit} tokens: lower --max-new-tokens ({wanted})")
        # A translation ends by itself and is about as long as the text.
        return Request(text, ids, wanted or min(max(_NEW_TOKENS, 2 * len(ids)), limit))
    if options.truncate:
        ids = _keep_end(ids, limit - (wanted or min(_NEW_TOKENS, limit // 2)), tokenizer.bos_token_id)
    room = limit - len(ids)
    if room < (wanted or 1):
        new = f"{wanted} new ones" if wanted else "a new one"
        raise ContextLengthError(
            f"{len(ids)} tokens of prompt and {new} do not fit {name}, which takes {limit} together: "
            "shorten the prompt, lower --max-new-tokens, or --truncate"
        )
    return Request(text, ids, wanted or min(_NEW_TOKENS, room))


def chosen_task(options: GenerateOptions, tokenizer: PreTrainedTokenizerBase) -> Task | None:
    """The task whose template a prompt is put into; None without one, or under --raw."""
    return None if options.raw else task_of(tokenizer)


def _encode(text: Text, options: GenerateOptions, tokenizer: PreTrainedTokenizerBase, name: str) -> list[int]:
    """Token ids of a prompt, in the template of the model's task."""
    task = chosen_task(options, tokenizer)
    if isinstance(text, Mapping) and not task:
        raise HfkitError("no prompt: write an object with the key 'prompt' and a text")
    ids = encode(task.fill(text) if task else str(text), tokenizer, name)
    if not options.src_lang:
        return ids
    # Set as tokenizer.src_lang, the language would hold for all threads that use this tokenizer.
    language = language_token(tokenizer, options.src_lang)
    usual = tokenizer.convert_tokens_to_ids(getattr(tokenizer, "src_lang", None) or "")
    if usual not in ids:
        raise OptionError(f"{name} does not mark the language of a text: leave --src-lang out")
    return [language if token == usual else token for token in ids]


def _keep_end(ids: list[int], room: int, bos: int | None) -> list[int]:
    """The last `room` of `ids`, after the BOS token if they begin with it."""
    if len(ids) <= room or room < 1:
        return ids
    return [bos, *ids[len(ids) - room + 1 :]] if ids[0] == bos and room > 1 else ids[-room:]


def ends_in_space(request: Request, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the last token is a lone space. A byte-level model rarely saw that: its words begin with their space."""
    return is_byte_level(tokenizer) and tokenizer.convert_ids_to_tokens(request.ids[-1:]) == ["Ġ"]


def is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether tokens are written in GPT-2's alphabet, one sign for each byte."""
    return "ByteLevel" in _decoder_of(tokenizer)


def _decoder_of(tokenizer: PreTrainedTokenizerBase) -> str:
    return str(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", ""))


def special_token_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Tokens that are left out of a text, by name."""
    added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


def token_writer(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], bytes]:
    """A function from a token, as the vocabulary spells it, to the bytes that it writes into a text."""
    byte_level, word_pieces = is_byte_level(tokenizer), "WordPiece" in _decoder_of(tokenizer)
    drops_spaces = "Replace" in _decoder_of(tokenizer)  # see models/wordpiece.py

    def write(word: str) -> bytes:
        if byte_level and all(sign in _BYTES for sign in word):
            return bytes(_BYTES[sign] for sign in word)
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", word):  # SentencePiece's
            return bytes.fromhex(byte[1])
        if word_pieces:
            is_joined = drops_spaces and starts_unspaced(word)
            return (word[2:] if word.startswith("##") else word if is_joined else f" {word}").encode()
        return word.replace("▁", " ").encode()

    return write


class Detokenizer:
    """Token ids to text piece by piece. The pieces joined are the text of all, and no piece is ever taken back."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: Sequence[int] = ()) -> None:
        """context: the tokens before the first one that is pushed.

        They decide how it is written: SentencePiece drops the space of a text's first word, and reads a run of byte
        tokens as one.
        """
        self._tokenizer = tokenizer
        self._ids = list(context)
        self._start, self._read = 0, len(self._ids)

    def push(self, *tokens: int) -> str:
        """The text that `tokens` complete; empty in the middle of a character."""
        self._ids += tokens
        return self._advance(final=False)

    @property
    def unfinished(self) -> str:
        """The text that `push` has not returned yet, as `finish` would."""
        return self._decode(self._start, len(self._ids))[len(self._decode(self._start, self._read)) :]

    def finish(self) -> str:
        """What is left: the bytes of an unfinished character, as U+FFFD."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        before, now = self._decode(self._start, self._read), self._decode(self._start, len(self._ids))
        if len(now) <= len(before) or (now.endswith("\ufffd") and not final):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return now[len(before) :]

    def _decode(self, start: int, end: int) -> str:
        ids = self._ids[start:end]
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return cast(str, text)  # of a flat list


def cut_at_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """`text` up to the first stop string in it, and whether there was one."""
    starts = [start for stop in stops if (start := text.find(stop)) >= 0]
    return (text[: min(starts)], True) if starts else (text, False)


def held_back(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of `text` may turn out to begin a stop string."""
    size = 0
    for stop in stops:
        # Only places with its first character are looked at: this runs at every token, for stops of any length.
        start = text.find(stop[:1], max(0, len(text) - len(stop) + 1))
        while start >= 0 and not stop.startswith(text[start:]):
            start = text.find(stop[:1], start + 1)
        size = max(size, len(text) - start if start >= 0 else 0)
    return size


def repeats(tokens: Sequence[int], longest: int = 40, least: int = 24) -> bool:
    """Whether `tokens` end in a loop: a run of at most `longest` three times or more, `least` tokens in all."""
    for period in range(1, longest + 1):
        span = max(3 * period, least)
        if len(tokens) >= span and all(tokens[-i] == tokens[-i - period] for i in range(1, span - period + 1)):
            return True
    return False
