"""A hub on this machine: as much of the Hub's HTTP interface as an upload needs. Files are kept as bytes."""

import base64
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN, READ_TOKEN, USER = "hf_write", "hf_read", "user"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        role = {TOKEN: "write", READ_TOKEN: "read"}.get(self.token)
        if self.path == "/api/whoami-v2" and role:
            account = {"name": USER, "type": "user", "auth": {"accessToken": {"role": role}}}
            return self.answer(account)
        return self.answer({"error": "no"}, 404 if role else 401)

    def do_POST(self):
        body = self.read_body()
        hub, path = self.server, self.path.strip("/").split("/")
        hub.requests.append(self.path)
        if self.path == "/api/repos/create":
            values = json.loads(body)
            repo = f"{values['organization'] or USER}/{values['name']}"
            status = 409 if repo in hub.repos else 200
            hub.repos.setdefault(repo, {"main": {}})
            return self.answer({"url": f"{hub.address}/{repo}"}, status)
        if path[-1] == "validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        repo, action, branch = "/".join(path[2:4]), path[4], path[5]
        if action == "branch":
            hub.repos[repo].setdefault(branch, {})
            return self.answer({})
        if hub.is_full:
            return self.answer({"error": "Storage limit reached"}, 403 if hub.is_full == "forbidden" else 507)
        if action == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            return self.answer({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        assert action == "commit", self.path
        lines = [json.loads(line) for line in body.splitlines()]
        hub.commits.append(lines[0]["value"]["summary"])
        for line in lines[1:]:
            hub.repos[repo][branch][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return self.answer({"commitUrl": f"{hub.address}/{repo}/commit/1", "commitOid": "1" * 40})

    @property
    def token(self):
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def read_body(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self, value, status=200):
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@contextmanager
def serve_hub():
    """The server, with `repos` (repository → branch → file → bytes), `commits` (messages) and `address`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.repos, server.commits, server.requests, server.is_full = {}, [], [], ""
    server.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
