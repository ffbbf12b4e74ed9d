"""The parts of the search for near-duplicates, as properties, and planted ones in a token store."""

from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from console.progress import Progress
from data_prep.dropped import REASONS, dropped_of, ordered
from data_prep.duplicates import candidates, ngrams
from data_prep.duplicates.candidates import Items
from data_prep.duplicates.decide import Deciding
from data_prep.duplicates.near import find_near_duplicates
from data_prep.duplicates.sections import Paragraphs, Texts, sections
from data_prep.duplicates.sketch import SLOTS, NearSettings, rows_of_band, signatures
from data_prep.ledger import Ledger, unit_path
from data_prep.unit_file import DocumentBatch, write_unit

NEWLINE, EOS, VOCABULARY = 1, 2, 5000
PIECES = [b"", b"\n", b"", *(b" w" for _ in range(VOCABULARY - 3))]
tokens = st.lists(st.integers(0, 3), max_size=40).map(lambda ids: np.array(ids, np.uint16))


def grams(ids, n: int) -> set[bytes]:
    return {ids[i : i + n].tobytes() for i in range(len(ids) - n + 1)}


def exact(a, b, n: int = 5) -> float:
    a, b = grams(a, n), grams(b, n)
    return len(a & b) / len(a | b)


def edited(ids: np.ndarray, jaccard: float, generator: np.random.Generator) -> np.ndarray:
    """The same with so many words exchanged, no two in one 5-gram, that the similarity is just not below this."""
    count = int((len(ids) - 4) * (1 - jaccard) / (1 + jaccard) / 5)
    places = np.arange(2, len(ids), 5)
    places = generator.choice(places[ids[places] > EOS], count, replace=False)
    result = ids.copy()
    result[places] = generator.integers(3, VOCABULARY, count)
    return result


def edited_sections(ids: np.ndarray, jaccard: float, generator: np.random.Generator) -> np.ndarray:
    cut = sections(Texts(ids, np.array([0]), np.array([len(ids)])), Paragraphs(PIECES), 50)
    return np.concatenate([edited(ids[b:e], jaccard, generator) for b, e in zip(cut.begin, cut.end, strict=True)])


