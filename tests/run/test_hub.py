"""Names on the Hub: its client against a server of our own that answers as the Hub does, and without one."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pytest

from streammerge.run.hub import wanted_files
from tests.command import Result
from tests.command import streammerge as run
from tests.models import make_models, read_tensors, write_recipe

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the server has, and what it was asked. `refused` are repositories and the error they answer with."""

    address: str = ""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    cache: Path = Path()

    def add(self, name: str, folder: Path, **more: bytes) -> None:
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        self.files[name] = files | {key.replace("__", "."): content for key, content in more.items()}

    def environment(self, *, offline: bool = False, **more: str) -> dict[str, str]:
        return {"HF_ENDPOINT": self.address, "HF_HOME": str(self.cache), "HF_HUB_OFFLINE": str(int(offline)),
                "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1", **more}  # fmt: skip

    def run(self, *arguments: str | Path, offline: bool = False) -> Result:
        self.asked.clear()
        done = run(*arguments, env=self.environment(offline=offline))
        # Asked by the client on its own, of nothing that is merged.
        self.asked = [path for path in self.asked if path != "api/agent-harnesses"]
        return done


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    made = Hub(cache=tmp_path / "cache")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(made))
    made.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield made
    server.shutdown()
    thread.join()
    server.server_close()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._respond(body=False)

        def do_GET(self) -> None:
            self._respond(body=True)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

        def _respond(self, *, body: bool) -> None:
            path = unquote(urlparse(self.path).path).strip("/")
            hub.asked.append(path)
            parts = path.removeprefix("api/models/").split("/")
            name, rest = "/".join(parts[:2]), parts[2:]
            if name in hub.refused:
                status, code = hub.refused[name]
                self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code}, body=body)
            elif name not in hub.files:
                self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"}, body=body)
            elif len(rest) > 1 and rest[1] not in ("main", COMMIT):
                self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body=body)
            elif path.startswith("api/models/") and "tree" in rest:
                entries = [{"type": "file", "path": file, "size": len(content), "oid": _digest(content)}
                           for file, content in hub.files[name].items()]  # fmt: skip
                self._send(200, json.dumps(entries).encode(), {}, body=body)
            elif path.startswith("api/models/"):
                siblings = [{"rfilename": file, "size": len(c)} for file, c in hub.files[name].items()]
                content = json.dumps({"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings}).encode()
                self._send(200, content, {}, body=body)
            else:
                content = hub.files[name]["/".join(rest[2:])]
                self._send(200, content, {"X-Repo-Commit": COMMIT, "ETag": f'"{_digest(content)}"'}, body=body)

        def _send(self, status: int, content: bytes, headers: Mapping[str, str], *, body: bool) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

    return Handler


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def models(tmp_path: Path, hub: Hub) -> list[Path]:
    """A base and two models, also on the Hub as org/base, org/m0 and org/m1."""
    made = make_models(tmp_path / "models")
    for path in made:
        hub.add(f"org/{path.name}", path, tokenizer__json=b"{}", chat_template__jinja=b"{{ x }}",
                modeling_x__py=b"x = 1", LICENSE=b"MIT", picture__png=b"PNG", pytorch_model__bin=b"not wanted",
                consolidated__safetensors=b"not wanted", model__gguf=b"not wanted")  # fmt: skip
    return made


def recipe_of(path: Path, revision: str = "") -> Path:
    return write_recipe(path, "ties", [f"org/m0{revision}", "org/m1"], base="org/base",
                        per_model={"weight": 0.5, "density": 0.4})  # fmt: skip


def test_models_of_the_hub_merge_as_those_on_disk_and_only_what_is_needed_is_fetched(
    tmp_path: Path, hub: Hub, models: list[Path]
) -> None:
    done = hub.run(recipe_of(tmp_path / "r.yaml"), tmp_path / "out")
    assert done.code == 0, done.err
    assert "org/base: downloading" in done.err
    assert f"at commit {COMMIT[:12]}" in done.err
    fetched = {path.rpartition("/")[2] for path in hub.asked if "/resolve/" in path}
    assert fetched == {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", "modeling_x.py",
                       "LICENSE"}  # fmt: skip
    here = write_recipe(tmp_path / "h.yaml", "ties", models[1:], base=models[0],
                        per_model={"weight": 0.5, "density": 0.4})  # fmt: skip
    assert hub.run(here, tmp_path / "here").code == 0
    assert hub.asked == [], "every input is local, and the network was asked"
    assert read_tensors(tmp_path / "out") == read_tensors(tmp_path / "here")
    for name in ("chat_template.jinja", "modeling_x.py", "LICENSE", "tokenizer.json"):
        assert (tmp_path / "out" / name).exists()
    manifest = json.loads((tmp_path / "out" / "streammerge.manifest.json").read_text())
    assert [each["commits"] for each in manifest["inputs"]] == [[COMMIT]] * 3
    assert "- org/m0" in (tmp_path / "out" / "README.md").read_text()


def test_what_is_in_the_cache_is_not_fetched_again_and_serves_without_a_network(
    tmp_path: Path, hub: Hub, models: list[Path]
) -> None:
    recipe = recipe_of(tmp_path / "r.yaml")
    assert hub.run(recipe, tmp_path / "one").code == 0
    again = hub.run("plan", recipe)
    assert again.code == 0
    assert "downloading" not in again.err
    assert not [path for path in hub.asked if path.endswith(".safetensors")]
    offline = hub.run(recipe, tmp_path / "two", offline=True)
    assert offline.code == 0, offline.err
    assert hub.asked == []
    assert "taken from the download cache" in offline.err
    assert read_tensors(tmp_path / "one") == read_tensors(tmp_path / "two")


def test_a_commit_that_is_in_the_cache_is_not_asked_for(tmp_path: Path, hub: Hub, models: list[Path]) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", "passthrough", [f"org/m0@{COMMIT}"])
    assert hub.run(recipe, tmp_path / "one").code == 0
    assert hub.run(recipe, tmp_path / "two").code == 0
    assert hub.asked == []


def test_shards_are_those_of_the_index(tmp_path: Path, hub: Hub) -> None:
    tensors = read_tensors(make_models(tmp_path / "whole", 0)[0])
    folder = make_models(tmp_path / "models", 0)[0]
    from safetensors.torch import load_file

    from tests.models import save_model

    sharded = save_model(tmp_path / "sharded", load_file(folder / "model.safetensors"), shards=3)
    hub.add("org/sharded", sharded, other__safetensors=b"not wanted")
    recipe = write_recipe(tmp_path / "r.yaml", "passthrough", ["org/sharded"])
    done = hub.run(recipe, tmp_path / "out")
    assert done.code == 0, done.err
    assert not [path for path in hub.asked if path.endswith("other.safetensors")]
    assert read_tensors(tmp_path / "out") == tensors


@pytest.mark.parametrize(
    ("model", "refusal", "expected"),
    [
        ("org/nobody", None, "is no path here and no model on the Hub. If it is a private one, log in first"),
        ("org/m0@v9", None, "org/m0@v9: the Hub has the model, but no revision 'v9'"),
        ("org/gated", (403, "GatedRepo"), "is given only to who agreed to its terms: do that at https://hugg"),
        ("org/broken", (500, "Boom"), "and not in the download cache either"),
        ("org/empty", None, "org/empty: holds no weights that can be merged"),
        ("some/where/else", None, "is not there (looked in"),
    ],
)
def test_what_cannot_be_fetched_is_one_error_before_anything_is_written(
    tmp_path: Path, hub: Hub, models: list[Path], model: str, refusal: tuple[int, str] | None, expected: str
) -> None:
    hub.files["org/empty"] = {"config.json": b"{}", "model.gguf": b""}
    if refusal is not None:
        hub.refused[model] = refusal
    recipe = write_recipe(tmp_path / "r.yaml", "passthrough", [model])
    done = hub.run(recipe, tmp_path / "out")
    assert done.code == 4
    assert expected in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "out").exists()


def test_offline_says_what_is_missing(tmp_path: Path, hub: Hub) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", "passthrough", ["org/m0"])
    done = hub.run(recipe, tmp_path / "out", offline=True)
    assert done.code == 4
    assert "org/m0: is no path here, and not in the download cache either" in done.err
    assert "hf download org/m0" in done.err


def test_an_adapter_may_be_on_the_hub(tmp_path: Path, hub: Hub, models: list[Path]) -> None:
    from tests.run.test_adapters import write_adapter

    adapter = write_adapter(tmp_path / "lora", {"lm_head.weight": (1100, 64)})
    hub.add("org/lora", adapter)
    recipe = write_recipe(tmp_path / "r.yaml", "passthrough", ["org/base@main+org/lora@main"])
    assert hub.run(recipe, tmp_path / "out").code == 0
    local = write_recipe(tmp_path / "l.yaml", "passthrough", [f"{models[0]}+{adapter}"])
    assert hub.run(local, tmp_path / "here").code == 0
    assert read_tensors(tmp_path / "out") == read_tensors(tmp_path / "here")
    inputs = json.loads((tmp_path / "out" / "streammerge.manifest.json").read_text())["inputs"]
    assert inputs[0]["commits"] == [COMMIT, COMMIT]


def test_a_revision_of_a_directory_is_an_error(tmp_path: Path, hub: Hub, models: list[Path]) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", "passthrough", [f"{models[0]}@main"])
    done = hub.run(recipe, tmp_path / "out")
    assert done.code == 4
    assert "a directory of this machine has no revisions" in done.err


def wanted(*names: str) -> list[str]:
    return wanted_files(names, lambda index: ["model-1.safetensors", "model-2.safetensors"])


def test_what_is_wanted_of_a_repository() -> None:
    small = ["README.md", "config.json", "vocab.txt"]
    assert wanted(*small, "model.safetensors", "pytorch_model.bin") == sorted([*small, "model.safetensors"])
    assert wanted(*small, "model.safetensors.index.json", "model-1.safetensors", "onnx/model.onnx") == sorted(
        [*small, "model.safetensors.index.json", "model-1.safetensors", "model-2.safetensors"]
    )
    assert wanted(*small, "a.safetensors", "b.safetensors", "consolidated.00.safetensors") == sorted(
        [*small, "a.safetensors", "b.safetensors"]
    )
    assert wanted(*small, "pytorch_model-00001-of-00001.bin", "tf_model.h5") == sorted(
        [*small, "pytorch_model-00001-of-00001.bin"]
    )
    assert wanted("adapter_config.json", "adapter_model.safetensors", "optimizer.pt") == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    assert wanted(*small, "model.gguf", "sub/model.safetensors") == []
