"""A stand-in for the hub's HTTP API on loopback: creates repositories, takes files and commits, and misbehaves on request.

`python hub_server.py TROUBLE` prints its address, and after its standard input has ended what it holds, as JSON. TROUBLE is "", or
"gone": the connection is cut at the first large file.
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

RIGHT_TOKEN = "hf_right"
_LARGE = ".safetensors"


class Hub(BaseHTTPRequestHandler):
    """Repositories, with their files by name, in the class."""

    repos: dict[str, dict[str, Any]] = {}  # noqa: RUF012 - of the one server of the process
    objects: dict[str, bytes] = {}  # noqa: RUF012
    trouble = ""

    def do_GET(self) -> None:
        self._answer(404, {"error": "no such thing"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != f"Bearer {RIGHT_TOKEN}":
            self._answer(401, {"error": "Invalid user token."})
            return
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            self._create(json.loads(body))
        elif path.endswith("/info/lfs/objects/batch"):
            self._batch(json.loads(body))
        elif path == "/api/validate-yaml":
            self._validate(json.loads(body)["content"])
        elif "/preupload/" in path:
            files = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(_LARGE) else "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            self._answer(200, {"files": files})
        elif "/commit/" in path:
            self._commit(path.split("/api/models/")[1].split("/commit/")[0], [json.loads(line) for line in body.splitlines()])
        else:
            self._answer(404, {"error": f"no {path}"})

    def do_PUT(self) -> None:
        if self.trouble == "gone":
            self.close_connection = True
            self.connection.close()
            return
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.objects[hashlib.sha256(data).hexdigest()] = data
        self._answer(200, {})

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        url = {"url": f"{self._address()}/{name}"}
        if name.startswith("theirs/"):
            self._answer(403, {"error": "You don't have the rights to create a model under the namespace 'theirs'."})
        elif name in self.repos:
            self._answer(409, {"error": "You already created this model repo", **url})
        else:
            self.repos[name] = {"private": wanted.get("private") or wanted.get("visibility"), "files": {}, "commits": []}
            self._answer(200, url)

    def _validate(self, card: str) -> None:
        """Read the front matter of a card, as the hub does before a commit."""
        try:
            found = yaml.safe_load(card.split("---\n")[1])
        except (yaml.YAMLError, IndexError) as e:
            found = str(e)
        errors = [] if isinstance(found, dict) else [{"message": f"no metadata: {found}"}]
        self._answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def _batch(self, wanted: dict[str, Any]) -> None:
        objects = [
            {**o, "authenticated": True, "actions": {"upload": {"href": f"{self._address()}/store/{o['oid']}", "header": {}}}}
            for o in wanted["objects"]
        ]
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.repos[repo]["commits"].append(value["summary"])
            elif line["key"] == "file":
                self.repos[repo]["files"][value["path"]] = hashlib.sha256(base64.b64decode(value["content"])).hexdigest()
            elif line["key"] == "lfsFile":
                assert value["oid"] in self.objects
                self.repos[repo]["files"][value["path"]] = value["oid"]
        self._answer(200, {"commitUrl": f"{self._address()}/{repo}/commit/abc", "commitOid": "abc", "success": True})

    def _address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def _answer(self, code: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def main(trouble: str) -> None:
    Hub.trouble = trouble
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    sys.stdin.read()
    print(json.dumps(Hub.repos), flush=True)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
