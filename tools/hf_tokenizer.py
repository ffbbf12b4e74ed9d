"""A data set's tokenizer as the files that `transformers.AutoTokenizer` loads: the one that was given, with its exact ids.

Special and added tokens, chat templates, padding and flags are those of the files that it came with. Several forms are
tried, the given files first; each is loaded and compared with the tokenizer of training before anything is written. Text
that spells a control token is text in training, and here with `split_special_tokens=True`; by default `transformers` takes
it for the token, as chat templates need it.
"""

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from data_prep.encode import awkward_texts
from data_prep.foresee import absent_names
from data_prep.sentencepiece_json import OTHER_IDS, from_sentencepiece
from data_prep.tokenizer import USUAL_NAMES, Tokenizer, open_tokenizer
from data_prep.tokenizer_files import (
    ADDED_FILE,
    CONFIG_FILE,
    JSON_FILE,
    MAP_FILE,
    MODEL_FILE,
    AddedToken,
    TokenizerConfig,
    companions,
    leave_out_unknown,
    read_config,
)
from storage.atomic import write_atomically
from storage.manifest import TokenizerInfo
from tools import tokenization_longform

CODE = Path(tokenization_longform.__file__)
OF_THE_PLACE = {"auto_map", "name_or_path", "vocab_file", "tokenizer_file", "processor_class"}
"""Keys of a tokenizer_config.json that speak of the folder that it was in."""
FAST = "PreTrainedTokenizerFast"
"""The class, in transformers 4 and 5, that does what tokenizer.json says and nothing else."""
OF_OTHER_CLASSES = {"tokenizer_class", "add_prefix_space", "legacy"}
INPUTS = {"model_input_names": ["input_ids", "attention_mask"]}
"""What the model takes: no token types."""
DEFAULTS = {"padding_side": "left", "clean_up_tokenization_spaces": False}
"""Of a tokenizer that came without tokenizer_config.json."""


class Form(NamedTuple):
    """One way to write the tokenizer down."""

    files: dict[str, bytes]
    config: dict[str, Any]
    notice: str | None = None

    def load(self, folder: Path) -> PreTrainedTokenizerBase:
        own = "auto_map" in self.config
        return (tokenization_longform.LongformTokenizer if own else AutoTokenizer).from_pretrained(folder)

    def write(self, folder: Path) -> None:
        config = json.dumps(self.config, ensure_ascii=False, indent=2).encode() + b"\n"
        for name, data in (self.files | {CONFIG_FILE: config}).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / name, data)


class Written(NamedTuple):
    notice: str | None
    adds_bos: bool
    """In front of every text, by itself."""
    own_code: bool
    """Whether AutoTokenizer needs trust_remote_code."""


def write_hf_tokenizer(
    info: TokenizerInfo,
    source: Path,
    output: Path,
    model_max_length: int,
    sample: Sequence[str] = (),
    mask_id: int | None = None,
    vocab_size: int | None = None,
) -> Written:
    """Write the tokenizer's files into `output`, which may hold the model's `config.json`.

    `info` is the data set's description of its tokenizer, `source` the tokenizer's file, with what belongs to it beside.
    `model_max_length`: tokens of a text that the model reads at most. `mask_id`: what the model was
    trained with as mask token; where the tokenizer has none, `tokenizer_config.json` adds one. `vocab_size`: rows of the
    model's embedding, no id is larger. Every form is compared with the tokenizer of training on awkward strings and on
    `sample`. Raises `ValueError` if `source` is another tokenizer, or if no form gives its ids.
    """
    trained = open_tokenizer(source)
    if trained.info(info.file) != info:
        raise ValueError(f"{trained.path} is not the tokenizer that the data was built with: restore that one")
    entries = max(vocab_size or trained.vocab_size, trained.vocab_size, 0 if mask_id is None else mask_id + 1)
    expected = Expected(trained, trained.mask_id if mask_id is None else mask_id, entries)
    texts = [*awkward_texts(trained), *sample, *trained.control_strings]
    made = _given_forms if trained.type == "huggingface" else _sentencepiece_forms
    problems = []
    for form in made(trained, model_max_length):
        if mask_id is not None and info.mask_id is None:
            _add_mask(form.config, mask_id, trained.vocabulary())
        with tempfile.TemporaryDirectory() as folder:
            form.write(Path(folder))
            _tell_model_type(output, Path(folder))
            try:
                loaded = form.load(Path(folder))
                problem = _difference(loaded, expected, texts)
            except Exception as error:  # whatever transformers makes of files that others wrote
                problem = f"transformers cannot use its files: {' '.join(str(error).split())[:200]}"
        if problem is None:
            form.write(output)
            begins = loaded("a")["input_ids"][:1]
            return Written(form.notice, begins == [trained.bos_id], "auto_map" in form.config)
        problems.append(problem)
    raise ValueError(f"{trained.path} cannot be exported: {'; '.join(dict.fromkeys(problems))}")


