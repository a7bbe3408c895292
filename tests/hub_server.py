"""A stand-in for the Hugging Face Hub, as a process of its own: repositories in memory, commits,
large files by the LFS protocol, downloads.

    python hub_server.py        # prints its address, serves until it is killed

Files above LFS_BYTES have to come by LFS, as on the Hub above 10 MB.
"""

import base64
import hashlib
import http.server
import json
import re
import sys
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

LFS_BYTES = 4096

Files = dict[str, bytes]


class Handler(http.server.BaseHTTPRequestHandler):
    """What huggingface_hub and datasets ask for."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a body waits 40 ms for the acknowledgement of its head
    repos: ClassVar[dict[tuple[str, str], list[Files]]] = {}
    objects: ClassVar[dict[str, bytes]] = {}

    def log_message(self, *_: Any) -> None:
        """Silence."""

    def do_HEAD(self) -> None:
        """Facts about a file."""
        self._resolve()

    def do_GET(self) -> None:
        """A file, a repository, a list of its files."""
        path = unquote(urlsplit(self.path).path)
        if path == "/api/whoami-v2":
            self._json({"name": "me", "type": "user", "orgs": []})
        elif found := re.fullmatch(r"/api/(model|dataset)s/(\w+/[\w.-]+)/tree/([^/]+)(/.*)?", path):
            self._tree(found[1], found[2], found[3], (found[4] or "").strip("/"))
        elif found := re.fullmatch(
            r"/api/(model|dataset)s/(\w+/[\w.-]+)(?:/revision/([^/]+))?", path
        ):
            self._info(found[1], found[2], found[3])
        else:
            self._resolve()

    def do_POST(self) -> None:
        """Make a repository, ask how to upload, commit."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        if path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given.get('organization') or 'me'}/{given['name']}"
            kind = given.get("type") or "model"
            there = (kind, name) in self.repos
            self.repos.setdefault((kind, name), [{}])
            prefix = "" if kind == "model" else f"{kind}s/"
            self._json({"url": f"{self._address()}/{prefix}{name}"}, 409 if there else 200)
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._batch(json.loads(body))
        elif found := re.fullmatch(r"/api/(model|dataset)s/(\w+/[\w.-]+)/preupload/[^/]+", path):
            files = [
                {"path": f["path"], "shouldIgnore": False, "uploadMode": self._mode(f["size"])}
                for f in json.loads(body)["files"]
            ]
            self._json({"files": files})
        elif found := re.fullmatch(r"/api/(model|dataset)s/(\w+/[\w.-]+)/commit/[^/]+", path):
            self._commit(found[1], found[2], body)
        elif found := re.fullmatch(r"/api/(model|dataset)s/(\w+/[\w.-]+)/paths-info/([^/]+)", path):
            wanted = json.loads(body)["paths"]
            files = self._files(found[1], found[2], found[3]) or {}
            self._json([_entry(name, files[name]) for name in wanted if name in files])
        else:
            self._json({"error": f"no {path}"}, 404)

    def do_PUT(self) -> None:
        """The content of a large file."""
        oid = self.path.rpartition("/")[2]
        content = self.rfile.read(int(self.headers["Content-Length"]))
        right = hashlib.sha256(content).hexdigest() == oid
        if right:
            self.objects[oid] = content
        self._json({}, 200 if right else 400)

    def _mode(self, size: int) -> str:
        return "lfs" if size > LFS_BYTES else "regular"

    def _batch(self, given: dict[str, Any]) -> None:
        objects = []
        for item in given["objects"]:
            if item["oid"] not in self.objects:
                href = f"{self._address()}/upload/{item['oid']}"
                item["actions"] = {"upload": {"href": href}}
            objects.append(item)
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, kind: str, name: str, body: bytes) -> None:
        """Lines of JSON: a header, then small files as base64 and large ones by their hash."""
        commits = self.repos[kind, name]
        files = dict(commits[-1])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                content = base64.b64decode(value["content"])
                if len(content) > LFS_BYTES:
                    self._json({"error": f"{value['path']} is too large, use LFS"}, 400)
                    return
                files[value["path"]] = content
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
        commits.append(files)
        oid = _oid(len(commits) - 1)
        url = f"{self._address()}/{name}/commit/{oid}"
        self._json({"success": True, "commitUrl": url, "commitOid": oid, "hookOutput": ""})

    def _files(self, kind: str, name: str, revision: str | None) -> Files | None:
        commits = self.repos.get((kind, name))
        if not commits or revision in (None, "main"):
            return commits and commits[-1]
        numbers = {_oid(i): i for i in range(len(commits))}
        return commits[numbers[revision]] if revision in numbers else None

    def _sha(self, kind: str, name: str, revision: str | None) -> str:
        latest = _oid(len(self.repos[kind, name]) - 1)
        return latest if revision in (None, "main") else str(revision)

    def _info(self, kind: str, name: str, revision: str | None) -> None:
        files = self._files(kind, name, revision)
        if files is None:
            self._missing("RevisionNotFound" if (kind, name) in self.repos else "RepoNotFound")
            return
        self._json(
            {
                "_id": "1",
                "id": name,
                "sha": self._sha(kind, name, revision),
                "private": False,
                "downloads": 0,
                "tags": [],
                "siblings": [{"rfilename": path} for path in files],
            }
        )

    def _tree(self, kind: str, name: str, revision: str, folder: str) -> None:
        files = self._files(kind, name, revision)
        if files is None:
            self._missing("RepoNotFound")
            return
        inside = {n: c for n, c in files.items() if not folder or n.startswith(f"{folder}/")}
        if folder and not inside:
            self._missing("EntryNotFound")
            return
        self._json([_entry(path, content) for path, content in inside.items()])

    def _resolve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        found = re.fullmatch(r"/(datasets/)?(\w+/[\w.-]+)/resolve/([^/]+)/(.+)", path)
        kind = "dataset" if found and found[1] else "model"
        files = self._files(kind, found[2], found[3]) if found else None
        if not found or files is None or found[4] not in files:
            known = found and (kind, found[2]) in self.repos
            self._missing("EntryNotFound" if known else "RepoNotFound")
            return
        content = whole = files[found[4]]
        code, first = 200, 0
        if span := self.headers.get("Range"):
            start, _, end = span.removeprefix("bytes=").partition("-")
            first = int(start)
            content = whole[first : int(end) + 1 if end else None]
            code = 206
        self.send_response(code)
        if code == 206:
            last = first + len(content) - 1
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(whole)}")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(whole).hexdigest()}"')
        self.send_header("X-Repo-Commit", self._sha(kind, found[2], found[3]))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def _missing(self, code: str) -> None:
        self._json({"error": "not found"}, 404, {"X-Error-Code": code})

    def _json(self, value: Any, code: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.send_response(code)
        for name, text in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _address(self) -> str:
        return f"http://{self.headers['Host']}"


def _oid(number: int) -> str:
    return f"{number:040x}"


def _entry(path: str, content: bytes) -> dict[str, Any]:
    digest = hashlib.sha256(content).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content)}
    entry["oid"] = digest[:40]
    if len(content) > LFS_BYTES:
        entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
    return entry


if __name__ == "__main__":
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    sys.stdout.write(f"http://127.0.0.1:{server.server_address[1]}\n")
    sys.stdout.flush()
    server.serve_forever()
