"""A small model hub on loopback: the part of the Hub's HTTP API that pushing, pinning and loading models use.

    with HubServer() as hub:
        subprocess.run([...], env=hub.environment(token=hub.token))

The unmodified `huggingface_hub` client of another process speaks to it. Repositories live in memory. A commit is whole
or not there; what it and an upload say of their content is checked by sha256 or git's sha1, as the Hub does.
"""

import base64
import dataclasses
import hashlib
import json
import os
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

LARGE_FILES = (".safetensors", ".bin", ".pt")  # the Hub's default .gitattributes, where tests need it
API = "/api/(?:models|spaces)"  # they share their names here
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


def git_sha1(content: bytes) -> str:
    """The name that git gives a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclasses.dataclass(frozen=True)
class File:
    """A file of a commit: its content, and whether that is in the large file storage."""

    content: bytes
    is_large: bool

    @property
    def oid(self) -> str:
        """What the Hub compares, and sends as the ETag: sha256 of a large file, git's sha1 of another."""
        return hashlib.sha256(self.content).hexdigest() if self.is_large else git_sha1(self.content)


@dataclasses.dataclass
class Repository:
    """Commits, as `{path: File}` by their sha; and branches and tags, as shas by their name."""

    is_private: bool
    commits: dict[str, dict[str, File]]
    refs: dict[str, str]

    def files(self, revision: str = "main") -> dict[str, File]:
        """The files of a branch, tag or commit."""
        return self.commits[self.refs.get(revision, revision)]


class Refusal(Exception):
    """An answer other than success: its status, the Hub's code for it or None, and a message."""


