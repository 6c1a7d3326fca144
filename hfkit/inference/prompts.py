"""A prompt as the token ids that a model is given, once it is certain that they fit the model."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from hfkit.corpus.encoding import encode, language_token
from hfkit.corpus.templates import task_of
from hfkit.errors import HfkitError, OptionError
from hfkit.inference.vocabulary import is_byte_level
from hfkit.models.architecture import context_length
from hfkit.options import GenerateOptions

_NEW_TOKENS = 100  # where the options say nothing
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
        raise _wrong_type(texts, what)
    return list(texts), False


def _wrong_type(value: Any, what: str) -> HfkitError:
    kind = type(value).__name__
    return HfkitError(f"{what} is a str or a mapping of fields, not {kind} ({value!r:.60}): convert it")


def check_text(text: Any, what: str) -> None:
    """HfkitError unless `text` is a str or a mapping."""
    if not isinstance(text, str | Mapping):
        raise _wrong_type(text, what)


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
    limit = context_length(config) or sys.maxsize
    fit = _fit_encoder if config.is_encoder_decoder else _fit_decoder
    ids, new_tokens = fit(ids, limit, options, tokenizer.bos_token_id, name)
    return Request(text, ids, new_tokens)


def _encode(text: Text, options: GenerateOptions, tokenizer: PreTrainedTokenizerBase, name: str) -> list[int]:
    """Token ids of a prompt, in the template of the model's task."""
    task = None if options.raw else task_of(tokenizer)
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


def _fit_encoder(
    ids: list[int], limit: int, options: GenerateOptions, bos: int | None, name: str
) -> tuple[list[int], int]:
    """Ids and new tokens for a model with an encoder, where prompt and output have a context each."""
    if options.truncate:
        ids = ids[-limit:]
    if len(ids) > limit:
        raise HfkitError(f"the text has {len(ids)} tokens, {name} takes {limit}: shorten it, or --truncate")
    wanted = options.max_new_tokens
    if wanted and wanted > limit:
        raise HfkitError(f"{name} writes at most {limit} tokens: lower --max-new-tokens ({wanted})")
    # A translation ends by itself and is about as long as the text.
    return ids, wanted or min(max(_NEW_TOKENS, 2 * len(ids)), limit)


def _fit_decoder(
    ids: list[int], limit: int, options: GenerateOptions, bos: int | None, name: str
) -> tuple[list[int], int]:
    """Ids and new tokens for a model that continues its prompt."""
    wanted = options.max_new_tokens
    if options.truncate:
        ids = _keep_end(ids, limit - (wanted or min(_NEW_TOKENS, limit // 2)), bos)
    room = limit - len(ids)
    if room < (wanted or 1):
        new = f"{wanted} new ones" if wanted else "a new one"
        raise HfkitError(
            f"{len(ids)} tokens of prompt and {new} do not fit {name}, which takes {limit} together: "
            "shorten the prompt, lower --max-new-tokens, or --truncate"
        )
    return ids, wanted or min(_NEW_TOKENS, room)


def ends_in_space(request: Request, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the last token is a lone space. A byte-level model rarely saw that: its words begin with their space."""
    return is_byte_level(tokenizer) and tokenizer.convert_ids_to_tokens(request.ids[-1:]) == ["Ġ"]


def _keep_end(ids: list[int], room: int, bos: int | None) -> list[int]:
    """The last `room` of `ids`, after the BOS token if they begin with it."""
    if len(ids) <= room or room < 1:
        return ids
    return [bos, *ids[len(ids) - room + 1 :]] if ids[0] == bos and room > 1 else ids[-room:]
