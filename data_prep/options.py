"""The options that decide what a build makes, and the flags by which they are given."""

import argparse
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from data_prep.chat import TEMPLATE_FILE, ChatFormat, own_template, special_names
from data_prep.tokenizer import Tokenizer
from data_prep.tokenizer_files import CONFIG_FILE
from storage.manifest import PackingPolicy


def _not_given(**bounds: float) -> Any:
    """A field that is in no plan without it."""
    return Field(default=None, exclude_if=lambda value: value is None, **bounds)  # type: ignore[call-overload]


class BuildOptions(BaseModel):
    """The options that decide the result (how it is computed: see `data_prep.build --help`)."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)

    packing: PackingPolicy
    text_field: str = "text"
    """field or column that holds the text"""
    id_field: str | None = None
    """field or column that names a document (default: its place in the input)"""
    messages_field: str | None = _not_given()
    """conversations instead of texts: field or column with a list of messages, each with role and content"""
    prompt_field: str | None = _not_given()
    """conversations of one question and its answer: field or column with the prompt"""
    response_field: str | None = _not_given()
    """field or column with the answer to it"""
    chat_template: str | None = _not_given()
    """Jinja file with the chat template of conversations (default: that of the tokenizer's folder)"""
    source_field: str | None = _not_given()
    """field or column that names the source of a document, in the place of --source"""
    validation_fraction: float = Field(default=0.01, ge=0, lt=1)
    """share of the documents for validation, chosen by the hash of their key; 0 for no validation split"""
    deduplicate: bool = False
    """leave out documents whose text is exactly that of an earlier one"""
    near_duplicates: float | None = _not_given(ge=0.3, le=1)
    """leave out documents whose n-grams are those of an earlier one to this share (Jaccard similarity, such as 0.8)"""
    near_duplicate_sections: float | None = _not_given(ge=0.3, le=1)
    """cut sections whose n-grams are those of an earlier section to this share out of documents (such as 0.8)"""
    ngram: int | None = _not_given(ge=1, le=1024)
    """tokens of these n-grams (default: 5)"""
    decontaminate: int | None = _not_given(ge=1, le=1024)
    """cut sections that share n-grams of so many tokens (such as 50) with the validation split or --evaluation out of training"""
    evaluation: dict[str, str] | None = _not_given()
    """with --decontaminate: files of texts that must not be trained on (--text-field), as --input"""
    section_tokens: int | None = _not_given(ge=1)
    """least tokens of a section, which is made of whole paragraphs (default: 128)"""
    filters: list[tuple[str, str]] | None = _not_given()
    """leave documents out by a rule, each with its reason: see data_prep/filters.py; may be repeated"""
    seed: int = Field(default=0, ge=0)
    """decides the split and the order of the rows"""
    unit_bytes: int | None = Field(default=None, ge=1)
    """bytes of input a worker does at a time (default: by the size of the input, at most 64 MiB)"""

    @model_validator(mode="after")
    def _conversations_or_texts(self) -> "BuildOptions":
        if (self.prompt_field is None) != (self.response_field is None):
            raise ValueError("--prompt-field and --response-field go together: give both")
        if self.prompt_field is not None and self.prompt_field == self.response_field:
            raise ValueError(f"--prompt-field and --response-field both name {self.prompt_field!r}: name two fields")
        if self.messages_field is not None and self.prompt_field is not None:
            raise ValueError(
                "a conversation is in --messages-field or in --prompt-field and --response-field: not both"
            )
        if self.has_chats and self.text_field != BuildOptions.model_fields["text_field"].default:
            raise ValueError(
                f"--text-field {self.text_field} is not read where records hold conversations: leave it out"
            )
        if self.chat_template is not None and not self.has_chats:
            raise ValueError("--chat-template needs --messages-field, or --prompt-field and --response-field")
        return self

    @model_validator(mode="after")
    def _near_duplicates(self) -> "BuildOptions":
        if self.near_duplicate_sections is not None and self.has_chats:
            raise ValueError(
                "--near-duplicate-sections: nothing can be cut out of a conversation; use --near-duplicates, which leaves "
                "out whole ones"
            )
        needs: dict[str, tuple[str, ...]] = {
            "ngram": ("near_duplicates", "near_duplicate_sections"),
            "section_tokens": ("near_duplicate_sections", "decontaminate"),
            "evaluation": ("decontaminate",),
        }
        for name, others in needs.items():
            if getattr(self, name) is not None and all(getattr(self, other) is None for other in others):
                flags = [f"--{each.replace('_', '-')}" for each in (name, *others)]
                raise ValueError(f"{flags[0]} has no effect without {' or '.join(flags[1:])}")
        return self

    @property
    def has_chats(self) -> bool:
        return self.messages_field is not None or self.prompt_field is not None

    def with_template(self, tokenizer: Tokenizer) -> "BuildOptions":
        """The same with the tokenizer's own chat template where one is needed and none is given."""
        if not self.has_chats or self.chat_template is not None:
            return self
        template = own_template(tokenizer.path.parent)
        if template is None:
            raise ValueError(
                f"{tokenizer.path.parent} has no chat template ({TEMPLATE_FILE}, or `chat_template` in {CONFIG_FILE}) for "
                "conversations: put one there, or give --chat-template FILE"
            )
        return self.model_copy(update={"chat_template": template})

    def chat_format(self, tokenizer: Tokenizer) -> ChatFormat | None:
        """How conversations become texts, if records hold any."""
        if self.chat_template is None:
            return None
        fields = self.messages_field, self.prompt_field, self.response_field
        return ChatFormat(self.chat_template, special_names(tokenizer), tokenizer.control_strings, *fields)


def add_packing_arguments(parser: argparse.ArgumentParser, keep: bool = False) -> None:
    """One option a field of PackingPolicy; `keep`: one that is not given is None, to be taken from a policy."""
    for name, field in PackingPolicy.model_fields.items():
        default = "that of DATA" if keep else field.default
        required = field.is_required() and not keep
        parser.add_argument(
            f"--{'packing' if name == 'policy' else name.replace('_', '-')}",
            dest=name,
            type=int if field.annotation is int else float if "float" in str(field.annotation) else str,
            default=None if keep or required else field.default,
            required=required,
            help=" ".join((field.description or "").split())
            + ("" if default is None or required else f" (default: {default})"),
        )


DEPEND_ON = {"policy": ("overlap", "cut", "cut_tolerance"), "cut": ("cut_tolerance",)}


def packing_from(arguments: argparse.Namespace, before: PackingPolicy | None = None) -> PackingPolicy:
    """The policy that was asked for; what was not given is that of `before`, unless it depends on what has changed."""
    given = {name: value for name in PackingPolicy.model_fields if (value := getattr(arguments, name)) is not None}
    kept = before.model_dump() if before else {}
    for name, dependent in DEPEND_ON.items():
        if name in kept and given.get(name, kept[name]) != kept[name]:
            kept = {key: value for key, value in kept.items() if key not in dependent}
    try:
        return PackingPolicy(**kept | given)
    except ValidationError as error:
        raise ValueError(option_problems(error)) from None


def option_problems(error: ValidationError) -> str:
    """What is wrong with the options, by the names of their flags."""
    flags = {"policy": "packing"}
    return "; ".join(
        "".join(f"--{flags.get(name, name).replace('_', '-')}: " for name in map(str, problem["loc"]))
        + problem["msg"].removeprefix("Value error, ")
        for problem in error.errors()
    )
