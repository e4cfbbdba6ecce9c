"""Files that somebody damaged or made to do harm: one error of ours or a usable result, never a crash, never a hang.

Every kind of file that is read as text has a sound example here, which is changed at random: bytes, and the parts of a
language that trip parsers up. The suite tries 2,000, `scripts/nightly` 100,000. Headers have tests of their own.
"""

from __future__ import annotations

import json
import random
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash

from streammerge.base.errors import StreamMergeError
from streammerge.plan.recipe import load_recipe
from streammerge.run.check import verify
from streammerge.run.inspection import inspect
from streammerge.run.journal import Journal
from streammerge.run.output import clean
from streammerge.run.sidefiles import architecture
from streammerge.run.survey import SurveyBook
from streammerge.storage.checkpoint import INDEX_NAME, open_checkpoint
from streammerge.study.scorebook import Scorebook
from streammerge.study.tasks import load_tasks, read_tasks_file
from tests.models import make_models

RECIPE = b"""
merge_method: ties
base_model: a
slices:
  - sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2], parameters: {weight: [0.1, 0.9]}}]
parameters: {density: [{filter: mlp, value: 0.5}, {value: 1}], normalize: true, lambda: 1e-1}
tokenizer_source: base
dtype: bfloat16
out_dtype: float32
"""
JSONL = b"""{"prompt": "2 + 2", "choices": ["3", "4"], "answer": 1}
{"messages": [{"role": "user", "content": "hi"}], "choices": ["yes", "\\u00e9"], "answer": 0}
"""
INDEX = json.dumps({"metadata": {"total_size": 8}, "weight_map": {"w": "model.safetensors"}}).encode()
PLAN = json.dumps({"digest": "d", "facts": {}, "files": ["model.safetensors", "config.json"]}).encode()
CONFIG = json.dumps({"architectures": ["X"], "num_hidden_layers": 2, "layer_types": ["a", "b"]}).encode()
MANIFEST = json.dumps(
    {"files": {"a.txt": "0"}, "shards": {"model.safetensors": {"header": "0"}}, "tensors": {}}
).encode()
PIECES = [
    b"\0", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\x1b[2J", b"\r", b"\n", b"\t", b" ", b'"', b"'", b"\\", b"\\u0000",
    b"\\ud800", b"{", b"}", b"[", b"]", b",", b":", b"- ", b"? ", b"| ", b"> ", b"&a ", b"*a", b"<<: *a\n",
    b"!!python/object/apply:os.system [x]", b"!!binary ", b"!!set ", b"---\n", b"...\n", b"%YAML 9.9\n", b"null",
    b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1", b"0", b"10000000000000000000000", b"1" * 5000, b"0x", b"1:2:3",
    b"2001-99-99", b"../../etc/passwd", b"/dev/zero", b"[" * 2000, b'{"a":' * 2000, b"\xef\xbb\xbf", b"\xff\xfe",
]  # fmt: skip


def _index(folder: Path, content: bytes) -> None:
    (folder / INDEX_NAME).write_bytes(content)
    open_checkpoint(folder)


def _recipe(folder: Path, content: bytes) -> None:
    (folder / "r.yaml").write_bytes(content)
    load_recipe(folder / "r.yaml", strict=False)


def _tasks(folder: Path, content: bytes) -> None:
    (folder / "tasks.yaml").write_bytes(content)
    load_tasks(read_tasks_file(folder / "tasks.yaml"), folder / "tasks.yaml", None)


def _questions(folder: Path, content: bytes) -> None:
    (folder / "q.jsonl").write_bytes(content)
    load_tasks([{"name": "t", "dev": "q.jsonl"}], folder / "tasks.yaml", None)


def _plan(folder: Path, content: bytes) -> None:
    work = folder / ".streammerge"
    work.mkdir(exist_ok=True)
    (work / "plan.json").write_bytes(content)
    clean(folder, remove=False)


def _sound_lines(text: bytes) -> bytes:
    """Any text with the checksums of ours: whoever makes such a file by hand can make those, too."""
    return b"".join(b"%08x %s\n" % (zlib.crc32(line), line) for line in text.split(b"\n"))


def _journal(folder: Path, content: bytes) -> None:
    (folder / "journal").write_bytes(_sound_lines(content))
    Journal(folder / "journal").close()


def _survey(folder: Path, content: bytes) -> None:
    book = SurveyBook(folder, "digest")
    book.put("key", [1])
    (path,) = folder.glob("survey-*")
    path.write_bytes(_sound_lines(content))
    book.get("key")


def _config(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    architecture(open_checkpoint(folder))
    inspect(folder)


def _manifest(folder: Path, content: bytes) -> None:
    try:
        made = json.loads(content)
        whole = json.dumps(made, indent=1, ensure_ascii=False) + "\n"
        content = json.dumps(made | {"checksum": xxhash.xxh3_128_hexdigest(whole.encode())}).encode()
    except (ValueError, TypeError, RecursionError):
        # No map any more: then it has no checksum.
        pass
    (folder / "streammerge.manifest.json").write_bytes(content)
    verify(folder)


def _scores(folder: Path, content: bytes) -> None:
    (folder / "scores").write_bytes(_sound_lines(content))
    Scorebook(folder / "scores").close()


READERS: dict[str, tuple[bytes, Callable[[Path, bytes], None]]] = {
    "index": (INDEX, _index),
    "recipe": (RECIPE, _recipe),
    "tasks": (b"- {name: t, dev: q.jsonl, metric: accuracy}\n", _tasks),
    "questions": (JSONL, _questions),
    "plan": (PLAN, _plan),
    "journal": (b'{"tensor":"w","xxh3_128":"0","nonfinite_inputs":[1],"nonfinite_output":0}', _journal),
    "survey": (b'{"found":[1,2.5]}', _survey),
    "scores": (b'{"key":"k","log_probs":[[-1.5,-2]],"distances":[0.5]}', _scores),
    "config": (CONFIG, _config),
    "manifest": (MANIFEST, _manifest),
}


def damaged(content: bytes, chance: random.Random) -> bytes:
    """The content with one to four changes."""
    changed = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        place = chance.randint(0, len(changed))
        match chance.randint(0, 5):
            case 0:
                changed[place:place] = chance.choice(PIECES)
            case 1:
                changed[place : place + chance.randint(1, 8)] = chance.choice(PIECES)
            case 2:
                del changed[place : place + chance.randint(1, 20)]
            case 3 if changed:
                changed[min(place, len(changed) - 1)] ^= 1 << chance.randint(0, 7)
            case 4:
                changed[place:place] = changed[place : place + chance.randint(1, 40)]
            case 5 if chance.random() < 0.1:
                del changed[place:]
    return bytes(changed)


@pytest.mark.parametrize("times", [225, pytest.param(10_100, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("kind", READERS)
def test_a_damaged_file_is_an_error_of_ours_or_none(tmp_path: Path, kind: str, times: int) -> None:
    sound, read = READERS[kind]
    (folder,) = make_models(tmp_path, 0, shapes={"w": (2, 2)})
    (folder / "q.jsonl").write_bytes(JSONL)
    chance = random.Random(times)
    for _ in range(times):
        content = damaged(sound, chance)
        began = time.perf_counter()
        try:
            read(folder, content)
        except StreamMergeError:
            # That is what it is refused with.
            pass
        except Exception as error:
            raise AssertionError(content[:300]) from error
        assert time.perf_counter() - began < 20, content[:300]


@pytest.mark.parametrize("kind", READERS)
def test_the_sound_file_is_no_error(tmp_path: Path, kind: str) -> None:
    sound, read = READERS[kind]
    (folder,) = make_models(tmp_path, 0, shapes={"w": (2, 2)})
    (folder / "q.jsonl").write_bytes(JSONL)
    read(folder, sound)
