"""A storage like Google's on this machine, for gs:// paths; it can be out of order for a while."""

import contextlib
import dataclasses
import email
import http.client
import http.server
import io
import json
import pathlib
import ssl
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator

import trustme
from engine_servers import free_ports
from gcp_storage_emulator import server as emulator_server
from gcp_storage_emulator.exceptions import NotFound

BUCKET = "bucket"
# Whatever proxy this process may have for other addresses.
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
_HOSTS = ("www.googleapis.com", "storage.googleapis.com")


@dataclasses.dataclass
class Storage:
    """A running storage.

    Attributes:
        environment: What a process needs to find it by gs:// paths: TensorFlow through a proxy,
            since it knows no other address than Google's, and Beam by the emulator's.
        emulator: Address of the emulator itself.
        requests: How many the proxy has had.
        refused: How many of them it has answered by 503.
    """

    environment: dict[str, str]
    emulator: str
    requests: int = 0
    refused: int = 0
    _out_of_order_until: float = 0.0
    _seconds_from_upload: float = 0.0

    def fail_for(self, seconds: float) -> None:
        """Makes the storage answer 503 for a while."""
        self._out_of_order_until = time.monotonic() + seconds

    def fail_at_upload(self, seconds: float) -> None:
        """Makes the storage answer 503 for a while, from the next upload of a file on."""
        self._seconds_from_upload = seconds

    def upload(self, folder: pathlib.Path) -> None:
        """Puts the files of a folder into the bucket, under its name."""
        place = f"{self.emulator}/upload/storage/v1/b/{BUCKET}/o"
        for path in filter(pathlib.Path.is_file, folder.rglob("*")):
            name = str(path.relative_to(folder.parent))
            query = urllib.parse.urlencode({"uploadType": "media", "name": name})
            _open(f"{place}?{query}", data=path.read_bytes()).close()

    def download(self, folder: pathlib.Path) -> pathlib.Path:
        """Writes all objects of the bucket into a folder; returns it."""
        listing = f"{self.emulator}/storage/v1/b/{BUCKET}/o"
        with _open(listing) as answer:
            names = [item["name"] for item in json.load(answer).get("items", [])]
        for name in names:
            if not name.endswith("/"):  # TensorFlow keeps an empty object for a folder
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                address = f"{listing}/{urllib.parse.quote(name, safe='')}?alt=media"
                with _open(address) as answer:
                    (folder / name).write_bytes(answer.read())
        return folder

    def refuses(self, method: str) -> bool:
        """Counts a request, and tells whether it is to be refused."""
        self.requests += 1
        if method == "PUT" and self._seconds_from_upload:
            self.fail_for(self._seconds_from_upload)
            self._seconds_from_upload = 0.0
        refused = time.monotonic() < self._out_of_order_until
        self.refused += refused
        return refused


@contextlib.contextmanager
def storage(folder: pathlib.Path) -> Iterator[Storage]:
    """Runs a storage with one empty bucket while the block runs; keeps certificates in `folder`."""
    (port,) = free_ports(1)
    emulator_server.RequestHandler = _EmulatorWithConditions
    emulator = emulator_server.create_server(
        "localhost", port, in_memory=True, default_bucket=BUCKET
    )
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "authority.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*_HOSTS).configure_cert(context)
    emulator.start()
    proxy = http.server.ThreadingHTTPServer(("localhost", 0), _Proxy)
    proxy.daemon_threads = True
    proxy.context, proxy.emulator = context, port
    address = f"http://localhost:{proxy.server_port}"
    proxy.storage = Storage(
        {
            "https_proxy": address,
            "no_proxy": "localhost,127.0.0.1",
            "CURL_CA_BUNDLE": str(folder / "authority.pem"),
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
            "STORAGE_EMULATOR_HOST": f"http://localhost:{port}",
            "GOOGLE_CLOUD_PROJECT": "project",
            "GOOGLE_APPLICATION_CREDENTIALS": str(_credentials(folder)),
        },
        emulator=f"http://localhost:{port}",
    )
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        yield proxy.storage
    finally:
        proxy.shutdown()
        proxy.server_close()
        emulator.stop()


