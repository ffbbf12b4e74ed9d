"""What an export of a tokenizer will not be able to keep as it is: said at the build and at the start of a training."""

import json
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from console.progress import say
from data_prep.sentencepiece_json import given_table, needs_own_code
from data_prep.tokenizer import Tokenizer, open_tokenizer
from data_prep.tokenizer_files import names_without_entry

OWN_CODE, WITHOUT_ENTRY = "tokenizer_needs_own_code", "tokenizer_names_without_entry"
"""Keys of a manifest's statistics; the second is there, if only empty, wherever both were looked for."""


def foreseen(tokenizer: Tokenizer) -> dict[str, JsonValue]:
    """Why an export has to come with code of its own, if it has to; and the tokens that have a name but no id."""
    reason = needs_own_code(tokenizer)
    facts: dict[str, Any] = {OWN_CODE: reason} if reason else {}
    return facts | {WITHOUT_ENTRY: absent_names(tokenizer)}


def foreseen_of(file: Path) -> dict[str, JsonValue]:
    """That of the tokenizer of a data set whose manifest does not say it; empty if the tokenizer cannot be opened."""
    try:
        return foreseen(open_tokenizer(file))
    except (OSError, ValueError):
        return {}


def absent_names(tokenizer: Tokenizer) -> list[str]:
    """Tokens that the files of a tokenizer name and its vocabulary, as an export will have it, lacks."""
    table = tokenizer if tokenizer.type == "huggingface" else given_table(tokenizer)
    vocabulary = (table or tokenizer).vocabulary()
    padding = json.loads(table.path.read_bytes()).get("padding") if table else None
    names = names_without_entry(tokenizer.path.parent, vocabulary)
    if padding and vocabulary.get(padding["pad_token"]) != padding["pad_id"]:
        names.append(padding["pad_token"])
    return sorted({*names})


def say_what_is_foreseen(tokenizer: Tokenizer) -> dict[str, JsonValue]:
    """Before any work; returns what was said, for the manifest."""
    facts: dict[str, Any] = foreseen(tokenizer)
    if OWN_CODE in facts:
        say(
            f"{tokenizer.path} has no exact equivalent in transformers ({facts[OWN_CODE]}): a model trained on these data is "
            "exported with code for its tokenizer, which transformers runs with trust_remote_code=True"
        )
    if names := facts[WITHOUT_ENTRY]:
        say(
            f"{tokenizer.path} has no entries for tokens that the files beside it name ({', '.join(names)}): an export of a "
            "model trained on these data leaves them out, unless the model has ids to spare"
        )
    return facts
