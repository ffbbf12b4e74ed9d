"""The text inside a file: decompressed, as UTF-8, and everything there is before damage."""

import bz2
import codecs
import io
import lzma
import re
import zlib
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple

import zstandard

from data_prep.elsewhere import READ_BYTES, open_file
from data_prep.formats import (
    HEAD_BYTES,
    SIGNATURES,
    SKIPPABLE_FRAME,
    compression_of,
    encoding_of,
)

COMPRESSED_BYTES = 1 << 14
"""Read at a time: little, since a few bytes may hold megabytes of one character."""
LARGEST_WINDOW = 1 << 31  # of `zstd --long=31`
DECODERS: dict[str, Callable[[], Any]] = {
    "gz": lambda: zlib.decompressobj(wbits=31),
    "bz2": bz2.BZ2Decompressor,
    "xz": lzma.LZMADecompressor,
    "zst": lambda: zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW).decompressobj(),
}
DAMAGED = "behind damage in compressed data"
UNPROVEN = f"{DAMAGED} (what was read since its last checksum may be wrong)"
PLACE = "damaged compressed file, rest unreadable"
UNPROVEN_PLACE = f"{PLACE}, some of what was read perhaps wrong"
TRUNCATED = "cut off in compressed data (what is missing cannot be counted, only what is there and gives nothing)"
BEHIND = "something else behind compressed data"
DECODING_ERRORS = (zlib.error, OSError, lzma.LZMAError, zstandard.ZstdError, EOFError, ValueError)


class Damage(NamedTuple):
    words: str
    lost: int
    """Bytes of the file, from the last one on that gave data; of text in another encoding, those that were no text."""
    reason: str = DAMAGED
    place: str = PLACE
    """What is reported of the line where it happens."""
    trailing: bool = False
    """Something else stands behind data that are complete: gzip, too, warns of it and goes on."""


