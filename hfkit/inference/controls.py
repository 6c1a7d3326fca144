"""From `GenerateOptions` to what `model.generate` takes. Nothing here changes a model, a tokenizer or a config."""

import copy
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, WatermarkingConfig

from hfkit.console import note_once
from hfkit.corpus.encoding import language_token
from hfkit.declaration import flag_of, set_fields, unescape
from hfkit.errors import OptionError
from hfkit.inference.decoding import BannedTexts, Endings
from hfkit.inference.text import chosen_task, special_token_ids
from hfkit.models.loading import LanguageModel, vocabulary_size
from hfkit.options import SAMPLING, GenerateOptions

# Options that GenerationConfig has by another name, in another form, or not at all.
NOT_IN_CONFIG = (
    "stop_strings bad_words sequence_bias negative_prompt watermark assistant_model "
    "novel novel_words src_lang tgt_lang raw truncate seed num_return_sequences"
).split()
# Fields of a model's own generation_config.json that hfkit decides itself: the length, what comes back, where keys and
# values are kept, and which of transformers' decoding loops runs. Options that are set are applied after these.
_UNSET = (
    "max_length stop_strings use_mtp prompt_lookup_num_tokens assistant_early_exit assistant_ensemble_weight "
    "speculation_type penalty_alpha dola_layers constraints cache_implementation cache_config max_cache_len "
    "compile_config force_words_ids num_beam_groups diversity_penalty is_assistant token_healing num_return_sequences "
    "return_dict_in_generate output_scores output_logits output_attentions output_hidden_states"
).split()


def generation_config(lm: LanguageModel, options: GenerateOptions, new_tokens: int) -> GenerationConfig:
    """The model's own generation config with `options` on top.

    Where a field is None it is off: run `generate` on a copy of the model whose own config this is, else transformers
    fills the field from the model's.
    """
    config = copy.deepcopy(_own_config(lm))
    for name in _UNSET:
        setattr(config, name, None)
    for name, value in set_fields(options).items():
        if name not in NOT_IN_CONFIG:
            setattr(config, name, value)
    config.max_new_tokens = new_tokens
    config.do_sample = is_sampled(lm, options)
    if not config.do_sample:
        for name in SAMPLING:  # transformers warns about each of them
            setattr(config, name, None)
    elif config.temperature == 0:  # the model's own, where the options ask for sampling all the same
        config.temperature = None
    ends = sorted(endings(lm, options).tokens)
    config.eos_token_id = ends or None
    if config.pad_token_id is None:
        config.pad_token_id = lm.tokenizer.pad_token_id if lm.tokenizer.pad_token_id is not None else (ends or [0])[0]
    if options.sequence_bias:
        # Each text as it is and after a space: to a byte-level tokenizer these are different words.
        config.sequence_bias = {
            tuple(ids): bias
            for text, bias in options.biases()
            for variant in (_meaning(text, options), " " + _meaning(text, options).lstrip(" "))
            if (ids := lm.tokenizer(variant, add_special_tokens=False)["input_ids"])
        }
    if options.tgt_lang:
        config.forced_bos_token_id = language_token(lm.tokenizer, options.tgt_lang)
    if options.watermark:
        config.watermarking_config = WatermarkingConfig()
    return config


def _meaning(text: str, options: GenerateOptions) -> str:
    """What a text in `options` means."""
    return text if options.is_literal else unescape(text)


def _own_config(lm: LanguageModel) -> GenerationConfig:
    config: GenerationConfig = lm.model.generation_config
    return config


def generate_arguments(lm: LanguageModel, options: GenerateOptions, rows: int, start: int) -> dict[str, Any]:
    """What `generate` takes in addition to its config, for `rows` whose first new token is at position `start`."""
    arguments: dict[str, Any] = {}
    if options.negative_prompt:
        ids = torch.tensor([lm.tokenizer(options.negative_prompt)["input_ids"]] * rows, device=lm.model.device)
        arguments["negative_prompt_ids"] = ids
    if options.bad_words:
        banned = BannedTexts(lm.tokenizer, [_meaning(text, options) for text in options.bad_words], start)
        arguments["logits_processor"] = LogitsProcessorList([banned])
    return arguments


def beams(lm: LanguageModel, options: GenerateOptions) -> int:
    """The number of beams. Translators often bring one of their own."""
    return options.num_beams or _own_config(lm).num_beams or 1


def is_plain(lm: LanguageModel, options: GenerateOptions) -> bool:
    """Whether the plain loop, token by token, can run these options. Beams and speculation have loops of their own."""
    return beams(lm, options) == 1 and not options.prompt_lookup_num_tokens and not options.assistant_model


def is_batchable(lm: LanguageModel, options: GenerateOptions) -> bool:
    """Whether prompts can be run together: in the plain loop, or in one beam search without random numbers."""
    special = options.prompt_lookup_num_tokens or options.assistant_model or is_sampled(lm, options)
    return is_plain(lm, options) or not (special or endings(lm, options).strings)


