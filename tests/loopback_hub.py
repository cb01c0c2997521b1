"""A stand-in for the Hugging Face Hub on 127.0.0.1, for tests: the real `huggingface_hub` client talks to it.

Everything is in memory and lives as long as the object; nothing is mocked in the client.

    with LoopbackHub() as hub:
        subprocess.run([...], env=hub.environment())        # or the fixture `hub` of conftest.py, in this process
        assert hub.repo("user/model").files()["config.json"] == b"..."

What is served. KIND is models, datasets or spaces; REPO is namespace/name; REV is a branch, a tag or a commit hash
(7 characters or more); * needs the token and a namespace of its user (`user`, `org`).

    GET     /api/whoami-v2                      whose token it is
    POST*   /api/repos/create                   409 when it exists; the first commit holds .gitattributes
    DELETE* /api/repos/delete
    POST    /api/validate-yaml                  the card's metadata: YAML and the shape of model-index
    GET     /api/KIND                           ?filter=TAG &author= &search= &sort= &limit= &expand=
    GET     /api/KIND/REPO[/revision/REV]       sha, siblings, tags, cardData, ...; ?blobs= &expand=
    PUT*    /api/KIND/REPO/settings             visibility
    GET     /api/KIND/REPO/tree/REV[/PATH]      ?recursive= &expand=
    POST    /api/KIND/REPO/paths-info/REV       form: paths, expand
    GET     /api/KIND/REPO/refs                 branches and tags
    GET     /api/KIND/REPO/commits/REV          newest first
    POST*   /api/KIND/REPO/branch/NAME, DELETE* the same
    POST*   /api/KIND/REPO/tag/REV, DELETE*     .../tag/NAME
    POST*   /api/KIND/REPO/preupload/REV        which files go by LFS, and what the Hub has already
    POST*   /[KIND/]REPO.git/info/lfs/objects/batch, then PUT /lfs/OID and POST* /lfs/OID/verify
    POST*   /api/KIND/REPO/commit/REV           NDJSON; 412 when parentCommit is stale
    GET     /[KIND/]REPO/resolve/REV/PATH       and HEAD; Range; X-Repo-Commit, ETag, X-Linked-* for LFS

Refusals carry X-Error-Code (RepoNotFound, RevisionNotFound, EntryNotFound) as the client expects; without a token a
missing or private repository is a 401, as on the Hub. Otherwise than on the Hub: LFS content comes from `resolve`
itself and not by a redirect to another host, and there is no Xet, no multipart upload, no .gitignore, no pull request
and no refs/... as a REV.
"""

from __future__ import annotations

import base64
import contextlib
import fnmatch
import hashlib
import itertools
import json
import os
import re
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.message import Message
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

import yaml

__all__ = ["Commit", "LoopbackHub", "Repo", "Seen"]

