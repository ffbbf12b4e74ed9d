"""Cutting by structure: the right place by a slow reference that decodes the text, nothing lost, nothing trained twice."""

import json
import re
from collections import Counter
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from data_prep.cut import CLOSERS, KINDS, OTHER_STOPS, STOPS, Breaks, count_cuts, structure_windows
from data_prep.pack import pack
from data_prep.token_bytes import token_bytes
from data_prep.tokenizer import open_tokenizer
from storage.manifest import PackingPolicy
from tests.data_prep.test_pack import targets_seen
from tests.data_prep.texts import DEEPSEEK, MISTRAL, PROSE, awkward
from tests.properties import examples

BLANKS = r"[ \t\r\v\f]*"
SENTENCE = re.compile(rf"([{re.escape(STOPS)}][{re.escape(STOPS + CLOSERS)}]*)({BLANKS})\Z")
CHINESE = "".join(
    f"　　第{n}天，他说：“今天的天气很好！”然后出门去了……路上没有人；风很大。\n街角（从前有一家书店。）如今空着？\n\n"
    for n in range(60)
)
PIECES = [b"", b"\n", b"\n\n", b" ", b"  \t", b"a", b" the", b".", b". ", b'."', b").\n ", b"!\r\n", b"3.14", b")"]
PIECES += [*("。".encode()[i : i + 1] for i in range(3)), "。".encode(), "”".encode(), "…".encode(), "中".encode()]


class Texts:
    """Documents of given ids."""

    def __init__(self, ids: list[np.ndarray]):
        self.ids, self.length = ids, np.array([len(one) for one in ids], np.int64)

    def tokens(self, i: int) -> np.ndarray:
        return self.ids[i]


@cache
def opened(path):
    tokenizer = open_tokenizer(path)
    return tokenizer, token_bytes(tokenizer)


def encoded(tokenizer, text: str) -> np.ndarray:
    ids = tokenizer.encode_batch([text])[0]
    return np.concatenate([[tokenizer.bos_id], ids, [tokenizer.eos_id]]).astype(tokenizer.dtype)


# --- what a token adds to a text --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [None, MISTRAL, DEEPSEEK])
@given(text=st.one_of(awkward, st.sampled_from([*PROSE[:9], CHINESE])))
@examples(30)
def test_the_bytes_of_tokens_are_the_text(tokenizer_folder, path, text):
    tokenizer, pieces = opened(path or tokenizer_folder)
    whole = b"".join(pieces[i] for i in encoded(tokenizer, text).tolist()).decode()
    decoded = tokenizer.decode(tokenizer.encode_batch([text])[0])
    assert whole in (decoded, " " + decoded)  # the space that SentencePiece puts before a text


def test_the_bytes_of_a_hugging_face_tokenizer_with_byte_fallback(tmp_path):
    pieces = {"<unk>": 0, "</s>": 1, "▁a": 2, "b": 3, "<0x0A>": 4, "<0xE2>": 5, "<b>": 6}
    decoder = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}]
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    table = {
        "version": "1.0",
        "added_tokens": [
            {"id": 1, "content": "</s>", "special": True} | added,
            {"id": 6, "content": "<b>", "special": False} | added,
        ],
        "decoder": {"type": "Sequence", "decoders": decoder},
        "model": {"type": "BPE", "vocab": pieces, "merges": [], "unk_token": "<unk>", "byte_fallback": True},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(table))
    found = token_bytes(open_tokenizer(tmp_path))
    assert found == ["\ufffd".encode(), b"", b" a", b"b", b"\n", b"\xe2", b"<b>"]


# --- the right place --------------------------------------------------------------------------------------------------


def kind_by_text(before: str, after: str) -> str:
    if re.search(rf"\n{BLANKS}\n{BLANKS}\Z", before):
        return "paragraph"
    if re.search(rf"\n{BLANKS}\Z", before):
        return "line"
    run = SENTENCE.search(before)
    following = (run[2] + after)[:1] if run else ""
    if not run or (following and following in STOPS + CLOSERS):
        return "hard"
    ends = (following and following in " \t\r\v\f\n") or set(run[1]) & set(OTHER_STOPS)
    return "sentence" if ends else "hard"


