"""A bucket on loopback: the emulator of the test extra, with the conditions that real ones keep and
with faults."""

import contextlib
import http.server
import os
import threading
import urllib.parse

from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.storage import Storage

BUCKET = "bucket"


class Handler(server.RequestHandler):
    """Honours ifGenerationMatch, which TensorStore and locks need, and fails where it is told to.

    server.bad_every, server.bad_reads_every: of the writes or reads, each so-manieth is answered
    with 503. server.answers: while it is not set, reads wait.
    """

    generation = "0"

    def _handle(self, method):
        own, url = self.server, urllib.parse.urlparse(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        with own.lock:  # a condition and its write are one
            if method in ("POST", "PUT", "DELETE"):
                own.writes += 1
                if own.bad_every and own.writes % own.bad_every == 0:
                    own.failed += 1
                    return self._refuse(503)
            name = query.get("name") or urllib.parse.unquote(url.path.partition("/o/")[2])
            self.generation = self._generation(name)
            if "upload_id" not in query and query.get("ifGenerationMatch") not in (
                None,
                self.generation,
            ):
                return self._refuse(412)
            server.Router(self).handle(method)

    def _generation(self, name):
        try:
            return self.storage.get_file_obj(BUCKET, name)["generation"]
        except NotFound:
            return "0"

    def end_headers(self):
        self.send_header("X-Goog-Generation", self.generation)
        super().end_headers()

    def _refuse(self, status):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self):
        own = self.server
        own.answers.wait()
        with own.lock:
            own.reads += 1
            bad = own.bad_reads_every and own.reads % own.bad_reads_every == 0
            own.failed += bool(bad)
        if bad:
            return self._refuse(503)
        self._handle("GET")

    def do_POST(self):
        self._handle("POST")

    def do_PUT(self):
        self._handle("PUT")

    def do_DELETE(self):
        self._handle("DELETE")

    def do_PATCH(self):
        self._handle("PATCH")


class Emulator(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, port=0):
        self.storage = Storage(use_memory_fs=True)
        buckets.create_bucket(BUCKET, self.storage)
        self.lock, self.answers = threading.Lock(), threading.Event()
        self.writes = self.reads = 0
        self.empty()
        super().__init__(("127.0.0.1", port), self._handler)

    def _handler(self, *arguments):
        return Handler(self.storage, *arguments)

    def handle_error(self, request, client_address):
        """A client that was killed is no error of ours."""

    def empty(self):
        self.bad_every = self.bad_reads_every = self.failed = 0
        self.answers.set()
        for name in self.names():
            self.storage.delete_file(BUCKET, name)

    def names(self, below=""):
        found, _ = self.storage.get_file_list(BUCKET, below)
        return [one["name"] for one in found]

    def read(self, name):
        return self.storage.get_file(BUCKET, name)

    def flip(self, name):
        """One bit of an object: its own checksum then tells."""
        value = bytearray(self.read(name))
        value[len(value) // 2] ^= 1
        about = dict(self.storage.get_file_obj(BUCKET, name))
        from gcp_storage_emulator.handlers.objects import _crc32c

        about["crc32c"] = _crc32c(bytes(value))
        self.storage.create_file(BUCKET, name, bytes(value), about)


@contextlib.contextmanager
def emulator():
    """An empty bucket, and the environment in which gs:// is it."""
    with Emulator() as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        address = f"http://127.0.0.1:{running.server_address[1]}"
        names = "STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"
        before = {name: os.environ.get(name) for name in names}
        os.environ.update(dict.fromkeys(names, address))
        try:
            yield running
        finally:
            running.shutdown()
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value