def prose(generator: np.random.Generator, size: int) -> np.ndarray:
    """Words in paragraphs of 20 to 200 tokens."""
    ids = generator.integers(3, VOCABULARY, size).astype(np.uint16)
    for place in np.cumsum(generator.integers(20, 200, size // 20 + 1)):
        ids[place : place + 2] = NEWLINE
    return ids


def write_store(folder, units: list[list[np.ndarray]]) -> list[Ledger]:
    folder.mkdir(parents=True)
    ledgers = []
    for number, documents in enumerate(units):
        stored = [np.append(ids, EOS).astype(np.uint16) for ids in documents]
        columns = [str(i) for i in range(len(stored))], [0] * len(stored), [0] * len(stored), [bytes(16)] * len(stored)
        batch = DocumentBatch(np.concatenate(stored), np.array([len(ids) for ids in stored]), *columns)
        sha256, size = write_unit(unit_path(folder, number), np.dtype(np.uint16), iter([batch]))
        known = {"plan_sha256": "", "input_sha256": "", "sha256": sha256, "file_bytes": size}
        ledgers.append(Ledger(unit=number, documents=len(stored), **known))
    return ledgers


def found(folder, units, workers: int = 1, ngram: int = 5, least: int = 50, **levels: float):
    ledgers = write_store(folder / "tokens", units)
    settings = NearSettings(levels, ngram, least, begins=0)
    pieces = find_near_duplicates(folder / "tokens", folder / "work", settings, ledgers, PIECES, workers)
    return ordered([dropped_of([]), *pieces])


# --- n-grams, sections, sketches --------------------------------------------------------------------------------------


@given(tokens, tokens, st.integers(1, 6))
def test_jaccard_is_that_of_the_sets_of_ngrams(a, b, n):
    if not np.array_equal(a, b):
        expected = exact(a, b, n) if grams(a, n) and grams(b, n) else 0
        assert ngrams.jaccard(ngrams.Grams(a, n), ngrams.Grams(b, n)) == expected


def test_colliding_hashes_make_nothing_similar(monkeypatch):
    a, b = np.arange(50, dtype=np.uint16), np.arange(30, 80, dtype=np.uint16)
    monkeypatch.setattr(ngrams, "hashes", lambda ids, n: np.zeros(len(ids) - n + 1, np.uint64))
    assert ngrams.jaccard(ngrams.Grams(a, 3), ngrams.Grams(b, 3)) == exact(a, b, 3)


@given(st.lists(tokens, min_size=2, max_size=8), st.integers(1, 6), st.booleans())
def test_many_pairs_at_once_are_as_similar_as_each_alone(texts, n, collide):
    """Also where n-grams share the part of a hash that is looked at first, or all of it."""
    texts = [text for text in texts if len(text) >= n]
    pairs = np.array([(a, b) for a in range(len(texts)) for b in range(a + 1)], np.int64).reshape(-1, 2)
    each = [ngrams.jaccard(ngrams.Grams(texts[a], n), ngrams.Grams(texts[b], n)) for a, b in pairs.tolist()]
    hashed = ngrams.hashes
    with pytest.MonkeyPatch.context() as patch:
        if collide:
            patch.setattr(ngrams, "hashes", lambda ids, n: hashed(ids, n) % np.uint64(3))
        assert not len(pairs) or ngrams.jaccards(texts, pairs, n).tolist() == each


def plainly_sketched(ids: np.ndarray, n: int) -> list[int]:
    """Slot by slot, by the definition."""
    slots: dict[int, int] = {}
    for each in ngrams.hashes(ids, n).tolist():
        slot = (each >> 32) * SLOTS >> 32
        slots[slot] = min(each, slots.get(slot, each))
    return [
        slots[next(place % SLOTS for place in range(slot, 2 * SLOTS) if place % SLOTS in slots)]
        for slot in range(SLOTS)
    ]


@given(st.lists(st.tuples(st.integers(1, 200), st.booleans()), min_size=1, max_size=6), st.integers(1, 8), st.randoms())
def test_sketches_of_a_batch_are_those_of_each_item_alone(pieces, n, random):
    """Documents with what begins and ends them between, and stretches of them that are items of another level."""
    ids = np.array([random.randrange(99) for _ in range(sum(size for size, _ in pieces) + 2 * len(pieces))], np.uint16)
    ends = np.cumsum([size + 2 for size, _ in pieces])
    documents = [(end - size - 1, end - 1) for end, (size, _) in zip(ends.tolist(), pieces, strict=True)]
    middles = [(b + e) // 2 if cut else e for (b, e), (_, cut) in zip(documents, pieces, strict=True)]
    stretches = [part for (b, e), m in zip(documents, middles, strict=True) for part in ((b, m), (m, e))]
    levels = [
        np.array([pair for pair in level if pair[1] - pair[0] >= n], np.int64).reshape(-1, 2)
        for level in (documents, stretches)
    ]
    found = signatures(ngrams.hashes(ids, n), [(level[:, 0], level[:, 1] - n + 1) for level in levels])
    for level, sketch in zip(levels, found, strict=True):
        assert sketch.T.tolist() == [plainly_sketched(ids[begin:end], n) for begin, end in level.tolist()]


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_a_hash_depends_on_its_ngram_alone(dtype):
    text = np.random.default_rng(0).integers(0, 9, 40).astype(dtype)
    ids = np.tile(text, ngrams.BLOCK // 32)
    hashed = ngrams.hashes(ids, 7).reshape(-1)
    assert len(np.unique(hashed)) == len(grams(ids, 7))
    assert np.array_equal(hashed[: len(hashed) // 40 * 40].reshape(-1, 40)[-1], hashed[:40])


def test_sections_are_whole_paragraphs_and_the_same_wherever_a_chapter_stands():
    generator = np.random.default_rng(1)
    chapter = prose(generator, 5000)
    texts = [np.concatenate([prose(generator, before), [NEWLINE] * 2, chapter]) for before in (0, 300, 1111)]
    ids = np.concatenate(texts).astype(np.uint16)
    ends = np.cumsum([len(text) for text in texts])
    content = Texts(ids, np.concatenate([[0], ends[:-1]]), ends)
    cut = sections(content, Paragraphs(PIECES), 100)
    assert np.array_equal(cut.begin[1:], cut.end[:-1])
    assert (cut.end - cut.begin).min() >= 100
    inside = cut.end[~np.isin(cut.end, ends)]
    assert np.all((ids[inside - 1] == NEWLINE) & (ids[inside - 2] == NEWLINE) & (ids[inside] != NEWLINE))
    pieces = [ids[begin:end].tobytes() for begin, end in zip(cut.begin, cut.end, strict=True)]
    shared = [piece for piece, count in Counter(pieces).items() if count == 3]
    assert sum(map(len, shared)) / 2 >= 0.9 * len(chapter)


def test_a_text_of_lines_alone_is_cut_at_lines():
    ids = np.tile(np.append(np.arange(3, 30), NEWLINE), 100).astype(np.uint16)
    cut = sections(Texts(ids, np.array([0]), np.array([len(ids)])), Paragraphs(PIECES), 100)
    assert (cut.end - cut.begin).tolist() == [112] * 25


@pytest.mark.parametrize("size", [30, 200, 5000])
def test_slots_are_equal_with_the_probability_of_the_similarity(size):
    generator = np.random.default_rng(size)
    a = [generator.integers(0, 1 << 16, size).astype(np.uint16) for _ in range(60)]
    b = [np.append(ids[: size * 3 // 4], generator.integers(0, 1 << 16, size // 4)).astype(np.uint16) for ids in a]
    ids, ends = np.concatenate([*a, *b]), np.cumsum([len(each) for each in [*a, *b]])
    [sketch] = signatures(ngrams.hashes(ids, 5), [(np.concatenate([[0], ends[:-1]]), ends - 4)])
    share = np.mean(sketch[:, :60] == sketch[:, 60:])
    assert abs(share - np.mean([exact(*pair) for pair in zip(a, b, strict=True)])) < 0.03


def test_bands_find_what_is_as_similar_as_the_threshold():
    for threshold in np.linspace(0.3, 1, 50):
        rows = rows_of_band(threshold)
        assert SLOTS % rows == 0
        assert 1 - (1 - threshold**rows) ** (SLOTS // rows) >= 0.99


# --- planted ones -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["documents", "sections"])
def test_planted_repetitions_are_found_and_nothing_else(tmp_path, level):
    generator = np.random.default_rng(7)
    originals = [prose(generator, size) for size in generator.integers(60, 1500, 200)]
    strangers = [prose(generator, size) for size in generator.integers(60, 1500, 100)]
    similar = [
        edited(ids, 0.8, generator) if level == "documents" else edited_sections(ids, 0.8, generator)
        for ids in originals
    ]
    below = [edited(ids, 0.7, generator) for ids in originals[:50]]  # the test of the values refuses most of them
    units = [originals[:120], [*originals[120:], *strangers], [*similar, *below]]
    documents = [ids for unit in units for ids in unit]
    dropped = found(tmp_path / "one", units, **{level: 0.8})
    assert np.all(dropped.value >= 0.8)
    for doc, begin, end, value, of in zip(*dropped[:3], *dropped[4:6], strict=True):
        assert of < doc
        if level == "documents":
            assert begin == 0
            assert end == len(documents[doc]) + 1
            assert value == exact(documents[doc], documents[of])
        else:
            mine = grams(documents[doc][begin : min(end, len(documents[doc]))], 5)
            assert len(mine & grams(documents[of], 5)) >= 0.8 * len(mine)
    first = len(originals) + len(strangers)
    if level == "documents":
        assert np.count_nonzero(np.isin(np.arange(first, first + len(similar)), dropped.doc)) >= 0.95 * len(similar)
    else:
        tokens = sum(int((dropped.end - dropped.begin)[dropped.doc == first + i].sum()) for i in range(len(similar)))
        assert tokens >= 0.95 * sum(map(len, similar))
    assert dropped.doc.min() >= first


def test_of_a_chain_every_second_one_stays(tmp_path):
    """What is left out is like something that stays, not only like something that is left out."""
    generator = np.random.default_rng(3)
    chain = [prose(generator, 1000)]
    for _ in range(9):
        chain.append(edited(chain[-1], 0.81, generator))
    dropped = found(tmp_path, [chain], documents=0.8)
    kept = sorted({*range(10)} - set(dropped.doc.tolist()))
    assert len(kept) >= 4
    assert not set(dropped.of.tolist()) & set(dropped.doc.tolist())


def test_a_document_of_repeated_sections_alone_is_left_out(tmp_path):
    generator = np.random.default_rng(4)
    words = generator.integers(3, VOCABULARY, (3, 400)).astype(np.uint16)
    words[:, 99::100] = words[:, 98::100] = NEWLINE
    chapters = list(words)
    book, excerpt = np.concatenate(chapters), np.concatenate([chapters[2], chapters[0]])
    dropped = found(tmp_path, [[book], [excerpt, prose(generator, 300)]], sections=0.9)
    assert [REASONS[reason] for reason in dropped.reason] == ["repeated sections"]
    assert (dropped.doc[0], dropped.of[0], dropped.end[0]) == (1, 0, len(excerpt) + 1)


def test_what_is_compared_together_are_the_decisions_one_by_one(tmp_path, monkeypatch):
    """Chains, so that what an item is like is itself left out, and copies; against the definition, pair after pair."""
    generator = np.random.default_rng(8)
    texts = [prose(generator, size) for size in (90, 300, 1000)]
    for _ in range(60):
        base = texts[generator.integers(len(texts))]
        texts.append(edited(base, generator.choice([0.75, 0.82, 1]), generator))
    stored = {"units": [texts[:20], texts[20:45], texts[45:]], "documents": 0.8}
    dropped = found(tmp_path / "a", **stored)
    pairs = np.concatenate(list(Items(sorted((tmp_path / "a" / "work").glob("*.documents.arrow"))).pairs(tmp_path)))
    expected: dict[int, tuple[int, float]] = {}
    for later, earlier in zip((pairs >> np.uint64(32)).tolist(), (pairs & np.uint64(0xFFFFFFFF)).tolist(), strict=True):
        if later not in expected and earlier not in expected:
            value = exact(texts[later], texts[earlier])
            if value >= 0.8:
                expected[later] = earlier, value
    assert len(expected) > 20
    assert dropped.doc.tolist() == list(expected)
    assert list(zip(dropped.of.tolist(), dropped.value.tolist(), strict=True)) == list(expected.values())
    for limit, few in ("BLOCK", 700), ("PAIRS_AHEAD", 3):
        monkeypatch.setattr(f"data_prep.duplicates.decide.{limit}", few)
        again = found(tmp_path / limit, **stored)
        assert all(np.array_equal(*columns) for columns in zip(dropped, again, strict=True))


class Numbers:
    """Items that are their numbers, each a document."""

    def __init__(self, count: int) -> None:
        self.starts = np.array([0, count])

    def __len__(self) -> int:
        return int(self.starts[1])

    def column(self, name: str, unit: int) -> np.ndarray:
        return np.arange(len(self))


def check_decisions(value: dict[tuple[int, int], float], tokens: list[int], together: int) -> None:
    """Of pairs (later, earlier) so similar and so long, compared so many tokens together; document 1 is left out before."""

    def alike(texts, places, n):
        return np.array([value[texts[a], texts[b]] for a, b in places])

    count = max(map(max, value), default=0) + 1
    deciding = Deciding(Path(), [count], Numbers(count), 5, np.zeros(0), Progress("", 0), 0)
    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as folder:
        for name, replaced in ("BLOCK", together), ("jaccards", alike):
            patch.setattr(f"data_prep.duplicates.decide.{name}", replaced)
        patch.setattr(deciding, "_texts", list)
        pairs = *np.array(list(value), np.int64).reshape(-1, 2).T, np.array(tokens, np.int64)
        patch.setattr(deciding, "_promising", lambda *_: [pairs])
        decided = list(deciding._repetitions(0.8, Path(folder), np.array([1])))
    gone, expected = {1}, []
    for (later, earlier), similar in value.items():
        if not {later, earlier} & gone and similar >= 0.8:
            gone.add(later)
            expected.append((later, earlier, similar))
    assert decided == expected


@given(st.integers(3, 12), st.sampled_from([0.2, 0.5, 0.8]), st.integers(1, 30), st.randoms())
def test_whatever_is_compared_ahead_each_pair_decides_in_its_turn(count, share, together, random):
    pairs = [(later, earlier) for later in range(count) for earlier in range(later) if random.random() < 0.7]
    value = {pair: 0.9 if random.random() < share else 0.1 for pair in pairs}
    check_decisions(value, [random.randint(1, together) for _ in pairs], together)


def test_a_pair_is_compared_when_what_would_have_spared_it_is_left_out():
    check_decisions({(3, 0): 0.1, (3, 2): 0.9, (4, 3): 0.9, (6, 4): 0.9, (6, 5): 0.9}, [5] * 5, 10)


def test_pairs_do_not_depend_on_what_fits_into_memory(tmp_path, monkeypatch):
    generator = np.random.default_rng(5)
    texts = [prose(generator, 80) for _ in range(40)]
    units = [[texts[i] for i in generator.integers(0, 40, 60)] for _ in range(3)]
    found(tmp_path, units, documents=0.8)
    items = Items(sorted((tmp_path / "work").glob("*.documents.arrow")))
    in_memory = np.concatenate(list(items.pairs(tmp_path)))
    monkeypatch.setattr(candidates, "ITEMS_AT_ONCE", 50)
    monkeypatch.setattr(candidates, "PAIRS_AT_ONCE", 200)
    assert np.array_equal(np.concatenate(list(items.pairs(tmp_path))), in_memory)
    assert len(list(tmp_path.glob("run-*"))) > 1


def test_worker_processes_and_what_is_looked_at_together_do_not_show(tmp_path, monkeypatch):
    generator = np.random.default_rng(6)
    texts = [prose(generator, 500) for _ in range(10)]
    units = [[*texts, edited(texts[i], 0.85, generator)] for i in range(4)]
    one, two = (found(tmp_path / str(n), units, n, documents=0.8, sections=0.8) for n in (1, 2))
    assert len(one.doc) == 34
    cut = found(tmp_path / "cut", units, sections=0.8)
    assert {REASONS[reason] for reason in cut.reason} == {"repeated section", "repeated sections"}
    monkeypatch.setattr("data_prep.duplicates.decide.FOUND_AT_ONCE", 3)
    monkeypatch.setattr("data_prep.dropped.ROWS_TOGETHER", 2)
    again = found(tmp_path / "again", units, sections=0.8)
    for pair in ((one, two), (cut, again)):
        assert all(np.array_equal(*columns) for columns in zip(*pair, strict=True))
