"""Data sets and checkpoints go to a real S3 server and come back as they were, or not at all, whatever happens between."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import tools.pull
from engine.checkpoint.manifest import read_manifest
from storage import remote, transfer
from storage.remote import Remote
from storage.shards import open_split
from storage.transfer import pull, push, read_listing
from tests.data_prep.builds import ROOT
from tests.engine.checkpoint.test_folder import flip, write
from tests.processes import clean_environment
from tests.s3 import CuttingProxy, environment, require_rights, s3  # noqa: F401 (a fixture)
from tools.push import verified

KILLED = """
import os, signal, sys
from pathlib import Path
from storage import remote, transfer
what, url, folder, calls = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
remote.RANGE_BYTES, transfer.RANGE_BYTES, transfer.FILES_AT_ONCE = 20_000, 20_000, 1
action, count = getattr(remote.Remote, what), 0
def dying(*arguments):
    global count
    count += 1
    if count == calls:
        os.kill(os.getpid(), signal.SIGKILL)
    return action(*arguments)
setattr(remote.Remote, what, dying)
place = remote.Remote(url)
if what == "put":
    from tools.push import verified
    transfer.push(folder, verified(folder), place, lambda size: None)
else:
    transfer.pull(place, transfer.read_listing(place), folder, lambda size: None)