LFS_SUFFIXES = ("bin", "ckpt", "h5", "model", "npz", "parquet", "pickle", "pkl", "pt", "pth", "safetensors")
GITATTRIBUTES = "".join(f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
LFS_SIZE = 10_000_000
"""Bytes from which any file goes by LFS."""


# ---- what is stored: blobs, commits, repositories ----


@dataclass(frozen=True)
class Blob:
    """The content of one file, and whether git holds it or a pointer to it."""

    content: bytes
    lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        size = len(self.content)
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {size}\n".encode()

    @cached_property
    def oid(self) -> str:
        """git's name for what is in the repository: the content, or the LFS pointer."""
        data = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    """One state of a repository. `message` is the description under the title."""

    oid: str
    parent: Commit | None
    title: str
    message: str
    author: str
    date: str
    files: Mapping[str, Blob]

    @property
    def facts(self) -> dict[str, Any]:
        return {"id": self.oid, "title": self.title, "date": self.date}

    def history(self) -> Iterator[Commit]:
        """This commit and those before it, newest first."""
        commit: Commit | None = self
        while commit is not None:
            yield commit
            commit = commit.parent

    def last_touch(self, path: str) -> Commit:
        """The newest commit that gave `path` the content it has here."""
        touched = self
        for commit in self.history():
            if commit.files.get(path) != self.files[path]:
                break
            touched = commit
        return touched


class Repo:
    """A repository: branches and tags point at commits; `lfs` holds what was uploaded, by SHA-256."""

    _serial = itertools.count()

    def __init__(self, kind: str, name: str, private: bool = False) -> None:
        self.kind, self.name, self.private = kind, name, private
        self.commits: dict[str, Commit] = {}
        self.branches: dict[str, Commit] = {}
        self.tags: dict[str, Commit] = {}
        self.lfs: dict[str, bytes] = {}
        self.commit("main", {".gitattributes": Blob(GITATTRIBUTES)}, "initial commit", author="system")

    @property
    def head(self) -> Commit:
        return self.branches["main"]

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Name and content of every file at `revision`."""
        return {path: blob.content for path, blob in self.resolve(revision).files.items()}

    def resolve(self, revision: str) -> Commit:
        for refs in (self.branches, self.tags):
            if revision in refs:
                return refs[revision]
        matching = [commit for oid, commit in self.commits.items() if oid.startswith(revision)]
        if len(revision) >= 7 and len(matching) == 1:
            return matching[0]
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def commit(
        self, branch: str, files: Mapping[str, Blob], title: str, message: str = "", author: str = "user"
    ) -> Commit:
        """Move `branch` to a new commit that holds exactly `files`."""
        parent = self.branches.get(branch)
        facts = [self.name, str(next(self._serial)), parent.oid if parent else "", title, *sorted(files)]
        commit = Commit(
            hashlib.sha1("\0".join(facts).encode()).hexdigest(), parent, title, message, author, now(), dict(files)
        )
        self.commits[commit.oid] = self.branches[branch] = commit
        return commit


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


# ---- one exchange: request, response, refusal, fault ----


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Message
    body: bytes

    def flag(self, name: str) -> bool:
        return self.query.get(name, ["false"])[0].lower() in ("1", "true")

    def json(self) -> Any:
        return json.loads(self.body or b"{}")


@dataclass
class Response:
    status: int
    body: bytes
    headers: dict[str, str]

    @classmethod
    def of(cls, data: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
        content = {"Content-Type": "application/json; charset=utf-8", **(headers or {})}
        return cls(status, json.dumps(data, default=str).encode(), content)


class HubError(Exception):
    """Becomes an error response; `code` is the Hub's X-Error-Code."""

    def __init__(self, status: int, message: str, code: str | None = None, **extra: Any) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.extra = status, message, code, extra

    def response(self) -> Response:
        headers = {"X-Error-Message": self.message} | ({"X-Error-Code": self.code} if self.code else {})
        return Response.of({"error": self.message, **self.extra}, self.status, headers)


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose "METHOD /path" `match` finds."""

    match: str
    times: int
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    first: Callable[[], object] = lambda: None
    # bytes of the request's body that are read before the connection is closed, and the request forgotten
    unheard_after: int | None = None
    spoil: Callable[[bytes], bytes] = lambda body: body
    # bytes of the answer's body, and the seconds before the others
    pause: tuple[int, float] = (0, 0.0)


@dataclass(frozen=True)
class Seen:
    """A request that was answered: `path` is decoded and without its query."""

    method: str
    path: str
    status: int


# ---- what a model says about itself ----


def front_matter(card: str) -> Any:
    """The metadata block of a card, None when there is none. Raises yaml.YAMLError."""
    found = re.match(r"\A---\s*\n(.*?)\n---\s*(?:\n|\Z)", card, re.DOTALL)
    return yaml.safe_load(found[1]) if found else None


def metadata_errors(data: Any) -> list[str]:
    """What the Hub refuses in a card's metadata."""
    if not isinstance(data, dict):
        return ["the metadata must be a mapping"]
    texts = ("license", "library_name", "pipeline_tag")
    errors = [f'"{key}" must be a string' for key in texts if not isinstance(data.get(key, ""), str)]
    for model in data.get("model-index") or []:
        if "name" not in model:
            errors.append('"model-index[].name" is required')
        for result in model.get("results", []):
            wanted = [("task", "type"), ("dataset", "type"), ("dataset", "name")]
            errors += [f'"{a}.{b}" is required in a result' for a, b in wanted if not result.get(a, {}).get(b)]
            for metric in result.get("metrics") or [{}]:
                errors += [f'"metrics[].{key}" is required' for key in ("type", "value") if metric.get(key) is None]
    return errors


def many(value: Any) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def model_tags(files: Mapping[str, Blob], card: Mapping[str, Any]) -> list[str]:
    tags = many(card.get("library_name"))
    tags += ["safetensors"] if any(path.endswith(".safetensors") for path in files) else []
    if "config.json" in files:
        tags += many(json.loads(files["config.json"].content).get("model_type"))
    tags += many(card.get("tags")) + many(card.get("language")) + many(card.get("pipeline_tag"))
    for key, prefix in (("datasets", "dataset"), ("license", "license"), ("base_model", "base_model")):
        tags += [f"{prefix}:{value}" for value in many(card.get(key))]
    return list(dict.fromkeys([*tags, "region:us"]))


def describe_repo(repo: Repo, commit: Commit, blobs: bool = False) -> dict[str, Any]:
    card: dict[str, Any] = {}
    if "README.md" in commit.files:
        try:
            card = front_matter(commit.files["README.md"].content.decode()) or {}
        except yaml.YAMLError:
            card = {}
    siblings: list[dict[str, Any]] = []
    for path, blob in sorted(commit.files.items()):
        described: dict[str, Any] = {"rfilename": path}
        if blobs:
            described |= {"size": len(blob.content), "blobId": blob.oid}
            described |= {"lfs": lfs_facts(blob) | {"sha256": blob.sha256}} if blob.lfs else {}
        siblings.append(described)
    return {
        "_id": hashlib.sha1(repo.name.encode()).hexdigest()[:24],
        "id": repo.name,
        "modelId": repo.name,
        "author": repo.name.split("/")[0],
        "sha": commit.oid,
        "createdAt": list(repo.head.history())[-1].date,
        "lastModified": commit.date,
        "private": repo.private,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "library_name": card.get("library_name"),
        "pipeline_tag": card.get("pipeline_tag"),
        "tags": model_tags(commit.files, card),
        "cardData": card,
        "model-index": card.get("model-index"),
        "siblings": siblings,
    }


def selected(info: dict[str, Any], request: Request) -> dict[str, Any]:
    wanted = request.query.get("expand")
    return {key: value for key, value in info.items() if key in ("_id", "id", *wanted)} if wanted else info


def lfs_facts(blob: Blob) -> dict[str, Any]:
    return {"oid": blob.sha256, "size": len(blob.content), "pointerSize": len(blob.pointer)}


def describe_path(commit: Commit, path: str, expand: bool) -> dict[str, Any] | None:
    """What tree and paths-info say of a file or folder, None where there is neither."""
    blob = commit.files.get(path)
    if blob is None:
        inside = [name for name in commit.files if name.startswith(f"{path}/")]
        oid = hashlib.sha1("\0".join(sorted(inside)).encode()).hexdigest()
        return {"type": "directory", "path": path, "oid": oid, "size": 0} if inside else None
    described = {"type": "file", "path": path, "oid": blob.oid, "size": len(blob.content)}
    if blob.lfs:
        described["lfs"] = lfs_facts(blob)
    if expand:
        described["lastCommit"] = commit.last_touch(path).facts
    return described


# ---- the endpoints ----

Endpoint = Callable[..., Response]
ROUTES: list[tuple[str, re.Pattern[str], Endpoint, bool]] = []
PARTS = {
    "KIND": r"(?P<kind>models|datasets|spaces)",
    "PREFIX": r"(?:(?P<kind>datasets|spaces)/)?",
    "REPO": r"(?P<name>[^/]+/[^/]+?)",
    "REV": r"(?P<rev>[^/]+)",
    "PATH": r"(?P<path>.+)",
    "OID": r"(?P<oid>[0-9a-f]{64})",
}


def route(methods: str, pattern: str, write: bool = False) -> Callable[[Endpoint], Endpoint]:
    """Serve `pattern` (PARTS stand for themselves) with the function below; `write`: for the token's user only."""
    compiled = re.compile(re.sub("|".join(PARTS), lambda found: PARTS[found[0]], pattern))

    def register(endpoint: Endpoint) -> Endpoint:
        ROUTES.extend((method, compiled, endpoint, write) for method in methods.split())
        return endpoint

    return register


@route("GET", "/api/whoami-v2", write=True)
def whoami(hub: LoopbackHub, request: Request) -> Response:
    access = {"displayName": "loopback", "role": "write"}
    orgs = [{"type": "org", "name": name} for name in hub.namespaces[1:]]
    me = {"type": "user", "name": hub.namespaces[0], "fullname": "Loopback", "orgs": orgs}
    return Response.of(me | {"auth": {"type": "access_token", "accessToken": access}})


@route("POST", "/api/repos/create", write=True)
def create_repo(hub: LoopbackHub, request: Request) -> Response:
    asked = request.json()
    kind, name = asked.get("type", "model") + "s", f"{asked.get('organization') or hub.namespaces[0]}/{asked['name']}"
    hub.may_write(name)
    answer = {"url": f"{hub.endpoint}/{'' if kind == 'models' else kind + '/'}{name}", "name": name}
    if (kind, name) in hub.repos:
        raise HubError(409, "You already created this model repo", **answer)
    private = asked.get("private", asked.get("visibility") == "private")
    hub.repos[kind, name] = Repo(kind, name, private=bool(private))
    return Response.of(answer)


@route("DELETE", "/api/repos/delete", write=True)
def delete_repo(hub: LoopbackHub, request: Request) -> Response:
    asked = request.json()
    kind, name = asked.get("type", "model") + "s", f"{asked.get('organization') or hub.namespaces[0]}/{asked['name']}"
    hub.may_write(name)
    hub.find(request, kind, name)
    del hub.repos[kind, name]
    return Response.of({})


@route("POST", "/api/validate-yaml")
def validate_yaml(hub: LoopbackHub, request: Request) -> Response:
    try:
        data = front_matter(request.json()["content"])
    except yaml.YAMLError as error:
        return Response.of({"errors": [{"message": f"bad YAML: {error}"}], "warnings": []}, 400)
    if data is None:
        return Response.of({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
    errors = [{"message": message} for message in metadata_errors(data)]
    return Response.of({"errors": errors, "warnings": []}, 400 if errors else 200)


@route("GET", "/api/KIND")
def list_repos(hub: LoopbackHub, request: Request, kind: str) -> Response:
    query, listed = request.query, []
    order = {
        "createdAt": lambda item: list(item[1].head.history())[-1].date,
        "lastModified": lambda item: item[1].head.date,
    }
    by = order.get(query.get("sort", [""])[0])
    # the Hub sorts from the newest to the oldest
    repos = sorted(hub.repos.items()) if by is None else sorted(hub.repos.items(), key=by, reverse=True)
    for (its_kind, name), repo in repos:
        info = describe_repo(repo, repo.head)
        if (
            its_kind == kind
            and (hub.authenticated(request) or not repo.private)
            and set(query.get("filter", [])) <= set(info["tags"])
            and query.get("author", [info["author"]])[0] == info["author"]
            and query.get("search", [""])[0] in name
        ):
            listed.append(selected(info, request))
    return hub.page(request, listed[: int(query.get("limit", [len(listed)])[0])])


@route("GET", "/api/KIND/REPO")
@route("GET", "/api/KIND/REPO/revision/REV")
def repo_info(hub: LoopbackHub, request: Request, kind: str, name: str, rev: str = "main") -> Response:
    repo = hub.find(request, kind, name)
    return Response.of(selected(describe_repo(repo, repo.resolve(rev), request.flag("blobs")), request))


@route("PUT", "/api/KIND/REPO/settings", write=True)
def settings(hub: LoopbackHub, request: Request, kind: str, name: str) -> Response:
    repo, asked = hub.find(request, kind, name), request.json()
    repo.private = asked.get("private", asked.get("visibility", "public") == "private")
    return Response.of({"private": repo.private})


@route("GET", "/api/KIND/REPO/tree/REV")
@route("GET", "/api/KIND/REPO/tree/REV/PATH")
def tree(hub: LoopbackHub, request: Request, kind: str, name: str, rev: str, path: str = "") -> Response:
    commit = hub.find(request, kind, name).resolve(rev)
    below = [file for file in commit.files if not path or file.startswith(f"{path}/")]
    if path and not below:
        raise HubError(404, f"{path} does not exist on {rev}", "EntryNotFound")
    entries: set[str] = set()
    for file in below:
        parts = file.split("/")
        depth = path.count("/") + 1 if path else 0
        ends = range(depth + 1, len(parts) + 1) if request.flag("recursive") else [depth + 1]
        entries |= {"/".join(parts[:end]) for end in ends}
    return hub.page(request, [describe_path(commit, entry, request.flag("expand")) for entry in sorted(entries)])


@route("POST", "/api/KIND/REPO/paths-info/REV")
def paths_info(hub: LoopbackHub, request: Request, kind: str, name: str, rev: str) -> Response:
    commit = hub.find(request, kind, name).resolve(rev)
    form = parse_qs(request.body.decode())
    expand = form.get("expand", ["false"])[0].lower() == "true"
    described = [describe_path(commit, path, expand) for path in form.get("paths", [])]
    return Response.of([item for item in described if item is not None])


@route("GET", "/api/KIND/REPO/refs")
def refs(hub: LoopbackHub, request: Request, kind: str, name: str) -> Response:
    repo = hub.find(request, kind, name)

    def listed(group: str, pointers: Mapping[str, Commit]) -> list[dict[str, str]]:
        return [
            {"name": name, "ref": f"refs/{group}/{name}", "targetCommit": commit.oid}
            for name, commit in pointers.items()
        ]

    return Response.of({"branches": listed("heads", repo.branches), "tags": listed("tags", repo.tags), "converts": []})


@route("GET", "/api/KIND/REPO/commits/REV")
def commits(hub: LoopbackHub, request: Request, kind: str, name: str, rev: str) -> Response:
    history = hub.find(request, kind, name).resolve(rev).history()
    return hub.page(
        request, [one.facts | {"authors": [{"user": one.author}], "message": one.message} for one in history]
    )


@route("POST DELETE", "/api/KIND/REPO/branch/REV", write=True)
def branch(hub: LoopbackHub, request: Request, kind: str, name: str, rev: str) -> Response:
    repo = hub.find(request, kind, name)
    if request.method == "DELETE":
        if rev == "main" or rev not in repo.branches:
            raise HubError(403, f"cannot delete the branch {rev}")
        del repo.branches[rev]
    elif rev in repo.branches:
        raise HubError(409, f"Reference already exists: refs/heads/{rev}")
    else:
        repo.branches[rev] = repo.resolve(request.json().get("startingPoint", "main"))
    return Response.of({})


@route("POST DELETE", "/api/KIND/REPO/tag/REV", write=True)
def tag(hub: LoopbackHub, request: Request, kind: str, name: str, rev: str) -> Response:
    repo = hub.find(request, kind, name)
    if request.method == "DELETE":
        if repo.tags.pop(rev, None) is None:
            raise HubError(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        return Response.of({})
    wanted, commit = request.json()["tag"], repo.resolve(rev)
    if wanted in repo.tags:
        raise HubError(409, f"Tag reference exists already: {wanted}")
    repo.tags[wanted] = commit
    return Response.of({})


@route("POST", "/api/KIND/REPO/preupload/REV", write=True)
def preupload(hub: LoopbackHub, request: Request, kind: str, name: str, rev: str) -> Response:
    held = hub.find(request, kind, name).resolve(rev).files
    attributes = held.get(".gitattributes", Blob(b"")).content.decode()
    patterns = [line.split()[0] for line in attributes.splitlines() if "filter=lfs" in line]

    def answer(file: dict[str, Any]) -> dict[str, Any]:
        binary = b"\0" in base64.b64decode(file["sample"]) or file["size"] >= LFS_SIZE
        lfs = binary or any(fnmatch.fnmatch(file["path"].rsplit("/", 1)[-1], pattern) for pattern in patterns)
        known = {"oid": held[file["path"]].etag} if file["path"] in held else {}
        return {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, **known}

    return Response.of({"files": [answer(file) for file in request.json()["files"]]})


@route("POST", "/PREFIXREPO.git/info/lfs/objects/batch", write=True)
def lfs_batch(hub: LoopbackHub, request: Request, kind: str | None, name: str) -> Response:
    repo = hub.find(request, kind or "models", name)
    objects = []
    for wanted in request.json()["objects"]:
        answer = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] not in repo.lfs:
            place = f"{hub.endpoint}/lfs/{repo.kind}/{repo.name}/{wanted['oid']}"
            answer["actions"] = {"upload": {"href": place}, "verify": {"href": f"{place}/verify"}}
        objects.append(answer)
    return Response.of({"transfer": "basic", "objects": objects})


@route("PUT", "/lfs/KIND/REPO/OID")
def lfs_upload(hub: LoopbackHub, request: Request, kind: str, name: str, oid: str) -> Response:
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise HubError(400, f"what was uploaded does not have the SHA-256 {oid}")
    hub.repos[kind, name].lfs[oid] = request.body
    return Response.of({})


@route("POST", "/lfs/KIND/REPO/OID/verify", write=True)
def lfs_verify(hub: LoopbackHub, request: Request, kind: str, name: str, oid: str) -> Response:
    if len(hub.find(request, kind, name).lfs.get(oid, b"")) != request.json()["size"]:
        raise HubError(404, f"no object {oid} of that size")
    return Response.of({})


@route("POST", "/api/KIND/REPO/commit/REV", write=True)
def commit(hub: LoopbackHub, request: Request, kind: str, name: str, rev: str) -> Response:
    repo = hub.find(request, kind, name)
    if request.flag("create_pr"):
        raise HubError(501, "this stand-in has no pull requests")
    if rev not in repo.branches:
        raise HubError(404, f"Invalid rev id: {rev}", "RevisionNotFound")
    header: dict[str, Any] = {}
    files = dict(repo.branches[rev].files)
    for line in request.body.splitlines():
        item = json.loads(line)
        if item["key"] == "header":
            header = item["value"]
        else:
            apply(repo, files, item["key"], item["value"])
    parent = header.get("parentCommit")
    if parent is not None and not repo.branches[rev].oid.startswith(parent):
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    made = repo.commit(rev, files, header["summary"], header.get("description", ""), hub.namespaces[0])
    address = f"{hub.endpoint}/{name}/commit/{made.oid}"
    return Response.of({"success": True, "commitOid": made.oid, "commitUrl": address})


def apply(repo: Repo, files: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
    """One operation of a commit, on `files`."""
    path = value["path"]
    if set(path.split("/")) & {"", ".", "..", ".git"} and key != "deletedFolder":
        raise HubError(400, f"invalid path: {path}")
    if key == "file":
        files[path] = Blob(base64.b64decode(value["content"]))
    elif key == "lfsFile":
        if value["oid"] not in repo.lfs:
            raise HubError(400, f"{path}: the LFS object {value['oid']} was not uploaded")
        files[path] = Blob(repo.lfs[value["oid"]], lfs=True)
    elif key == "deletedFile":
        if files.pop(path, None) is None:
            raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
    elif key == "deletedFolder":
        for inside in [file for file in files if file.startswith(path.rstrip("/") + "/")]:
            del files[inside]
    else:
        raise HubError(400, f"unknown operation {key}")


@route("GET HEAD", "/PREFIXREPO/resolve/REV/PATH")
def resolve(hub: LoopbackHub, request: Request, kind: str | None, name: str, rev: str, path: str) -> Response:
    at = hub.find(request, kind or "models", name).resolve(rev)
    blob = at.files.get(path)
    if blob is None:
        refusal = HubError(404, "Entry not found", "EntryNotFound").response()
        refusal.headers["X-Repo-Commit"] = at.oid
        return refusal
    size = len(blob.content)
    headers = {"X-Repo-Commit": at.oid, "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
    headers["Content-Type"] = "application/octet-stream" if blob.lfs else "text/plain; charset=utf-8"
    if blob.lfs:
        headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(size)}
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
    if asked is None:
        return Response(200, blob.content, headers)
    first, last = int(asked[1]), min(int(asked[2] or size - 1), size - 1)
    if first > last:
        return Response(416, b"", headers | {"Content-Range": f"bytes */{size}"})
    return Response(206, blob.content[first : last + 1], headers | {"Content-Range": f"bytes {first}-{last}/{size}"})


# ---- HTTP ----


class Handler(BaseHTTPRequestHandler):
    """Reads a request, lets the hub answer it, and writes the answer, or breaks it off where a fault says so."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: LoopbackHub

    def serve(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        fault = self.hub.take_fault(f"{self.command} {path}")
        if fault.unheard_after is not None:
            self.rfile.read(min(fault.unheard_after, int(self.headers.get("Content-Length", 0))))
            fault.first()
            self.hang_up()
            return
        request = Request(self.command, url.path, parse_qs(url.query), self.headers, self.read_body())
        meant = self.hub.repos
        fault.first()
        if self.hub.repos is not meant:
            # it stalled into the next test
            self.hang_up()
            return
        if fault.status is not None:
            response = Response.of({"error": f"injected {fault.status}"}, fault.status, fault.headers)
        else:
            response = self.hub.answer(request)
        self.hub.requests.append(Seen(self.command, path, response.status))
        response.body = fault.spoil(response.body)
        self.write(response, fault)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve  # noqa: N815

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def write(self, response: Response, fault: Fault) -> None:
        self.send_response(response.status)
        for key, value in response.headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(response.body)))
        self.end_headers()
        if self.command != "HEAD":
            size, seconds = fault.pause
            if seconds:
                self.wfile.write(response.body[:size])
                time.sleep(seconds)
            self.wfile.write(response.body[size if seconds else 0 : fault.cut_after])
        if fault.cut_after is not None:
            self.hang_up()

    def hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: `hub.requests` is the log."""


class Server(ThreadingHTTPServer):
    """Knows its connections, so that they can be broken off."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.connections: set[socket.socket] = set()
        super().__init__(*args, **kwargs)

    def finish_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        try:
            super().finish_request(request, client_address)
        finally:
            self.connections.discard(request)

    def break_off(self) -> None:
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Quiet: a client that gave up is part of a test."""


class LoopbackHub:
    """The hub. `endpoint` is known, and refuses connections, from construction on; `start` begins to serve.

    token: what writes need; namespaces: the user's own name, then the organisations it may write to;
    requests: every request answered so far; page_size: entries a listing gives at once;
    home: the HF_HOME of `environment`, a folder of its own unless given.
    """

    token = "hf_loopback"
    namespaces = ("user", "org")
    page_size = 1000

    def __init__(self, home: str | Path | None = None) -> None:
        self.server = self.bound(0)
        self.alive = False
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        self.home = Path(home or tempfile.mkdtemp(prefix="loopback-hub-"))
        self.lock = threading.RLock()
        self.reset()

    def bound(self, port: int) -> Server:
        """A server that has the port but does not listen yet: connections are refused."""
        server = Server(("127.0.0.1", port), type("BoundHandler", (Handler,), {"hub": self}), bind_and_activate=False)
        server.daemon_threads = True
        server.server_bind()
        return server

    def reset(self, home: str | Path | None = None) -> None:
        """Forget repositories, requests and faults; `home` becomes the new HF_HOME. A dead hub stays dead."""
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[Seen] = []
        self.faults: list[Fault] = []
        self.page_size = type(self).page_size
        self.home = Path(home or self.home)

    def start(self) -> LoopbackHub:
        self.server.server_activate()
        threading.Thread(target=self.server.serve_forever, args=(0.02,), name="loopback-hub", daemon=True).start()
        self.alive = True
        return self

    def stop(self) -> None:
        self.alive = False
        self.server.shutdown()
        self.server.server_close()

    def die(self) -> None:
        """Break off every connection and refuse new ones, until `start` is called; what it holds stays."""
        port = self.server.server_port
        self.stop()
        self.server.break_off()
        self.server = self.bound(port)

    def __enter__(self) -> LoopbackHub:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()

    # what tests look at and set up

    def environment(self, **changes: str | None) -> dict[str, str]:
        """The environment for a subprocess that is to use this hub; None in `changes` drops a variable."""
        wanted: dict[str, str | None] = {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": self.token,
            "HF_HOME": str(self.home),
            "HF_HUB_CACHE": str(self.home / "hub"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "HF_HUB_OFFLINE": None,
            "TRANSFORMERS_OFFLINE": None,
            **changes,
        }
        merged = {**os.environ, **wanted}
        return {key: value for key, value in merged.items() if value is not None}

    def repo(self, name: str, kind: str = "models") -> Repo:
        return self.repos[kind, name]

    def plant(self, name: str, files: Mapping[str, bytes], branch: str = "main", title: str = "by hand") -> Commit:
        """Commit `files` as somebody else would, with no check of their names; makes the repository if need be."""
        repo = self.repos.setdefault(("models", name), Repo("models", name))
        blobs = {path: Blob(content, lfs=b"\0" in content) for path, content in files.items()}
        return repo.commit(branch, {**repo.branches[branch].files, **blobs}, title, author="somebody")

    def count(self, match: str, status: int | None = None) -> int:
        """How many requests `match` (a regex on "METHOD /path") finds, of that status if one is given."""
        return sum(
            bool(re.search(match, f"{seen.method} {seen.path}")) and status in (None, seen.status)
            for seen in self.requests
        )

    def fail(self, match: str, status: int = 503, times: int = 1, headers: Mapping[str, str] | None = None) -> None:
        """Refuse the next `times` requests that `match` finds with `status`, without carrying them out."""
        self.faults.append(Fault(match, times, status=status, headers=dict(headers or {})))

    def cut(self, match: str, after: int = 0, times: int = 1) -> None:
        """Carry the request out, but close the connection after `after` bytes of the answer's body."""
        self.faults.append(Fault(match, times, cut_after=after))

    def hang_up(self, match: str, after: int = 0, times: int = 1) -> None:
        """Close the connection after `after` bytes of what is sent, an upload's body, and do not carry it out."""
        self.faults.append(Fault(match, times, unheard_after=after))

    def stall(self, match: str, seconds: float, times: int = 1, after: int | None = None) -> None:
        """Answer that much later, or stop for that long after `after` bytes of the answer's body."""
        if after is None:
            self.meanwhile(match, lambda: time.sleep(seconds), times)
        else:
            self.faults.append(Fault(match, times, pause=(after, seconds)))

    def shorten(self, match: str, after: int, times: int = 1) -> None:
        """Answer with the first `after` bytes of the body, as if they were all of it."""
        self.faults.append(Fault(match, times, spoil=lambda body: body[:after]))

    def corrupt(self, match: str, times: int = 1) -> None:
        """Answer with as many bytes as there are, one of them wrong."""

        def spoil(body: bytes) -> bytes:
            middle = len(body) // 2
            return body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :] if body else body

        self.faults.append(Fault(match, times, spoil=spoil))

    def die_at(self, match: str, after: int = 0, back_after: float | None = None) -> None:
        """Die (see `die`) in the next request that `match` finds, after `after` bytes of what is sent.

        `back_after` seconds later the hub starts again; None leaves it dead.
        """

        def die() -> None:
            self.die()
            if back_after is not None:
                threading.Timer(back_after, self.start).start()

        self.faults.append(Fault(match, 1, unheard_after=after, first=die))

    def meanwhile(self, match: str, action: Callable[[], object], times: int = 1) -> None:
        """Run `action` before the next `times` requests that `match` finds are carried out."""
        self.faults.append(Fault(match, times, first=action))

    # what the endpoints use

    def take_fault(self, line: str) -> Fault:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.match, line):
                    fault.times -= 1
                    return fault
        return Fault("", 0)

    def answer(self, request: Request) -> Response:
        try:
            for method, pattern, endpoint, write in ROUTES:
                found = pattern.fullmatch(request.path) if method == request.method else None
                if found is None:
                    continue
                parts = {key: value and unquote(value) for key, value in found.groupdict().items()}
                known = self.authenticated(request)
                if write and not known:
                    raise HubError(401, "Invalid username or password.")
                if write and "name" in parts:
                    self.may_write(parts["name"])
                with self.lock:
                    return endpoint(self, request, **parts)
            raise HubError(404, "Sorry, we can't find the page you are looking for.")
        except HubError as refusal:
            return refusal.response()

    def authenticated(self, request: Request) -> bool:
        given = request.headers.get("Authorization")
        if given not in (None, f"Bearer {self.token}"):
            raise HubError(401, "Invalid credentials in Authorization header")
        return given is not None

    def may_write(self, name: str) -> None:
        if name.split("/")[0] not in self.namespaces:
            raise HubError(403, f"You don't have the rights to write to {name}")

    def find(self, request: Request, kind: str, name: str) -> Repo:
        repo, known = self.repos.get((kind, name)), self.authenticated(request)
        if repo is None or (repo.private and not known):
            raise HubError(404 if known else 401, "Repository not found", "RepoNotFound")
        return repo

    def page(self, request: Request, items: list[Any]) -> Response:
        start = int(request.query.get("cursor", ["0"])[0])
        end = start + self.page_size
        headers = {}
        if end < len(items):
            query = urlencode({**request.query, "cursor": [str(end)]}, doseq=True)
            headers["Link"] = f'<{self.endpoint}{request.path}?{query}>; rel="next"'
        return Response.of(items[start:end], headers=headers)