def _credentials(folder: pathlib.Path) -> pathlib.Path:
    """Writes credentials that need no request to Google."""
    path = folder / "credentials.json"
    facts = {"client_id": "id", "client_secret": "secret", "refresh_token": "refresh"}
    far = {"type": "authorized_user", "token": "token", "expiry": "2100-01-01T00:00:00Z"}
    path.write_text(json.dumps(facts | far))
    return path


class _EmulatorWithConditions(emulator_server.RequestHandler):
    """Answers 412 to an upload whose ifGenerationMatch is wrong, which the emulator ignores."""

    def do_POST(self):  # noqa: N802
        query = urllib.parse.parse_qs(urllib.parse.urlparse(self.path).query)
        if "ifGenerationMatch" in query:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            name = query["name"][0] if "name" in query else self._name_in(body)
            if query["ifGenerationMatch"] != [self._generation(name)]:
                self.send_response(412)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.rfile = io.BytesIO(body)
        super().do_POST()

    def _name_in(self, body: bytes) -> str:
        kind = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        facts = email.message_from_bytes(kind + body).get_payload(0).get_payload()
        return json.loads(facts)["name"]

    def _generation(self, name: str) -> str:
        try:
            return self.storage.get_file_obj(BUCKET, name)["generation"]
        except NotFound:
            return "0"


class _Proxy(http.server.BaseHTTPRequestHandler):
    """Ends the TLS of a tunnel to Google's hosts, and asks the emulator in their place."""

    protocol_version = "HTTP/1.1"

    def do_CONNECT(self):  # noqa: N802
        assert self.path.partition(":")[0] in _HOSTS, self.path
        self.send_response_only(200)
        self.end_headers()
        self.connection = self.server.context.wrap_socket(self.connection, server_side=True)
        self.rfile = self.connection.makefile("rb")
        self.wfile = self.connection.makefile("wb", buffering=0)
        self.close_connection = False

    def _forward(self):
        body = self._body()
        if self.server.storage.refuses(self.command):
            self._answer(503, {}, b"out of order")
            return
        path, headers = self.path, {**self.headers, "Content-Length": str(len(body))}
        headers.pop("Transfer-Encoding", None)
        if not body and "uploadType=media" in path:
            path, body, headers = _empty_object(path, headers)
        emulator = http.client.HTTPConnection("localhost", self.server.emulator)
        emulator.request(self.command, path, body, headers)
        found = emulator.getresponse()
        kept = {
            name: found.headers[name] for name in ("Location", "Range") if name in found.headers
        }
        if kept.get("Range") == "bytes=0-0":
            # The emulator's word for an upload of which it has nothing, for which Google's has
            # none: TensorFlow would take its first byte for received.
            del kept["Range"]
        if "Location" in kept:
            kept["Location"] = kept["Location"].replace("http:", "https:")
        self._answer(found.status, kept, found.read())
        emulator.close()

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = _forward  # noqa: N815

    def _body(self) -> bytes:
        # TensorFlow gives the length as well where it sends chunks.
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _answer(self, status: int, headers: dict[str, str], body: bytes):
        self.send_response_only(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words):
        """Says nothing."""


def _empty_object(path: str, headers: dict[str, str]) -> tuple[str, bytes, dict[str, str]]:
    """Returns the upload of an empty object in the only form that the emulator accepts."""
    parts = (
        b"--part\r\nContent-Type: application/json\r\n\r\n{}\r\n"
        b"--part\r\nContent-Type: application/octet-stream\r\n\r\n\r\n--part--\r\n"
    )
    kind = {"Content-Type": "multipart/related; boundary=part", "Content-Length": str(len(parts))}
    return path.replace("uploadType=media", "uploadType=multipart"), parts, headers | kind
