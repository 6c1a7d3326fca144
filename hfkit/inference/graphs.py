"""Decoding on a GPU with a CUDA graph: one step is recorded, then replayed.

Python takes several times longer to launch the kernels of a small model's step than the GPU takes to run them. A
graph launches all of them at once. Nothing is compiled, so it pays after a few tokens.
"""

import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import (
    EpsilonLogitsWarper,
    GenerationConfig,
    LogitsProcessor,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticLayer

from hfkit.console import detail
from hfkit.errors import first_line
from hfkit.models.loading import LanguageModel

# Model types whose attention takes a finished mask and whose forward pass reads nothing back from the GPU.
_FAMILIES = ("gpt2", "llama", "qwen2", "qwen3")
# Processors that read the scores alone, and nothing back from the GPU: they are recorded with the step.
_RECORDABLE = (
    EpsilonLogitsWarper,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
_SHORTEST = 8  # new tokens from which recording pays: it takes as long as a step or two without a graph
_WARM_UP = 2  # steps without a graph: in these, libraries choose their kernels and get their memory
_CHECK = 16  # steps between two looks at whether all rows have ended; each look waits for the GPU
_recording = threading.Lock()  # torch records one graph at a time


def suits(lm: LanguageModel, new_tokens: int) -> bool:
    """Whether `sample` can write `new_tokens` with this model, and is faster than transformers' loop."""
    config: Any = lm.model.config
    return (
        lm.model.device.type == "cuda"
        and lm.model.device.index in (None, torch.cuda.current_device())  # torch records on this one
        and new_tokens >= _SHORTEST
        and config.model_type in _FAMILIES
        and config._attn_implementation in ("sdpa", "eager")
        and not getattr(lm.model, "is_quantized", False)
        and len(set(getattr(lm.model, "hf_device_map", {}).values())) <= 1
        and all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
    )


class FixedCache(Cache):
    """Keys and values of all columns, prompts and new tokens together, in tensors that keep their place in memory."""

    def __init__(self, lm: LanguageModel, columns: int) -> None:
        self.column = torch.zeros(1, dtype=torch.long, device=lm.model.device)  # where the next token goes
        count = len(DynamicCache(config=lm.model.config).layers)
        super().__init__(layers=[_Layer(columns, self.column) for _ in range(count)])


class _Layer(StaticLayer):  # type: ignore[no-untyped-call]
    """A StaticLayer without a count of its own, which costs as many kernels as a static layer saves.

    transformers' initialization also imports torch's compiler, to mark the tensors: that takes longer than a text.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, columns: int, column: torch.Tensor) -> None:
        super().__init__(columns)
        self.cumulative_length = column

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        rows, heads, _, width = key_states.shape
        self.device = key_states.device
        self.keys = key_states.new_zeros(rows, heads, self.max_cache_len, width)
        self.values = value_states.new_zeros(rows, heads, self.max_cache_len, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The prompts, at the first call; later one token of each row."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            width = key_states.shape[2]
            self.keys[:, :, :width], self.values[:, :, :width] = key_states, value_states
        else:
            self.keys.index_copy_(2, self.cumulative_length, key_states)
            self.values.index_copy_(2, self.cumulative_length, value_states)
        return self.keys, self.values


def sample(
    model: Any,
    input_ids: torch.Tensor,
    processors: Sequence[LogitsProcessor],
    config: GenerationConfig,
    rows: Any,
    **inputs: Any,
) -> torch.Tensor:
    """What `model._sample` does, for a FixedCache. The results are in `rows`.

    processors: of the scores, before `rows` chooses from them. rows: a `decoding.Rows`.
    """
    end = time.monotonic() + (config.max_time or math.inf)
    logits = model._prefill(input_ids, config, inputs).logits
    noise = rows.room_for_noise(logits)

    def choose(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Each row's token and its log-probability in nats, (rows, 1) each. logits: (rows, 1, vocabulary)."""
        # A copy: the next step writes its logits to the same place.
        scores = logits[:, -1].to(torch.float32, copy=True)
        nats = scores.log_softmax(-1)
        for process in processors:
            scores = process(input_ids, scores)
        tokens = scores.argmax(-1, keepdim=True) if noise is None else draw_with(scores.softmax(-1), noise)
        return tokens, nats.gather(1, tokens)

    is_recordable = all(type(process) in _RECORDABLE for process in processors)
    mask = inputs.get("attention_mask")  # None if no row is padded
    mask = torch.ones_like(input_ids) if mask is None else mask
    step = Step(model, inputs["cache"], mask, choose if is_recordable else None)
    rows.fill(noise)
    tokens, nats = choose(logits)
    for count in range(1, config.max_new_tokens + 1):
        rows.keep(tokens, nats)
        if (rows.reads_text or count % _CHECK == 0) and rows.have_ended():
            break
        if count == config.max_new_tokens or time.monotonic() > end:
            break
        rows.fill(noise)
        if is_recordable:
            tokens, nats = step(tokens)
        else:
            input_ids = torch.cat([input_ids, tokens], 1)
            tokens, nats = choose(step(tokens))
    return input_ids


def fill(noise: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Fill `noise`, (rows, vocabulary), with the random numbers of a step, each row from its own generator."""
    for row, generator in zip(noise, generators, strict=True):
        row.exponential_(generator=generator)
    return noise


def draw_with(probabilities: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The tokens that torch.multinomial draws with these random numbers, (rows, 1)."""
    return (probabilities / noise).argmax(-1, keepdim=True)


class Step:
    """The forward pass of one new token for each row, in tensors that keep their place in memory."""

    def __init__(
        self, model: Any, cache: Any, attention_mask: torch.Tensor, finish: Callable[[torch.Tensor], Any] | None = None
    ) -> None:
        """cache: a FixedCache that holds the prompts. attention_mask: of the prompts, (rows, width).

        finish: what else is done in a step, with its logits, (rows, 1, vocabulary).
        """
        rows, width = attention_mask.shape
        columns = cache.layers[0].max_cache_len
        self._model, self._cache, self._finish, self._count = model, cache, finish, 0
        self._token = torch.zeros(rows, 1, dtype=torch.long, device=attention_mask.device)
        self._position = attention_mask.sum(1, keepdim=True)
        cache.column.fill_(width)
        # Attention on a GPU needs rows of masks that begin at multiples of 16 numbers.
        shape, hidden = (rows, 1, 1, columns + -columns % 16), torch.finfo(model.dtype).min
        self._mask = torch.full(shape, hidden, dtype=model.dtype, device=attention_mask.device)[..., :columns]
        self._mask[:, 0, 0, :width].masked_fill_(attention_mask.bool(), 0)
        self._result: Any = None
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, tokens: torch.Tensor) -> Any:
        """Append a token to each row, (rows, 1). Returns what `finish` does, else the logits of the next one."""
        self._token.copy_(tokens)
        self._count += 1
        if self._count == _WARM_UP + 1:
            self._record()
        if self._graph:
            self._graph.replay()
        else:
            self._result = self.forward()
        return self._result

    def forward(self) -> Any:
        """The pass itself. It reads no result back: the CPU does not know what it computes."""
        self._mask.index_fill_(3, self._cache.column, 0)
        logits: torch.Tensor = self._model(
            input_ids=self._token,
            attention_mask=self._mask,
            position_ids=self._position,
            cache=self._cache,
            use_cache=True,
        ).logits
        self._cache.column.add_(1)
        self._position.add_(1)
        return self._finish(logits) if self._finish else logits

    def _record(self) -> None:
        """Record the pass, which computes nothing yet. Where that fails, steps go on without a graph."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with _recording, torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._result = self.forward()
            self._graph = graph
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # torch goes on with the one that it records on
            detail(f"this model's steps cannot be recorded, so they take longer: {first_line(error)}")
