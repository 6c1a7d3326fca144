"""Decoding on a GPU with a CUDA graph: one step is recorded, then replayed.

Python takes several times longer to launch the kernels of a small model's step than the GPU takes to run them. A
graph launches all of them at once. Nothing is compiled, so it pays after a few tokens.

No GPU has run this yet: until tests/gpu has passed on one, HFKIT_CUDA_GRAPHS=1 turns it on.
"""

import os
import threading
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticLayer

from hfkit.console import detail
from hfkit.models.loading import LanguageModel

# Their attention takes a finished mask, and no step of theirs reads a result back.
_FAMILIES = ("gpt2", "llama", "qwen2", "qwen3")
_SHORTEST = 8  # new tokens from which recording pays: it takes as long as a step or two without a graph
_WARM_UP = 2  # steps without a graph: in these, libraries choose their kernels and get their memory
_CHECK = 16  # steps between two looks at whether all rows have ended; each look waits for the GPU
_recording = threading.Lock()  # torch records one graph at a time


def suits(lm: LanguageModel, new_tokens: int) -> bool:
    """Whether `sample` can write `new_tokens` with this model, and is faster than transformers' loop."""
    config: Any = lm.model.config
    return (
        os.environ.get("HFKIT_CUDA_GRAPHS") == "1"
        and lm.model.device.type == "cuda"
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
        count = len(DynamicCache(config=lm.model.config).layers)
        super().__init__(layers=[_Layer(columns) for _ in range(count)])


class _Layer(StaticLayer):  # type: ignore[no-untyped-call]
    """transformers' own would import torch's compiler, to mark the tensors for it. That takes longer than a text."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        rows, heads, _, width = key_states.shape
        self.device = key_states.device
        self.keys = key_states.new_zeros(rows, heads, self.max_cache_len, width)
        self.values = value_states.new_zeros(rows, heads, self.max_cache_len, value_states.shape[-1])
        self.cumulative_length = self.cumulative_length.to(self.device)
        self.is_initialized = True


def sample(
    model: Any,
    input_ids: torch.Tensor,
    processors: Any,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    *,
    check_each: bool,
    **inputs: Any,
) -> torch.Tensor:
    """What `model._sample` does, for a FixedCache. The last of `processors` has chosen the token of each row.

    check_each: look at `criteria` after each step, since what they read has left the GPU anyway.
    """
    logits = model._prefill(input_ids, config, inputs).logits
    mask = inputs.get("attention_mask")  # None if no row is padded
    step = Step(model, inputs["cache"], torch.ones_like(input_ids) if mask is None else mask)
    ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    for count in range(1, config.max_new_tokens + 1):
        # A copy: the next step writes its logits to the same place.
        scores = processors(input_ids, logits[:, -1].to(torch.float32, copy=True))
        tokens = scores.argmax(-1, keepdim=True)
        input_ids = torch.cat([input_ids, tokens], 1)
        ended |= criteria(input_ids, scores)
        if count == config.max_new_tokens or ((check_each or count % _CHECK == 0) and ended.all()):
            break
        logits = step(tokens)
    return input_ids


class Step:
    """The forward pass of one new token for each row, in tensors that keep their place in memory."""

    def __init__(self, model: Any, cache: Any, attention_mask: torch.Tensor) -> None:
        """cache: a FixedCache that holds the prompts. attention_mask: of the prompts, (rows, width)."""
        rows, width = attention_mask.shape
        columns = cache.layers[0].max_cache_len
        self._model, self._cache, self._count = model, cache, 0
        self._token = torch.zeros(rows, 1, dtype=torch.long, device=attention_mask.device)
        self._position = attention_mask.sum(1, keepdim=True)
        self._column = torch.tensor([width], device=attention_mask.device)
        # Attention on a GPU needs rows of masks that begin at multiples of 16 numbers.
        shape, hidden = (rows, 1, 1, columns + -columns % 16), torch.finfo(model.dtype).min
        self._mask = torch.full(shape, hidden, dtype=model.dtype, device=attention_mask.device)[..., :columns]
        self._mask[:, 0, 0, :width].masked_fill_(attention_mask.bool(), 0)
        self._logits = torch.empty(0)
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append a token to each row, (rows, 1). Returns the logits of the next one, (rows, 1, vocabulary)."""
        self._token.copy_(tokens)
        self._count += 1
        if self._count == _WARM_UP + 1:
            self._record()
        if self._graph:
            self._graph.replay()
        else:
            self._logits = self.forward()
        return self._logits

    def forward(self) -> torch.Tensor:
        """The pass itself. It reads no result back: the CPU does not know what it computes."""
        self._mask.index_fill_(3, self._column, 0)
        logits: torch.Tensor = self._model(
            input_ids=self._token,
            attention_mask=self._mask,
            position_ids=self._position,
            cache=self._cache,
            use_cache=True,
        ).logits
        self._column.add_(1)
        self._position.add_(1)
        return logits

    def _record(self) -> None:
        """Record the pass, which computes nothing yet. Where that fails, steps go on without a graph."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with _recording, torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._logits = self.forward()
            self._graph = graph
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # torch goes on with the one that it records on
            detail(f"this model's steps cannot be recorded, so they take longer: {str(error).splitlines()[0]}")
