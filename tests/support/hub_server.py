"""A stand-in for the Hugging Face Hub on the loopback interface, for tests without a network.

It serves local directories as repositories to the real clients: `huggingface_hub`,
`transformers` and `datasets` connect to the server that the variable HF_ENDPOINT names.

    with StandInHub(models={"user/model": model_dir}, datasets={"user/data": data_dir}) as hub:
        subprocess.run([...], env=hub.environment(cache_dir))
        print(hub.requests)

A repository has one branch, `main`. Its first commit is the content of the directory when the
stand-in was made; `push` adds another. Only what the loading functions request is served:

    HEAD, GET  [/datasets]/<id>/resolve/<revision>/<path>             a file
    GET        /api/{models,datasets}/<id>[/revision/<revision>]      metadata of the repository
    GET        /api/{models,datasets}/<id>/tree/<revision>[/<path>]   the entries of a directory
"""

import hashlib
import json
import os
import re
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

# The clients quote a revision or a tree's path with its slashes (`data%2Fen`), so the URL is
# split first and unquoted afterwards.
REPO_ID = r"(?P<repo_id>[^/]+/[^/]+)"
FILE_ADDRESS = re.compile(
    rf"/((?P<kind>datasets)/)?{REPO_ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)"
)
API_ADDRESS = re.compile(
    rf"/api/(?P<kind>models|datasets)/{REPO_ID}"
    r"(/(?P<what>revision|tree)/(?P<revision>[^/]+)(/(?P<path>.+))?)?"
)


class HubError(Exception):
    """A response "404 Not Found". The clients choose their exception by its X-Error-Code."""

    def __init__(self, code: str, message: str, **headers: str):
        super().__init__(message)
        self.headers = {"X-Error-Code": code, "X-Error-Message": message, **headers}


class Repository:
    """One commit of a repository. It never changes, so its files are read once, here."""

    def __init__(self, repo_id: str, directory: Path):
        self.repo_id = repo_id
        self.files = {
            path.relative_to(directory).as_posix(): path.read_bytes()
            for path in sorted(Path(directory).rglob("*"))
            if path.is_file()
        }
        self.oids = {path: git_object_id("blob", data) for path, data in self.files.items()}
        self.sha = git_object_id("commit", json.dumps(self.oids).encode())
        self.directories = {
            parent.as_posix() for path in self.files for parent in PurePosixPath(path).parents
        } - {"."}

    def info(self) -> dict:
        """Return the metadata of a model or a data set."""
        return {
            "id": self.repo_id,
            "sha": self.sha,
            "private": False,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": [{"rfilename": path} for path in self.files],
        }

    def entry(self, path: str) -> dict:
        """Return the metadata of a file or a directory."""
        if path in self.files:
            size = len(self.files[path])
            return {"type": "file", "oid": self.oids[path], "size": size, "path": path}
        if path in self.directories:
            oid = git_object_id("tree", path.encode())
            return {"type": "directory", "oid": oid, "size": 0, "path": path}
        # The clients cache that this commit has no such file, so that they need not ask again, or
        # while offline. So the response names the commit.
        raise HubError("EntryNotFound", "Entry not found", **{"X-Repo-Commit": self.sha})

    def tree(self, directory: str, recursive: bool) -> list[dict]:
        """List the entries of a directory ("" is the root), or with `recursive` all below it."""
        if directory:
            self.entry(directory)  # an unknown directory is an error, not an empty list
        inside = f"{directory}/" if directory else ""
        paths = [p for p in sorted({*self.files, *self.directories}) if p.startswith(inside)]
        return [self.entry(p) for p in paths if recursive or "/" not in p[len(inside) :]]