class Content:
    """An open file; `stream` gives its bytes and ends before damage, which `damage` then describes."""

    def __init__(self, path: str, promised: str | None = None) -> None:
        """`promised`: the compression by the file's name; its first bytes decide."""
        self.damage: Damage | None = None
        self._raw = open_file(path)
        self._size = self._raw.seek(0, io.SEEK_END)
        self._raw.seek(0)
        head = self._raw.peek(HEAD_BYTES)[:HEAD_BYTES]
        self._compression = compression_of(head, promised) or ""
        self.stream: io.BufferedReader = self._raw
        if self._compression:
            self.stream = io.BufferedReader(_Blocks(self._members()), READ_BYTES)
            head = self.stream.peek(HEAD_BYTES)[:HEAD_BYTES]
        if encoding := encoding_of(head):
            self.stream = io.BufferedReader(_Blocks(self._as_utf8(self.stream, encoding)), READ_BYTES)

    def __enter__(self) -> "Content":
        return self

    def __exit__(self, *_: object) -> None:
        self._raw.close()

    @property
    def plain(self) -> bool:
        """The stream is the file as it is: any part of it can be read alone."""
        return self.stream is self._raw

    @property
    def truncated(self) -> bool:
        """The stream has ended early: its last line may be a part of one."""
        return self.damage is not None and not self.damage.trailing

    @property
    def damaged_before_a_record(self) -> str | None:
        """Where no whole record stands before damage in the file itself: the reason to leave all of it out."""
        return self.damage.reason if self.damage and self.damage.reason in (DAMAGED, UNPROVEN, TRUNCATED) else None

    def _members(self) -> Iterator[bytes]:
        begin: int | None = 0
        while begin is not None:
            end = yield from self._member(begin)
            begin = None if end is None else self._next_member(end)

    def _member(self, begin: int) -> Generator[bytes, None, int | None]:
        """The member (gzip's word; a frame or stream elsewhere) at `begin`; returns where it ends, None when damaged."""
        decoder, position, given = DECODERS[self._compression](), begin, begin
        while not decoder.eof:
            block = self._raw.read(COMPRESSED_BYTES)
            if not block:
                self.damage = Damage("it ends in the middle", self._size - given, TRUNCATED)
                return None
            try:
                data = _decompressed(decoder, block)
            except DECODING_ERRORS as error:
                yield from self._up_to_damage(begin, position, given, str(error))
                return None
            position += len(block)
            if data:
                yield data
                given = position
        return position - len(decoder.unused_data)

    def _up_to_damage(self, begin: int, position: int, given: int, words: str) -> Iterator[bytes]:
        """What a member still gives of the block at `position`, which its decoder refused as a whole.

        `given`: where the last data came from.
        """
        decoder = DECODERS[self._compression]()
        self._raw.seek(begin)
        while (left := position - self._raw.tell()) > 0:
            _decompressed(decoder, self._raw.read(min(COMPRESSED_BYTES, left)))
        while byte := self._raw.read(1):
            try:
                data = _decompressed(decoder, byte)
            except DECODING_ERRORS as error:
                words = str(error)
                break
            if data:
                yield data
                given = self._raw.tell()
        lost = self._size - given
        self.damage = Damage(words, lost) if given == begin else Damage(words, lost, UNPROVEN, UNPROVEN_PLACE)

    def _next_member(self, end: int) -> int | None:
        """Where the member after `end` begins; None if there is none, and `damage` says what is there instead."""
        begin, signature = end, SIGNATURES[self._compression]
        self._raw.seek(begin)
        while (rest := self._raw.read(HEAD_BYTES)) and rest[0] == 0:  # zeros fill up the blocks of a tape
            begin += len(rest) - len(rest.lstrip(b"\0"))
            self._raw.seek(begin)
        if not rest:
            return None
        if signature.match(rest) or (self._compression == "zst" and SKIPPABLE_FRAME.match(rest)):
            self._raw.seek(begin)
            return begin
        words, lost = f"{self._size - begin:,} bytes of something else behind the compressed data", self._size - begin
        trailing = not self._finds(signature, begin)
        self.damage = Damage(words, lost, BEHIND if trailing else DAMAGED, trailing=trailing)
        return None

    def _finds(self, signature: re.Pattern[bytes], position: int) -> bool:
        """Is there another member somewhere behind `position`? Then what stands before it is damage."""
        self._raw.seek(position)
        before = b""
        while block := self._raw.read(READ_BYTES):
            if signature.search(before + block):
                return True
            before = block[-HEAD_BYTES:]
        return False

    def _as_utf8(self, stream: io.BufferedReader, encoding: str) -> Iterator[bytes]:
        """What is invalid stays invalid, so that it is found and named line by line; the rest behind what no text begins with
        is counted.
        """
        decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
        block = b"more"
        while block:
            block = stream.read(READ_BYTES)
            try:
                yield decoder.decode(block, final=not block).encode("utf-8", "surrogatepass")
            except UnicodeDecodeError as error:
                before = block[: max(0, error.start - (len(error.object) - len(block)))]
                yield decoder.decode(before).encode("utf-8", "surrogatepass")
                lost = len(error.object) - error.start + sum(map(len, iter(lambda: stream.read(READ_BYTES), b"")))
                name = encoding.upper()
                reason = f"behind invalid {name}" + (" (bytes after decompression)" if self._compression else "")
                self.damage = self.damage or Damage(error.reason, lost, reason, f"invalid {name}, rest unreadable")
                return


def _decompressed(decoder: Any, block: bytes) -> bytes:
    """All that follows from a block: some decoders keep a part until they are asked again."""
    parts = [decoder.decompress(block)]
    while parts[-1] and not decoder.eof:
        parts.append(decoder.decompress(b""))
    return b"".join(parts)


class _Blocks(io.RawIOBase):
    """Blocks of any size as a file."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks, self._left = blocks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._left = memoryview(block)
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size
