"""Keys and values of the texts in progress, which share one window, and of earlier prompts."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from hfkit.inference.batches import forward
from hfkit.models.architecture import for_device
from hfkit.models.loading import LanguageModel

_ROOM = 64  # columns beyond those in use: the window is copied once in this many steps
SHORTEST_PREFIX = 32  # tokens; keeping fewer costs more than computing them again
_BYTES_KEPT = {"cpu": 1 << 28, "cuda": 1 << 31}  # of prompts


def can_share_steps(lm: LanguageModel) -> bool:
    """Whether texts of this model can share a step: it has no encoder, and no state besides keys and values."""
    config: Any = lm.model.config
    return not config.is_encoder_decoder and all(
        isinstance(layer, DynamicLayer) for layer in DynamicCache(config=config).layers
    )


class _Layer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer's part of a window: keys and values of (rows, heads, columns, width), made when they are needed."""

    is_sliding = False

    def __init__(self, window: "Window") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._window, self.is_initialized = window, True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing: `add` has made the tensors before the first step."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        count, first, end = len(self._window.starts), self._window.first, self._window.end
        assert self.keys is not None and self.values is not None  # noqa: S101, see lazy_initialization
        self.keys[:count, :, end : end + 1] = key_states
        self.values[:count, :, end : end + 1] = value_states
        return self.keys[:count, :, first : end + 1], self.values[:count, :, first : end + 1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self._window.end - self._window.first

    def get_max_length(self) -> int:
        return -1


class Window:
    """Keys and values of rows that end in the same column, as in a batch that is padded on the left.

    A step writes one column and copies nothing. A row that leaves gives its place to the last one.
    """

    def __init__(self, layers: int) -> None:
        self.cache: Any = Cache(layers=[_Layer(self) for _ in range(layers)])
        self.starts: list[int] = []  # the first column of each row
        self.end = 0  # the column that the next step writes

    @property
    def first(self) -> int:
        """The first column that any row uses."""
        return min(self.starts, default=self.end)

    def add(self, source: Any, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Copy rows of another cache, `source`, into the window: of each, its last `length` columns."""
        count, longest = len(self.starts) + len(rows), max(lengths)
        keys = self.cache.layers[0].keys
        if keys is None or count > len(keys) or self.end >= keys.shape[2] or longest > self.end:
            self._lay_out(source, max(longest, self.end - self.first), count)
        for row, length in zip(rows, lengths, strict=True):
            place, columns = len(self.starts), slice(self.end - length, self.end)
            for layer, other in zip(self.cache.layers, source.layers, strict=True):
                layer.keys[place, :, columns] = other.keys[row, :, -length:]
                layer.values[place, :, columns] = other.values[row, :, -length:]
            self.starts.append(self.end - length)

    def remove(self, place: int) -> None:
        """Remove a row; the last one takes its place."""
        start, last = self.starts.pop(), len(self.starts)
        if place < last:
            for layer in self.cache.layers:
                layer.keys[place, :, start : self.end] = layer.keys[last, :, start : self.end]
                layer.values[place, :, start : self.end] = layer.values[last, :, start : self.end]
            self.starts[place] = start
        if not self.starts:
            self.clear()

    def clear(self) -> None:
        """Remove all rows, and give their memory back."""
        self.starts, self.end = [], 0
        for layer in self.cache.layers:
            layer.keys = layer.values = None

    def step(self, lm: LanguageModel, tokens: Sequence[int]) -> torch.Tensor:
        """Append a token to each row. Returns the logits of the next ones, (rows, vocabulary)."""
        if self.end >= self.cache.layers[0].keys.shape[2]:
            self._lay_out(self.cache, self.end - self.first, len(self.starts))
        starts = torch.tensor(self.starts, device=lm.model.device)[:, None]
        mask = (torch.arange(self.first, self.end + 1, device=lm.model.device) >= starts).long()
        logits: torch.Tensor = forward(
            lm,
            input_ids=torch.tensor(tokens)[:, None],
            attention_mask=mask,
            position_ids=self.end - starts,
            cache=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        self.end += 1
        return logits[:, -1]

    def _lay_out(self, like: Any, width: int, rows: int) -> None:
        """Move all rows into tensors that end `_ROOM` columns after `width`, with room for at least so many rows."""
        count, first, end = len(self.starts), self.first, self.end
        for layer, other in zip(self.cache.layers, like.layers, strict=True):
            for name in ("keys", "values"):
                before, model = getattr(layer, name), getattr(other, name)
                capacity = rows if before is None else len(before) if rows <= len(before) else max(rows, 2 * count)
                # Zeros, because attention multiplies masked values by 0, and 0 times NaN is NaN.
                made = model.new_zeros(capacity, model.shape[1], width + _ROOM, model.shape[3])
                if count:
                    made[:count, :, width - (end - first) : width] = before[:count, :, first:end]
                setattr(layer, name, made)
        self.starts = [start + width - end for start in self.starts]
        self.end = width


class Prefixes:
    """Keys and values of the latest prompts, so that what they share with the next ones is computed once."""

    def __init__(self, device: str) -> None:
        self._kept: list[tuple[tuple[int, ...], DynamicCache]] = []  # oldest first
        self._room = for_device(_BYTES_KEPT, device)

    def length(self, ids: Sequence[int]) -> int:
        """How many tokens at the beginning of a prompt have keys and values here."""
        return max((common_length(kept, ids) for kept, _ in self._kept), default=0)

    def find(self, ids: Sequence[int]) -> DynamicCache:
        """A cache for the beginning of a prompt, as far as it is here. The last token is always left to compute."""
        length = self.length(ids[:-1])
        place = next(place for place, (kept, _) in enumerate(self._kept) if kept[:length] == tuple(ids[:length]))
        self._kept.append(self._kept.pop(place))
        return _copy(self._kept[-1][1], 0, slice(0, length))

    def keep(self, ids: tuple[int, ...], cache: Any, row: int) -> None:
        """Keep the keys and values of a prompt, a row of `cache`, unless it is short or already here."""
        if len(ids) < SHORTEST_PREFIX or any(common_length(kept, ids) == len(ids) for kept, _ in self._kept):
            return
        self._kept = [entry for entry in self._kept if common_length(entry[0], ids) < len(entry[0])]
        self._kept.append((ids, _copy(cache, row, slice(-len(ids), None))))
        while sum(_size(kept) for _, kept in self._kept) > self._room:
            del self._kept[0]


def common_length(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens two texts share at their beginning."""
    return len(os.path.commonprefix([list(ids), list(others)]))


def _copy(cache: Any, row: int, columns: slice) -> DynamicCache:
    copied = DynamicCache()
    for index, layer in enumerate(cache.layers):
        copied.update(layer.keys[row : row + 1, :, columns], layer.values[row : row + 1, :, columns], index)
    return copied


def _size(cache: Any) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
