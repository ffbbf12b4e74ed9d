"""Documents that are left out before they are encoded, each with its reason: `--filter`, once or several times.

    gopher-quality, gopher-repetition, c4, fineweb   datatrove's filters of these names, as they are (English)
    characters=MIN:MAX            length of the text
    gzip=MIN:MAX                  bytes of the text compressed (zlib, level 6) by those of the text: repetitive texts are near 0
    language=MODEL:LABELS[:MIN]   a fastText model's first label (without `__label__`) is one of LABELS, its score at least MIN
    FILE.py:FUNCTION              FUNCTION(document), which has `text` and `key`: whether to keep it, or False and a reason

MIN or MAX may be left out. A document passes the filters in the order in which they are given; the first that refuses it is
its reason. Texts stay as they are: `c4` decides about a document, the lines that it would drop are kept.
"""

import hashlib
import importlib.metadata
import importlib.util
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data_prep.records import BadInput, Document, Filtered
from storage.manifest import file_sha256

DATATROVE = {
    "gopher-quality": ("gopher_quality_filter", "GopherQualityFilter"),
    "gopher-repetition": ("gopher_repetition_filter", "GopherRepetitionFilter"),
    "c4": ("c4_filters", "C4QualityFilter"),
    "fineweb": ("fineweb_quality_filter", "FineWebQualityFilter"),
}
Filter = Callable[[Document], str | None]
"""The reason to leave a document out, or None."""


def filter_hashes(specs: Sequence[str]) -> list[tuple[str, str]]:
    """Each filter and what it is made of: the hash of its file, or the version of its package.

    Raises ValueError if one cannot be used.
    """
    return [(spec, _made_of(spec)) for spec in specs]


def _made_of(spec: str) -> str:
    open_filter(spec)
    if spec in DATATROVE:
        return f"datatrove {importlib.metadata.version('datatrove')}"
    name, _, value = spec.partition("=")
    if name == "language":
        return file_sha256(Path(_language_parts(value)[0]))
    return file_sha256(Path(spec.rpartition(":")[0])) if name not in MEASURES else ""


def open_filter(spec: str) -> Filter:
    """Raises ValueError, which names the flag, where it cannot be used."""
    name, equals, value = spec.partition("=")
    if spec in DATATROVE:
        return _of_datatrove(spec)
    if name in MEASURES and equals:
        return _of_measure(name, value)
    if name == "language" and equals:
        return _of_language(value)
    path, _, function = spec.rpartition(":")
    if path.endswith(".py") and function:
        return _of_file(path, function)
    raise ValueError(
        f"--filter {spec}: write {', '.join(DATATROVE)}, characters=MIN:MAX, gzip=MIN:MAX, language=MODEL:LABELS or "
        "FILE.py:FUNCTION"
    )


def _of_datatrove(spec: str) -> Filter:
    module, name = DATATROVE[spec]
    try:
        from datatrove.data import Document as TheirDocument

        from data_prep.words import english_words

        kind: Any = getattr(importlib.import_module(f"datatrove.pipeline.filters.{module}"), name)
        theirs = kind(language=english_words())
    except ImportError as error:
        raise ValueError(
            f"--filter {spec} needs a package ({error}): install it by `pip install -r requirements-filters.txt`"
        ) from None

    def reason(document: Document) -> str | None:
        return _reason(theirs.filter(TheirDocument(text=document.text, id=document.key)))

    return reason


MEASURES: dict[str, Callable[[str], float]] = {
    "characters": len,
    "gzip": lambda text: len(zlib.compress(text.encode(), 6)) / max(1, len(text.encode())),
}


def _of_measure(name: str, value: str) -> Filter:
    low, colon, high = value.partition(":")
    try:
        least, most = float(low or "-inf"), float(high or "inf")
    except ValueError:
        colon = ""
    if not colon or not (low or high) or least > most:
        raise ValueError(f"--filter {name}={value}: write {name}=MIN:MAX, two numbers of which one may be left out")

    def reason(document: Document) -> str | None:
        measured = MEASURES[name](document.text)
        return None if least <= measured <= most else f"{measured:.4g}"

    return reason


def _language_parts(value: str) -> tuple[str, list[str], float]:
    *model, labels, score = value.split(":") if value.count(":") > 1 else [*value.split(":"), "0"]
    try:
        return ":".join(model), labels.split(","), float(score)
    except ValueError:
        raise ValueError(
            f"--filter language={value}: write language=MODEL:LABELS:MIN, such as lid.176.ftz:en,de:0.65"
        ) from None


def _of_language(value: str) -> Filter:
    path, labels, least = _language_parts(value)
    if not Path(path).is_file():
        raise ValueError(f"--filter language={value}: there is no model file {path!r}; write language=MODEL:LABELS")
    try:
        from fasttext.FastText import _FastText

        model: Any = _FastText(path)
    except ImportError:
        raise ValueError(
            "--filter language needs fastText: install it by `pip install -r requirements-filters.txt`"
        ) from None
    except ValueError as error:
        raise ValueError(f"--filter language={value}: {path} is no model of fastText ({error})") from None

    def reason(document: Document) -> str | None:
        score, label = model.f.predict(document.text.replace("\n", " ") + "\n", 1, 0.0, "strict")[0]
        label = label.removeprefix("__label__")
        return None if label in labels and score >= least else f"{label} {score:.3f}"

    return reason


def _of_file(path: str, name: str) -> Filter:
    try:
        code = Path(path).read_bytes()
        scope: dict[str, Any] = {"__name__": f"filter_{hashlib.sha256(code).hexdigest()[:8]}", "__file__": path}
        exec(compile(code, path, "exec"), scope)
        function = scope[name]
    except OSError as error:
        raise ValueError(f"--filter {path}:{name}: {path} cannot be read ({error.strerror})") from None
    except KeyError:
        raise ValueError(f"--filter {path}:{name}: {path} defines no {name}") from None
    except Exception as error:
        raise ValueError(f"--filter {path}:{name}: {path} cannot be run ({type(error).__name__}: {error})") from None
    return lambda document: _reason(function(document))


def _reason(result: Any) -> str | None:
    keep, words = result if isinstance(result, tuple) else (result, "")
    return None if keep else str(words or "")


class Filters:
    """All of them, in order."""

    def __init__(self, specs: Sequence[str]) -> None:
        self._filters = [(spec, open_filter(spec)) for spec in specs]

    def kept(self, documents: Iterable[Document], refused: list[Filtered]) -> Iterator[Document]:
        """Documents that pass; the others' keys and reasons go to `refused`. Raises BadInput where a filter raises."""
        for document in documents:
            if (found := self._refusal(document)) is None:
                yield document
            else:
                refused.append(found)

    def _refusal(self, document: Document) -> Filtered | None:
        if not document.text or document.text.isspace():
            return None  # counted as empty
        for spec, reason in self._filters:
            try:
                words = reason(document)
            except Exception as error:
                raise BadInput(
                    f"--filter {spec} raised {type(error).__name__} ({' '.join(str(error).split())}) at document "
                    f"{document.key!r}: mend it and run the command again, or leave the filter out"
                ) from None
            if words is not None:
                return Filtered(document.key, spec, words)
        return None
