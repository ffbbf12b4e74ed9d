"""A SentencePiece model rewritten for the `tokenizers` library, so that every text gives the same ids.

Both join neighbouring symbols of BPE pair by pair: SentencePiece whichever neighbours spell the entry of the best score,
`tokenizers` by the rank of the pair. What precedes an entry's last join does not depend on what surrounds the entry, so
each entry is only ever made from one pair, the one found by encoding the entry alone; these pairs, ranked by score, give
the same ids for every text. Entries of equal score, of which SentencePiece joins the leftmost first, need a rank that
amounts to the same (`_order_ties`). What has no exact equivalent is refused: among it unigram models, of which both find the
likeliest entries, but not the same ones of several equally likely (runs of one character), and rules of normalization,
which `tokenizers` applies to whole grapheme clusters.
"""

from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import tokenizers
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec
from tokenizers import AddedToken, decoders, models, normalizers

from data_prep.encode import awkward_texts
from data_prep.tokenizer import Tokenizer, open_tokenizer
from data_prep.tokenizer_files import JSON_FILE

SPACE = "▁"
OTHER_IDS = "transformers gives other ids for text that spells control tokens"
Pair = tuple[str, str]
Piece = ModelProto.SentencePiece


def needs_own_code(tokenizer: Tokenizer) -> str | None:
    """Why an export of the tokenizer has to come with code that runs it, or None: what is said before any training."""
    if tokenizer.type != "sentencepiece" or given_table(tokenizer):
        return None
    try:
        backend = from_sentencepiece(tokenizer.path)
    except ValueError as error:
        return str(error)
    backend.encode_special_tokens = True
    texts = awkward_texts(tokenizer)
    found = [encoding.ids for encoding in backend.encode_batch(texts, add_special_tokens=False)]
    return None if found == _ids(tokenizer, texts) else OTHER_IDS


def given_table(tokenizer: Tokenizer) -> Tokenizer | None:
    """The tokenizer.json beside the model, if there is one with the same ids."""
    try:
        given, texts = open_tokenizer(tokenizer.path.with_name(JSON_FILE)), awkward_texts(tokenizer)
        return given if _ids(given, texts) == _ids(tokenizer, texts) else None
    except ValueError:
        return None


def _ids(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [ids.tolist() for ids in tokenizer.encode_batch(texts)]


def from_sentencepiece(path: Path) -> tokenizers.Tokenizer:
    """The model for the `tokenizers` library; `ValueError` gives the reason if there is no equivalent."""
    proto = ModelProto.FromString(path.read_bytes())
    if reason := _no_equivalent(proto):
        raise ValueError(reason)
    of_type = defaultdict(list)
    for piece in proto.pieces:
        of_type[piece.type].append(piece.piece)
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece.piece: i for i, piece in enumerate(proto.pieces)},
            merges=_merges({piece.piece: piece.score for piece in proto.pieces if piece.type == Piece.NORMAL}),
            unk_token=of_type[Piece.UNKNOWN][0],
            fuse_unk=True,
            byte_fallback=proto.trainer_spec.byte_fallback,
        )
    )
    prefix = proto.normalizer_spec.add_dummy_prefix
    spaces = normalizers.Replace(" ", SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces
    without_prefix = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *without_prefix]
    )
    control = of_type[Piece.UNKNOWN] + of_type[Piece.CONTROL]
    backend.add_special_tokens([AddedToken(content, special=True, normalized=False) for content in control])
    symbols = [content for content in of_type[Piece.USER_DEFINED] if " " not in content]  # no text holds others: "▁"
    backend.add_tokens([AddedToken(content, special=False, normalized=True) for content in symbols])
    return backend


def _no_equivalent(proto: ModelProto) -> str | None:
    """Why `tokenizers` cannot do what the model does, or None."""
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    types = {piece.type for piece in proto.pieces}
    normal = {piece.piece for piece in proto.pieces if piece.type == Piece.NORMAL}
    reasons = {
        "it is not a BPE model": trainer.model_type != TrainerSpec.BPE,
        f"it normalizes text ({normalizer.name})": normalizer.precompiled_charsmap
        or proto.denormalizer_spec.precompiled_charsmap,
        "it removes extra white space": normalizer.remove_extra_whitespaces,
        "it marks spaces in its own way": not normalizer.escape_whitespaces or trainer.treat_whitespace_as_suffix,
        "it has unused entries": Piece.UNUSED in types,
        "it has user-defined symbols and puts a space before the text": Piece.USER_DEFINED in types
        and normalizer.add_dummy_prefix,
        "an entry contains a character that is not itself an entry": any(not normal.issuperset(p) for p in normal),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _merges(scores: dict[str, float]) -> list[Pair]:
    """Pairs in the order in which `tokenizers` must prefer them to join what SentencePiece joins."""
    last = {entry: pair for entry in scores if (pair := _last_pair(entry, scores)) is not None}
    groups: dict[float, dict[str, Pair]] = defaultdict(dict)
    for entry, pair in last.items():
        groups[scores[entry]][entry] = pair
    for entry, pair in last.items():
        for part in pair:
            if part in last and scores[part] < scores[entry] and len(groups[scores[part]]) > 1:
                raise ValueError(f"{part!r} has the score of other entries, and {entry!r}, made from it, a better one")
    ordered = [_order_ties(groups[score]) for score in sorted(groups, reverse=True)]
    return [pair for group in ordered for pair in group.values()]


def _last_pair(entry: str, scores: dict[str, float]) -> Pair | None:
    """The two entries that SentencePiece joins into this one; None if it never does."""
    parts = list(entry)
    while len(parts) > 2:
        found = [scores.get(left + right) for left, right in pairwise(parts)]
        best = max((score for score in found if score is not None), default=None)
        if best is None:
            return None
        place = found.index(best)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else None


def _order_ties(group: dict[str, Pair]) -> dict[str, Pair]:
    """Entries of one score in an order of ranks that has the effect of joining the leftmost pair first.

    Where a symbol can go with its left or its right neighbour, the left one has to win: that join, and all joins by
    which the left neighbour comes about, rank before the join with the right one. Joins by which the symbol itself
    comes about are exempt: the same join happens at the left first.
    """

    def derivation(entry: str) -> set[str]:
        return {entry}.union(*map(derivation, group[entry])) if entry in group else set()

    starting = defaultdict(list)
    for entry, (left, _) in group.items():
        starting[left].append(entry)
    order = TopologicalSorter(dict.fromkeys(group, ()))
    for entry, (left, right) in group.items():
        if starting[right]:
            before = derivation(left) - derivation(right) | {entry}
            for later in starting[right]:
                order.add(later, *(before - {later}))
    try:
        return {entry: group[entry] for entry in order.static_order()}
    except CycleError as error:
        first, second = error.args[1][:2]
        raise ValueError(f"{first!r} and {second!r} have the same score and compete") from None
