"""A hub of one's own: the few answers of the Hugging Face hub's HTTP interface that downloading and streaming need."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serving(
    models: dict[str, Path], gated: tuple[str, ...] = (), datasets: dict[str, Path] | None = None
) -> Iterator[tuple[str, list[str]]]:
    """Serve folders under their ids; yields the endpoint and the paths that were asked for, with the range if there was one."""
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
            path = unquote(self.path.split("?")[0])
            asked.append(f"{path} {self.headers['Range']}" if self.headers["Range"] else path)
            api = path.startswith("/api/")
            words = path.removeprefix("/api").strip("/").split("/")
            kind = words.pop(0) if words[0] in ("models", "datasets") else "models"
            owner_name, rest = "/".join(words[:2]), words[2:]
            if owner_name in gated:
                return self.answer(403, b"{}", X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
            folder = (models if kind == "models" else datasets or {}).get(owner_name)
            if folder is None:
                return self.answer(404, b"{}", X_Error_Code="RepoNotFound")
            if api:
                body = self.tree(folder, "/".join(rest[2:])) if rest[:1] == ["tree"] else self.info(owner_name, folder)
                return self.answer(200, json.dumps(body).encode(), Content_Type="application/json")
            file = folder / "/".join(rest[2:])
            if not file.is_file():
                return self.answer(404, b"", X_Error_Code="EntryNotFound")
            data = file.read_bytes()
            etag = hashlib.sha256(data).hexdigest()
            status, headers = 200, {"ETag": f'"{etag}"', "X_Repo_Commit": COMMIT}
            if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or ""):
                status, first = 206, int(wanted[1])
                last = min(int(wanted[2] or len(data) - 1), len(data) - 1)
                headers["Content_Range"] = f"bytes {first}-{last}/{len(data)}"
                data = data[first : last + 1]
            return self.answer(status, data, **headers)

        def tree(self, folder: Path, inner: str) -> list[dict[str, object]]:
            return [
                {
                    "type": "file" if one.is_file() else "directory",
                    "path": one.relative_to(folder).as_posix(),
                    "size": one.stat().st_size if one.is_file() else 0,
                    "oid": "0" * 40,
                }
                for one in sorted((folder / inner).glob("**/*" if "recursive=true" in self.path.lower() else "*"))
            ]

        def info(self, name: str, folder: Path) -> dict[str, object]:
            files = sorted(one for one in folder.rglob("*") if one.is_file())
            siblings = [{"rfilename": f.relative_to(folder).as_posix(), "size": f.stat().st_size} for f in files]
            return {"id": name, "sha": COMMIT, "siblings": siblings}

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
