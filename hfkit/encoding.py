"""A prompt as the token ids that a model is given, once it is sure that they fit it."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from hfkit.corpus.encoding import encode, language_token
from hfkit.corpus.templates import task_of
from hfkit.errors import HfkitError
from hfkit.models.architecture import context_length
from hfkit.options import GenerateOptions

_NEW_TOKENS = 100
Prompt = str | Mapping[str, Any] | Sequence[int]  # a row where the model's task has several fields


@dataclass(frozen=True)
class Request:
    """A prompt that fits the model."""

    prompt: str | Mapping[str, Any]
    ids: list[int]
    new_tokens: int  # most that may be generated
    seed: int | None = None


def prepare(
    prompt: Prompt, options: GenerateOptions, tokenizer: PreTrainedTokenizerBase, config: Any, name: str
) -> Request:
    """Encode `prompt` and see that it fits a model of this `config`; needs no weights.

    Raises:
        HfkitError: prompt and new tokens are more than the model takes; the message has the numbers.
    """
    if isinstance(prompt, str | Mapping):
        text: str | Mapping[str, Any] = prompt
        task = None if options.raw else task_of(tokenizer)
        if isinstance(prompt, Mapping) and not task:
            raise HfkitError("no prompt: write an object with the key 'prompt' and a text")
        if options.src_lang:
            language_token(tokenizer, options.src_lang)
            tokenizer.src_lang = options.src_lang
        ids = encode(task.fill(prompt) if task else str(prompt), tokenizer, name)
    else:
        text, ids = tokenizer.decode(prompt), list(prompt)
    limit, wanted = context_length(config) or sys.maxsize, options.max_new_tokens
    if config.is_encoder_decoder:  # prompt and output have a context each
        if options.truncate:
            ids = ids[-limit:]
        if len(ids) > limit:
            raise HfkitError(f"the text has {len(ids)} tokens, {name} takes {limit}: shorten it, or --truncate")
        if wanted and wanted > limit:
            raise HfkitError(f"{name} writes at most {limit} tokens: lower --max-new-tokens ({wanted})")
        # A translation ends by itself, and is about as long as the text.
        return Request(text, ids, wanted or min(max(_NEW_TOKENS, 2 * len(ids)), limit))
    if options.truncate:
        ids = _end(ids, limit - (wanted or min(_NEW_TOKENS, limit // 2)), tokenizer.bos_token_id)
    room = limit - len(ids)
    if room < (wanted or 1):
        new = f"{wanted} new ones" if wanted else "a new one"
        raise HfkitError(
            f"{len(ids)} tokens of prompt and {new} do not fit {name}, which takes {limit} together: "
            "shorten the prompt, lower --max-new-tokens, or --truncate"
        )
    return Request(text, ids, wanted or min(_NEW_TOKENS, room))


def _end(ids: list[int], room: int, bos: int | None) -> list[int]:
    """The last `room` of `ids`, behind the token that begins a text if they have it."""
    if len(ids) <= room or room < 1:
        return ids
    return [bos, *ids[len(ids) - room + 1 :]] if ids[0] == bos and room > 1 else ids[-room:]
