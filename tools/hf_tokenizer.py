"""A data set's tokenizer as the files that `transformers.AutoTokenizer` loads, with exactly the ids of training.

In text, the spelling of a control token stays text; a document begins with BOS and EOS is left to the caller.

A SentencePiece model is rewritten for the `tokenizers` library. Both join neighbouring symbols pair by pair:
SentencePiece whichever neighbours spell the entry of the best score, `tokenizers` by the rank of the pair. What
precedes an entry's last join does not depend on what surrounds the entry, so each entry is only ever made from one
pair, the one found by encoding the entry alone; these pairs, ranked by score, give the same ids for every text.
Entries of equal score, of which SentencePiece joins the leftmost first, need a rank that amounts to the same
(`_order_ties`). What has no exact equivalent is refused.
"""

import json
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import tokenizers
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec
from tokenizers import AddedToken, decoders, models, normalizers
from transformers import AutoTokenizer

from data_prep.encode import awkward_texts
from data_prep.tokenizer import USUAL_NAMES, Tokenizer, open_tokenizer
from data_prep.tokenizer_files import CONFIG_FILE, JSON_FILE, MODEL_FILE
from training.manifest import TokenizerInfo, write_atomically

SPACE = "▁"
Pair = tuple[str, str]
Piece = ModelProto.SentencePiece


def write_hf_tokenizer(
    info: TokenizerInfo,
    source: Path,
    output: Path,
    model_max_length: int,
    sample: Sequence[str] = (),
    mask_id: int | None = None,
) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and, of a SentencePiece model, `tokenizer.model` into `output`.

    `info` is the data set's description of its tokenizer, `source` the tokenizer's file, `mask_id` what the model was
    trained with as mask token: where the tokenizer has none, `tokenizer_config.json` adds one. The result is loaded and
    compared with the tokenizer of training on awkward strings and on `sample` before anything is written. Raises
    `ValueError` if `source` is another tokenizer or one that `transformers` cannot reproduce.
    """
    trained = open_tokenizer(source)
    if trained.info(info.file) != info:
        raise ValueError(f"{trained.path} is not the tokenizer that the data was built with: restore that one")
    is_sentencepiece = info.type == "sentencepiece"
    backend = _from_sentencepiece(trained.path) if is_sentencepiece else _from_json(trained.path, info)
    table = json.loads(backend.to_str())
    table["post_processor"] = _beginning_with(info.bos_id, backend)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model_max_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "add_bos_token": info.bos_id is not None,
        "add_eos_token": False,
    }
    added = backend.get_added_tokens_decoder()
    named = {kind: getattr(info, f"{kind}_id") for kind in USUAL_NAMES} | {"unk": trained.unk_id}
    named["unk"] = named["unk"] if named["unk"] in added else None
    config |= {f"{kind}_token": backend.id_to_token(i) for kind, i in named.items() if i is not None}
    if mask_id is not None and info.mask_id is None:
        config |= _added_mask(mask_id, backend)
    files = {
        JSON_FILE: json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode(),
        CONFIG_FILE: json.dumps(config, ensure_ascii=False, indent=2).encode() + b"\n",
    }
    if is_sentencepiece:
        files[MODEL_FILE] = trained.path.read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            (Path(folder) / name).write_bytes(data)
        _check(AutoTokenizer.from_pretrained(folder), trained, [*awkward_texts(trained), *sample], mask_id)
    output.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        write_atomically(output / name, data)


def _beginning_with(bos_id: int | None, backend: tokenizers.Tokenizer) -> dict:
    """The post-processor that puts BOS in front of every text."""
    bos = None if bos_id is None else backend.id_to_token(bos_id)

    def sequence(name: str, type_id: int) -> list[dict]:
        begin = [] if bos is None else [{"SpecialToken": {"id": bos, "type_id": type_id}}]
        return [*begin, {"Sequence": {"id": name, "type_id": type_id}}]

    return {
        "type": "TemplateProcessing",
        "single": sequence("A", 0),
        "pair": sequence("A", 0) + sequence("B", 1),
        "special_tokens": {} if bos is None else {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }


def _added_mask(mask_id: int, backend: tokenizers.Tokenizer) -> dict:
    """The part of tokenizer_config.json that adds a mask token; tokenizer.json stays what training used."""
    content = next(name for name in USUAL_NAMES["mask"] if backend.token_to_id(name) is None)
    token = {"content": content, "special": True, "normalized": False, "lstrip": False, "rstrip": False}
    return {"mask_token": content, "added_tokens_decoder": {str(mask_id): token | {"single_word": False}}}


def _check(loaded, trained: Tokenizer, texts: Sequence[str], mask_id: int | None) -> None:
    """Raise `ValueError` unless the loaded tokenizer gives the ids of training for every text, and the same text back."""
    ids = {kind: getattr(trained, f"{kind}_id") for kind in USUAL_NAMES}
    ids["mask"] = ids["mask"] if mask_id is None else mask_id
    for kind, expected in ids.items():
        if getattr(loaded, f"{kind}_token_id") != expected:
            raise ValueError(f"{trained.path} cannot be exported: transformers gives another {kind} id")
    if max(loaded.get_vocab().values()) + 1 != max(trained.vocab_size, (ids["mask"] or 0) + 1):
        raise ValueError(f"{trained.path} cannot be exported: transformers adds entries to its vocabulary")
    begin = [] if trained.bos_id is None else [trained.bos_id]
    texts = [*texts, *trained.control_strings]
    plain = loaded(texts, add_special_tokens=False, verbose=False)["input_ids"]
    whole = loaded(texts, verbose=False)["input_ids"]
    for text, exact, ids, document in zip(texts, trained.encode_batch(texts), plain, whole, strict=True):
        if ids != exact.tolist() or document != begin + ids:
            raise ValueError(f"{trained.path} cannot be exported: transformers gives other ids for {text[:60]!r}")
        lossless = trained.unk_id not in ids
        if lossless and loaded.decode(document, skip_special_tokens=True) != trained.decode(exact):
            raise ValueError(f"{trained.path} cannot be exported: transformers decodes {text[:60]!r} differently")


def _from_json(path: Path, info: TokenizerInfo) -> tokenizers.Tokenizer:
    """A tokenizer.json as training used it: nothing cut or padded, the tokens known by name special."""
    backend = tokenizers.Tokenizer.from_file(str(path))
    backend.no_truncation()
    backend.no_padding()
    added = backend.get_added_tokens_decoder()
    named = {i for kind in USUAL_NAMES if (i := getattr(info, f"{kind}_id")) is not None}
    plain = [added[i].content for i in sorted(named & added.keys()) if not added[i].special]
    backend.add_special_tokens([AddedToken(content, special=True, normalized=False) for content in plain])
    return backend


def _from_sentencepiece(path: Path) -> tokenizers.Tokenizer:
    """A SentencePiece BPE model for the `tokenizers` library; `ValueError` if no exact equivalent exists."""
    proto = ModelProto.FromString(path.read_bytes())
    if reason := _no_equivalent(proto):
        raise ValueError(f"{path} cannot be exported with its exact ids: {reason}")
    try:
        merges = _merges({piece.piece: piece.score for piece in proto.pieces if piece.type == Piece.NORMAL})
    except ValueError as error:
        raise ValueError(f"{path} cannot be exported with its exact ids: {error}") from None
    of_type = defaultdict(list)
    for piece in proto.pieces:
        of_type[piece.type].append(piece.piece)
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece.piece: i for i, piece in enumerate(proto.pieces)},
            merges=merges,
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
    symbols = of_type[Piece.USER_DEFINED]
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
    groups = defaultdict(dict)
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
