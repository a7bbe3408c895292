"""A stand-in for the Hub that holds data sets and fails on purpose, and a reader of them.

Each data set's name says how its file is served: me/503-1 answers 503 to the first request for it,
me/503-999 to all of them. The texts are the same in all.
"""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

TEXTS = [f"document {i}: the cat sat on the mat " * 20 for i in range(400)]
FILE = "\n".join(json.dumps({"text": text}) for text in TEXTS).encode()
COMMIT = "a" * 40
READERS = 5
"""Processes that read at a time; they mostly wait."""
KINDS = ("429", "500", "503", "408", "slow", "cut")


class Handler(http.server.BaseHTTPRequestHandler):
    """The few answers that `datasets` asks for when it streams a data set of one JSONL file."""

    protocol_version = "HTTP/1.1"
    asked: ClassVar[Counter[str]] = Counter()

    def log_message(self, *_: Any) -> None:
        """Silence."""

    def do_HEAD(self) -> None:
        """Nothing but texts.jsonl exists."""
        self._send(200 if self.path.endswith("texts.jsonl") else 404, b"")

    def do_GET(self) -> None:
        """The data set, its list of files, its file."""
        path = self.path.partition("?")[0]
        name = "/".join(path.removeprefix("/api").split("/")[2:4])
        listed = {"type": "file", "path": "texts.jsonl", "size": len(FILE), "oid": "1" * 40}
        if path.endswith("texts.jsonl"):
            self._file(name)
        elif path.startswith("/api/datasets/") and "/tree/" in path:
            self._send(200, json.dumps([listed] if path.endswith(COMMIT) else []).encode())
        elif path.startswith("/api/datasets/"):
            files = [{"rfilename": "texts.jsonl"}]
            facts = {"id": name, "sha": COMMIT, "private": False, "siblings": files, "tags": []}
            self._send(200, json.dumps(facts | {"_id": "1", "downloads": 0}).encode())
        else:
            self._send(404, b"")

    def _file(self, name: str) -> None:
        kind, times = name.rpartition("/")[2].split("-")
        self.asked[name] += 1
        first, last = 0, len(FILE) - 1
        if span := self.headers.get("Range"):
            start, _, end = span.removeprefix("bytes=").partition("-")
            first, last = int(start), min(int(end or last), last)
        part = FILE[first : last + 1]
        failing = self.asked[name] <= int(times)
        if failing and kind.isdigit():
            self._send(int(kind), b"")
            return
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(FILE)}")
        self.send_header("Content-Length", str(len(part)))
        self.send_header("ETag", '"1"')
        self.end_headers()
        if failing and kind == "cut":
            self.wfile.write(part[: len(part) // 2])
            self.close_connection = True
        elif failing:
            for i in range(0, len(part), 1 << 15):
                self.wfile.write(part[i : i + (1 << 15)])
                time.sleep(0.02)
        else:
            self.wfile.write(part)

    def _send(self, code: int, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        if code == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def served() -> Iterator[str]:
    """The address of the stand-in while the block runs."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()


def digest(texts: list[str]) -> str:
    """What tells whether all of the text came."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def read_all(names: list[str], seconds: float) -> dict[str, tuple[str, str]]:
    """Stream data sets in processes of their own: name → ("read" or "refused", digest or words)."""
    with served() as endpoint, tempfile.TemporaryDirectory() as home:
        env = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": home, "HF_HUB_OFFLINE": "0"}
        readers = [
            subprocess.Popen(
                [sys.executable, "-m", "faults.hub", *names[i::READERS]],
                env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            )
            for i in range(READERS)
        ]  # fmt: skip
        deadline, lines = time.monotonic() + seconds, []
        for reader in readers:
            try:
                said, _ = reader.communicate(timeout=max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                reader.kill()
                said, _ = reader.communicate()
            lines += said.splitlines()
    return {name: (how, what) for name, how, what in map(json.loads, lines)}


def _read(name: str) -> tuple[str, str]:
    from sae.config import DataConfig
    from sae.documents import Documents
    from sae.errors import SAEError

    try:
        documents = Documents(DataConfig(source=name, streaming=True))
        return "read", digest([str(document.text) for document in documents])
    except SAEError as error:
        return "refused", str(error)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(json.dumps([name, *_read(name)]), flush=True)  # noqa: T201 - to the parent
