"""The page of a data set says what is in it, shows every script as it is read, and needs nothing but itself."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.store import TokenStore
from data_prep.tokenizer import open_tokenizer
from data_prep.tokenizer_files import MODEL_FILE
from data_prep.tokenizer_training import train
from storage.manifest import read_manifest
from tests.data_prep.builds import build_here
from tests.data_prep.many_scripts import ARABIC, CHINESE, CODE, write_scripts
from tests.data_prep.texts import PROSE
from tests.tools.test_report import Page
from tests.tools.test_report_in_browser import CHROMIUM, FRAME
from tests.training.corpus import build
from tools.data_facts import Reader, _classes, length_classes, looks_like_code
from tools.data_report import main, page

WIDTHS = (400, 1280)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scripts")
    (folder / MODEL_FILE).write_bytes(train([*PROSE[:20], CHINESE, ARABIC], 1200))
    build_here(
        [write_scripts(folder)],
        folder / MODEL_FILE,
        folder / "data",
        id_field="id",
        source_field="domain",
        seq_length=64,
    )
    return folder / "data"


def test_it_says_what_the_manifest_and_the_documents_say(data):
    text, manifest = page(data), read_manifest(data)
    shown = Page(text)
    numbers = manifest.statistics
    for words in (
        f"{numbers['tokens']:,}",
        manifest.fingerprint[:16],
        "exact duplicates",
        "Arabic",
        "Han",
        "elsewhere",
    ):
        assert words in shown.visible, words
    for split, sources in manifest.splits.items():
        for name, entry in sources.items():
            row = f"<td>{split}</td><td>{name}</td><td>{entry.documents:,}</td><td>{entry.tokens:,}</td>"
            assert row in text
    assert "<td>exact duplicates</td><td>1</td><td>kept</td>" in text
    assert not {"src", "href", "srcset"} & set(shown.attributes)
    assert "script" not in shown.tags  # a document's neither
    assert "<script>document.body.remove()</script>␇" in shown.visible
    assert "chinese <b>, " in shown.visible


def test_what_repeats_a_document_is_shown_with_it(tmp_path, data):
    texts = [("first", PROSE[0]), ("other", PROSE[1]), *((f"copy{n}", PROSE[0]) for n in range(7)), ("twin", PROSE[1])]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"id": key, "text": text}) + "\n" for key, text in texts))
    build_here(
        [tmp_path / "a.jsonl"], data / "tokenizer", tmp_path / "data", id_field="id", deduplicate=True, seq_length=64
    )
    text = page(tmp_path / "data")
    cells = "<td>first</td><td>7 x exact duplicate</td><td>1.000 to 1.000</td><td>copy0, copy1, copy2, copy3, copy4, ...</td>"
    assert text.index(cells) < text.index(
        "<td>other</td><td>1 x exact duplicate</td><td>1.000 to 1.000</td><td>twin</td>"
    )


def test_a_data_set_without_statistics_has_a_page_of_what_is_known(tmp_path):
    manifest = build(tmp_path, {"books": [9] * 20}, seq_length=16)
    text = page(tmp_path)
    assert f"<td>train</td><td>books</td><td>{manifest.splits['train']['books'].documents:,}</td>" in text
    assert "exact duplicates" not in text


def test_tokens_bytes_and_characters_by_script_add_up(data):
    store, tokenizer = TokenStore.open(data / "tokens"), open_tokenizer(data / "tokenizer")
    reader = Reader(store, tokenizer)
    # SentencePiece puts a space before each document
    expected = {"chinese": ("Han", CHINESE), "arabic": ("Arabic", ARABIC), "code": ("Latin", CODE)}
    for source, (script, text) in expected.items():
        split = next(split for split in ("train", "validation") if len(store.documents(split, source)))
        documents = store.documents(split, source)
        found = reader.by_script(documents)
        assert max(found, key=lambda name: found[name].bytes) == script
        held = reader.sizes[np.concatenate([documents.tokens(i) for i in range(len(documents))])] > 0
        assert sum(entry.tokens for entry in found.values()) == np.count_nonzero(held)
        assert sum(entry.bytes for entry in found.values()) == len(f" {text}".encode()) * len(documents)
        assert sum(entry.characters for entry in found.values()) == len(f" {text}") * len(documents)


@given(st.binary(max_size=40))
def test_every_byte_has_a_class_text_or_not(data):
    names, classes = _classes(data)
    assert len(classes) == len(data)
    assert classes.max(initial=0) < len(names)


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=40))
def test_lengths_are_counted_once(lengths):
    classes = length_classes(np.array(lengths))
    assert sum(documents for *_, documents, _ in classes) == len(lengths)
    assert sum(tokens for *_, tokens in classes) == sum(lengths)
    for least, most, documents, _ in classes:
        assert documents == sum(least <= length <= most for length in lengths)


def test_code_is_told_from_prose():
    assert looks_like_code(CODE[2000:2700])
    assert not any(looks_like_code(text[:600]) for text in (CHINESE, ARABIC))


def test_bad_data_is_refused_in_one_sentence_and_a_lost_token_store_is_said(data, tmp_path, capsys):
    assert main([str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())
    shutil.copytree(data, tmp_path / "rows", ignore=shutil.ignore_patterns("tokens"))
    assert main([str(tmp_path / "rows")]) == 0
    assert "tokens/ is gone" in (tmp_path / "rows" / "data.html").read_text()


LOOK = """
<script>
const style = (node, name) => getComputedStyle(node)[name];
const samples = [...document.querySelectorAll(".sample")].map(node => {
  const range = document.createRange();
  range.setStart(node.firstChild, 0); range.setEnd(node.firstChild, 12);
  const text = range.getBoundingClientRect(), box = node.getBoundingClientRect();
  return {text: node.textContent, code: node.classList.contains("code"), space: style(node, "whiteSpace"),
    fromLeft: text.left - box.left, fromRight: box.right - text.right, left: box.left, right: box.right,
    font: style(node, "fontFamily")};
});
parent.postMessage({width: innerWidth, page: document.documentElement.scrollWidth, samples,
  paper: style(document.body, "backgroundColor"), ink: style(document.body, "color"),
  bars: [...document.querySelectorAll(".bar i")].map(node => node.getBoundingClientRect().width)}, "*");
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs the Chromium browser")
def test_a_browser_shows_arabic_from_the_right_code_as_it_is_and_nothing_outside(data, tmp_path):
    (tmp_path / "page.html").write_text(page(data).replace("</body>", LOOK + "</body>"), encoding="utf-8")
    frames = [f'<iframe src="page.html" style="width:{width}px;height:900px"></iframe>' for width in WIDTHS]
    (tmp_path / "frames.html").write_text(f"<meta charset=utf-8><body>{FRAME}{''.join(frames)}</body>")
    papers = set()
    for scheme in (0, 1):  # dark, light
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--virtual-time-budget=20000",
            "--window-size=1700,1000",
        ]
        flags += [f"--blink-settings=preferredColorScheme={scheme}", f"--user-data-dir={tmp_path / str(scheme)}"]
        command = [CHROMIUM, *flags, "--dump-dom", tmp_path / "frames.html"]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=300).stdout
        looks = [json.loads(unescaped(text)) for text in re.findall("<pre>(.*?)</pre>", shown, re.DOTALL)]
        assert sorted(look["width"] for look in looks) == list(WIDTHS)
        for look in looks:
            assert look["page"] <= look["width"], "the page scrolls to the side"
            assert all(0 <= width < look["width"] for width in look["bars"])
            samples = {name: sample for sample in look["samples"] for name in found(sample["text"])}
            assert samples.keys() >= {"arabic", "chinese", "code"}
            assert samples["arabic"]["fromRight"] < 30 < samples["arabic"]["fromLeft"]
            assert samples["chinese"]["fromLeft"] < 30
            assert samples["code"]["space"] == "pre"
            assert "monospace" in samples["code"]["font"]
            assert all(0 <= sample["left"] < sample["right"] <= look["width"] for sample in look["samples"])
            assert samples["code"]["code"] > samples["arabic"]["code"] + samples["chinese"]["code"]
            papers.add((scheme, look["paper"], look["ink"]))
    assert len(papers) == 2
    assert len({paper for _, paper, _ in papers}) == 2


def unescaped(text: str) -> str:
    return text.replace("&lt;", "<").replace("&gt;", ">").replace("&nbsp;", "\u00a0").replace("&amp;", "&")


def found(text: str) -> list[str]:
    return [name for name, whole in (("arabic", ARABIC), ("chinese", CHINESE), ("code", CODE)) if whole[:50] in text]
