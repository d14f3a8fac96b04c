"""A stand-in for the Hugging Face hub on this machine: what its libraries ask it for when they load and upload."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Hub:
    """Repositories by `models/NAME` or `datasets/NAME`, each a list of commits, the newest last: {file: bytes}.

    `requests`: method and path of those that came. `made`: the repositories that were asked for and were not there.
    """

    def __init__(self):
        self.repositories = {}
        self.requests = []
        self.made = []
        self.uploads = {}
        self.refuse_uploads = False

    def add(self, repository, files):
        """A new commit with these files; its hash."""
        self.repositories.setdefault(repository, []).append(dict(files))
        return self.commit(repository)

    def commit(self, repository, number=-1):
        """The hash of a commit of the repository."""
        commits = self.repositories[repository]
        return hashlib.sha1(f"{repository} {range(len(commits))[number]}".encode()).hexdigest()

    def files(self, repository, revision):
        """The hash and the files of a commit, named by its hash or as `main`."""
        for number in range(len(self.repositories[repository])):
            if revision == self.commit(repository, number):
                return revision, self.repositories[repository][number]
        assert revision == "main", revision
        return self.commit(repository), self.repositories[repository][-1]


class Handler(BaseHTTPRequestHandler):
    """Answers for the `hub` of its class."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, content, status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_request(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        try:
            for pattern, answer in ANSWERS.items():
                if found := re.fullmatch(pattern, f"{self.command} {path}"):
                    return answer(self, body, **found.groupdict())
            return self.answer({"error": f"the stand-in does not know {self.command} {path}"}, 404)
        except (KeyError, AssertionError):
            return self.answer({"error": "Repository Not Found"}, 404, **{"X-Error-Code": "RepoNotFound"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_request  # noqa: N815


def whoami(self, body):
    if "Authorization" not in self.headers:
        return self.answer({"error": "Invalid credentials"}, 401)
    return self.answer({"type": "user", "name": "someone", "orgs": []})


def create(self, body):
    if "Authorization" not in self.headers:
        return self.answer({"error": "Invalid username or password."}, 401)
    asked = json.loads(body)
    name = f"{asked.get('organization') or 'someone'}/{asked['name']}"
    if f"models/{name}" not in self.hub.repositories:
        self.hub.made.append(name)
        self.hub.add(f"models/{name}", {})
    return self.answer({"url": f"http://{self.headers['Host']}/{name}", "name": name})


def info(self, body, kind, name, revision="main"):
    commit, files = self.hub.files(f"{kind}/{name}", revision)
    siblings = [{"rfilename": file} for file in files]
    return self.answer({"_id": "1", "id": name, "sha": commit, "private": False, "tags": [], "siblings": siblings})


def entry(path, content):
    oid = hashlib.sha1(content).hexdigest()
    return {"type": "file", "path": path, "size": len(content), "oid": oid}


def tree(self, body, kind, name, revision, folder=""):
    _, files = self.hub.files(f"{kind}/{name}", revision)
    return self.answer([entry(path, content) for path, content in files.items() if path.startswith(folder)])


def paths_info(self, body, kind, name, revision):
    _, files = self.hub.files(f"{kind}/{name}", revision)
    asked = json.loads(body)["paths"]
    return self.answer([entry(path, files[path]) for path in asked if path in files])


def resolve(self, body, name, revision, file, kind="models"):
    commit, files = self.hub.files(f"{kind}/{name}", revision)
    if file not in files:
        return self.answer({"error": "Entry not found"}, 404, **{"X-Error-Code": "EntryNotFound"})
    etag = {"ETag": f'"{hashlib.sha1(files[file]).hexdigest()}"'}
    return self.answer(files[file], **{"X-Repo-Commit": commit}, **etag)


def preupload(self, body, name):
    if self.hub.refuse_uploads:
        return self.answer({}, 403, **{"X-Error-Message": "the storage of someone is full"})
    files = json.loads(body)["files"]
    mode = {True: "lfs", False: "regular"}
    asked = [
        {"path": f["path"], "uploadMode": mode[f["path"].endswith(".safetensors")], "shouldIgnore": False}
        for f in files
    ]
    return self.answer({"files": asked})


def batch(self, body, name):
    host = self.headers["Host"]
    objects = [
        {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"http://{host}/lfs/{o['oid']}"}}}
        for o in json.loads(body)["objects"]
    ]
    return self.answer({"transfer": "basic", "objects": objects})


def put(self, body, oid):
    assert hashlib.sha256(body).hexdigest() == oid
    self.hub.uploads[oid] = body
    return self.answer(b"")


def commit(self, body, name):
    files = {}
    for line in body.splitlines():
        operation = json.loads(line)
        value = operation["value"]
        if operation["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif operation["key"] == "lfsFile":
            files[value["path"]] = self.hub.uploads[value["oid"]]
    commit = self.hub.add(f"models/{name}", files)
    url = f"http://{self.headers['Host']}/{name}/commit/{commit}"
    return self.answer({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})


NAME = r"(?P<name>[\w.-]+/[\w.-]+)"
KIND = "(?P<kind>models|datasets)"
ANSWERS = {
    "GET /api/whoami-v2": whoami,
    "POST /api/repos/create": create,
    rf"GET /api/{KIND}/{NAME}": info,
    rf"GET /api/{KIND}/{NAME}/revision/(?P<revision>\w+)": info,
    rf"GET /api/{KIND}/{NAME}/tree/(?P<revision>\w+)/?(?P<folder>.*)": tree,
    rf"POST /api/{KIND}/{NAME}/paths-info/(?P<revision>\w+)": paths_info,
    rf"(GET|HEAD) /datasets/{NAME}/resolve/(?P<revision>\w+)/(?P<file>.+)": lambda *a, **b: resolve(
        *a, **b, kind="datasets"
    ),
    rf"(GET|HEAD) /{NAME}/resolve/(?P<revision>\w+)/(?P<file>.+)": resolve,
    "POST /api/validate-yaml": lambda self, body: self.answer({"errors": [], "warnings": []}),
    rf"POST /api/models/{NAME}/preupload/main": preupload,
    rf"POST /{NAME}.git/info/lfs/objects/batch": batch,
    r"PUT /lfs/(?P<oid>\w+)": put,
    rf"POST /api/models/{NAME}/commit/main": commit,
}


@contextlib.contextmanager
def hub_here():
    """A hub, and its address."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Handler,), {"hub": hub}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
