"""Texts that packages bring: each in a folder, fetched when they are first asked for. Nothing is installed but in that folder."""

import gettext
import importlib.util
import json
import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from console.progress import say

COMPLETE = "complete"
"""File in the folder of a package that is unpacked."""


def of_pip(package: str) -> Path:
    """The folder of an installed Python package; ValueError where it is not installed."""
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"the texts of the Python package {package} are needed: pip install {package}")
    return Path(str(files(package)))


def of_debian(packages: Sequence[str], work: Path) -> Path:
    """The files of Debian's packages, as under /, in work/debian; ValueError where apt-get does not get them."""
    folder = work / "debian"
    for package in packages:
        done = folder / f"{package}.{COMPLETE}"
        if done.exists():
            continue
        downloads = _fresh(folder / "download")
        what = f"the texts of Debian's package {package} are needed in {folder}"
        _run(["apt-get", "download", package], downloads, f"{what}: run `apt-get update`, or bring them there by hand")
        (archive,) = downloads.glob("*.deb")
        _run(["dpkg-deb", "--extract", archive.name, ".."], downloads, what)
        shutil.rmtree(downloads)
        done.touch()
    return folder


def of_npm(package: str, work: Path) -> Path:
    """The files of an npm package in work/npm/PACKAGE; ValueError where npm does not get it."""
    folder = work / "npm" / package
    if not (folder / COMPLETE).exists():
        downloads = _fresh(folder)
        what = f"the texts of the npm package {package} are needed in {folder}"
        _run(["npm", "pack", "--silent", package], downloads, f"{what}: look whether npm works here")
        (archive,) = downloads.glob("*.tgz")
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")
        archive.unlink()
        (folder / COMPLETE).touch()
    return folder / "package"


def catalogue(path: Path) -> dict[str, str]:
    """A program's messages and their translations, from a compiled gettext catalogue; plural forms are left out."""
    with path.open("rb") as file:
        found = gettext.GNUTranslations(file)
    messages: dict = found._catalog  # type: ignore[attr-defined]  # there is no other way to list them
    return {message: text for message, text in messages.items() if isinstance(message, str) and message and text}


def strings(value: object) -> list[str]:
    """All strings inside of decoded JSON under keys that hold text, in order."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return [text for item in value for text in strings(item)]
    if isinstance(value, dict):
        return [text for key, item in value.items() if key in ("paragraphs", "content") for text in strings(item)]
    return []


def json_strings(path: Path) -> list[str]:
    return strings(json.loads(path.read_bytes()))


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _run(command: list[str], folder: Path, problem: str) -> None:
    say(" ".join(command))
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except OSError:
        raise ValueError(f"{problem} ({command[0]} is not installed)") from None
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise ValueError(f"{problem} ({last})")