class StandInHub:
    """The server, as a context: it listens on a free port of 127.0.0.1 until the block ends."""

    def __init__(
        self, models: dict[str, Path] | None = None, datasets: dict[str, Path] | None = None
    ):
        self.repositories: dict[tuple[str, str], dict[str, Repository]] = {}  # by revision
        for kind, group in (("models", models), ("datasets", datasets)):
            for repo_id, directory in (group or {}).items():
                self.push(kind, repo_id, directory)
        self.requests: list[str] = []  # "METHOD /path", in the order of arrival
        self.url = ""

    def __enter__(self) -> "StandInHub":
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self._server.shutdown()
        self._server.server_close()

    def push(self, kind: str, repo_id: str, directory: Path, tag: str | None = None) -> str:
        """Make the content of a directory the newest commit of a repository; return its name."""
        commit = Repository(repo_id, directory)
        names = ["main", commit.sha] + ([tag] if tag else [])
        self.repositories.setdefault((kind, repo_id), {}).update(dict.fromkeys(names, commit))
        return commit.sha

    def repository(self, kind: str, repo_id: str, revision: str = "main") -> Repository:
        """Return a commit of a repository, or raise the Hub's error for an unknown one."""
        if (kind, repo_id) not in self.repositories:
            raise HubError("RepoNotFound", "Repository not found")
        revisions = self.repositories[kind, repo_id]
        if revision not in revisions:
            raise HubError("RevisionNotFound", "Revision not found")
        return revisions[revision]

    def environment(self, hf_home: Path, *, offline: bool = False) -> dict[str, str]:
        """Return an environment in which a client sees this server and one cache, nothing else.

        The clients read it at import, so it only works for a new process.
        """
        foreign = re.compile(r"HF_|HUGGINGFACE_|TRANSFORMERS_|\w+_proxy$", re.IGNORECASE)
        inherited = {name: value for name, value in os.environ.items() if not foreign.match(name)}
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(hf_home)}
        return inherited | own | ({"HF_HUB_OFFLINE": "1"} if offline else {})


class Handler(BaseHTTPRequestHandler):
    """One connection of a client."""

    protocol_version = "HTTP/1.1"  # the clients keep a connection for several requests

    def do_GET(self) -> None:
        """Send what the URL names, or the Hub's error."""
        self.server.hub.requests.append(f"{self.command} {self.path}")
        address = urlsplit(self.path)
        try:
            if match := FILE_ADDRESS.fullmatch(address.path):
                self.send_repository_file(**unquoted(match))
            elif match := API_ADDRESS.fullmatch(address.path):
                self.send_api_answer(**unquoted(match), query=parse_qs(address.query))
            else:
                raise HubError("NotFound", "Not served by this stand-in")
        except HubError as error:
            answer = json.dumps({"error": str(error)}).encode()
            self.send(answer, error.headers, HTTPStatus.NOT_FOUND)

    do_HEAD = do_GET

    def send_repository_file(
        self, kind: str | None, repo_id: str, revision: str, path: str
    ) -> None:
        """Send a file."""
        repository = self.server.hub.repository(kind or "models", repo_id, revision)
        entry = repository.entry(path)
        if entry["type"] != "file":
            raise HubError("EntryNotFound", "Not a file")
        headers = {"ETag": f'"{entry["oid"]}"', "X-Repo-Commit": repository.sha}
        self.send(repository.files[path], headers)

    def send_api_answer(
        self,
        kind: str,
        repo_id: str,
        what: str | None,
        revision: str | None,
        path: str | None,
        query: dict[str, list[str]],
    ) -> None:
        """Send metadata."""
        repository = self.server.hub.repository(kind, repo_id, revision or "main")
        if what == "tree":
            answer = repository.tree(path or "", recursive=query.get("recursive") == ["true"])
        else:
            answer = repository.info()
        self.send(json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def send(self, content: bytes, headers: dict[str, str], status: int = HTTPStatus.OK) -> None:
        """Send a response, without its content to HEAD."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args) -> None:
        """Print nothing: `hub.requests` is the log."""


def git_object_id(kind: str, content: bytes) -> str:
    """Return git's name of an object, 40 hexadecimal digits: the Hub's ETags and commits."""
    return hashlib.sha1(b"%s %d\0%s" % (kind.encode(), len(content), content)).hexdigest()


def unquoted(match: re.Match) -> dict[str, str | None]:
    """Return the named parts of a URL as plain text; None for those that are missing."""
    return {name: part and unquote(part) for name, part in match.groupdict().items()}
