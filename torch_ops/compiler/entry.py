"""The entry: one compiled kernel, in the same bytes in a pack and in the disk cache.

The C++ runtime reads entries (`csrc/runtime`); Python writes them, and reads them back to check.
Layout, little endian: magic (8), header size (u32), payload size (u32), sha256 of what follows
(32), header lines `key=value`, payload (raw deflate of the cubin or of the PTX).
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from dataclasses import dataclass

MAGIC = b"RLKERN01"
MAX_HEADER_SIZE = 1 << 16
_PREFIX = struct.Struct("<8sII32s")
_NUMBERS = ("registers", "static_smem", "spill_stores", "spill_loads", "stack", "raw_size")
_FIELDS = ("name", "arch", "kind", "lowered", *_NUMBERS, "raw_sha256", "compiler", "key")


class EntryError(ValueError):
    """The bytes are not a valid entry; the message says what is wrong with them."""


@dataclass(frozen=True)
class Entry:
    """A compiled kernel with what the assembler said about it.

    Sizes are in bytes. An entry of kind "ptx" has -1 where only an assembler would know.
    """

    name: str
    arch: str
    kind: str
    lowered: str
    registers: int
    static_smem: int
    spill_stores: int
    spill_loads: int
    stack: int
    raw_size: int
    raw_sha256: str
    compiler: str
    key: str
    payload: bytes

    def pack(self) -> bytes:
        """Return the entry as bytes: the same fields always give the same bytes."""
        values = {field: str(getattr(self, field)) for field in _FIELDS}
        for field, value in values.items():
            if "\n" in value:
                raise EntryError(f"the field {field} has a line break: {value!r}")
        header = "".join(f"{field}={value}\n" for field, value in values.items()).encode()
        if len(header) >= MAX_HEADER_SIZE:
            raise EntryError(f"the header has {len(header)} bytes; the limit is {MAX_HEADER_SIZE}")
        digest = hashlib.sha256(header + self.payload).digest()
        return _PREFIX.pack(MAGIC, len(header), len(self.payload), digest) + header + self.payload

    def raw(self) -> bytes:
        """Return the cubin or PTX, decompressed and checked."""
        try:
            data = zlib.decompress(self.payload, wbits=-zlib.MAX_WBITS, bufsize=self.raw_size or 1)
        except zlib.error as error:
            raise EntryError(f"the payload does not decompress: {error}") from None
        if len(data) != self.raw_size or hashlib.sha256(data).hexdigest() != self.raw_sha256:
            raise EntryError("the decompressed payload does not match the header's size and sha256")
        return data


def deflate(raw: bytes) -> bytes:
    """Return `raw` as the payload of an entry."""
    compressor = zlib.compressobj(level=9, wbits=-zlib.MAX_WBITS)
    return compressor.compress(raw) + compressor.flush()


def unpack(data: bytes) -> Entry:
    """Read an entry and check its sizes and its sha256.

    Raises
    ------
    EntryError
        If the bytes are truncated, corrupted or of another format.
    """
    if len(data) < _PREFIX.size:
        raise EntryError(f"{len(data)} bytes are too few for an entry")
    magic, header_size, payload_size, digest = _PREFIX.unpack_from(data)
    if magic != MAGIC:
        raise EntryError(f"the magic is {magic!r}, expected {MAGIC!r}")
    expected = _PREFIX.size + header_size + payload_size
    if header_size >= MAX_HEADER_SIZE or len(data) != expected:
        raise EntryError(f"the entry has {len(data)} bytes, its prefix says {expected}")
    if hashlib.sha256(memoryview(data)[_PREFIX.size :]).digest() != digest:
        raise EntryError("the sha256 does not match: the entry is corrupted")
    header = data[_PREFIX.size : _PREFIX.size + header_size]
    payload = data[_PREFIX.size + header_size :]
    try:
        fields = dict(line.split("=", 1) for line in header.decode().splitlines())
        numbers = {field: int(fields[field]) for field in _NUMBERS}
        texts = {field: fields[field] for field in _FIELDS if field not in _NUMBERS}
    except (KeyError, ValueError) as error:
        raise EntryError(f"the header is malformed: {error}") from None
    return Entry(**texts, **numbers, payload=payload)  # type: ignore[arg-type]
