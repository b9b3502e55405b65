"""A small server on the loopback address that speaks the protocol of the Hugging Face hub, as far as downloads go."""

import contextlib
import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

COMMIT = "a" * 40


@contextlib.contextmanager
def serve(folder: Path, *, gated: tuple[str, ...] = (), cut: tuple[str, ...] = ()) -> Iterator[str]:
    """Serve ``folder / owner / name`` as repositories, each with the revision main. Yields the endpoint.

    gated: repositories that ask for a token. cut: names of files of which only the first half arrives.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(with_body=False)

        def do_GET(self):
            self.answer(with_body=True)

        def answer(self, *, with_body):
            parts = self.path.split("?")[0].strip("/").split("/")
            repository, revision, file = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
            if repository in gated:
                return self.refuse(403, "GatedRepo")
            if not (folder / repository).is_dir():
                return self.refuse(404, "RepoNotFound")
            if revision not in ("main", COMMIT):
                return self.refuse(404, "RevisionNotFound")
            path = folder / repository / file
            if not path.is_file():
                return self.refuse(404, "EntryNotFound")
            content = path.read_bytes()
            self.send_response(200)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if with_body:
                self.wfile.write(content[: len(content) // 2] if file in cut else content)

        def refuse(self, status, code):
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
