"""Models by hub name: from a local cache without a network, and from a hub at HF_ENDPOINT (a small local server)."""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from families import tiny, tokenizer

from kdcli.models.embedding import append_dense
from kdcli.models.heads import SENTENCE_EMBEDDING, with_new_head
from kdcli.models.probe import probe
from kdcli.models.save import save_model

NAME = "some-owner/tiny-bert"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SCRIPT = """
import json, sys
from kdcli.errors import InputError
from kdcli.models.load import has_head, load_tokenizer
from kdcli.tasks.heads import head_named, load_model
from kdcli.models.overparam import probe

found = {}
for name in sys.argv[1:]:
    try:
        ids = load_tokenizer(name)("so dull")["input_ids"]
        found[name] = [has_head(name, head_named("sequence-classification")), probe(load_model(name)).tolist(), ids]
    except InputError as error:
        found[name] = error.message
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_model(tiny("bert"), path, tokenizer())
    return path


@pytest.fixture(scope="module")
def expected() -> list:
    return [True, probe(tiny("bert")).tolist(), tokenizer()("so dull")["input_ids"]]


def load_by_name(home: Path, *names: str, **variables: str) -> dict:
    """Return what a fresh process with its own HF_HOME says of each name."""
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGINGFACE_"))}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *names],
        env={**plain, "HF_HOME": str(home), **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_cached_model_loads_by_name_without_a_network(folder: Path, expected: list, tmp_path: Path):
    cached = tmp_path / "hub" / f"models--{NAME.replace('/', '--')}"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(COMMIT)
    (cached / "snapshots").mkdir()
    (cached / "snapshots" / COMMIT).symlink_to(folder)
    found = load_by_name(tmp_path, NAME, "some-owner/unknown", HF_HUB_OFFLINE="1")
    assert found[NAME] == expected
    why = "there is no such folder, it is not in the cache, and HF_HUB_OFFLINE is set"
    assert found["some-owner/unknown"] == f"model 'some-owner/unknown' not found: {why}"


class Hub(BaseHTTPRequestHandler):
    """As much of a hub as loading one model needs: file lists, heads of files, and files."""

    folder: Path
    log: list[str]

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        self.log.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0]
        files = {file.relative_to(self.folder).as_posix(): file for file in self.folder.rglob("*") if file.is_file()}
        if path.startswith(f"/api/models/{NAME}/tree/"):
            rows = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": self.tag(file)}
                for name, file in files.items()
            ]
            self.send(json.dumps(rows if path.count("/") == 6 else []).encode(), "application/json", body)
        elif path in (f"/api/models/{NAME}", *(f"/api/models/{NAME}/revision/{r}" for r in ("main", COMMIT))):
            siblings = [{"rfilename": name} for name in files]
            info = {"_id": "0", "id": NAME, "modelId": NAME, "sha": COMMIT, "siblings": siblings, "tags": []}
            self.send(json.dumps(info).encode(), "application/json", body)
        elif path.startswith(f"/{NAME}/resolve/") and (name := path.split("/", 5)[-1]) in files:
            self.send(files[name].read_bytes(), "application/octet-stream", body, ETag=f'"{self.tag(files[name])}"')
        else:
            known = path.startswith((f"/{NAME}/", f"/api/models/{NAME}"))
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()

    def tag(self, file: Path) -> str:
        return hashlib.sha1(file.read_bytes()).hexdigest()

    def send(self, content: bytes, kind: str, body: bool, **headers: str) -> None:
        self.send_response(200)
        for key, value in {"Content-Type": kind, "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def running_hub(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the address of a running hub with one model, and the list that it notes requests in."""
    log: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OneModelHub", (Hub,), {"folder": folder, "log": log}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", log
    server.shutdown()
    server.server_close()


@pytest.fixture
def hub(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield what `running_hub` does, for the model in `folder`."""
    with running_hub(folder) as found:
        yield found


@pytest.mark.slow
def test_a_model_is_fetched_by_name_and_no_pickle_with_it(
    folder: Path, expected: list, tmp_path: Path, hub: tuple[str, list[str]]
):
    address, log = hub
    (folder / "pytorch_model.bin").write_bytes(b"not to be read")
    try:
        variables = {"HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        found = load_by_name(tmp_path, NAME, "some-owner/unknown", **variables)
    finally:
        (folder / "pytorch_model.bin").unlink()
    assert found[NAME] == expected, log
    assert "there is no such folder, and the hub has no such model, or it is private" in found["some-owner/unknown"]
    assert any(line.startswith("GET") and line.endswith("model.safetensors") for line in log)
    assert not any("pytorch_model.bin" in line for line in log if line.startswith("GET"))
    [why] = load_by_name(tmp_path / "empty", NAME, HF_ENDPOINT="http://127.0.0.1:9", NO_PROXY="127.0.0.1").values()
    assert why.endswith("it is not in the cache, and the hub cannot be reached")


@pytest.mark.slow
def test_the_modules_of_a_model_of_embeddings_come_with_it(tmp_path: Path):
    model = with_new_head(tiny("bert"), SENTENCE_EMBEDDING)
    append_dense(model, torch.eye(24, 32), normalize=True)
    (tmp_path / "model").mkdir()
    save_model(model, tmp_path / "model", tokenizer())
    with running_hub(tmp_path / "model") as (address, log):
        variables = {"HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        found = load_by_name(tmp_path / "home", NAME, **variables)
    expected = [False, probe(model).tolist(), tokenizer()("so dull")["input_ids"]]
    assert found[NAME] == expected, log
    # Once fetched, it needs no hub.
    assert load_by_name(tmp_path / "home", NAME, HF_HUB_OFFLINE="1")[NAME] == expected