def _given_forms(trained: Tokenizer, model_max_length: int) -> Iterator[Form]:
    """A tokenizer.json with all that came with it; then without what its vocabulary lacks, and read by FAST."""
    folder, beside = trained.path.parent, _companions(trained)
    table = _any_length((folder / JSON_FILE if trained.type == "sentencepiece" else trained.path).read_bytes())
    _, given = read_config(folder / CONFIG_FILE)
    length = {"model_max_length": model_max_length}
    if given or beside:
        config = {key: value for key, value in given.items() if key not in OF_THE_PLACE}
        yield Form(beside | {JSON_FILE: table}, {"tokenizer_class": FAST} | INPUTS | config | length)
    vocabulary = _table_vocabulary(table)
    config = _said_of_the_tokenizer(folder)
    leave_out_unknown(config, vocabulary)
    padding = json.loads(table).get("padding")
    if padding and vocabulary.get(padding["pad_token"]) != padding["pad_id"]:
        table = _with(table, padding=None)
    config = (config if given or beside else DEFAULTS) | _names(trained, vocabulary, config)
    config = INPUTS | config | length | {"tokenizer_class": FAST}
    yield Form(_templates(beside) | {JSON_FILE: table}, config, _left_out(trained))


def _left_out(trained: Tokenizer) -> str | None:
    names = absent_names(trained)
    return f"left out, being no entries of the tokenizer: {', '.join(names)}" if names else None


def _sentencepiece_forms(trained: Tokenizer, model_max_length: int) -> Iterator[Form]:
    """The given tokenizer.json, if there is one; the model rewritten as one; the model with code that runs it."""
    model = trained.path.read_bytes()
    if trained.path.with_name(JSON_FILE).is_file():
        for form in _given_forms(trained, model_max_length):
            yield form._replace(files=form.files | {MODEL_FILE: model})
    vocabulary, left_out = trained.vocabulary(), _left_out(trained)
    kept, templates = _said_of_the_tokenizer(trained.path.parent), _templates(_companions(trained))
    leave_out_unknown(kept, vocabulary)
    surrounding = {"add_bos_token": trained.bos_id is not None, "add_eos_token": False}
    config: dict[str, Any] = INPUTS | DEFAULTS | surrounding | kept | {"model_max_length": model_max_length}
    config |= _names(trained, vocabulary, config)
    try:
        backend = from_sentencepiece(trained.path)
    except ValueError as error:
        reason = str(error)
    else:
        reason = OTHER_IDS
        table = _with(backend.to_str(), post_processor=_surrounding(trained, config, vocabulary))
        yield Form(templates | {JSON_FILE: table, MODEL_FILE: model}, config | {"tokenizer_class": FAST}, left_out)
    name = tokenization_longform.LongformTokenizer.__name__
    special = {str(vocabulary[token]): _special(token) for token in trained.control_strings}
    own = {
        "tokenizer_class": name,
        "auto_map": {"AutoTokenizer": [f"{CODE.stem}.{name}", None]},
        "added_tokens_decoder": special | (config.get("added_tokens_decoder") or {}),
    }
    code = {tokenization_longform.MODEL_FILE: model, CODE.name: CODE.read_bytes()}
    notice = f"{trained.path} has no exact equivalent in transformers ({reason}): {CODE.name} is put beside it, "
    notice += "AutoTokenizer needs trust_remote_code=True"
    yield Form(templates | code, config | own, "; ".join(filter(None, [notice, left_out])))


def _companions(trained: Tokenizer) -> dict[str, bytes]:
    """What came with the tokenizer, CONFIG_FILE left out."""
    folder = trained.path.parent
    files = {str(file.relative_to(folder)): file.read_bytes() for file in companions(folder)}
    return {name: content for name, content in files.items() if name != CONFIG_FILE}


def _templates(beside: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in beside.items() if name not in (MAP_FILE, ADDED_FILE)}


def _said_of_the_tokenizer(folder: Path) -> dict[str, Any]:
    """What tokenizer_config.json and special_tokens_map.json say that any class of transformers understands."""
    given = read_config(folder / MAP_FILE)[1] | read_config(folder / CONFIG_FILE)[1]
    keys = TokenizerConfig.model_fields.keys() - OF_OTHER_CLASSES
    return {key: _with_types(key, value) for key, value in given.items() if key in keys and value is not None}


def _with_types(key: str, value: Any) -> Any:
    """Tokens as transformers 5 wants them: spelled, or objects that say what they are."""
    if key.endswith("_special_tokens"):
        if isinstance(value, dict):
            return {name: _with_type(token) for name, token in value.items()}
        return [_with_type(token) for token in value]
    return _with_type(value) if key.endswith("_token") else value