def best_by_text(pieces: list[bytes], low: int, high: int, last: bool) -> tuple[int, str]:
    """Every position on its own, by regular expressions on the decoded halves."""
    found: dict[str, list[tuple[int, int]]] = {kind: [] for kind in KINDS}
    for position in range(low, high + 1):
        halves = b"".join(pieces[:position]), b"".join(pieces[position:])
        kind = kind_by_text(*(half.decode(errors="surrogateescape") for half in halves))
        end = len(halves[0].rstrip(b" \t\r\v\f"))
        found[kind].append((end if last else -end, -position))
        if kind == "paragraph":
            found["line"].append(found[kind][-1])
    for kind in KINDS[:-1]:
        if found[kind]:
            return -max(found[kind])[1], kind
    return (high if last else low), "hard"


@given(st.lists(st.integers(0, len(PIECES) - 1), min_size=2, max_size=60), st.data(), st.booleans())
@example([3, 1] + [4] * 30 + [1, 5], None, True)  # a blank line longer than what is usually looked at
@example([7] + [13] * 40 + [18, 5], None, True)
@examples(400)
def test_the_best_cut_is_that_of_the_decoded_text(ids, data, last):
    low = data.draw(st.integers(1, len(ids) - 1)) if data else len(ids) - 1
    high = data.draw(st.integers(low, len(ids) - 1)) if data else len(ids) - 1
    found = Breaks(PIECES).best(np.array(ids), low, high, last)
    assert found == best_by_text([PIECES[i] for i in ids], low, high, last)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("One.\n\n|Two", "paragraph"),
        ("One.\r\n \t\r\n|Two", "paragraph"),
        ("One\n|Two", "line"),
        ("def f():\n    |return", "line"),
        ("One.| Two", "sentence"),
        ('He said "yes!"| Then', "sentence"),
        ("(See above.)|\nThen", "sentence"),
        ("他说：“好！”|然后", "sentence"),
        ("他说：“好！|”然后", "hard"),
        ("等等……|然后", "sentence"),
        ("pi is 3.|14", "hard"),
        ("www.|example.com", "hard"),
        ("a comma,| and", "hard"),
        ("中|文", "hard"),
    ],
)
def test_kinds_of_cuts(text, kind):
    before, after = text.split("|")
    pieces = [character.encode() for character in before + after]
    assert Breaks(pieces).kind(np.arange(len(pieces)), len(before)) == kind


@pytest.mark.parametrize("path", [None, MISTRAL, DEEPSEEK])
@pytest.mark.parametrize("overlap", [1, 20])
def test_real_text_is_cut_where_its_decoded_form_says(tokenizer_folder, path, overlap):
    tokenizer, pieces = opened(path or tokenizer_folder)
    policy = PackingPolicy(seq_length=120, overlap=overlap, cut="structure", cut_tolerance=0.3)
    documents = Texts([encoded(tokenizer, text) for text in (*PROSE[40:60], CHINESE)])
    breaks = Breaks(pieces)
    windows = structure_windows(documents, policy, breaks)
    chosen = Counter()
    for doc, off, size, ctx in zip(*(column.tolist() for column in windows), strict=True):
        ids = documents.ids[doc]
        own = [pieces[i] for i in ids.tolist()]
        if off:
            end = off + ctx
            assert off == (best_by_text(own, end - overlap, end - 10, last=False)[0] if overlap > 1 else end - 1)
        if off + size == len(ids):
            continue
        low, high = max(off + 121 - policy.cut_tolerance_tokens, off + ctx + 1), off + 121
        end, kind = best_by_text(own, low, high, last=True)
        assert off + size == end
        assert kind == breaks.kind(ids, end)
        chosen[kind] += 1
    assert set(chosen) >= {"paragraph", "line"}
    assert chosen["hard"] < 0.2 * chosen.total()
    assert count_cuts(documents, windows.doc, windows.off + windows.len, breaks) == {k: chosen[k] for k in KINDS}


