"""A hub of one's own: the few answers of the Hugging Face hub's HTTP interface that downloading a model needs."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serving(models: dict[str, Path], gated: tuple[str, ...] = ()) -> Iterator[tuple[str, list[str]]]:
    """Serve folders under their ids; yields the endpoint and the paths that were asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_args: object) -> None:
            pass

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            asked.append(path)
            owner_name = "/".join(path.removeprefix("/api/models").strip("/").split("/")[:2])
            if owner_name in gated:
                return self.answer(403, b"{}", X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
            folder = models.get(owner_name)
            if folder is None:
                return self.answer(404, b"{}", X_Error_Code="RepoNotFound")
            files = sorted(file.name for file in folder.iterdir())
            if path.startswith("/api/models"):
                if "/tree/" in path:
                    tree = [
                        {"type": "file", "path": n, "size": (folder / n).stat().st_size, "oid": "0" * 40} for n in files
                    ]
                    return self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
                siblings = [{"rfilename": name, "size": (folder / name).stat().st_size} for name in files]
                body = {"id": owner_name, "sha": COMMIT, "siblings": siblings}
                return self.answer(200, json.dumps(body).encode(), Content_Type="application/json")
            name = path.rsplit("/", 1)[-1]
            if name not in files:
                return self.answer(404, b"", X_Error_Code="EntryNotFound")
            data = (folder / name).read_bytes()
            etag = hashlib.sha256(data).hexdigest()
            return self.answer(200, data, ETag=f'"{etag}"', X_Repo_Commit=COMMIT)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
