"""A stand-in for the hub of Hugging Face on this machine, with one repository."""

import base64
import contextlib
import hashlib
import http.server
import json
import pathlib
import threading
import time
from collections.abc import Iterator

COMMIT = "1" * 40


class Hub:
    """What the hub holds of one repository, and how it is served.

    Attributes:
        endpoint: Its address, for HF_ENDPOINT.
        name: USER/NAME.
        kind: "models" or "datasets".
        files: The content of each file.
        large: The content of what was uploaded by git LFS, by its hash.
        commits: The number of commits.
        stalls: The number of requests with large content that stop half-way, for a minute.
    """

    def __init__(self, name: str, kind: str, files: dict[str, bytes]):
        self.endpoint = ""
        self.name, self.kind, self.files = name, kind, files
        self.large: dict[str, bytes] = {}
        self.commits = self.stalls = 0

    def commit(self, lines: list[dict]) -> None:
        """Adds the files of a commit, which come in lines of JSON."""
        changed = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                changed[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                changed[value["path"]] = self.large[value["oid"]]
        self.files |= changed
        self.commits += 1

    def stall(self) -> bool:
        """Returns whether to stop now, half-way."""
        self.stalls -= 1
        return self.stalls >= 0


@contextlib.contextmanager
def hub(name: str, files: dict[str, bytes], kind: str) -> Iterator[Hub]:
    """Serves the files as a repository; yields it."""
    served = Hub(name, kind, files)
    prefix = "" if kind == "models" else f"/{kind}"

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.partition("?")[0]
            file = served.files.get(path.removeprefix(f"{prefix}/{name}/resolve/{COMMIT}/"))
            if path in (f"/api/{kind}/{name}", f"/api/{kind}/{name}/revision/main"):
                self.answer(json.dumps({"id": name, "sha": COMMIT, "siblings": []}).encode())
            elif path == f"/api/{kind}/{name}/tree/{COMMIT}":
                listed = [
                    {"type": "file", "path": path, "size": len(content), "oid": etag(content)}
                    for path, content in served.files.items()
                ]
                self.answer(json.dumps(listed).encode())
            elif file is not None:
                self.answer(file, {"ETag": f'"{etag(file)}"', "X-Repo-Commit": COMMIT})
            else:
                self.answer(b"", {"X-Error-Code": "RepoNotFound"}, status=404)

        do_HEAD = do_GET

        def do_POST(self):
            path, body = self.path.partition("?")[0], self.body()
            if path == "/api/repos/create":
                self.answer(json.dumps({"url": f"{served.endpoint}/{name}", "id": name}).encode())
            elif path == "/api/validate-yaml":
                self.answer(b'{"errors": [], "warnings": []}')
            elif path == f"/api/{kind}/{name}/preupload/main":
                modes = [
                    {"path": file["path"], "uploadMode": mode_of(file), "shouldIgnore": False}
                    for file in json.loads(body)["files"]
                ]
                self.answer(json.dumps({"files": modes}).encode())
            elif path == f"/{name}.git/info/lfs/objects/batch":
                objects = [
                    {**o, "actions": {"upload": {"href": f"{served.endpoint}/lfs/{o['oid']}"}}}
                    for o in json.loads(body)["objects"]
                ]
                self.answer(json.dumps({"transfer": "basic", "objects": objects}).encode())
            elif path == f"/api/{kind}/{name}/commit/main":
                served.commit([json.loads(line) for line in body.splitlines()])
                url = f"{served.endpoint}/{name}/commit/{COMMIT}"
                self.answer(json.dumps({"commitUrl": url, "commitOid": COMMIT}).encode())
            else:
                self.answer(b"", status=404)

        def do_PUT(self):
            if served.stall():
                time.sleep(60)
            content = self.body()
            served.large[self.path.rpartition("/")[2]] = content
            self.answer(b"")

        def body(self):
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return self.rfile.read(int(self.headers["Content-Length"]))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def answer(self, content, headers=(), status=200):
            self.send_response(status)
            for header, value in dict(headers).items():
                self.send_header(header, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "HEAD":
                return
            if len(content) > 50_000 and served.stall():
                self.wfile.write(content[: len(content) // 2])
                self.wfile.flush()
                time.sleep(60)
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request, client_address):
            pass  # a client that was killed

    with Server(("127.0.0.1", 0), Handler) as server:
        served.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield served
        finally:
            server.shutdown()
            thread.join()


def files_in(folder: pathlib.Path) -> dict[str, bytes]:
    """Returns the content of each file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def mode_of(file: dict) -> str:
    """Returns how the hub wants a file: models by git LFS."""
    return "lfs" if file["path"].endswith(".keras") else "regular"


def etag(content: bytes) -> str:
    """Returns the hash by which the hub knows a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
