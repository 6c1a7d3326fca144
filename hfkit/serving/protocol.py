"""The bodies of requests, as OpenAI defines them, their limits, and the options that they mean.

A field that is missing or null is not set. Sampling is then that of `hfkit generate`; lengths have OpenAI's defaults.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from hfkit.errors import HfkitError, OptionError
from hfkit.options import GenerateOptions
from hfkit.serving.rows import Wishes

_MOST_TEXTS = 128  # of one request
_LEAST_TEMPERATURE = 1e-3  # some clients say 1e-8 and mean greedy
# Controls of `GenerateOptions` that a client may set under their own names.
CONTROLS = ("min_new_tokens", "do_sample", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
            "repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "num_beams", "length_penalty",
            "early_stopping", "guidance_scale", "negative_prompt", "suppress_tokens", "begin_suppress_tokens",
            "forced_bos_token_id", "src_lang", "tgt_lang", "renormalize_logits", "max_time", "bad_words",
            "sequence_bias", "watermark", "raw", "truncate")  # fmt: skip
# OpenAI's fields that have no effect here.
_IGNORED = {"user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "tool_choice",
            "parallel_tool_calls", "prompt_cache_retention", "include"}  # fmt: skip
# OpenAI's fields with the only value that is supported here.
_ONLY: dict[str, Any] = {"response_format": {"type": "text"}, "modalities": ["text"], "truncation": "disabled",
                         "text": {"format": {"type": "text"}}, "background": False}  # fmt: skip
_LOGPROBS = "message.output_text.logprobs"  # what a client of /v1/responses may ask to include

Ids = list[int]
Stop = Annotated[str, Field(min_length=1, max_length=4096)]


class LiteralOptions(GenerateOptions):
    r"""Options that came as JSON, which has spelled a newline already: \n in them is two characters."""

    is_literal = True


class _Nullable(BaseModel):
    """Treats null as a missing field: many clients send it."""

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, values: Any) -> Any:
        return {name: value for name, value in values.items() if value is not None} if type(values) is dict else values


def _texts_in(value: Any) -> Iterator[str]:
    """All texts of a JSON value, names of fields included."""
    parts = [value]
    while parts:
        part = parts.pop()
        if isinstance(part, str):
            yield part
        elif isinstance(part, dict):
            parts += [*part, *part.values()]
        elif isinstance(part, list):
            parts += [each for each in part if not isinstance(each, int)]  # most lists are token ids


class Body(_Nullable):
    """Fields of every request."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    model: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_texts(cls, values: Any) -> Any:
        """Raise HfkitError for half a surrogate pair, which JSON can spell, in any text of the body.

        It is not an OptionError: pydantic would reword that, as any ValueError.
        """
        for name, field in values.items() if type(values) is dict else ():
            for text in _texts_in([name, field]):
                try:
                    text.encode()
                except UnicodeEncodeError as error:
                    fault = f"is not UTF-8 text (character {error.start + 1}): convert it"
                    raise HfkitError(f"{text!a:.60} in {name!a:.40} {fault}") from error
        return values

    def check_extras(self) -> dict[str, Any]:
        """Raise OptionError for a field that would have no effect. Returns controls among undeclared fields."""
        extras = {}
        for name, value in (self.model_extra or {}).items():
            if name in CONTROLS:
                extras[name] = value
            elif name not in _IGNORED and value and value != _ONLY.get(name):
                raise OptionError(f"{name!r:.80} is not supported here: leave it out")
        return extras


class StreamOptions(_Nullable):
    """What a stream holds besides text."""

    include_usage: bool = False


class Sampling(Body):
    """How texts are generated."""

    temperature: float | None = None
    top_p: float | None = None
    n: int = Field(1, ge=1, le=_MOST_TEXTS)
    stop: Stop | Annotated[list[Stop], Field(max_length=64)] | None = None
    seed: int | None = None
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=300)] = {}
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    def options(self, max_tokens: int | None, more_stops: tuple[str, ...] = ()) -> GenerateOptions:
        """OptionError for a value that is out of range."""
        stops = [self.stop] if isinstance(self.stop, str) else list(self.stop or [])
        temperature = self.temperature
        options = LiteralOptions(
            temperature=0.0 if temperature is not None and 0 < temperature < _LEAST_TEMPERATURE else temperature,
            top_p=self.top_p,
            seed=self.seed,
            max_new_tokens=max_tokens or None,
            stop_strings=[*stops, *more_stops] or None,
            **self.check_extras(),
        )
        if self.text_count * (options.num_beams or 1) > _MOST_TEXTS:
            raise OptionError(
                f"one request may have at most {_MOST_TEXTS} beams, those of all its texts together: lower num_beams, "
                "or send several requests"
            )
        return options

    @property
    def text_count(self) -> int:
        """Texts that are written for the request."""
        return self.n

    def wishes(self, vocabulary: int, top: int | None, scores_prompt: bool = False) -> Wishes:
        """OptionError if logit_bias names something that is not a token. top: see `Wishes`."""
        if bad := [token for token in self.logit_bias if not (token.isdecimal() and int(token) < vocabulary)]:
            raise OptionError(f"logit_bias has {bad[0]!r:.40}: its keys are token ids from 0 to {vocabulary - 1}")
        return Wishes(
            streams=self.stream,
            top=top,
            scores_prompt=scores_prompt,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias={int(token): bias for token, bias in self.logit_bias.items()},
        )


