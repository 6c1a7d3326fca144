"""From `GenerateOptions` to what `model.generate` takes."""

import copy
import functools
from typing import Any

import torch
from transformers import GenerationConfig, WatermarkingConfig

from hfkit.corpus.encoding import language_token
from hfkit.corpus.templates import task_of
from hfkit.declaration import set_fields
from hfkit.errors import OptionError
from hfkit.models.loading import LanguageModel, load
from hfkit.options import SAMPLING, GenerateOptions

# Options that GenerationConfig has by another name, in another form, or not at all.
OWN = ("stop_strings", "bad_words", "sequence_bias", "negative_prompt", "watermark", "assistant_model",
       "novel", "novel_words", "src_lang", "tgt_lang", "raw", "truncate", "seed", "num_return_sequences")  # fmt: skip


def generation_config(lm: LanguageModel, options: GenerateOptions, new_tokens: int) -> GenerationConfig:
    """The model's own generation config with `options` on top."""
    config = copy.deepcopy(lm.model.generation_config)
    for name, value in set_fields(options).items():
        if name not in OWN:
            setattr(config, name, value)
    config.max_length, config.max_new_tokens, config.stop_strings = None, new_tokens, None
    config.num_return_sequences = 1
    config.do_sample = draws(lm, options)
    if not config.do_sample:
        for name in SAMPLING:  # transformers warns of each of them
            setattr(config, name, None)
    ends = sorted(end_tokens(lm))
    config.eos_token_id = ends or None
    if config.pad_token_id is None:
        config.pad_token_id = lm.tokenizer.pad_token_id if lm.tokenizer.pad_token_id is not None else (ends or [0])[0]
    if options.bad_words:
        config.bad_words_ids = [ids for word in options.bad_words for ids in _spellings(lm, word)]
    if options.sequence_bias:
        config.sequence_bias = {tuple(ids): bias for text, bias in options.biases() for ids in _spellings(lm, text)}
    if options.tgt_lang:
        config.forced_bos_token_id = language_token(lm.tokenizer, options.tgt_lang)
    if options.watermark:
        config.watermarking_config = WatermarkingConfig()
    return config


def generate_arguments(lm: LanguageModel, options: GenerateOptions, rows: int, length: int) -> dict[str, Any]:
    """What `generate` takes beside its config; for `rows` that come to be `length` tokens long."""
    arguments: dict[str, Any] = {}
    if options.negative_prompt:
        ids = torch.tensor([lm.tokenizer(options.negative_prompt)["input_ids"]] * rows, device=lm.model.device)
        arguments["negative_prompt_ids"] = ids
    if options.assistant_model:
        assistant = _assistant(options.assistant_model, str(lm.model.device), str(lm.model.dtype))
        if assistant.context and assistant.context < length:
            raise IndexError  # as it would be in the middle of it
        # transformers looks for it here, not in the config of the model that is assisted.
        if options.num_assistant_tokens:
            assistant.model.generation_config.num_assistant_tokens = options.num_assistant_tokens
        arguments["assistant_model"] = assistant.model
        if assistant.tokenizer.get_vocab() != lm.tokenizer.get_vocab():
            arguments["assistant_tokenizer"] = assistant.tokenizer
    return arguments


@functools.lru_cache(maxsize=1)
def _assistant(name: str, device: str, dtype: str) -> LanguageModel:
    return load(name, device=device, dtype=dtype.removeprefix("torch."))


def beams(lm: LanguageModel, options: GenerateOptions) -> int:
    """How many beams there are; translators often bring a number of their own."""
    return options.num_beams or lm.model.generation_config.num_beams or 1


def is_plain(lm: LanguageModel, options: GenerateOptions) -> bool:
    """Whether the plain loop does it, token by token; beams and speculation run in loops of their own."""
    return beams(lm, options) == 1 and not options.prompt_lookup_num_tokens and not options.assistant_model


def counts_ngrams(lm: LanguageModel, options: GenerateOptions) -> bool:
    """Whether padding could be taken for a repetition. (A penalty is blind to it: rows are padded with their own.)"""
    size = options.no_repeat_ngram_size
    return bool(lm.model.generation_config.no_repeat_ngram_size if size is None else size)


def draws(lm: LanguageModel, options: GenerateOptions) -> bool:
    """Whether tokens are drawn at random: by default yes, but a model with an encoder follows its own config."""
    if options.temperature == 0:
        return False
    if options.do_sample is not None:
        return options.do_sample
    if any(getattr(options, name) is not None for name in SAMPLING):
        return True
    if lm.model.config.is_encoder_decoder:
        return bool(lm.model.generation_config.do_sample)
    return beams(lm, options) == 1


def end_tokens(lm: LanguageModel) -> set[int]:
    """The tokens that end a text."""
    for eos in (lm.model.generation_config.eos_token_id, lm.tokenizer.eos_token_id):
        if eos is not None:
            return set(eos) if isinstance(eos, list) else {eos}
    return set()


def stops(lm: LanguageModel, options: GenerateOptions) -> list[str]:
    """The strings that end a text."""
    given = options.stop_strings or lm.model.generation_config.stop_strings or []
    if not given and not options.raw and (task := task_of(lm.tokenizer)):
        return [task.end]
    return [given] if isinstance(given, str) else list(given)


def check_controls(lm: LanguageModel, options: GenerateOptions) -> None:
    """Refuse what transformers would notice late, or never."""
    samples, most = options.num_return_sequences or 1, beams(lm, options)
    if samples > 1 and not draws(lm, options) and samples > most:
        way = f"it must be at most --num-beams ({most})" if most > 1 else "greedy decoding has one result, so sample"
        raise OptionError(f"--num-return-sequences is {samples}: {way}")
    if options.novel and not (draws(lm, options) and is_plain(lm, options)):
        raise OptionError("--novel draws again what copies: sample, without beams and speculation")
    size = lm.model.get_input_embeddings().weight.shape[0]
    for name in ("suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id"):
        value = getattr(options, name)
        if any(not 0 <= token < size for token in ([value] if isinstance(value, int) else value or [])):
            raise OptionError(f"--{name.replace('_', '-')} takes token ids from 0 to {size - 1}")


def _spellings(lm: LanguageModel, text: str) -> list[list[int]]:
    """Token ids of `text` as it stands and after a space: to a byte-level tokenizer these are different words."""
    spellings = []
    for variant in (text, " " + text.lstrip(" ")):
        ids = lm.tokenizer(variant, add_special_tokens=False)["input_ids"]
        if ids and ids not in spellings:
            spellings.append(ids)
    return spellings