def needs_equal_lengths(lm: LanguageModel, options: GenerateOptions) -> bool:
    """Whether a control would see padding: then only prompts of one length may share a batch.

    Rows are padded with their own first token, to which controls that look at single tokens are blind.
    """
    config = generation_config(lm, options, 1)
    if lm.model.config.is_encoder_decoder:  # only the encoder's input is padded
        return bool(config.encoder_no_repeat_ngram_size)
    phrases = [*(config.sequence_bias or {}), *(config.bad_words_ids or [])]
    return bool(
        config.no_repeat_ngram_size
        or config.min_length
        or config.forced_bos_token_id is not None
        or (config.watermarking_config and getattr(config.watermarking_config, "context_width", 2) > 1)
        # A model's own config holds biases as [[ids, bias], ...].
        or any(len(phrase[0] if isinstance(phrase[0], list | tuple) else phrase) > 1 for phrase in phrases)
    )


def continues(lm: LanguageModel, options: GenerateOptions) -> bool:
    """Whether the text goes on from its prompt; translators and models that learned a task answer it instead."""
    return not lm.model.config.is_encoder_decoder and not chosen_task(options, lm.tokenizer)


def is_sampled(lm: LanguageModel, options: GenerateOptions) -> bool:
    """Whether tokens are chosen at random.

    By default they are. A model with an encoder follows its own config, one that learned a task is greedy, and so is
    one whose own temperature is 0.
    """
    if options.temperature == 0:
        return False
    if options.do_sample is not None:
        return options.do_sample
    if any(getattr(options, name) is not None for name in SAMPLING):
        return True
    if lm.model.config.is_encoder_decoder:
        return bool(_own_config(lm).do_sample)
    return beams(lm, options) == 1 and not chosen_task(options, lm.tokenizer) and _own_config(lm).temperature != 0


def endings(lm: LanguageModel, options: GenerateOptions) -> Endings:
    """What ends a text: of the options, else of the model, else of its tokenizer and its task."""
    eos = _own_config(lm).eos_token_id
    eos = lm.tokenizer.eos_token_id if eos is None else eos
    tokens = set() if eos is None else set(eos) if isinstance(eos, list) else {eos}
    strings = [_meaning(text, options) for text in options.stop_strings or []]
    if not strings and (own := _own_config(lm).stop_strings):
        strings = [own] if isinstance(own, str) else own
    if not strings and (task := chosen_task(options, lm.tokenizer)):
        return Endings(tokens, [task.end])
    # A special token is left out of the text, so a string that has one in it ends the text at that token.
    special = special_token_ids(lm.tokenizer) if strings else {}
    tokens |= {token for name, token in special.items() if any(name in text for text in strings)}
    return Endings(tokens, [text for text in strings if not any(name in text for name in special)])


def check_options(options: GenerateOptions) -> None:
    """OptionError for options that have no effect without another one, or beside it. Needs no model."""
    for name, needed in (("num_assistant_tokens", "assistant_model"), ("novel_words", "novel")):
        if getattr(options, name) is not None and not getattr(options, needed):
            raise OptionError(f"{flag_of(name)} has no effect alone: add {flag_of(needed)}")
    for name, rival in (("assistant_model", "prompt_lookup_num_tokens"), ("tgt_lang", "forced_bos_token_id")):
        if getattr(options, name) is not None and getattr(options, rival) is not None:
            raise OptionError(f"{flag_of(name)} and {flag_of(rival)} exclude each other: leave one of both out")
    if options.temperature == 0 and options.do_sample:
        raise OptionError("--temperature 0 is greedy, --do-sample is not: leave one of both out")


def check_controls(lm: LanguageModel, options: GenerateOptions) -> None:
    """OptionError for what transformers would notice late, or never; a note about options that change nothing."""
    count, beam_count, is_random = options.num_return_sequences or 1, beams(lm, options), is_sampled(lm, options)
    if count > beam_count and not is_random:
        limit = f"it must be at most --num-beams ({beam_count})"
        way_out = limit if beam_count > 1 else "greedy decoding has one result, so sample"
        raise OptionError(f"--num-return-sequences is {count}: {way_out}")
    if options.novel and not (is_random and is_plain(lm, options)):
        raise OptionError("--novel draws again what copies: sample, without beams and speculation")
    if options.negative_prompt and (options.guidance_scale or _own_config(lm).guidance_scale or 1) == 1:
        raise OptionError("--negative-prompt has no effect alone: add --guidance-scale, such as 1.5")
    for name in ("length_penalty", "early_stopping"):
        value = getattr(options, name)
        if value is not None and value is not False and beam_count == 1:
            raise OptionError(f"{flag_of(name)} has no effect without beams: add --num-beams, such as 4")
    if not is_random and (ignored := [flag_of(name) for name in SAMPLING if getattr(options, name)]):
        note_once(f"greedy decoding ignores {', '.join(ignored)}")
    size = vocabulary_size(lm.model)
    for name in ("suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id"):
        value = getattr(options, name)
        if any(not 0 <= token < size for token in ([value] if isinstance(value, int) else value or [])):
            raise OptionError(f"{flag_of(name)} takes token ids from 0 to {size - 1}")
