"""A stand-in of the Hugging Face Hub on 127.0.0.1, for huggingface_hub's real client.

    with Hub(folder) as hub:
        hub.faults["owner/gated"] = "gated"
        subprocess.run([...], env=os.environ | hub.environment(cache))  # another process
        hub.patch(monkeypatch, cache)  # or this one

`folder/OWNER/NAME` is a model, `folder/datasets/OWNER/NAME` a data set, each with one revision.
Weights and parquet files are served as large files (LFS), all others as plain ones. Pushed files
land in the folder, so that they can be looked at and downloaded again.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from fnmatch import fnmatch
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest

LARGE_FILES = ("*.safetensors", "*.bin", "*.parquet", "*.onnx")
# Without a body: (status, the Hub's error code).
REFUSALS = {"missing": (404, "RepoNotFound"), "gated": (403, "GatedRepo"), "down": (503, None)}


class Hub:
    """The stand-in. Runs inside a `with` block.

    `faults` maps OWNER/NAME to what goes wrong there:
        missing, gated, down    every request is refused
        cut, slow, wrong        the large files break off halfway, stall halfway, have other bytes;
                                `wrong:config.json` for a file by name
        push-403, push-500      the commit of a push is refused
    `requests` lists what was asked for, as `METHOD path`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: dict[str, str] = {}
        self.requests: list[str] = []
        self.uploads: dict[str, bytes] = {}
        self.closing = threading.Event()

    def __enter__(self) -> Hub:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def environment(self, cache: Path, offline: bool = False) -> dict[str, str]:
        """Variables that send another process's client here, with its own cache folder."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(cache),
            "HF_HUB_CACHE": str(cache / "hub"),
            "HF_HUB_OFFLINE": "1" if offline else "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": "1",
            "HF_TOKEN": "hf_stand_in",
            "NO_PROXY": "127.0.0.1",
        }

    def patch(self, monkeypatch: pytest.MonkeyPatch, cache: Path, offline: bool = False) -> None:
        """Sends this process's client here; it waits neither long for data nor between tries."""
        from huggingface_hub import constants, file_download

        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
        monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda seconds: None))
        monkeypatch.setenv("HF_TOKEN", "hf_stand_in")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def files(self, repository: str) -> dict[str, bytes]:
        """Returns the content of a repository by path."""
        folder = self.folder / repository
        return {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }


def _is_large(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in LARGE_FILES)


def _blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, hub: Hub, *arguments: object) -> None:
        self.hub = hub
        super().__init__(*arguments)

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, status: int, body: object = None, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body or {}).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _refuse(self, status: int, code: str | None = None) -> None:
        self._answer(status, **({"X_Error_Code": code} if code else {}))

    def _handle(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "/api/repos/create":
            asked = json.loads(body)
            repository = "/".join(filter(None, [asked["organization"], asked["name"]]))
            (self.hub.folder / repository).mkdir(parents=True, exist_ok=True)
            return self._answer(200, {"url": f"{self.hub.url}/{repository}"})
        if path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if path == "/api/whoami-v2":
            return self._answer(200, {"name": "owner", "type": "user", "orgs": []})
        if found := re.fullmatch(r"/lfs/(\w{64})", path):
            self.hub.uploads[found[1]] = body
            return self._answer(200 if hashlib.sha256(body).hexdigest() == found[1] else 400)
        found = re.fullmatch(
            r"/(?:api/models/|api/(?=datasets/))?((?:datasets/)?[\w.-]+/[\w.-]+?)(/.+|\.git/.+)?",
            path,
        )
        if not found:
            return self._refuse(404)
        repository, action = found[1], found[2] or ""
        fault = self.hub.faults.get(repository, "")
        if not (self.hub.folder / repository).is_dir():
            fault = "missing"
        if fault in REFUSALS:
            return self._refuse(*REFUSALS[fault])
        return self._repository(repository, action, fault, body)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _repository(self, repository: str, action: str, fault: str, body: bytes) -> None:
        files = self.hub.files(repository)
        commit = hashlib.sha1("".join(map(_blob_id, files.values())).encode()).hexdigest()
        if action == "" or action.startswith("/revision/"):
            siblings = [{"rfilename": name} for name in files]
            self._answer(200, {"id": repository, "sha": commit, "siblings": siblings})
        elif action.startswith("/tree/"):
            self._answer(200, [self._tree_entry(name, files[name]) for name in files])
        elif found := re.fullmatch(r"/resolve/[^/]+/(.+)", action):
            if found[1] not in files:
                return self._answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            self._file(found[1], files[found[1]], commit, fault)
        elif action.startswith("/preupload/"):
            asked = json.loads(body)["files"]
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if _is_large(file["path"]) else "regular",
                    "shouldIgnore": False,
                }
                for file in asked
            ]
            self._answer(200, {"files": modes})
        elif action == ".git/info/lfs/objects/batch":
            objects = [
                {**item, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}}
                for item in json.loads(body)["objects"]
            ]
            self._answer(200, {"objects": objects, "transfer": "basic"})
        elif action.startswith("/commit/"):
            if fault.startswith("push-"):
                return self._refuse(int(fault.removeprefix("push-")))
            self._commit(self.hub.folder / repository, body)
            self._answer(200, {"commitUrl": f"{self.hub.url}/{repository}", "commitOid": commit})
        else:
            self._refuse(404)
        return None

    def _tree_entry(self, name: str, content: bytes) -> dict[str, object]:
        entry = {"type": "file", "path": name, "size": len(content), "oid": _blob_id(content)}
        if _is_large(name):
            sha256 = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 134}
        return entry

    def _file(self, name: str, content: bytes, commit: str, fault: str) -> None:
        etag = hashlib.sha256(content).hexdigest() if _is_large(name) else _blob_id(content)
        headers = {"ETag": f'"{etag}"', "X_Repo_Commit": commit}
        if _is_large(name):
            headers |= {"X_Linked_Etag": f'"{etag}"', "X_Linked_Size": str(len(content))}
        kind, _, pattern = fault.partition(":")
        hit = fnmatch(name, pattern) if pattern else _is_large(name)
        if self.command == "HEAD" or not hit or kind not in ("cut", "slow", "wrong"):
            # A HEAD answer has the length of the body that it leaves out.
            return self._answer(200, content, **headers)
        if kind == "wrong":
            return self._answer(200, bytes(byte ^ 1 for byte in content), **headers)
        # Half the file once; a client that comes back for the rest gets nothing. A stand-in that
        # gave it a little each time would keep it coming for ever.
        if "Range" not in self.headers:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
        if kind == "slow":
            self.hub.closing.wait(60)
        return None

    def _commit(self, folder: Path, body: bytes) -> None:
        for line in body.splitlines():
            key, value = (item := json.loads(line))["key"], item["value"]
            if key == "file":
                content = base64.b64decode(value["content"])
            elif key == "lfsFile":
                content = self.hub.uploads[value["oid"]]
            else:
                continue
            target = folder / value["path"]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
