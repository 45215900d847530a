"""A stand-in for the Hugging Face hub on loopback: as much of it as huggingface_hub asks for when a
model is sent and fetched. Repositories are kept in memory, every commit as a whole."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "StandIn0" * 5
LARGE = (".safetensors", ".png", ".webp", ".mp4")


@dataclass
class Repository:
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # the newest is the last

    def commit(self, files: dict[str, bytes]) -> str:
        before = self.commits[self.head] if self.commits else {}
        files = before | files
        key = repr([*self.commits, sorted(files)]).encode()
        self.commits[hashlib.sha1(key).hexdigest()] = files
        return self.head

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    def at(self, revision: str) -> tuple[str, dict[str, bytes]]:
        name = self.head if revision == "main" else revision
        return name, self.commits[name]


class Hub:
    """`url`; `repositories` by name; `requests`: method, path, authorization and range of each.
    `broken_after`: bytes after which downloads of weights break off, until it is 0."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # of LFS, by their SHA-256
        self.requests: list[tuple[str, str, str, str]] = []
        self.broken_after = 0
        self.elsewhere = ""  # another host that large files are fetched from, as a CDN
        self.damaged = ""  # the name of a file whose bytes are not what the tree says
        hub = self

        class Handler(HubHandler):
            server_hub = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def public(self, name: str, files: dict[str, bytes]) -> Repository:
        repository = self.repositories[name] = Repository(private=False)
        repository.commit(files)
        return repository


