"""The files that belong to a tokenizer, as Hugging Face folders have them, and what is wrong with them in a sentence."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, RootModel, StringConstraints, ValidationError

from storage.atomic import write_atomically

MODEL_FILE, JSON_FILE = "tokenizer.model", "tokenizer.json"
CONFIG_FILE, MAP_FILE, ADDED_FILE = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
TEMPLATES = "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"

Flag = Annotated[bool | None, Field(strict=True)]
Id = Annotated[int, Field(ge=0, strict=True)]
Side = Literal["left", "right"] | None


class AddedToken(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)
    content: str
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = True
    special: bool = False


Token = str | AddedToken


class NamedTemplate(BaseModel):
    model_config = ConfigDict(strict=True)
    name: str
    template: str


class TokenizerConfig(BaseModel):
    """What `transformers` reads of `tokenizer_config.json` and of `special_tokens_map.json`; other keys may be there."""

    model_config = ConfigDict(extra="allow", strict=True)
    bos_token: Token | None = None
    eos_token: Token | None = None
    pad_token: Token | None = None
    mask_token: Token | None = None
    unk_token: Token | None = None
    sep_token: Token | None = None
    cls_token: Token | None = None
    additional_special_tokens: list[Token] | None = None
    extra_special_tokens: list[Token] | dict[str, Token] | None = None
    added_tokens_decoder: dict[Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")], AddedToken] | None = None
    model_max_length: Annotated[float, Field(gt=0)] | None = None
    padding_side: Side = None
    truncation_side: Side = None
    add_bos_token: Flag = None
    add_eos_token: Flag = None
    add_prefix_space: Flag = None
    legacy: Flag = None
    clean_up_tokenization_spaces: Flag = None
    split_special_tokens: Flag = None
    tokenizer_class: str | None = None
    model_input_names: list[str] | None = None
    chat_template: str | list[NamedTemplate] | dict[str, str] | None = None

    def content(self, kind: str) -> str | None:
        """Spelling of the token that `KIND_token` names."""
        token = getattr(self, f"{kind}_token")
        return token.content if isinstance(token, AddedToken) else token


class AddedTokens(RootModel):
    root: dict[str, Id]


def read_config(path: Path) -> tuple[TokenizerConfig, dict[str, Any]]:
    """A `tokenizer_config.json` or `special_tokens_map.json`: checked, and as it is; empty where there is none.

    Raises ValueError with file and key.
    """
    if not path.exists():
        return TokenizerConfig(), {}
    content = read_object(path)
    return _checked(TokenizerConfig, content, path), content


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; ValueError names the file."""
    try:
        content = json.loads(path.read_bytes())
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder, not a file") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object, {{...}}, but {type(content).__name__}")
    return content


Checked = TypeVar("Checked", bound=BaseModel)


def _checked(kind: type[Checked], content: dict[str, Any], path: Path) -> Checked:
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = str(first["loc"][0])  # behind it pydantic puts the names of our types
        wanted = 'expected a string, or an object with "content"' if key.endswith("_token") else first["msg"]
        raise ValueError(f"{path}: {key}: {wanted}, not {json.dumps(content[key])[:60]}") from None


def companions(folder: Path) -> list[Path]:
    """Files beside a tokenizer's own that say how it behaves: names, flags, added tokens, chat templates."""
    names = (CONFIG_FILE, MAP_FILE, ADDED_FILE, *TEMPLATES)
    return sorted(file for name in names for file in folder.glob(name) if file.is_file())


def copy_companions(source: Path, target: Path) -> None:
    """Put those of one folder into another, under the same names."""
    if source.resolve() == target.resolve():
        return
    for file in companions(source):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(place, file.read_bytes())


def check_companions(folder: Path) -> TokenizerConfig:
    """What the folder's files declare, `tokenizer_config.json` before `special_tokens_map.json`. Raises ValueError."""
    config, _ = read_config(folder / CONFIG_FILE)
    by_map, _ = read_config(folder / MAP_FILE)
    if (added := folder / ADDED_FILE).exists():
        _checked(AddedTokens, read_object(added), added)
    for file in companions(folder):
        if file.suffix == ".jinja":
            try:
                file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"{file} cannot be read as text: {error}") from None
    given = config.model_dump(exclude_none=True)
    return TokenizerConfig.model_validate(by_map.model_dump(exclude_none=True) | given)


def names_without_entry(folder: Path, vocabulary: dict[str, int]) -> list[str]:
    """Spellings of tokens that the files in a folder name and that are no entries of a vocabulary."""
    given = read_config(folder / MAP_FILE)[1] | read_config(folder / CONFIG_FILE)[1]
    known = {key: value for key, value in given.items() if key in TokenizerConfig.model_fields and value is not None}
    added = read_object(folder / ADDED_FILE) if (folder / ADDED_FILE).exists() else {}
    return [*leave_out_unknown(known, vocabulary), *(token for token in added if token not in vocabulary)]


def leave_out_unknown(config: dict[str, Any], vocabulary: dict[str, int]) -> list[str]:
    """Take out of a `tokenizer_config.json` what it says of tokens that are no entries; returns their spellings."""
    left_out: list[str] = []

    def known(token: Any) -> bool:
        spelling = token["content"] if isinstance(token, dict) else token
        if spelling not in vocabulary:
            left_out.append(spelling)
        return spelling in vocabulary

    for key, value in list(config.items()):
        if key.endswith("_token") and isinstance(value, str | dict) and not known(value):
            del config[key]
        elif key in ("additional_special_tokens", "extra_special_tokens") and isinstance(value, list):
            config[key] = [token for token in value if known(token)]
        elif key == "extra_special_tokens" and isinstance(value, dict):
            config[key] = {name: token for name, token in value.items() if known(token)}
        elif key == "added_tokens_decoder" and value:
            config[key] = {i: t for i, t in value.items() if known(t) and vocabulary[t["content"]] == int(i)}
    return left_out