class CompletionBody(Sampling):
    """POST /v1/completions."""

    prompt: str | list[str] | Ids | list[Ids] = ""
    max_tokens: int | None = Field(None, ge=0)  # [default: 16, as OpenAI has it]
    fit: bool = False  # without max_tokens: as many as `hfkit generate` writes, and fewer where these do not fit
    best_of: int | None = Field(None, ge=1, le=_MOST_TEXTS)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def prompts(self) -> list[str] | list[Ids]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if self.prompt and isinstance(self.prompt[0], int) else self.prompt  # type: ignore[return-value]

    @property
    def samples(self) -> int:
        """Texts that are written for each prompt."""
        return max(self.n, self.best_of or 1)

    @property
    def text_count(self) -> int:
        return len(self.prompts) * self.samples

    def check(self) -> None:
        """Raise OptionError for fields that contradict each other."""
        if not self.prompts or [] in self.prompts:
            raise OptionError("prompt is empty: write a text, token ids, or a list of either")
        if self.text_count > _MOST_TEXTS:
            raise OptionError(f"one request may have at most {_MOST_TEXTS} texts: send several requests")
        if self.best_of is not None and self.best_of < self.n:
            raise OptionError(f"best_of is {self.best_of}: it must be at least n, which is {self.n}")
        if self.stream and self.samples > self.n:
            raise OptionError("best_of is not known before the end of a stream: leave best_of or stream out")
        if self.stream and self.echo and self.logprobs is not None:
            raise OptionError("log-probabilities of the prompt come whole: leave stream, echo or logprobs out")
        if self.max_tokens == 0 and not self.echo:
            raise OptionError("max_tokens is 0: that needs echo")


class Part(BaseModel):
    """A part of a message."""

    type: Literal["text", "input_text", "output_text"]
    text: str


class Message(_Nullable):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] = ""

    def to_dict(self) -> dict[str, str]:
        """What a chat template takes."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatBody(Sampling):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)

    def check(self) -> None:
        """Raise OptionError for a field that would have no effect."""
        if self.top_logprobs and not self.logprobs:
            raise OptionError("top_logprobs has no effect alone: add logprobs")


class ResponseBody(Sampling):
    """POST /v1/responses."""

    input: str | list[Message] = ""
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    metadata: dict[str, str] = {}
    include: Any = None

    def check(self) -> None:
        """Raise OptionError for a field that would have no effect."""
        if self.n > 1:
            raise OptionError("'n' is not supported here: leave it out")
        if isinstance(self.include, list) and _LOGPROBS in self.include:
            raise OptionError(f"{_LOGPROBS!r} is not supported in 'include' here: leave it out")

    @property
    def repeated(self) -> dict[str, Any]:
        """The fields that the reply repeats."""
        names = ("instructions", "metadata", "temperature", "top_p", "max_output_tokens")
        return {name: getattr(self, name) for name in names}

    @property
    def messages(self) -> list[Message]:
        """The conversation that it asks to go on with."""
        turns = [Message(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        return [Message(role="system", content=self.instructions), *turns] if self.instructions else turns


class TokenizeBody(Body):
    """POST /tokenize."""

    prompt: str
    add_special_tokens: bool = True


class DetokenizeBody(Body):
    """POST /detokenize."""

    tokens: Annotated[Ids, Field(max_length=1_000_000)]


class ClassifyBody(Body):
    """POST /v1/classify. Texts, or the columns of the rows that the model was trained on."""

    input: str | dict[str, Any] | Annotated[list[str | dict[str, Any]], Field(max_length=1024)]
    labels: Annotated[list[str], Field(max_length=1024)] | None = None

    @property
    def texts(self) -> list[str | Mapping[str, Any]]:
        return list(self.input) if isinstance(self.input, list) else [self.input]


class AnswerBody(Body):
    """POST /v1/answer."""

    question: str
    context: str
    no_answer_threshold: float = 0.0
