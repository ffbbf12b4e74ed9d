"""Questions with one right answer each, from what packages document: messages, sections, manual pages.

A tenth is held out: of the messages by what they say, of the others by the page that they are from (see texts.is_held_out).
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from storage.atomic import write_atomically
from tools.specialists.packages import catalogue, of_debian
from tools.specialists.texts import is_held_out, manual, python

CATALOGUES = ("coreutils", "git", "gnupg-l10n", "util-linux-locales", "libc-l10n", "dpkg", "bash")
LONGEST_MESSAGE = 80
LONGEST_CONTEXT = 320
"""Characters."""


class Question(NamedTuple):
    page: str
    """Whatever is held out as a whole."""
    prompt: str
    response: str
    copied: str
    """An answer that nothing has to be learned for: a part of the prompt."""


def translation(work: Path) -> Iterator[Question]:
    """Messages of programs and their German translations (gettext catalogues of Debian's packages)."""
    folder = of_debian(CATALOGUES, work) / "usr/share/locale/de/LC_MESSAGES"
    known = set()
    for path in sorted(folder.glob("*.mo")):
        for message, text in catalogue(path).items():
            english, german = " ".join(message.split()), " ".join(text.split())
            if 8 <= len(english) <= LONGEST_MESSAGE and len(german) <= 2 * LONGEST_MESSAGE and english not in known:
                known.add(english)
                yield Question(english, f"German: {english}", german, english)


def summarisation(work: Path) -> Iterator[Question]:
    """Sections of Python's documentation and their titles."""
    for name, text in python(work):
        for title, body in sections(text):
            shown = body[:LONGEST_CONTEXT].rsplit(" ", 1)[0]
            yield Question(name, f"Title of: {shown}", title, " ".join(first_line(body).split()[:8]))


def answering(work: Path) -> Iterator[Question]:
    """Manual pages of functions: the header that declares one, and what it does."""
    for name, text in manual(work):
        if question := of_page(text):
            function, what, header, synopsis = question
            shown = synopsis[:LONGEST_CONTEXT]
            for asked, answer in ((f"Header of {function}?", header), (f"What does {function} do?", what)):
                yield Question(name, f"{shown}\n{asked}", answer, first_line(synopsis))


QUESTIONS: dict[str, Callable[[Path], Iterator[Question]]] = {
    "translation": translation,
    "summarisation": summarisation,
    "answering": answering,
}


def sections(text: str) -> Iterator[tuple[str, str]]:
    """Titles and what stands below them, of reStructuredText; both without the marks of roles and directives."""
    parts = re.split(r"(?m)^(\S.*)\n([=\-~^*\"'+#`])\2{2,}\s*\n", text)
    for title, body in zip(parts[1::3], parts[3::3], strict=True):
        lines = (line.strip() for line in body.splitlines())
        prose = " ".join(line for line in lines if line and not line.startswith((".. ", ":", "=")))
        if len(prose) >= 100 and (bare := without_roles(title)):
            yield bare, without_roles(prose)


def without_roles(text: str) -> str:
    return " ".join(re.sub(r":[a-z:]+:`[~!]?([^`<]*)[^`]*`|``([^`]*)``", r"\1\2", text).split())


def of_page(text: str) -> tuple[str, str, str, str] | None:
    """The name of a function, what it does, its header and its synopsis, from a manual page in man(7)'s macros."""
    name = re.search(r'(?m)^\.SH "?NAME"?\n(\S+?),? .*?\\- (.+)$', text)
    synopsis = re.search(r'(?m)^\.SH "?SYNOPSIS"?\n((?:(?!\.SH).*\n)*)', text)
    if not name or not synopsis:
        return None
    plain = without_macros(synopsis[1])
    header = re.search(r"#include <([^>]+)>", plain)
    return (name[1], without_macros(name[2]).strip(), header[1], plain) if header else None


def without_macros(text: str) -> str:
    lines = (
        re.sub(r"^\.[A-Za-z]+ ?", "", line) for line in text.splitlines() if not re.match(r"\.(nf|fi|PP|P|RS|RE)", line)
    )
    return "\n".join(line for line in (re.sub(r"\\f.|\\[&e]|\\\*\(|\"", "", line).strip() for line in lines) if line)


def first_line(text: str) -> str:
    return text.splitlines()[0] if text else ""


def split(questions: Sequence[Question]) -> tuple[list[Question], list[Question]]:
    """Those to learn from, and those that are held out."""
    kept: tuple[list[Question], list[Question]] = ([], [])
    for question in questions:
        kept[is_held_out(question.page)].append(question)
    return kept


def write_questions(questions: Sequence[Question], output: Path) -> None:
    """JSON lines with id, prompt, response and copied."""
    lines = (
        json.dumps({"id": f"{number}"} | question._asdict(), ensure_ascii=False) + "\n"
        for number, question in enumerate(questions)
    )
    write_atomically(output, "".join(lines).encode())


def read_questions(path: Path) -> list[Question]:
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [Question(row["page"], row["prompt"], row["response"], row["copied"]) for row in rows]