"""


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def fetched(url: str, target: Path) -> None:
    place, sums = Remote(url), []
    listing = read_listing(place)
    pull(place, listing, target, sums.append)
    assert sum(sums) == listing.size


def killed(what: str, url: str, folder: Path, calls: int) -> None:
    kept = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    words = [sys.executable, "-c", KILLED, what, url, str(folder), str(calls)]
    done = subprocess.run(words, cwd=ROOT, env=clean_environment(kept), capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr


def count_calls(monkeypatch, name: str) -> list:
    """Filled with the URL and the arguments of each call of a method."""
    calls, action = [], getattr(Remote, name)
    monkeypatch.setattr(Remote, name, lambda self, *rest: (calls.append((self.url, *rest)), action(self, *rest))[1])
    return calls


@pytest.fixture(scope="module")
def pushed(data, s3):  # noqa: F811
    listing = verified(data)
    assert push(data, listing, Remote("s3://ours/data"), lambda size: None, read_back=True)
    return "s3://ours/data"


def test_a_data_set_comes_back_as_it_was_and_is_sent_once(data, pushed, tmp_path, monkeypatch):
    fetched(pushed, tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(data)
    assert len(open_split(tmp_path / "back", "train", "full")) == len(open_split(data, "train"))
    assert [path.name for path in tmp_path.iterdir()] == ["back"]
    sent = count_calls(monkeypatch, "put")
    assert not push(data, verified(data), Remote(pushed), lambda size: None)
    assert [url for url, *_ in sent] == []


def test_cut_connections_cost_a_range_each(data, pushed, s3, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(transfer, "RANGE_BYTES", 20_000)
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.01)
    with CuttingProxy(s3, 5, 12_000) as proxy, environment(AWS_ENDPOINT_URL=proxy.address):
        fetched(pushed, tmp_path / "back")
    assert proxy.cut == 5
    assert hashes(tmp_path / "back") == hashes(data)


def test_a_killed_pull_is_not_there_and_continues(data, pushed, tmp_path, monkeypatch):
    target = tmp_path / "back"
    files = read_listing(Remote(pushed)).files
    largest = max(files, key=lambda name: files[name].size)
    before = sum(-(-files[name].size // 20_000) for name in files if name < largest)
    killed("read", pushed, target, 1 + before + 3)  # the first reads the listing
    assert not target.exists()
    asked = count_calls(monkeypatch, "read")
    fetched(pushed, target)
    begun = {url: rest[0] for url, *rest in asked if rest and rest[0]}
    assert begun == {f"{pushed}/{largest}": 40_000}
    assert len(asked) == 1 + 1 + sum(name > largest for name in files)
    assert hashes(target) == hashes(data)


def test_a_killed_push_is_not_there_and_sends_only_the_rest(data, s3, tmp_path, monkeypatch):  # noqa: F811
    url = "s3://ours/killed"
    killed("put", url, data, 5)
    with pytest.raises(ValueError, match=r"killed is not complete, it lacks manifest\.json: run the push again"):
        read_listing(Remote(url))
    sent, listing = count_calls(monkeypatch, "put"), verified(data)
    push(data, listing, Remote(url), lambda size: None)
    assert len(sent) == len(listing.files) - 4
    assert sent[-1][0].endswith("/manifest.json")
    fetched(url, tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(data)


def test_leftovers_of_another_push_never_pass_for_new_files(data, s3, tmp_path):  # noqa: F811
    url, other = "s3://ours/other", tmp_path / "other"
    killed("put", url, data, 4)
    shutil.copytree(data, other)
    plan = (other / "plan.json").read_text()
    (other / "plan.json").write_text(plan.replace(", ", ",  ", 1)[:-1] + "}")
    assert verified(other).files.keys() == verified(data).files.keys()
    push(other, verified(other), Remote(url), lambda size: None)
    fetched(url, tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(other)
    with pytest.raises(ValueError, match="other holds another data set already"):
        push(data, verified(data), Remote(url), lambda size: None)


def test_a_checkpoint_comes_back_under_its_name(s3, tmp_path, monkeypatch):  # noqa: F811
    folder = write(tmp_path / "run", 100)
    with pytest.raises(ValueError, match=r"run is a run: give one of its checkpoints, such as .*step-00000100"):
        verified(tmp_path / "run")
    listing = verified(folder)
    assert (listing.kind, listing.name) == ("checkpoint", "step-00000100")
    push(folder, listing, Remote("s3://ours/checkpoint"), lambda size: None)
    monkeypatch.setattr(sys, "argv", ["pull", "s3://ours/checkpoint", str(tmp_path / "mine")])
    with pytest.raises(ValueError, match=r"found under its own name only: give .*mine/step-00000100"):
        tools.pull.main()
    assert not (tmp_path / "mine").exists()
    back = tmp_path / "back" / "checkpoints" / folder.name
    fetched("s3://ours/checkpoint", back)
    assert read_manifest(back).state.step == 100
    flip(folder / "weights.pt")
    with pytest.raises(ValueError, match="content has changed"):
        verified(folder)


def test_what_goes_wrong_is_one_sentence(data, pushed, s3, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(remote, "ATTEMPTS", 1)
    listing = verified(data)
    with pytest.raises(ValueError, match=r"s3://no-such-bucket/.* does not exist|s3://no-such-bucket/data holds no"):
        push(data, listing, Remote("s3://no-such-bucket/data"), lambda size: None)
    with pytest.raises(ValueError, match=r"holds no files\.json: nothing was pushed there"):
        read_listing(Remote("s3://ours/nothing"))
    Remote("s3://ours/mine/notes.txt").write(b"mine")
    with pytest.raises(ValueError, match=r"holds files that no push brought there \(s3://ours/mine/notes.txt\)"):
        push(data, listing, Remote("s3://ours/mine"), lambda size: None)
    (tmp_path / "there" / "mine").mkdir(parents=True)
    with pytest.raises(ValueError, match="there is there already"):
        fetched(pushed, tmp_path / "there")
    require_rights(s3, 0)
    try:
        with pytest.raises(ValueError, match="no right to do this"):
            read_listing(Remote(pushed))
        with pytest.raises(ValueError, match="no right to do this"):
            push(data, listing, Remote("s3://ours/new"), lambda size: None)
    finally:
        require_rights(s3, "inf")
    with environment(AWS_ENDPOINT_URL="http://127.0.0.1:9"), pytest.raises(ValueError, match="cannot be reached"):
        read_listing(Remote(pushed))
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ValueError, match=r"gs:// needs gcsfs, which is not installed: see requirements-storage\.txt"):
        Remote("gs://bucket/data")


def test_a_changed_object_is_found(data, pushed, tmp_path):
    place = Remote(pushed)
    (name,) = [name for name in read_listing(place).files if name.startswith("validation/shard-plays")]
    held = place.child(name).read()
    place.child(name).write(bytes([held[0] ^ 1]) + held[1:])
    try:
        with pytest.raises(ValueError, match=r"shard-plays-00000\.arrow is not what was pushed: its sha256"):
            fetched(pushed, tmp_path / "back")
        assert not (tmp_path / "back").exists()
    finally:
        place.child(name).write(held)
    fetched(pushed, tmp_path / "back")  # what was damaged is fetched again, the rest is kept
    assert hashes(tmp_path / "back") == hashes(data)


def test_the_commands_say_what_they_did(data, s3, tmp_path):  # noqa: F811
    kept = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}

    def command(*words: str) -> subprocess.CompletedProcess:
        given = [sys.executable, "-m", *words]
        return subprocess.run(given, cwd=ROOT, env=clean_environment(kept), capture_output=True, text=True, timeout=120)

    done = command("tools.push", str(data), "s3://ours/command")
    assert done.returncode == 0, done.stderr
    assert "MB sent, at s3://ours/command" in done.stdout
    done = command("tools.pull", "s3://ours/command", str(tmp_path / "back"))
    assert "every hash as it was sent" in done.stdout
    assert hashes(tmp_path / "back") == hashes(data)
