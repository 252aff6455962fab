"""A stand-in of the Hugging Face hub for uploads, on this machine: it keeps what it is sent in memory."""

import base64
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

TOKEN = "hf_ATokenThatNobodyMaySee"
USER = {
    "name": "me",
    "type": "user",
    "orgs": [{"name": "we", "roleInOrg": "write"}, {"name": "they", "roleInOrg": "read"}],
    "auth": {"type": "access_token", "accessToken": {"displayName": "laptop", "role": "write"}},
}


class Hub:
    """The repositories by name, each as {"private": bool, "files": {name: bytes}}, and the paths that were
    asked for.

    `fails` is {a part of a path: (status, message)} of the requests that fail.
    """

    def __init__(self):
        self.repositories, self.asked, self.fails, self.user = {}, [], {}, USER
        self._large = {}

    def add(self, name, private=False, **files):
        self.repositories[name] = {"private": private, "files": dict(files)}

    def answer(self, method, url, token, body):
        """(status, headers, object) of a request."""
        path = urlsplit(url).path
        self.asked.append(f"{method} {path}")
        for part, (status, message) in self.fails.items():
            if part in path:
                return status, {"X-Error-Message": message}, {"error": message}
        if path.startswith("/large/"):  # where a batch has sent the client; it has no token
            self._large[path.split("/")[-1]] = body
            return 200, {}, {}
        if token != f"Bearer {TOKEN}":
            return 401, {"X-Error-Message": "Invalid credentials"}, {"error": "Invalid credentials"}
        if path == "/api/whoami-v2":
            return 200, {}, self.user
        if path == "/api/validate-yaml":
            return 200, {}, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path.endswith(".git/info/lfs/objects/batch"):
            return 200, {}, {"transfer": "basic", "objects": self._batch(json.loads(body)["objects"])}
        name, action = "/".join(path.split("/")[3:5]), path.split("/")[5:6]
        if name not in self.repositories:
            return 404, {"X-Error-Code": "RepoNotFound"}, {"error": "Repository not found"}
        return self._of_repository(name, action, body)

    def _create(self, wanted):
        name = f"{wanted['organization']}/{wanted['name']}"
        private = wanted.get("private") or wanted.get("visibility") == "private"
        found = name in self.repositories
        self.repositories.setdefault(name, {"private": bool(private), "files": {}})
        return (409 if found else 200), {}, {"url": f"{self.url}/{name}", "id": name, "name": name}

    def _batch(self, objects):
        def action(oid):
            return {"upload": {"href": f"{self.url}/large/{oid}", "header": {}}}

        return [each | {"actions": action(each["oid"])} for each in objects]

    def _of_repository(self, name, action, body):
        repository = self.repositories[name]
        files = repository["files"]
        if action == ["preupload"]:
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in json.loads(body)["files"]
            ]
            return 200, {}, {"files": modes}
        if action == ["tree"]:
            listed = [{"type": "file", "path": path, "size": 1, "oid": "0"} for path in files]
            return 200, {}, listed
        if action == ["commit"]:
            for line in map(json.loads, body.decode().splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self._large[value["oid"]]
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
            url = f"{self.url}/{name}/commit/0"
            return 200, {}, {"commitUrl": url, "commitOid": "0" * 40, "success": True}
        siblings = [{"rfilename": path} for path in files]
        return (
            200,
            {},
            {"id": name, "sha": "0" * 40, "private": repository["private"], "siblings": siblings, "tags": []},
        )


@contextmanager
def hub(monkeypatch):
    """A Hub that huggingface_hub in this process asks in place of the real one, logged in with TOKEN."""
    stand_in = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            token = self.headers.get("Authorization")
            status, headers, values = stand_in.answer(self.command, self.path, token, body)
            content = json.dumps(values).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_PUT = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    stand_in.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", stand_in.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    # Else large files go to a storage of their own, by a program that is not Python.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    try:
        yield stand_in
    finally:
        server.shutdown()
        server.server_close()
