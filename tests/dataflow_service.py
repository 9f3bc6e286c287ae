"""A local stand-in for Google's Dataflow: it accepts a job and reports that it is done."""

import contextlib
import http.server
import json
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def dataflow_service() -> Iterator[tuple[str, list[dict]]]:
    """Runs the service while the block runs; yields its address and the jobs that it received."""
    server = http.server.ThreadingHTTPServer(("localhost", 0), _Service)
    server.daemon_threads = True
    server.jobs = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://localhost:{server.server_port}", server.jobs
    finally:
        server.shutdown()
        server.server_close()


class _Service(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):  # noqa: N802
        job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.jobs.append(job)
        self._answer(job)

    def do_GET(self):  # noqa: N802
        self._answer({})

    def _answer(self, job: dict):
        known = {"id": "job-1", "projectId": "project", "location": "region"}
        body = json.dumps({**job, **known, "currentState": "JOB_STATE_DONE"}).encode()
        self.send_response_only(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words):
        """Says nothing."""
