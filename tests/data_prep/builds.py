"""`data_prep` at work, in this process or as a command, and what came of it."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_prep.build import How, build, build_part
from data_prep.documents import Document, Problems, read_unit
from data_prep.plan import BuildOptions, Plan
from data_prep.sources import parse_sources, plan_units
from data_prep.tokenizer import Tokenizer, open_tokenizer
from data_prep.units.parts import part_from
from storage.manifest import Manifest, PackingPolicy

ROOT = Path(__file__).parents[2]
UNIT_BYTES = 60_000


def build_here(
    inputs, tokenizer, output: Path, workers: int = 1, on_error="fail", encoder="plain", **options
) -> Manifest:
    """`data_prep.build` within this process; `options` are of BuildOptions or PackingPolicy."""
    plan, opened = plan_of(inputs, tokenizer, on_error, **options)
    return build(plan, opened, output, How(workers, on_error, encoder))


def build_part_here(part: str, inputs, tokenizer, output: Path, on_error="fail", **options) -> None:
    """`--part` of it."""
    plan, opened = plan_of(inputs, tokenizer, on_error, **options)
    build_part(plan, opened, output, part_from(part), How(1, on_error, "plain"))


def plan_of(inputs, tokenizer, on_error="fail", **options) -> tuple[Plan, Tokenizer]:
    packing = {name: options.pop(name) for name in PackingPolicy.model_fields if name in options}
    chosen = BuildOptions(packing=PackingPolicy(**{"seq_length": 128} | packing), **options)
    opened = open_tokenizer(tokenizer)
    sources = parse_sources([str(path) for path in inputs], [])
    return Plan(sources, chosen, opened, on_error), opened


def read(
    *places, on_error="fail", unit_bytes=None, text_field="text", id_field=None, chat=None
) -> tuple[list[Document], Problems]:
    """The documents of files and folders, in order."""
    units, files, *_ = plan_units(parse_sources([str(place) for place in places], []), unit_bytes, on_error)
    problems = Problems(on_error)
    found = [d for unit in units for d in read_unit(unit, files, text_field, id_field, problems, chat=chat)]
    return found, problems


def left_out_of(*places, on_error="fail") -> list:
    """What lies there and is not read."""
    return plan_units(parse_sources([str(place) for place in places], []), on_error=on_error)[2]


@contextmanager
def unprivileged() -> Iterator[None]:
    """As a user for whom permissions hold; root reads everything."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def command(module: str, *arguments, **environment: str) -> tuple[list[str], dict]:
    words = [sys.executable, "-m", f"data_prep.{module}", *map(str, arguments)]
    return words, {"cwd": ROOT, "env": os.environ | environment, "text": True}


def run(module: str, *arguments, **environment: str) -> subprocess.CompletedProcess:
    words, settings = command(module, *arguments, **environment)
    return subprocess.run(words, capture_output=True, timeout=120, **settings)


def contents(output: Path) -> dict[str, str]:
    """Hash of every file that makes up a data set, without the local parts (plan with its file times, lock)."""
    skipped = ("plan.json", ".lock", ".lock-parts", "manifest.json")
    files = [path for path in output.rglob("*") if path.is_file() and path.name not in skipped]
    hashes = {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    manifest = json.loads((output / "manifest.json").read_text())
    local = ("created_at", "repacked_from")
    return hashes | {"manifest.json": {key: value for key, value in manifest.items() if key not in local}}


def arguments(prose, tokenizer_folder, output, *more) -> list:
    base = ["--input", prose, "--tokenizer", tokenizer_folder, "--output", output, "--seq-length", 128]
    return [*base, "--unit-bytes", UNIT_BYTES, "--encoder", "plain", *more]


def failure(done: subprocess.CompletedProcess) -> str:
    """The one sentence of a command that refused."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return sentence