def _with_type(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {"__type": "AddedToken"} | {flag: value[flag] for flag in AddedToken.model_fields if flag in value}


def _names(trained: Tokenizer, vocabulary: dict[str, int], config: dict[str, Any]) -> dict[str, str]:
    """The named tokens of training that `config` lacks or names otherwise; of padding and unknown text what it says.

    Padding that only stands in for EOS is none: whoever masks padding would mask the end of every text. A SentencePiece
    model then pads with <unk>, which all have.
    """
    spelled = {i: token for token, i in vocabulary.items()}
    ids = {kind: getattr(trained, f"{kind}_id") for kind in ("bos", "eos", "mask", "unk", "pad")}
    if ids["pad"] == ids["eos"]:
        ids["pad"] = ids["unk"] if trained.type == "sentencepiece" else None
    named = {f"{kind}_token": spelled[i] for kind, i in ids.items() if i is not None and i in spelled}
    kept = {"unk_token", "pad_token"} & config.keys()
    kept |= {key for key, token in named.items() if _content(config.get(key)) == token}
    return {key: token for key, token in named.items() if key not in kept}


def _content(token: Any) -> Any:
    return token["content"] if isinstance(token, dict) else token


def _any_length(table: bytes) -> bytes:
    """A tokenizer.json that cuts no text: how much a model reads is the model's to say."""
    return table if json.loads(table).get("truncation") is None else _with(table, truncation=None)


def _with(table: bytes | str, **changes: Any) -> bytes:
    return json.dumps(json.loads(table) | changes, ensure_ascii=False, separators=(",", ":")).encode()


def _table_vocabulary(table: bytes) -> dict[str, int]:
    return tokenizers.Tokenizer.from_buffer(table).get_vocab(with_added_tokens=True)


def _surrounding(trained: Tokenizer, config: dict[str, Any], vocabulary: dict[str, int]) -> dict:
    """The post-processor that puts BOS in front of every text, and EOS behind it, as the config says."""
    pieces = {i: token for token, i in vocabulary.items()}
    begin = trained.bos_id if config["add_bos_token"] else None
    end = trained.eos_id if config["add_eos_token"] else None

    def sequence(name: str, type_id: int) -> list[dict]:
        around = [[] if i is None else [{"SpecialToken": {"id": pieces[i], "type_id": type_id}}] for i in (begin, end)]
        return [*around[0], {"Sequence": {"id": name, "type_id": type_id}}, *around[1]]

    return {
        "type": "TemplateProcessing",
        "single": sequence("A", 0),
        "pair": sequence("A", 0) + sequence("B", 1),
        "special_tokens": {
            pieces[i]: {"id": pieces[i], "ids": [i], "tokens": [pieces[i]]}
            for i in {i for i in (begin, end) if i is not None}
        },
    }


def _special(content: str) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    return {"content": content, "special": True} | flags


def _add_mask(config: dict[str, Any], mask_id: int, vocabulary: dict[str, int]) -> None:
    """Let tokenizer_config.json add a mask token; the tokenizer's own file stays what training used."""
    content = next(name for name in (*USUAL_NAMES["mask"], f"<|mask_{mask_id}|>") if name not in vocabulary)
    config["mask_token"] = content
    config["added_tokens_decoder"] = (config.get("added_tokens_decoder") or {}) | {str(mask_id): _special(content)}


def _tell_model_type(output: Path, folder: Path) -> None:
    """AutoTokenizer looks at the model's config.json, too."""
    if (config := output / "config.json").is_file():
        content = json.loads(config.read_bytes())
        if "auto_map" not in content:
            (folder / "config.json").write_text(json.dumps({"model_type": content["model_type"]}))


class Expected(NamedTuple):
    trained: Tokenizer
    mask_id: int | None
    entries: int
    """Ids that the model has."""


def _difference(loaded: PreTrainedTokenizerBase, expected: Expected, texts: Sequence[str]) -> str | None:
    trained = expected.trained
    for kind, wanted in (("bos", trained.bos_id), ("eos", trained.eos_id), ("mask", expected.mask_id)):
        if getattr(loaded, f"{kind}_token_id") != wanted:
            return f"transformers gives another {kind} id"
    if max(loaded.get_vocab().values()) >= expected.entries:
        return "transformers adds entries to its vocabulary"
    found = loaded(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    for text, exact, ids in zip(texts, trained.encode_batch(texts), found, strict=True):
        if ids != exact.tolist():
            return f"transformers gives other ids for {text[:60]!r}"
        backs = (loaded.decode(ids, skip, clean_up_tokenization_spaces=False) for skip in (True, False))
        if trained.unk_id not in ids and trained.decode(exact) not in backs:
            return f"transformers decodes {text[:60]!r} differently"
    return None