class HubServer:
    """The server.

    Attributes:
        repositories: by their name.
        token: that of the only user, "me"; nobody else may write, or read what is private.
        breaks: how many more requests that match `break_at`, as in `requests`, are broken off amid their body.
        requests: "METHOD path" of each request that came.
    """

    token = "hf_of_me"

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # the large file storage, by sha256
        self.requests: list[str] = []
        self.breaks, self.break_at = 0, ""
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, cache: os.PathLike | str, token: str | None = None) -> dict[str, str]:
        """The environment of a client: it has this hub for the Hub, `cache` for a home, and perhaps a token."""
        ours = ("HF_", "TRANSFORMERS_", "HUGGING")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        settings = {"HF_ENDPOINT": self.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
        settings["NUMBA_CACHE_DIR"] = f"{cache}/numba"  # kernels that it kept from earlier may round otherwise
        settings |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return inherited | settings | ({"HF_TOKEN": token} if token else {})


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def handle_request(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        length = int(self.headers.get("Content-Length") or 0)
        if self.hub.breaks and re.match(self.hub.break_at, self.hub.requests[-1]):
            self.hub.breaks -= 1
            self.rfile.read(length // 2)
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        self.body = self.rfile.read(length)
        try:
            for method, pattern, answer in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method:
                    return answer(self, **match.groupdict())
            raise Refusal(404, None, f"there is no {self.command} {path}")
        except Refusal as refusal:
            status, code, message = refusal.args
            headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
            self.answer({"error": message, "errors": [{"message": message}]}, status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def answer(self, content: dict | list | bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """Sends JSON, or bytes."""
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_) -> None:
        """Prints nothing."""

    @property
    def is_me(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def require_me(self) -> None:
        """Refuses whoever may not write."""
        if not self.is_me:
            raise Refusal(401, None, "Invalid username or password.")

    def repository(self, name: str) -> Repository:
        """A repository that the client may read."""
        found = self.hub.repositories.get(name)
        if found is None or (found.is_private and not self.is_me):
            # To those who have not logged in, the Hub does not say which of the two it is.
            raise Refusal(404 if self.is_me else 401, "RepoNotFound", "Repository not found")
        return found

    def commit_of(self, repository: Repository, revision: str) -> str:
        """The sha of a branch, tag or commit."""
        sha = repository.refs.get(revision, revision)
        if sha not in repository.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def info(self, repo: str, revision: str | None = None) -> None:
        repository = self.repository(repo)
        sha = self.commit_of(repository, revision or "main")
        siblings = [{"rfilename": path} for path in repository.commits[sha]]
        self.answer({"id": repo, "sha": sha, "private": repository.is_private, "siblings": siblings})

    def tree(self, repo: str, revision: str) -> None:
        repository = self.repository(repo)
        files = repository.commits[self.commit_of(repository, revision)]
        entries = []
        for path, file in files.items():
            size = len(file.content)
            large = {"lfs": {"oid": file.oid, "size": size, "pointerSize": 1}} if file.is_large else {}
            entries.append({"type": "file", "path": path, "size": size, "oid": git_sha1(file.content), **large})
        self.answer(entries)

    def resolve(self, repo: str, revision: str, path: str) -> None:
        repository = self.repository(repo)
        sha = self.commit_of(repository, revision)
        file = repository.commits[sha].get(path)
        if file is None:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": sha, "ETag": f'"{file.oid}"'}
        if not file.is_large:
            return self.answer(file.content, headers=headers)
        # As on the Hub, large files are elsewhere.
        headers |= {"X-Linked-ETag": f'"{file.oid}"', "X-Linked-Size": str(len(file.content))}
        self.answer(b"", 302, headers | {"Location": f"http://localhost:{urlsplit(self.hub.url).port}/lfs/{file.oid}"})

    def download(self, oid: str) -> None:
        self.answer(self.hub.objects[oid], headers={"ETag": f'"{oid}"'})

    def create(self) -> None:
        self.require_me()
        request = json.loads(self.body)
        name = f"{request['organization'] or 'me'}/{request['name']}"
        if name in self.hub.repositories:
            return self.answer({"url": f"{self.hub.url}/{name}"}, 409)
        first = hashlib.sha1(name.encode()).hexdigest()
        is_private = request.get("visibility") == "private" or request.get("private") is True
        self.hub.repositories[name] = Repository(is_private, {first: {}}, {"main": first})
        self.answer({"url": f"{self.hub.url}/{name}"})

    def tag(self, repo: str, revision: str) -> None:
        self.require_me()
        repository = self.repository(repo)
        repository.refs[json.loads(self.body)["tag"]] = self.commit_of(repository, revision)
        self.answer({})

    def validate_yaml(self) -> None:
        header = re.match(r"---\n(.*?)\n---\n", json.loads(self.body)["content"], re.DOTALL)
        try:
            metadata = yaml.safe_load(header[1]) if header else {}
        except yaml.YAMLError as error:
            raise Refusal(400, None, "the metadata are no YAML") from error
        for name in ("license", "pipeline_tag", "library_name", "base_model"):
            if not isinstance(metadata.get(name, ""), str):
                raise Refusal(400, None, f'"{name}" must be a string')
        self.answer({"errors": [], "warnings": []})

    def preupload(self, repo: str, revision: str) -> None:
        self.require_me()
        repository = self.repository(repo)
        known = repository.commits[self.commit_of(repository, revision)]
        entries = []
        for path in (file["path"] for file in json.loads(self.body)["files"]):
            mode, oid = "lfs" if path.endswith(LARGE_FILES) else "regular", known[path].oid if path in known else None
            entries.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer({"files": entries})

    def batch(self, repo: str) -> None:
        self.require_me()
        self.repository(repo)
        objects = []
        for entry in json.loads(self.body)["objects"]:
            links = {
                "upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}"},
                "verify": {"href": f"{self.hub.url}/lfs"},
            }
            objects.append(entry | ({} if entry["oid"] in self.hub.objects else {"actions": links}))
        self.answer({"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, None, f"the content is not that of {oid}")
        self.hub.objects[oid] = self.body
        self.answer(b"")

    def verify(self) -> None:
        self.require_me()
        request = json.loads(self.body)
        if len(self.hub.objects.get(request["oid"], b"")) != request["size"]:
            raise Refusal(404, None, f"there is no {request['oid']} of {request['size']} bytes")
        self.answer({})

    def commit(self, repo: str, revision: str) -> None:
        self.require_me()
        repository = self.repository(repo)
        parent = self.commit_of(repository, revision)
        files, message = dict(repository.commits[parent]), ""
        for line in self.body.splitlines():
            key, value = (item := json.loads(line))["key"], item["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"], validate=True), is_large=False)
            elif key == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise Refusal(400, None, f"{value['path']} was not uploaded")
                files[value["path"]] = File(self.hub.objects[value["oid"]], is_large=True)
            else:
                raise Refusal(400, None, f"there is no {key} here")
        listing = json.dumps([parent, message, sorted((path, file.oid) for path, file in files.items())])
        sha = hashlib.sha1(listing.encode()).hexdigest()
        repository.commits[sha] = files
        repository.refs[revision] = sha
        self.answer({"commitUrl": f"{self.hub.url}/{repo}/commit/{sha}", "commitOid": sha, "success": True})


ROUTES = (
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("POST", "/api/repos/create", _Handler.create),
    ("GET", f"{API}/{REPO}", _Handler.info),
    ("GET", f"{API}/{REPO}/revision/(?P<revision>.+)", _Handler.info),
    ("GET", f"{API}/{REPO}/tree/(?P<revision>[^/]+)/?", _Handler.tree),
    ("POST", f"{API}/{REPO}/tag/(?P<revision>.+)", _Handler.tag),
    ("POST", f"{API}/{REPO}/preupload/(?P<revision>.+)", _Handler.preupload),
    ("POST", f"{API}/{REPO}/commit/(?P<revision>.+)", _Handler.commit),
    ("GET HEAD", f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    ("GET HEAD", r"/lfs/(?P<oid>\w+)", _Handler.download),
    ("PUT", r"/lfs/(?P<oid>\w+)", _Handler.upload),
    ("POST", "/lfs", _Handler.verify),
)
