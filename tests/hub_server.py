"""A small server on the loopback address that speaks the protocol of the Hugging Face hub: downloads and pushes."""

import base64
import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

COMMIT = "a" * 40


@contextlib.contextmanager
def serve(folder: Path, *, gated: tuple[str, ...] = (), cut: tuple[str, ...] = ()) -> Iterator[str]:
    """Serve ``folder / owner / name`` as repositories, each with the revision main. Yields the endpoint.

    gated: repositories that ask for a token. cut: names of files of which only the first half arrives. What is pushed
    appears in ``folder``; safetensors travel by LFS.
    """
    uploads: dict[str, bytes] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(with_body=False)

        def do_GET(self):
            self.answer(with_body=True)

        def do_POST(self):
            parts = self.path.split("?")[0].strip("/").split("/")
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if parts[:3] == ["api", "repos", "create"]:
                asked = json.loads(body)
                name = f"{asked.get('organization', 'own')}/{asked['name']}"
                (folder / name).mkdir(parents=True, exist_ok=True)
                self.reply({"url": f"http://{self.headers['Host']}/{name}", "name": name})
            elif parts[-1] == "validate-yaml":  # of the model card
                self.reply({"errors": [], "warnings": []})
            elif "preupload" in parts:
                files = [each["path"] for each in json.loads(body)["files"]]
                modes = [{"path": each, "uploadMode": "lfs" if "safetensors" in each else "regular"} for each in files]
                self.reply({"files": [{**mode, "shouldIgnore": False} for mode in modes]})
            elif parts[-1] == "batch":
                place = f"http://{self.headers['Host']}/upload"
                objects = [
                    {**each, "actions": {"upload": {"href": f"{place}/{each['oid']}", "header": {}}}}
                    for each in json.loads(body)["objects"]
                ]
                self.reply({"transfer": "basic", "objects": objects})
            elif "commit" in parts:
                self.commit(folder / parts[2] / parts[3], [json.loads(line) for line in body.splitlines()])
                url = f"http://{self.headers['Host']}/{parts[2]}/{parts[3]}/commit/{COMMIT}"
                self.reply({"success": True, "commitUrl": url, "commitOid": COMMIT, "hookOutput": ""})
            else:
                self.refuse(404, "RepoNotFound")

        def do_PUT(self):
            uploads[self.path.split("/")[-1]] = self.rfile.read(int(self.headers["Content-Length"]))
            self.reply({})

        def commit(self, repository, lines):
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    content = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    content = uploads[value["oid"]]
                    assert hashlib.sha256(content).hexdigest() == value["oid"]
                else:
                    continue
                path = repository / value["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)

        def reply(self, content):
            body = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def answer(self, *, with_body):
            parts = self.path.split("?")[0].strip("/").split("/")
            if parts[0] == "api" or len(parts) < 5:
                known = len(parts) >= 4 and (folder / "/".join(parts[2:4])).is_dir()
                content = {"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": []}
                return self.reply(content) if known else self.refuse(404, "RepoNotFound")
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