@contextlib.contextmanager
def running_hub():
    hub = Hub()
    thread = threading.Thread(target=hub.server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
        thread.join()


class HubHandler(BaseHTTPRequestHandler):
    server_hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self.answer()

    def do_HEAD(self):
        self.answer()

    def do_POST(self):
        self.answer()

    def do_PUT(self):
        self.answer()

    def answer(self):
        self.hub, path = self.server_hub, unquote(urlsplit(self.path).path)
        authorization = self.headers.get("Authorization", "")
        self.signed_in = authorization == f"Bearer {TOKEN}"
        asked = self.headers.get("Range", "")
        self.hub.requests.append((self.command, path, authorization, asked))
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        for method, pattern, handler in ROUTES:
            match = re.fullmatch(pattern, path)
            if method in (self.command, "GET" if self.command == "HEAD" else "") and match:
                return handler(self, *match.groups())
        return self.say(404, {"error": f"no {path}"})

    def say(self, status: int, content=None, headers=()):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def repository(self, name: str) -> Repository | None:
        """Return a repository that this request may see; else say that there is none."""
        found = self.hub.repositories.get(name)
        if found is None or (found.private and not self.signed_in):
            self.say(401 if not self.signed_in else 404, {"error": "Repository not found"})
            return None
        return found

    def create(self):
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if not self.signed_in:
            return self.say(401, {"error": "Invalid username or password."})
        if name.startswith("others/"):
            return self.say(403, {"error": "You don't have the rights"})
        private = asked.get("visibility") == "private" or asked.get("private") is True
        if name in self.hub.repositories:
            return self.say(409, {"url": f"{self.hub.url}/{name}", "error": "exists"})
        self.hub.repositories[name] = Repository(private)
        self.hub.repositories[name].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        return self.say(200, {"url": f"{self.hub.url}/{name}", "name": name})

    def info(self, name, revision="main"):
        if repository := self.repository(name):
            try:
                commit, files = repository.at(revision)
            except KeyError:
                error = {"X-Error-Code": "RevisionNotFound"}
                return self.say(404, {"error": "Invalid rev id"}, error)
            siblings = [{"rfilename": file} for file in files]
            facts = {"id": name, "modelId": name, "sha": commit, "private": repository.private}
            self.say(200, {**facts, "siblings": siblings, "tags": [], "downloads": 0})

    def check_card(self):
        self.say(200, {"warnings": [], "errors": []})

    def preupload(self, name):
        if self.repository(name):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(self.body)["files"]
            ]
            self.say(200, {"files": files})

    def batch(self, name):
        if not self.repository(name):
            return
        rows = []
        for wanted in json.loads(self.body)["objects"]:
            row = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.objects:
                place = {"href": f"{self.hub.url}/objects/{wanted['oid']}"}
                row["actions"] = {"upload": place}
            rows.append(row)
        self.say(200, {"transfer": "basic", "objects": rows})

    def store(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.say(400, {"error": "not what was announced"})
        self.hub.objects[oid] = self.body
        return self.say(200, {})

    def commit(self, name):
        repository = self.repository(name)
        if repository is None:
            return
        files = {}
        for line in self.body.splitlines():
            row = json.loads(line)
            if row["key"] == "file":
                files[row["value"]["path"]] = base64.b64decode(row["value"]["content"])
            if row["key"] == "lfsFile":
                files[row["value"]["path"]] = self.hub.objects[row["value"]["oid"]]
        commit = repository.commit(files)
        where = f"{self.hub.url}/{name}/commit/{commit}"
        self.say(200, {"commitUrl": where, "commitOid": commit})

    def tree(self, name, revision):
        if repository := self.repository(name):
            rows = [{"type": "directory", "path": "folder", "oid": "0" * 40}]
            for path, data in repository.at(revision)[1].items():
                oid = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
                row = {"type": "file", "path": path, "size": len(data), "oid": oid}
                if path.endswith(LARGE):
                    digest = hashlib.sha256(data).hexdigest()
                    row["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 130}
                rows.append(row)
            self.say(200, rows)

    def storage(self, path):
        files = [repository.at("main")[1] for repository in self.hub.repositories.values()]
        self.say(200, next(held[path] for held in files if path in held))

    def resolve(self, name, revision, path):
        repository = self.repository(name)
        if repository is None:
            return
        commit, files = repository.at(revision)
        data = files[path]
        digest = hashlib.sha256(data) if path.endswith(LARGE) else hashlib.sha1(data)
        if path == self.hub.damaged:
            data = data[:-1] + b"?"
        headers = {"X-Repo-Commit": commit, "ETag": f'"{digest.hexdigest()}"'}
        headers["Accept-Ranges"] = "bytes"
        if self.hub.elsewhere and path.endswith(LARGE) and self.command == "GET":
            return self.say(302, b"", {"Location": f"{self.hub.elsewhere}/storage/{path}"})
        breaks = self.hub.broken_after and path.endswith(".safetensors")
        if breaks and self.headers.get("Range"):
            return self.say(503, {"error": "broken"})
        start = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if start:
            first = int(start[1])
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
            return self.say(206, data[first:], headers)
        if breaks and self.command == "GET":
            self.send_response(200)
            for header, value in (*headers.items(), ("Content-Length", str(len(data)))):
                self.send_header(header, value)
            self.end_headers()
            self.wfile.write(data[: self.hub.broken_after])
            self.close_connection = True
            self.connection.close()
            return None
        return self.say(200, data, headers)


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    ("POST", "/api/repos/create", HubHandler.create),
    ("POST", "/api/validate-yaml", HubHandler.check_card),
    ("GET", f"/api/models/{NAME}", HubHandler.info),
    ("GET", f"/api/models/{NAME}/revision/(.+)", HubHandler.info),
    ("POST", f"/api/models/{NAME}/preupload/main", HubHandler.preupload),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", HubHandler.batch),
    ("PUT", r"/objects/(\w+)", HubHandler.store),
    ("POST", f"/api/models/{NAME}/commit/main", HubHandler.commit),
    ("GET", f"/api/models/{NAME}/tree/([^/]+)", HubHandler.tree),
    ("GET", "/storage/(.+)", HubHandler.storage),
    ("GET", f"/{NAME}/resolve/([^/]+)/(.+)", HubHandler.resolve),
]