def test_a_document_without_pauses_is_cut_where_rows_are_full():
    ids, policy = np.full(1000, 5), PackingPolicy(seq_length=100, overlap=7, cut="structure")
    windows = structure_windows(Texts([ids]), policy, Breaks(PIECES))
    exact = pack(np.array([1000]), 101, PackingPolicy(seq_length=100, overlap=7), 0)
    assert sorted(windows.off.tolist()) == sorted(exact.piece_off.tolist())
    assert (
        count_cuts(Texts([ids]), windows.doc, windows.off + windows.len, Breaks(PIECES))["hard"] == len(windows.doc) - 1
    )


@pytest.mark.parametrize("piece", [0, 1, 3, 7])
def test_endless_blanks_and_dots_take_no_longer(piece):
    """The text behind a cut is looked at up to a limit: each window may cost FAR_TOKENS, not the whole document."""
    ids, seen = np.full(200_000, piece), 0

    class Counting(list):
        def __getitem__(self, i):
            nonlocal seen
            seen += 1
            return super().__getitem__(i)

    breaks = Breaks(PIECES)
    breaks.pieces = Counting(PIECES)
    policy = PackingPolicy(seq_length=2000, cut="structure")
    windows = structure_windows(Texts([ids]), policy, breaks)
    assert seen < 40_000 * len(windows.doc)


# --- nothing lost, nothing twice --------------------------------------------------------------------------------------


@st.composite
def policies(draw) -> PackingPolicy:
    seq_length, tolerance = draw(st.integers(2, 24)), draw(st.floats(0.01, 0.9))
    most = seq_length - int(tolerance * (seq_length + 1))
    assume(most >= 1)
    overlap, tail = draw(st.integers(1, most)), draw(st.sampled_from(["pad", "drop"]))
    return PackingPolicy(seq_length=seq_length, overlap=overlap, tail=tail, cut="structure", cut_tolerance=tolerance)


DOCUMENTS = st.lists(st.lists(st.integers(0, len(PIECES) - 1), min_size=1, max_size=90), min_size=1, max_size=12)


@given(DOCUMENTS, policies(), st.integers(0, 3))
@examples(200)
def test_every_token_but_a_documents_first_is_a_target_exactly_once(texts, policy, seed):
    documents = Texts([np.array(text) for text in texts])
    windows = structure_windows(documents, policy, Breaks(PIECES))
    packing = pack(documents.length, policy.row_tokens, policy, seed, windows)
    again = pack(
        documents.length, policy.row_tokens, policy, seed, structure_windows(documents, policy, Breaks(PIECES))
    )
    for name, value in vars(packing).items():
        assert np.array_equal(value, getattr(again, name))
    fill = [int(packing.piece_len[a:b].sum()) for a, b in pairwise(packing.row_splits)]
    assert all(0 < n <= policy.row_tokens for n in fill)
    assert packing.padding == sum(policy.row_tokens - n for n in fill)
    assert (windows.len > windows.ctx).all()
    assert (windows.ctx[windows.off > 0] >= (policy.overlap + 1) // 2).all()
    assert (windows.ctx <= policy.overlap).all()
    seen = targets_seen(packing)
    everything = {(d, o): 1 for d, text in enumerate(texts) for o in range(1, len(text))}
    if policy.tail == "pad":
        assert seen == everything
        assert packing.documents_cut == sum(len(text) > policy.row_tokens for text in texts)
        assert packing.tokens_dropped == packing.documents_cut_though_fitting == 0
    else:
        assert seen.items() <= everything.items()


def test_the_tolerance_is_kept_only_where_it_counts():
    assert PackingPolicy(seq_length=64).cut_tolerance is None
    policy = PackingPolicy(seq_length=64, cut="structure")
    assert policy.cut_tolerance_tokens == 4
    assert PackingPolicy.model_validate_json(policy.model_dump_json()) == policy


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"cut": "structure", "policy": "concat"}, "cut structure has no effect with policy concat"),
        ({"cut_tolerance": 0.5}, "cut_tolerance 0.5 has no effect with cut exact"),
        ({"cut": "structure", "cut_tolerance": 1.0}, "less than 1"),
        (
            {"cut": "structure", "overlap": 61},
            "overlap 61 and a cut_tolerance of 4 tokens leave nothing of seq_length 64",
        ),
    ],
)
def test_impossible_cuts_are_refused(fields, sentence):
    with pytest.raises(ValidationError, match=sentence):
        PackingPolicy(seq_length=64, **fields)
