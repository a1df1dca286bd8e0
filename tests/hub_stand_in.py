"""A stand-in for the Hub on this machine: what huggingface_hub's client asks of it to publish and to load models."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlparse


OWNER, WRITER, READER = "me", "hf_writer", "hf_reader"


@dataclass
class Commit:
    """One commit: where it went, what it says, and the files that it adds."""

    repo_id: str
    revision: str
    message: str
    create_pr: bool
    files: dict[str, bytes]


@dataclass
class Repo:
    """A repository: its visibility, and the files of each branch."""

    private: bool = False
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})


class HubStandIn:
    """What was asked, and what came of it."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.commits: list[Commit] = []
        self.requests: list[tuple[str, str, str | None]] = []
        self.large_files: dict[str, bytes] = {}

    def serve(self, handler, method: str) -> None:
        """Answer one request."""
        path, query = urlparse(handler.path).path, parse_qs(urlparse(handler.path).query)
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        token = (handler.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.requests.append((method, handler.path, token))
        for pattern, action in self.ROUTES.items():
            verb, _, place = pattern.partition(" ")
            found = re.fullmatch(place, path)
            if verb == method and found:
                names = {name: unquote(value) for name, value in found.groupdict().items()}
                if token not in (None, WRITER, READER):
                    return handler.answer(401, {"error": "Invalid username or password."})
                writes = method == "POST" and not place.endswith(("yaml", "batch")) and "create_pr" not in query
                mine = (names.get("repo") or f"{OWNER}/").startswith(f"{OWNER}/")
                if writes and not (token == WRITER and mine):
                    return handler.answer(403, {"error": "You don't have the rights to write here."})
                return action(self, handler, body, query, **names)
        return handler.answer(404, {"error": f"the stand-in knows no {method} {path}"})

    def create(self, handler, body, query):
        """Make a repository."""
        asked = json.loads(body)
        owner = asked.get("organization") or OWNER
        if owner != OWNER:
            return handler.answer(403, {"error": f"You don't have the rights to create under {owner}."})
        repo_id = f"{owner}/{asked['name']}"
        known = repo_id in self.repos
        if not known:
            self.repos[repo_id] = Repo(private=asked.get("visibility") == "private" or bool(asked.get("private")))
        return handler.answer(409 if known else 200, {"url": f"{handler.endpoint}/{repo_id}"})

    def branch(self, handler, body, query, repo, revision):
        """Make a branch."""
        branches = self.repos[repo].branches
        known = revision in branches
        branches.setdefault(revision, dict(branches["main"]))
        return handler.answer(409 if known else 200, {})

    def preupload(self, handler, body, query, repo, revision):
        """Say which files are large ones."""
        if not self.known(handler, repo, revision):
            return None
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".png", ".jpg")) else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in json.loads(body)["files"]
        ]
        return handler.answer(200, {"files": files})

    def batch(self, handler, body, query, repo):
        """Say where large files go."""
        asked = json.loads(body)
        objects = [
            one | {"actions": {"upload": {"href": f"{handler.endpoint}/storage/{one['oid']}"}}}
            for one in asked["objects"]
        ]
        return handler.answer(200, {"transfer": "basic", "objects": objects})

    def store(self, handler, body, query, oid):
        """Take a large file."""
        assert hashlib.sha256(body).hexdigest() == oid
        self.large_files[oid] = body
        return handler.answer(200, {})

    def commit(self, handler, body, query, repo, revision):
        """Add files to a branch, or to a pull request."""
        if not self.known(handler, repo, revision):
            return None
        lines = [json.loads(line) for line in body.splitlines()]
        files = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.large_files[value["oid"]]
        create_pr = "create_pr" in query
        self.commits.append(Commit(repo, revision, lines[0]["value"]["summary"], create_pr, files))
        if not create_pr:
            self.repos[repo].branches[revision].update(files)
        url = f"{handler.endpoint}/{repo}"
        answer = {"commitUrl": f"{url}/commit/{self.oid(repo, revision)}", "commitOid": self.oid(repo, revision)}
        return handler.answer(200, answer | {"pullRequestUrl": f"{url}/discussions/1" if create_pr else None})

    def info(self, handler, body, query, repo, revision="main"):
        """Describe a repository."""
        if not self.known(handler, repo, revision):
            return None
        about = {"_id": "0", "id": repo, "modelId": repo, "private": self.repos[repo].private, "tags": []}
        about |= {"sha": self.oid(repo, revision), "downloads": 0, "likes": 0}
        about["siblings"] = [{"rfilename": name} for name in self.repos[repo].branches[revision]]
        return handler.answer(200, about)

    def tree(self, handler, body, query, repo, revision, folder=""):
        """List files."""
        if not self.known(handler, repo, revision):
            return None
        files = self.repos[repo].branches[revision]
        listed = [
            {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for name, content in files.items()
            if name.startswith(folder)
        ]
        return handler.answer(200, listed)

    def resolve(self, handler, body, query, repo, revision, path):
        """Give a file."""
        if not self.known(handler, repo, revision):
            return None
        branches = self.repos[repo].branches
        branch = next(name for name in branches if revision in (name, self.oid(repo, name)))
        content = branches[branch].get(path)
        if content is None:
            return handler.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": self.oid(repo, branch)}
        return handler.answer(200, content, headers)

    def validate(self, handler, body, query):
        """Find nothing wrong with a card."""
        return handler.answer(200, {"warnings": [], "errors": []})

    def known(self, handler, repo, revision) -> bool:
        """Answer that there is no such repository or branch, where there is none."""
        if repo not in self.repos:
            handler.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return False
        branches = self.repos[repo].branches
        if not any(revision in (name, self.oid(repo, name)) for name in branches):
            handler.answer(404, {"error": f"Invalid rev id: {revision}"}, {"X-Error-Code": "RevisionNotFound"})
            return False
        return True

    def oid(self, repo: str, revision: str) -> str:
        """Name the state of a branch."""
        files = self.repos[repo].branches.get(revision, {})
        state = json.dumps({name: hashlib.sha1(content).hexdigest() for name, content in sorted(files.items())})
        return hashlib.sha1(f"{repo}@{revision}:{state}".encode()).hexdigest()

    _REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
    ROUTES = {
        "POST /api/repos/create": create,
        "POST /api/validate-yaml": validate,
        rf"POST /api/models/{_REPO}/branch/(?P<revision>[^/]+)": branch,
        rf"POST /api/models/{_REPO}/preupload/(?P<revision>[^/]+)": preupload,
        rf"POST /api/models/{_REPO}/commit/(?P<revision>[^/]+)": commit,
        rf"POST /{_REPO}\.git/info/lfs/objects/batch": batch,
        r"PUT /storage/(?P<oid>\w+)": store,
        rf"GET /api/models/{_REPO}": info,
        rf"GET /api/models/{_REPO}/revision/(?P<revision>[^/]+)": info,
        rf"GET /api/models/{_REPO}/tree/(?P<revision>[^/]+)": tree,
        rf"GET /api/models/{_REPO}/tree/(?P<revision>[^/]+)/(?P<folder>.+)": tree,
        rf"GET /{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)": resolve,
        rf"HEAD /{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)": resolve,
    }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, status: int, content, headers=()):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


for _method in ("GET", "HEAD", "POST", "PUT"):
    setattr(_Handler, f"do_{_method}", lambda self, method=_method: self.server.hub.serve(self, method))


@contextmanager
def hub_stand_in():
    """Serve a stand-in.

    Yields:
        `tuple[HubStandIn, str]`: It, and its address.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.hub = HubStandIn()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server.hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
