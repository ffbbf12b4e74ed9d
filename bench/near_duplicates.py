"""Near-duplicates beside datatrove, on the same text, in one run of about three minutes.

    python -m bench.near_duplicates [--megabytes 48]

The text of `bench.data`, and behind it a fifth of its documents once more, with so many words exchanged that nine tenths
of their 5-grams of words (about four fifths of those of tokens) are the same. Every contender runs in its own process, with one
worker; CPU seconds after imports.

    documents, sections, both    `data_prep.build --near-duplicates 0.8 --near-duplicate-sections 0.8`, without the tokenizing
    datatrove                    its MinHash: signatures, buckets, clusters, filter, from the JSON Lines file (14 x 8 hashes)
"""

import json
import random
import tempfile
from itertools import chain
from pathlib import Path

from bench.alone import Figures, megabytes_or_run, run_alone
from bench.data import VOCAB_SIZE, Stopwatch, documents

BENCH = "bench.near_duplicates"
SIMILARITY, NGRAM, REPEATED = 0.8, 5, 5
PLANTED = 0.9
"""Of words, which is about SIMILARITY of tokens."""


def prepare(folder: Path, megabytes: int) -> Figures:
    """Write the texts, and a token store of them."""
    from data_prep.build import build
    from data_prep.plan import BuildOptions, Plan
    from data_prep.sources import Source
    from data_prep.tokenizer import open_tokenizer
    from data_prep.tokenizer_files import MODEL_FILE
    from data_prep.tokenizer_training import train
    from storage.manifest import PackingPolicy

    found = [text for _, text in documents(megabytes * 1_000_000)]
    generator = random.Random(0)
    planted = [edited(text, generator) for text in found[::REPEATED]]
    with (folder / "corpus.jsonl").open("w") as file:
        for number, text in enumerate(chain(found, planted)):
            file.write(json.dumps({"id": str(number), "text": text}, ensure_ascii=False) + "\n")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / MODEL_FILE).write_bytes(train(found[:: 1 + megabytes // 8], VOCAB_SIZE))
    tokenizer = open_tokenizer(folder / "tokenizer")
    options = BuildOptions(packing=PackingPolicy(seq_length=4096), validation_fraction=0, id_field="id")
    plan = Plan([Source("bench", None, (str(folder / "corpus.jsonl"),))], options, tokenizer)
    build(plan, tokenizer, folder / "data")
    size = sum(len(text.encode()) for text in chain(found, planted))
    return {"bytes": size, "originals": len(found), "planted": len(planted)}


def edited(text: str, generator: random.Random) -> str:
    """The text with every so many words another."""
    words = text.split(" ")
    count = int(max(0, len(words) - NGRAM) * (1 - PLANTED) / (1 + PLANTED) / NGRAM)
    for place in generator.sample(range(2, max(3, len(words)), NGRAM), min(count, len(words) // NGRAM)):
        words[place] = f"w{generator.randrange(10**6)}"
    return " ".join(words)


def run_ours(folder: Path, **levels: float) -> Figures:
    import numpy as np

    from data_prep.duplicates.near import find_near_duplicates
    from data_prep.duplicates.sketch import NearSettings
    from data_prep.leave_out import SECTION_TOKENS
    from data_prep.ledger import Ledger
    from data_prep.token_bytes import token_bytes
    from data_prep.tokenizer import open_tokenizer

    pieces = token_bytes(open_tokenizer(folder / "tokenizer"))
    tokens = folder / "data" / "tokens"
    ledgers = [Ledger.model_validate_json(path.read_bytes()) for path in sorted(tokens.glob("unit-*.json"))]
    with tempfile.TemporaryDirectory(dir=folder) as work, Stopwatch() as watch:
        settings = NearSettings(levels, NGRAM, SECTION_TOKENS, begins=1)
        dropped = list(find_near_duplicates(tokens, Path(work) / "near", settings, ledgers, pieces, 1))
    documents = [rows.doc[rows.begin == 0] for rows in dropped]
    return watch.result | {"dropped": np.unique(np.concatenate([np.zeros(0, np.int64), *documents])).tolist()}


def run_datatrove(folder: Path) -> Figures:
    from datatrove.data import Document
    from datatrove.pipeline.dedup import (
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.utils.hashing import HashConfig

    config = MinhashConfig(hash_config=HashConfig(hash_fc="sha1"))  # its xxhash calls are those of older releases

    with tempfile.TemporaryDirectory(dir=folder) as work, Stopwatch() as watch:
        reader = JsonlReader(str(folder), glob_pattern="corpus.jsonl")
        signature = MinhashDedupSignature(output_folder=f"{work}/signatures", config=config)
        signature.run(reader.run(None, 0, 1), 0, 1)
        buckets = MinhashDedupBuckets(f"{work}/signatures", f"{work}/buckets", config=config)
        for rank in range(14):
            buckets.run(None, rank, 14)
        MinhashDedupCluster(f"{work}/buckets", f"{work}/remove", config=config).run(None, 0, 1)
        kept: list[Document] = list(MinhashDedupFilter(input_folder=f"{work}/remove").run(reader.run(None, 0, 1), 0, 1))
    left = {int(document.id) for document in kept}
    count = sum(1 for _ in (folder / "corpus.jsonl").open())
    return watch.result | {"dropped": [number for number in range(count) if number not in left]}


CONTENDERS = {
    "documents": lambda folder: run_ours(folder, documents=SIMILARITY),
    "sections": lambda folder: run_ours(folder, sections=SIMILARITY),
    "documents and sections": lambda folder: run_ours(folder, documents=SIMILARITY, sections=SIMILARITY),
    "datatrove": run_datatrove,
}


def main() -> None:
    megabytes = megabytes_or_run(BENCH, __doc__, 48, prepare, CONTENDERS)
    if megabytes is None:
        return
    with tempfile.TemporaryDirectory() as temporary:
        made = run_alone(BENCH, Path(temporary), "prepare", megabytes)
        planted = range(made["originals"], made["originals"] + made["planted"])
        print(f"{made['bytes'] / 1e6:.1f} MB, {made['originals']:,} documents and {made['planted']:,} planted")
        for name in CONTENDERS:
            result = run_alone(BENCH, Path(temporary), name, megabytes)
            found = len(set(result["dropped"]) & set(planted)) / made["planted"]
            print(
                f"  {name:<28} {made['bytes'] / 1e6 / result['cpu']:7.2f} MB/cpu-s, {len(result['dropped']):,} documents "
                f"dropped, {found:.1%} of the planted; peak MB {result['self']:.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
