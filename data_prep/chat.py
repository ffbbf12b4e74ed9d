"""Conversations to texts: a chat template, which `transformers` renders, and the stretches that carry loss.

A record holds a list of messages, or a prompt and a response. Loss is on what the assistant writes: what the template puts
between {% generation %} and {% endgeneration %}, or, where it has no such marks, what each of the assistant's messages
adds to the conversation before it (with the generation prompt). The spelling of a control token in a message is text, as
in every document; the template's own are the tokens. A template sees no clock: its text does not depend on the day.
"""

import re
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.records import BadRecord, Rendered, Stretch
from data_prep.tokenizer import Tokenizer
from data_prep.tokenizer_files import (
    CONFIG_FILE,
    TokenizerConfig,
    check_companions,
    read_config,
    read_object,
)
from storage.atomic import write_atomically

TEMPLATE_FILE, PROCESSOR_FILE = "chat_template.jinja", "chat_template.json"
ROLES = ("system", "developer", "user", "assistant", "tool")
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
MARKS = [chr(code) + chr(code + 1) for code in range(0x10FF00, 0x10FFF0, 2)]
"""Private characters: the first pair that a conversation lacks stands around control tokens that its messages spell."""
NO_CLOCK = "{% set strftime_now = there_is_no_clock %}"
FAILS, NO_PREFIX = "the chat template fails", "the chat template changes what stands before an answer"
MARK_IT = "put {% generation %} and {% endgeneration %} around what the assistant writes in it"
PROBE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


