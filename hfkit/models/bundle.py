"""Read the tensors of a TensorFlow checkpoint: NAME.index says what is where, NAME.data-* hold the numbers.

TensorFlow itself would read them, too, but it fills 1.6 GB of disk and brings its own numpy. The index is a table of
LevelDB's format with protocol buffers in it: tensorflow/core/lib/io/format.cc, core/protobuf/tensor_bundle.proto.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hfkit.errors import HfkitError, first_line

if TYPE_CHECKING:
    import numpy as np

_MAGIC = 0xDB4775248B80FB57
_FOOTER, _TRAILER = 48, 5  # bytes: at the end of the index; after each block, its compression and checksum
_DTYPES = {1: "<f4", 2: "<f8", 3: "<i4", 9: "<i8", 19: "<f2"}  # of tensorflow.DataType


class Tensor(NamedTuple):
    """A tensor in a checkpoint. `numpy.asarray` reads it."""

    file: Path
    offset: int
    size: int  # bytes
    shape: tuple[int, ...]
    dtype: str | None  # as numpy spells it; None for one that is not a whole tensor of numbers
    checksum: int

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        """Read and check the numbers.

        Raises:
            HfkitError: they are missing, cut off or changed.
        """
        import numpy as np

        try:
            with self.file.open("rb") as file:
                file.seek(self.offset)
                data = file.read(self.size)
        except OSError as error:
            raise HfkitError(
                f"a part of the checkpoint cannot be read ({self.file}): {first_line(error)}; copy it here, too"
            ) from error
        if len(data) < self.size:
            raise HfkitError(f"the checkpoint is cut off ({self.file}): copy it again")
        if self.dtype is None:
            raise HfkitError(f"a tensor is split, or not of floats ({self.file}): save it whole and in float32")
        if _checksum(data) != self.checksum:
            raise _damaged(self.file)
        return np.frombuffer(data, self.dtype).reshape(self.shape).astype(dtype or self.dtype)


def read_index(prefix: Path) -> dict[str, Tensor]:
    """The tensors of the checkpoint PREFIX.index by name. Their numbers stay on disk.

    Raises:
        HfkitError: the index is missing or damaged.
    """
    path = prefix.with_name(f"{prefix.name}.index")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise HfkitError(
            f"the checkpoint cannot be read ({path}): {first_line(error)}; copy its .index and .data files here"
        ) from error
    try:
        entries = dict(_read_table(content))
        [shards] = _parse(entries.pop(b""))[1]
        tensors = {name: _make_tensor(_parse(entry), prefix, shards) for name, entry in entries.items()}
        return {name.decode(errors="replace"): tensor for name, tensor in tensors.items()}
    except (IndexError, ValueError, KeyError) as error:
        raise _damaged(path) from error


def _damaged(path: Path) -> HfkitError:
    return HfkitError(f"the checkpoint is damaged ({path}): copy it again")


def _make_tensor(entry: dict[int, list[Any]], prefix: Path, shards: int) -> Tensor:
    """A tensor from a BundleEntryProto. Fields that are zero are left out of it."""
    dtype, shard, offset, size, checksum = (entry[number][0] if entry[number] else 0 for number in (1, 3, 4, 5, 6))
    dimensions = _parse(entry[2][0])[2] if entry[2] else []
    sizes = [_parse(dimension)[1] for dimension in dimensions]
    return Tensor(
        file=prefix.with_name(f"{prefix.name}.data-{shard:05d}-of-{shards:05d}"),
        offset=offset,
        size=size,
        shape=tuple(size[0] if size else 0 for size in sizes),
        dtype=None if entry[7] else _DTYPES.get(dtype),  # 7: it is split into slices
        checksum=checksum,
    )


def _read_table(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of a table, in order."""
    footer = content[-_FOOTER:]
    if int.from_bytes(footer[-8:], "little") != _MAGIC:
        raise ValueError("no table")
    position = 0
    for _ in range(2):  # skip the offset and the size of the metaindex block, which is empty
        _, position = _read_varint(footer, position)
    for _, handle in _read_block(content, footer[position:]):
        yield from _read_block(content, handle)


def _read_block(content: bytes, handle: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of a block. handle: its offset and size."""
    offset, position = _read_varint(handle, 0)
    size, _ = _read_varint(handle, position)
    block = content[offset : offset + size]
    compression, *checksum = content[offset + size : offset + size + _TRAILER]
    if compression or _checksum(content[offset : offset + size + 1]) != int.from_bytes(checksum, "little"):
        raise ValueError("damaged, or compressed, as TensorFlow never does")
    end = size - 4 - 4 * int.from_bytes(block[-4:], "little")
    key, position = b"", 0
    while position < end:
        shared, position = _read_varint(block, position)  # bytes of the key before
        more, position = _read_varint(block, position)
        length, position = _read_varint(block, position)
        key = key[:shared] + block[position : position + more]
        position += more
        yield key, block[position : position + length]
        position += length


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    """A number, seven bits a byte, and the position after it."""
    number = shift = 0
    while data[position] & 0x80:
        number |= (data[position] & 0x7F) << shift
        position, shift = position + 1, shift + 7
    return number | data[position] << shift, position + 1


def _parse(message: bytes) -> dict[int, list[Any]]:
    """The values of a protocol buffer's fields by their number: bytes, and unsigned numbers."""
    fields: dict[int, list[Any]] = defaultdict(list)
    position = 0
    while position < len(message):
        tag, position = _read_varint(message, position)
        value: Any
        if tag & 7 == 5:  # 32 bits
            value, position = int.from_bytes(message[position : position + 4], "little"), position + 4
        else:
            value, position = _read_varint(message, position)
        if tag & 7 == 2:  # bytes, of which that was the length
            value, position = message[position : position + value], position + value
        fields[tag >> 3].append(value)
    return fields


def _checksum(data: bytes) -> int:
    """The CRC-32C of `data`, masked as TensorFlow stores it: a CRC of data that contains its own CRC is weak."""
    import google_crc32c

    crc: int = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
