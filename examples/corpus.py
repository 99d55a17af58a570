"""The demo's corpus: novels in the public domain, out of two Debian packages.

`python examples/corpus.py --out .corpus/corpus.txt` downloads the packages with `apt-get download`,
unpacks them with `dpkg -x` (neither needs root) and writes clean UTF-8 text: one paragraph a line,
a blank line between paragraphs, a form feed between books.
"""

import argparse
import re
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

#: Debian package -> the R data base in it that holds the books.
PACKAGES = {
    "r-cran-janeaustenr": "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb",
    "r-cran-tokenizers": "usr/lib/R/site-library/tokenizers/data/Rdata.rdb",
}
BOOK_SEPARATOR = "\n\f\n"
HELD_OUT_SHARE = 0.05

_AFTERWORD = re.compile(r"\n\s*(?:End of Project Gutenberg|Northanger Abbey was written in)")
_R_HEADER = b"X\n"
_R_STRING_VECTOR = 16
_R_HAS_ATTRIBUTES = 0x200


class CorpusError(Exception):
    """The corpus cannot be had; the message says what to do."""


def r_string_vectors(database: bytes) -> Iterator[list[str]]:
    """Yield the character vectors of an R lazy-load data base (`.rdb`).

    Such a file is a row of records: the length as 4 bytes, then a zlib stream that holds one
    R object in the XDR serialization (R Internals, section 1.8).
    """
    while database:
        stream = zlib.decompressobj()
        record = stream.decompress(database[4:])
        database = stream.unused_data
        if record.startswith(_R_HEADER):
            yield _r_strings(record)


def _r_strings(record: bytes) -> list[str]:
    """Decode one serialized character vector."""
    encoding_length = struct.unpack_from(">i", record, 14)[0]
    offset = 18 + encoding_length
    flags, count = struct.unpack_from(">ii", record, offset)
    if flags & ~_R_HAS_ATTRIBUTES != _R_STRING_VECTOR:
        raise CorpusError(f"expected an R character vector (type 16), got flags {flags:#x}")
    offset += 8
    strings = []
    for _ in range(count):
        length = struct.unpack_from(">i", record, offset + 4)[0]
        offset += 8
        strings.append(record[offset : offset + length].decode("utf-8"))
        offset += length
    return strings


def clean(text: str) -> str:
    """Return a book as one line a paragraph, with nothing in it that is not the author's.

    >>> clean("A _very_ good\\nday--she said.\\n\\n\\n* * *\\n\\nIt rained.\\n")
    'A very good day\u2014she said.\\n\\nIt rained.'
    """
    text = text.replace("\r\n", "\n").lstrip("\ufeff")
    start = text.rfind("\nCHAPTER 1. Loomings")
    if start >= 0:
        text = text[start:]
    text = _AFTERWORD.split(text)[0]
    text = text.translate(str.maketrans("\u2018\u2019\u201c\u201d\u00a0", "''\"\" "))
    text = re.sub(r"\[(?:Illustration|Footnote|Transcriber)[^\]]*\]", "", text)
    text = re.sub(r" ?-{2,} ?", "\u2014", text.replace("_", ""))
    paragraphs = (" ".join(block.split()) for block in re.split(r"\n\s*\n", text))
    return "\n\n".join(p for p in paragraphs if re.search(r"[A-Za-z0-9]", p))


def fetch() -> str:
    """Download and unpack the packages, and return the cleaned books joined by `BOOK_SEPARATOR`."""
    books = []
    with tempfile.TemporaryDirectory() as folder:
        for package, database in PACKAGES.items():
            _run(["apt-get", "download", package], folder, f"apt-get cannot download {package}")
            (archive,) = Path(folder).glob(f"{package}_*.deb")
            unpack = ["dpkg", "-x", archive.name, package]
            _run(unpack, folder, f"dpkg cannot unpack {archive.name}")
            for lines in r_string_vectors(Path(folder, package, database).read_bytes()):
                books.append(clean("\n".join(lines)))
    return BOOK_SEPARATOR.join(books) + "\n"


def _run(command: list[str], folder: str, problem: str) -> None:
    way_out = "Run `apt-get update` first, or pass --corpus PATH with any English text."
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:
        raise CorpusError(f"{problem}: there is no {command[0]} here. {way_out}") from None
    if done.returncode:
        raise CorpusError(f"{problem}: {done.stderr.strip().splitlines()[-1]}. {way_out}")


def split(text: str) -> tuple[str, str]:
    """Split into (train, held-out): the end of every book, 5% of it, is held out.

    The cut falls between two paragraphs, at the same place every time.
    """
    train, held_out = [], []
    for book in text.strip().split(BOOK_SEPARATOR):
        cut = book.find("\n\n", round(len(book) * (1 - HELD_OUT_SHARE)))
        if cut < 0:
            cut = round(len(book) * (1 - HELD_OUT_SHARE))
        train.append(book[:cut].strip())
        held_out.append(book[cut:].strip())
    return "\n\n".join(train), "\n\n".join(held_out)


def main() -> int:
    """Write the corpus."""
    parser = argparse.ArgumentParser(description="Fetch and clean the demo's corpus.")
    parser.add_argument("--out", type=Path, default=Path(".corpus/corpus.txt"))
    arguments = parser.parse_args()
    try:
        text = fetch()
    except CorpusError as error:
        print(f"error: {error}")
        return 2
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(text, encoding="utf-8")
    train, held_out = split(text)
    print(f"{arguments.out}: {len(train):,} characters to train on, {len(held_out):,} held out")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
