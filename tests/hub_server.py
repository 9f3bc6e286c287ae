"""A stand-in for the hub of Hugging Face on this machine, with one dataset."""

import contextlib
import hashlib
import http.server
import json
import pathlib
import threading
from collections.abc import Iterator

COMMIT = "1" * 40


@contextlib.contextmanager
def hub(name: str, folder: pathlib.Path) -> Iterator[str]:
    """Serves the files of a folder as a dataset; yields the address for HF_ENDPOINT."""
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.partition("?")[0]
            file = files.get(path.removeprefix(f"/datasets/{name}/resolve/{COMMIT}/"))
            if path == f"/api/datasets/{name}/revision/main":
                self.answer(json.dumps({"id": name, "sha": COMMIT, "siblings": []}).encode())
            elif path == f"/api/datasets/{name}/tree/{COMMIT}":
                listed = [
                    {"type": "file", "path": path, "size": len(content), "oid": etag(content)}
                    for path, content in files.items()
                ]
                self.answer(json.dumps(listed).encode())
            elif file is not None:
                self.answer(file, {"ETag": f'"{etag(file)}"', "X-Repo-Commit": COMMIT})
            else:
                self.answer(b"", {"X-Error-Code": "RepoNotFound"}, status=404)

        do_HEAD = do_GET

        def answer(self, content, headers=(), status=200):
            self.send_response(status)
            for header, value in dict(headers).items():
                self.send_header(header, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def etag(content: bytes) -> str:
    """Returns the hash by which the hub knows a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
