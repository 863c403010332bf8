"""A Hub on the loopback: as much of its protocol as ``hf_hub_download`` uses, with repos kept in memory.

The client reads ``HF_ENDPOINT`` when it is imported, so a test runs it in a process of its own::

    with HubServer() as hub:
        commit = hub.commit("acme/wan-fast", {"hf_accel.yaml": "..."})
        subprocess.run([...], env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path)})
"""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote


@dataclass
class Repo:
    """Commits of a repo (hash -> path -> content) and its branches and tags (name -> hash)."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)


class HubServer:
    """Serves repos at ``url``; ``requests`` lists what was asked, as ``"METHOD /path"``.

    Attributes:
        broken: paths whose download breaks off halfway.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []
        self.broken: set[str] = set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def commit(self, repo_id: str, files: dict[str, str], branch: str = "main", tag: str | None = None) -> str:
        """Commit files to a branch; returns the hash, which depends on content and history as git's does."""
        repo = self.repos.setdefault(repo_id, Repo())
        parent = repo.refs.get(branch, "")
        content = {path: text.encode() for path, text in files.items()}
        digest = hashlib.sha1(parent.encode())
        for path, data in sorted(content.items()):
            digest.update(path.encode() + b"\0" + data)
        commit = digest.hexdigest()
        repo.commits[commit] = content
        repo.refs[branch] = commit
        if tag is not None:
            repo.refs[tag] = commit
        return commit

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body for ``/owner/name/resolve/revision/file``."""
        parts = unquote(path.split("?")[0]).lstrip("/").split("/", 4)
        if len(parts) != 5 or parts[2] != "resolve":
            return 404, {}, b""
        repo = self.repos.get(f"{parts[0]}/{parts[1]}")
        if repo is None:  # the Hub answers 401 here, so that nobody can probe for private repos
            return 401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b""
        commit = repo.refs.get(parts[3], parts[3])
        if commit not in repo.commits:
            return 404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"}, b""
        headers = {"X-Repo-Commit": commit}
        data = repo.commits[commit].get(parts[4])
        if data is None:
            return 404, headers | {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}, b""
        return 200, headers | {"ETag": f'"{hashlib.sha1(data).hexdigest()}"'}, data

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self._reply(body=False)

            def do_GET(self) -> None:
                self._reply(body=True)

            def _reply(self, body: bool) -> None:
                hub.requests.append(f"{self.command} {self.path}")
                status, headers, data = hub.answer(self.path)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if body:
                    self.wfile.write(data[: len(data) // 2] if self.path in hub.broken else data)

            def log_message(self, *args: object) -> None:
                pass

        return Handler
