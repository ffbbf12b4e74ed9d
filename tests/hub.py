"""A stand-in for the Hugging Face Hub: one data set, by the part of its HTTP API that `huggingface_hub` reads files with.

See https://huggingface.co/docs/hub/api: the facts of a repository, its tree, and files by `resolve`, whole or a range.
"""

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

COMMIT = "0123456789" * 4


@contextlib.contextmanager
def hub(repository: str, folder: Path) -> Iterator[str]:
    """The address for HF_ENDPOINT of a Hub that has this data set only; whatever else is asked for needs rights."""

    def entry(path: Path) -> dict:
        facts = {"type": "directory", "oid": COMMIT, "size": 0, "path": str(path.relative_to(folder))}
        if path.is_file():
            facts |= {"type": "file", "oid": hashlib.sha1(path.read_bytes()).hexdigest(), "size": path.stat().st_size}
        return facts

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = unquote(urlparse(self.path).path)
            if path == f"/api/datasets/{repository}":
                return self._json({"id": repository, "sha": COMMIT, "private": False, "tags": [], "siblings": []})
            if found := re.fullmatch(rf"/api/datasets/{repository}/tree/main/?(.*)", path):
                everything = "recursive=true" in self.path
                place = folder / found[1]
                if not place.is_dir():
                    return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
                return self._json([entry(each) for each in sorted(place.rglob("*") if everything else place.iterdir())])
            if found := re.fullmatch(rf"/datasets/{repository}/resolve/main/(.*)", path):
                return self._file((folder / found[1]).read_bytes())
            return self._send(401, b"", {"X-Error-Code": "RepoNotFound"})

        do_HEAD = do_GET

        def _file(self, content: bytes) -> None:
            first, last = 0, len(content) - 1
            if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                first, last = int(asked[1]), min(int(asked[2] or last), last)
            part = {"Content-Range": f"bytes {first}-{last}/{len(content)}"} if asked else {}
            self._send(206 if asked else 200, content[first : last + 1], {"X-Repo-Commit": COMMIT, **part})

        def _json(self, facts: object) -> None:
            self._send(200, json.dumps(facts).encode(), {"Content-Type": "application/json"})

        def _send(self, code: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(code)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
