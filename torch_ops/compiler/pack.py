"""The pack: the compiled kernels of one architecture in one file, with an index by key.

Layout, little endian: magic (8), index size (u32), sha256 of the index (32), index lines
`key offset size name`, then the entries back to back. Offsets count from the start of the file.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from . import entry

MAGIC = b"RLPACK01"
_PREFIX = struct.Struct("<8sI32s")


class PackError(ValueError):
    """The bytes are not a valid pack; the message says what is wrong with them."""


@dataclass(frozen=True)
class Slot:
    """Where an entry lies in a pack."""

    key: str
    offset: int
    size: int
    name: str


def write(entries: Iterable[bytes]) -> bytes:
    """Return the pack of `entries`; the same entries, in any order, give the same bytes."""
    found = sorted(((entry.unpack(data), data) for data in entries), key=lambda item: item[0].key)
    # Numbers have a fixed width, so that the size of the index does not depend on them.
    line = "{} {:012d} {:012d} {}\n".format
    index_size = sum(len(line(item.key, 0, 0, item.name).encode()) for item, _ in found)
    offset = _PREFIX.size + index_size
    lines = []
    for item, data in found:
        lines.append(line(item.key, offset, len(data), item.name))
        offset += len(data)
    index = "".join(lines).encode()
    prefix = _PREFIX.pack(MAGIC, len(index), hashlib.sha256(index).digest())
    return prefix + index + b"".join(data for _, data in found)


def read_index(data: bytes) -> tuple[Slot, ...]:
    """Return the slots of a pack, its index checked.

    Raises
    ------
    PackError
        If the index is truncated, corrupted or of another format.
    """
    if len(data) < _PREFIX.size:
        raise PackError(f"{len(data)} bytes are too few for a pack")
    magic, index_size, digest = _PREFIX.unpack_from(data)
    if magic != MAGIC:
        raise PackError(f"the magic is {magic!r}, expected {MAGIC!r}")
    index = data[_PREFIX.size : _PREFIX.size + index_size]
    if len(index) != index_size or hashlib.sha256(index).digest() != digest:
        raise PackError("the sha256 of the index does not match: the pack is corrupted")
    try:
        return tuple(_slot(line) for line in index.decode().splitlines())
    except ValueError as error:
        raise PackError(f"the index is malformed: {error}") from None


def read_entries(data: bytes) -> Iterator[tuple[Slot, entry.Entry]]:
    """Yield every slot of a pack with its entry, each checked.

    Raises
    ------
    PackError
        If the index or an entry is not valid; the message names the kernel.
    """
    for slot in read_index(data):
        try:
            found = entry.unpack(data[slot.offset : slot.offset + slot.size])
            found.raw()
        except entry.EntryError as error:
            raise PackError(f"kernel '{slot.name}': {error}") from None
        if (found.key, found.name) != (slot.key, slot.name):
            raise PackError(f"kernel '{slot.name}': the entry is that of '{found.name}'")
        yield slot, found


def _slot(line: str) -> Slot:
    key, offset, size, name = line.split(" ", 3)
    return Slot(key, int(offset), int(size), name)