class ChatFormat(NamedTuple):
    """How records become texts. Raises BadRecord for what it cannot be done with."""

    template: str
    names: dict[str, str]
    """Spellings of the tokenizer's special tokens, as templates name them: `bos_token` and others."""
    control: tuple[str, ...]
    messages: str | None
    prompt: str | None = None
    response: str | None = None

    @property
    def columns(self) -> dict[str, str]:
        """The fields that are read, and the options that name them."""
        flags = {self.messages: "--messages-field", self.prompt: "--prompt-field", self.response: "--response-field"}
        return {name: flag for name, flag in flags.items() if name is not None}

    def render(self, record: dict[str, Any]) -> Rendered:
        """The text of a record that has the fields, the stretches that carry loss, and control tokens that are text."""
        messages = self._messages(record)
        marks, marked = self._marked(messages)
        if GENERATION.search(self.template):
            text, targets = self._apply(marked, mark=True)
        else:
            text, _ = self._apply(marked)
            targets = list(self._answers(marked, text))
        rendered = _without_marks(text, targets, marks)
        if not any(begin < end for begin, end in rendered.targets):
            raise BadRecord("the chat template writes nothing for the assistant")
        return rendered

    def check(self) -> None:
        """Raises ValueError where no record can be rendered."""
        try:
            import jinja2
            import transformers.utils.chat_template_utils  # noqa: F401
        except ImportError as error:
            raise ValueError(f"chat templates need the packages transformers and jinja2: {error}") from None
        try:
            self.render(dict(zip(self.columns, ([PROBE] if self.messages is not None else ["a", "b"]), strict=True)))
        except BadRecord as error:
            if error.reason == NO_PREFIX or isinstance(error.__cause__, jinja2.TemplateSyntaxError):
                raise ValueError(f"{error.reason} ({error.detail}), or give another: --chat-template FILE") from None

    def _messages(self, record: dict[str, Any]) -> list[dict[str, Any]]:
        if self.messages is not None:
            return checked_messages(record[self.messages], self.messages)
        pair = []
        for role, name in zip(("user", "assistant"), self.columns, strict=True):
            if not isinstance(record[name], str):
                raise BadRecord(f"field {name!r} is not text")
            pair.append({"role": role, "content": record[name]})
        return checked_messages(pair, "")

    def _marked(self, messages: list[dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
        """The messages with marks, which are returned too, around control tokens that they spell; no marks: they spell none."""
        everything = "\n".join(_strings(messages))
        spelled = [token for token in self.control if token and token in everything]
        if not spelled:
            return "", messages
        marks = next(pair for pair in MARKS if not any(mark in everything for mark in pair))
        longest_first = "|".join(map(re.escape, sorted(spelled, key=len, reverse=True)))
        return marks, _with_marks(messages, re.compile(longest_first), f"{marks[0]}\\g<0>{marks[1]}")

    def _apply(
        self, messages: list[dict[str, Any]], mark: bool = False, prompt: bool = False
    ) -> tuple[str, list[Stretch]]:
        """The text of a conversation and what it has between generation marks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self.template
        if "strftime_now" in template:
            template = NO_CLOCK + ("\n" if template.startswith("\n") else "") + template
        try:
            options: dict[str, Any] = {"return_assistant_tokens_mask": mark, "add_generation_prompt": prompt}
            found: Any = render_jinja_template([messages], chat_template=template, **options | self.names)
        except MemoryError:
            raise
        except Exception as error:  # whatever a template makes of what it was not written for
            raise BadRecord(FAILS, " ".join(str(error).split())[:200]) from error
        (text,), marked = found
        return text, marked[0] if mark else []

    def _answers(self, messages: list[dict[str, Any]], text: str) -> Iterator[Stretch]:
        """What each message of the assistant adds to the text before it."""
        for number, message in enumerate(messages, start=1):
            if message["role"] == "assistant":
                before, _ = self._apply(messages[: number - 1], prompt=True)
                with_it = text if number == len(messages) else self._apply(messages[:number])[0]
                if not (with_it.startswith(before) and text.startswith(with_it)):
                    raise BadRecord(NO_PREFIX, f"message {number}: {MARK_IT}")
                yield len(before), len(with_it)


def checked_messages(value: Any, field: str) -> list[dict[str, Any]]:
    """A conversation as templates expect it. Raises BadRecord."""
    if not isinstance(value, list):
        raise BadRecord(f"field {field!r} is not a list of messages", _kind(value))
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict):
            raise BadRecord("a message is not an object with role and content", f"message {number}: {_kind(message)}")
        if message.get("role") is None:
            raise BadRecord("a message has no role", f"message {number} has {', '.join(map(str, list(message)[:8]))}")
        if message["role"] not in ROLES:
            known = ", ".join(ROLES)
            raise BadRecord("unknown role", f"message {number}: {str(message['role'])[:40]!r}, known are {known}")
        content = message.get("content")
        if not isinstance(content, str) and (content is not None or not message.get("tool_calls")):
            raise BadRecord("the content of a message is not text", f"message {number}: {_kind(content)}")
    answers = [message for message in value if message["role"] == "assistant"]
    if not answers:
        raise BadRecord("no message of the assistant")
    if not any((message.get("content") or "").strip() or message.get("tool_calls") for message in answers):
        raise BadRecord("the assistant says nothing")
    return [{key: content for key, content in message.items() if content is not None} for message in value]


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for content in value.values() if isinstance(value, dict) else value:
            yield from _strings(content)


def _with_marks(value: Any, spelled: re.Pattern[str], marked: str) -> Any:
    if isinstance(value, str):
        return spelled.sub(marked, value)
    if isinstance(value, dict):
        return {
            key: content if key == "role" else _with_marks(content, spelled, marked) for key, content in value.items()
        }
    return [_with_marks(content, spelled, marked) for content in value] if isinstance(value, list) else value


def _without_marks(text: str, targets: list[Stretch], marks: str) -> Rendered:
    """The text as it is meant, and where in it control tokens are spelled that are text."""
    if not marks:
        return Rendered(text, targets, [])
    opening, closing = marks[0], marks[1]
    place = [0, *accumulate(character not in marks for character in text)]
    between = re.finditer(f"{opening}([^{opening}{closing}]*){closing}", text)
    literal = [(place[match.start()], place[match.end()]) for match in between]
    plain = text.replace(opening, "").replace(closing, "")
    return Rendered(plain, [(place[begin], place[end]) for begin, end in targets], literal)


def own_template(folder: Path) -> str | None:
    """The chat template among the files of a tokenizer, the one called `default` where there are several."""
    if (file := folder / TEMPLATE_FILE).is_file():
        return read_template(file)
    given = check_companions(folder).chat_template
    if given is None and (file := folder / PROCESSOR_FILE).is_file():
        given = TokenizerConfig.model_validate({"chat_template": read_object(file).get("chat_template")}).chat_template
    if isinstance(given, list):
        given = {entry.name: entry.template for entry in given}
    return given.get("default") if isinstance(given, dict) else given


def read_template(file: Path) -> str:
    """The text of a template's file. Raises ValueError."""
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} cannot be read as text: {error}") from None


def keep_template(template: str | None, folder: Path) -> None:
    """Leave a template that conversations were rendered by in the tokenizer's folder of a data set, for its export."""
    if template is not None and own_template(folder) != template:
        write_atomically(folder / TEMPLATE_FILE, template.encode())


def special_names(tokenizer: Tokenizer) -> dict[str, str]:
    """The tokenizer's special tokens as `transformers` hands them to templates: what its files say, else what it has."""
    vocabulary = tokenizer.vocabulary()
    spelled = {i: token for token, i in vocabulary.items()}
    config = check_companions(tokenizer.path.parent)
    kinds = ("bos", "eos", "pad", "mask", "unk", "sep", "cls")
    names = {f"{kind}_token": token for kind in kinds if (token := config.content(kind)) in vocabulary and token}
    padding = None if tokenizer.pad_id == tokenizer.eos_id else tokenizer.pad_id
    own = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "mask": tokenizer.mask_id, "unk": tokenizer.unk_id}
    for kind, number in (own | {"pad": padding}).items():
        if number is not None and (kind in ("bos", "eos") or f"{kind}_token" not in names):
            names[f"{kind}_token"] = spelled[number]
    extra = read_config(tokenizer.path.with_name(CONFIG_FILE))[1].get("extra_special_tokens")
    if isinstance(extra, dict):
        tokens = {name: token["content"] if isinstance(token, dict) else token for name, token in extra.items()}
        names |= {name: token for name, token in tokens.items() if token in vocabulary}
    return names
