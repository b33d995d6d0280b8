"""A hub on 127.0.0.1 with as much of the real one's HTTP interface as huggingface_hub 2.4 uses for models."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

Files = dict[str, bytes]


class Hub(ThreadingHTTPServer):
    """The repositories, each with named revisions; what was asked for; what the lfs endpoint received."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, Files]] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.commits: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def files(self, repo: str, revision: str) -> Files | None:
        """Return the files at a branch or at a commit's hash."""
        branches = self.repos.get(repo, {})
        return next((files for name, files in branches.items() if revision in (name, commit_hash(files))), None)


def commit_hash(files: Files) -> str:
    """Return the hash that stands for a state of the files."""
    return hashlib.sha1(b"".join(name.encode() + files[name] for name in sorted(files))).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        self.server.requests.append(f"{self.command} {self.path}")

    def answer(self, body: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def missing(self, code: str) -> None:
        self.answer({"error": code}, status=404, headers={"X-Error-Code": code})

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            return self.info(match[1], match[2] or "main")
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            return self.tree(match[1], match[2])
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.file(match[1], match[2], match[3])
        return self.missing("EntryNotFound")

    def info(self, repo: str, revision: str) -> None:
        files = self.server.files(repo, revision)
        if files is None:
            return self.missing("RevisionNotFound" if repo in self.server.repos else "RepoNotFound")
        siblings = [{"rfilename": name} for name in sorted(files)]
        return self.answer({"id": repo, "modelId": repo, "sha": commit_hash(files), "siblings": siblings, "tags": []})

    def tree(self, repo: str, revision: str) -> None:
        files = self.server.files(repo, revision)
        if files is None:
            return self.missing("RepoNotFound")
        entries = [
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for name, data in files.items()
        ]
        return self.answer(entries)

    def file(self, repo: str, revision: str, name: str) -> None:
        files = self.server.files(repo, revision)
        if files is None:
            return self.missing("RepoNotFound")
        headers = {"X-Repo-Commit": commit_hash(files), "Accept-Ranges": "none"}
        if name not in files:
            return self.answer({}, status=404, headers={"X-Error-Code": "EntryNotFound", **headers})
        return self.answer(files[name], headers={"ETag": f'"{hashlib.sha1(files[name]).hexdigest()}"', **headers})

    def do_PUT(self) -> None:
        self.server.blobs[self.path.rpartition("/")[2]] = self.body()
        self.answer({})

    def do_POST(self) -> None:
        path, body = self.path.partition("?")[0], self.body()
        if self.headers.get("Authorization") != "Bearer hf_test":
            return self.answer({"error": "token"}, status=401)
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if re.fullmatch(r"/api/models/[^/]+/[^/]+/preupload/main", path):
            return self.preupload(json.loads(body))
        if path.endswith("/info/lfs/objects/batch"):
            return self.lfs_batch(json.loads(body))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            return self.commit(match[1], [json.loads(line) for line in body.splitlines() if line])
        return self.missing("EntryNotFound")

    def create(self, asked: dict[str, Any]) -> None:
        repo = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
        exists = repo in self.server.repos
        self.server.repos.setdefault(repo, {"main": {}})
        self.answer({"url": f"{self.server.url}/{repo}", "id": repo}, status=409 if exists else 200)

    def preupload(self, asked: dict[str, Any]) -> None:
        modes = [
            {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
            for f in asked["files"]
        ]
        self.answer({"files": [{**mode, "shouldIgnore": False, "oid": None} for mode in modes]})

    def lfs_batch(self, asked: dict[str, Any]) -> None:
        objects = [
            {**entry, "actions": {"upload": {"href": f"{self.server.url}/lfs/{entry['oid']}"}}}
            for entry in asked["objects"]
        ]
        self.answer({"transfer": "basic", "objects": objects})

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        files = self.server.repos[repo]["main"]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            else:
                self.server.commits.append(value)
        sha = commit_hash(files)
        self.answer({"success": True, "commitOid": sha, "commitUrl": f"{self.server.url}/{repo}/commit/{sha}"})


@contextmanager
def running() -> Iterator[Hub]:
    """Serve inside the block."""
    hub = Hub()
    thread = Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
