"""A Hugging Face Hub of one model on the loopback interface, enough of its HTTP interface for a snapshot download."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(ThreadingHTTPServer):
    """Serves `files` as the repository `repo`; a `failure` (status, error code) answers every request instead."""

    daemon_threads = True
    repo: str
    files: dict[str, bytes]
    failure: tuple[int, str] | None = None
    requests: list[str]

    @property
    def url(self) -> str:
        """Address to use as the endpoint."""
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        hub.requests.append(path)
        if hub.failure is not None:
            self._send(hub.failure[0], b"{}", {"X-Error-Code": hub.failure[1]})
        elif path.startswith(f"/api/models/{hub.repo}/revision/"):
            if path.endswith(("/main", f"/{COMMIT}")):
                siblings = [{"rfilename": name} for name in hub.files]
                self._send_json({"id": hub.repo, "modelId": hub.repo, "sha": COMMIT, "siblings": siblings})
            else:
                self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif path.startswith(f"/api/models/{hub.repo}/tree/"):
            entries = [{"type": "file", "path": n, "size": len(c), "oid": _etag(c)} for n, c in hub.files.items()]
            self._send_json(entries)
        elif (name := path.removeprefix(f"/{hub.repo}/resolve/{COMMIT}/")) in hub.files:
            content = hub.files[name]
            self._send(200, content, {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": COMMIT})
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent."""

    def _send_json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@contextmanager
def serve_hub(repo: str, files: dict[str, bytes]) -> Iterator[FakeHub]:
    """Serve a repository until the block ends."""
    hub = FakeHub(("127.0.0.1", 0), _Handler)
    hub.repo, hub.files, hub.requests = repo, files, []
    thread = Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
