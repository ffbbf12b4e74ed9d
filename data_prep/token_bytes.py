"""What each token of a vocabulary adds to a text, as UTF-8 bytes: joined, they are the text that was encoded.

A token may hold a part of a character (byte fallback, byte-level BPE), so only the joined bytes can be decoded.
"""

import json
from collections.abc import Iterator
from typing import Any

import sentencepiece

from data_prep.tokenizer import Tokenizer

SPACE = "\u2581"
UNKNOWN = "\ufffd".encode()
"""Stands for the text behind an unknown token, which is lost."""


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """Bytes of every id; none for control tokens. A space that an encoder puts before a text is not left out."""
    return _of_sentencepiece(tokenizer) if tokenizer.type == "sentencepiece" else _of_huggingface(tokenizer)


def _of_sentencepiece(tokenizer: Tokenizer) -> list[bytes]:
    model = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.path.read_bytes())

    def added(i: int) -> bytes:
        if model.is_control(i):
            return b""
        if model.is_unknown(i):
            return UNKNOWN
        piece = model.id_to_piece(i)
        return bytes([int(piece[3:5], 16)]) if model.is_byte(i) else piece.replace(SPACE, " ").encode()

    return [added(i) for i in range(model.vocab_size())]


def _of_huggingface(tokenizer: Tokenizer) -> list[bytes]:
    import tokenizers

    model = tokenizers.Tokenizer.from_file(str(tokenizer.path))
    decoders = list(_steps(json.loads(tokenizer.path.read_bytes()).get("decoder")))
    kinds = {decoder["type"] for decoder in decoders}
    letters = _byte_letters() if "ByteLevel" in kinds else {}
    spaced = "Metaspace" in kinds or any(SPACE in str(decoder.get("pattern")) for decoder in decoders)
    single = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)} if "ByteFallback" in kinds else {}

    def added(piece: str) -> bytes:
        if piece in single:
            return single[piece]
        if letters:
            return b"".join(letters.get(letter) or letter.encode() for letter in piece)
        return (piece.replace(SPACE, " ") if spaced else piece).encode()

    table = [b""] * tokenizer.vocab_size
    for piece, i in model.get_vocab(with_added_tokens=False).items():
        table[i] = added(piece)
    for i, token in model.get_added_tokens_decoder().items():  # written as they are, whatever the decoder
        table[i] = b"" if token.content in tokenizer.control_strings else token.content.encode()
    if tokenizer.unk_id is not None:
        table[tokenizer.unk_id] = UNKNOWN
    return table


def _steps(decoder: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if decoder is not None:
        yield decoder
        for step in decoder.get("decoders", []):
            yield from _steps(step)


def _byte_letters() -> dict[str, bytes]:
    """The alphabet of byte-level BPE (Radford et al. 2019, GPT-2): printable bytes as themselves, others from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): bytes([byte]) for byte in printable}
    return letters | {chr(256 + place): bytes([byte]) for place, byte in enumerate(others)}
