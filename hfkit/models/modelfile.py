"""What ollama needs beside a GGUF file: a Modelfile, with the chat template in ollama's words."""

import string
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from hfkit.console import note
from hfkit.models.architecture import context_length
from hfkit.models.loading import LanguageModel

_SYSTEM, _PROMPT, _RESPONSE = "{{ .System }}", "{{ .Prompt }}", "{{ .Response }}"
_NAMES = {"repetition_penalty": "repeat_penalty"}  # what ollama calls a setting, where transformers differs


def sampling_of(lm: LanguageModel) -> dict[str, float]:
    """How a model is to be sampled, by its generation_config.json. One that learned a task is greedy."""
    settings: Any = lm.model.generation_config
    if lm.tokenizer.init_kwargs.get("task"):
        return {"temperature": 0.0}
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty") if settings.do_sample else ()
    return {name: value for name in names if (value := getattr(settings, name)) is not None}


def modelfile_of(weights: Path, *, is_alone: bool) -> Path:
    """The Modelfile beside a .gguf file. is_alone: the file is not in a folder of its own, so both have one name."""
    return weights.with_suffix(".Modelfile") if is_alone else weights.with_name("Modelfile")


def write_modelfile(lm: LanguageModel, path: Path, weights: str) -> None:
    """Write what `ollama create NAME -f PATH` reads. weights: name of the .gguf file in the same folder."""
    settings: Any = lm.model.generation_config
    template, stops = _translate_template(lm.tokenizer)
    lines = [f"FROM ./{weights}", f"PARAMETER num_ctx {context_length(lm.model.config)}"]
    lines += [f"PARAMETER {_NAMES.get(name, name)} {value}" for name, value in sampling_of(lm).items()]
    lines += [f'PARAMETER stop """{stop}"""' for stop in [*stops, *(settings.stop_strings or [])]]
    if template:
        lines.append(f'TEMPLATE """{template}"""')
    else:
        note("ollama's TEMPLATE cannot say what the chat template does: ollama will choose one by itself")
    path.write_text("\n".join(lines) + "\n", "utf-8")


def _translate_template(tokenizer: PreTrainedTokenizerBase) -> tuple[str | None, list[str]]:
    """The chat template in ollama's words, None if these cannot say it; and the texts that end an answer.

    ollama repeats its template for each turn and cuts the last one at the response. A conversation of ollama's own
    variables, rendered, is such a template if all its turns look alike.
    """
    task = tokenizer.init_kwargs.get("task")
    ends = [_text_after_fields(task["template"]) or "\n"] if task else []
    if not tokenizer.chat_template:
        return _PROMPT, ends

    def render(*turns: str, system: bool = False) -> str:
        messages = [{"role": "system", "content": _SYSTEM}] if system else []
        messages += [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
        text: Any = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        written = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]  # then llama.cpp writes it, too
        return str(text).removeprefix(str(tokenizer.bos_token)) if written else str(text)

    try:
        question, conversation = render(_PROMPT), render(_PROMPT, _RESPONSE, _PROMPT)
    except Exception:  # a template can raise anything
        return None, []
    answer = conversation.removeprefix(question).removesuffix(question).lstrip(" ")
    if question.count("{{") != 1 or _PROMPT not in question or '"""' in conversation:
        return None, []
    if conversation == question:  # only the last message counts, as for a task
        return question, ends
    if conversation.replace(answer, "", 1) not in (2 * question, f"{question} {question}"):
        return None, []
    if not answer.startswith(_RESPONSE) or answer.count("{{") != 1:
        return None, []
    end = answer.removeprefix(_RESPONSE).strip()
    stops = [end] if end and not end.startswith(str(tokenizer.eos_token)) else []
    try:
        opening = render(_PROMPT, system=True).removesuffix(question)
    except Exception:  # many templates have no place for a system message
        opening = ""
    if opening.count(_SYSTEM) == opening.count("{{") == 1:
        question = f"{{{{ if .System }}}}{opening}{{{{ end }}}}{question}"
    return question + answer, stops


def _text_after_fields(template: str) -> str:
    """What a task's template has after its last field. A doubled brace is a brace."""
    end = ""
    for text, field, *_ in string.Formatter().parse(template):
        end = end + text if field is None else ""
    return end
