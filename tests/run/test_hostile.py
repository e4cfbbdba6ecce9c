"""Files that somebody damaged or made to do harm: one error of ours or a usable result, never a crash, never a hang.

Every kind of file that is read as text has a sound example here, which is changed at random: bytes, and the parts of a
language that trip parsers up. The suite tries 2,000, `scripts/nightly` 100,000. Headers have tests of their own.
"""

from __future__ import annotations

import json
import random
import re
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import xxhash

from streammerge.base.errors import StreamMergeError
from streammerge.cluster.job import Job, folder_of, prepare
from streammerge.cluster.ledger import Committed, Failed
from streammerge.cluster.slurm import Submission, read_submission
from streammerge.cluster.status import progress_of
from streammerge.cluster.worker import Worked
from streammerge.cluster_report import progress_rows, progress_table, workers_table
from streammerge.plan.adapter import changes_of, open_adapter
from streammerge.plan.recipe import load_recipe
from streammerge.plan.tokenizer import Tokenizer
from streammerge.plan.vocab import join, load_vocabulary, template_of, tokenizer_files
from streammerge.run.check import verify
from streammerge.run.configuration import architecture
from streammerge.run.inspection import inspect
from streammerge.run.journal import Done, Journal
from streammerge.run.merge import Options
from streammerge.run.output import clean
from streammerge.run.survey import SurveyBook
from streammerge.storage.checkpoint import INDEX_NAME, TensorSpec, open_checkpoint
from streammerge.storage.lines import checked_line
from streammerge.study.scorebook import Scorebook
from streammerge.study.tasks import load_tasks, read_tasks_file
from tests.command import streammerge as run
from tests.models import make_models, make_tensors, save_model, write_recipe
from tests.run.test_adapters import write_adapter
from tests.study.tiny import make_examples, make_model, write_lines

RECIPE = b"""
merge_method: ties
base_model: a
slices:
  - sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2], parameters: {weight: [0.1, 0.9]}}]
parameters: {density: [{filter: mlp, value: 0.5}, {value: 1}], normalize: true, lambda: 1e-1}
tokenizer: {source: union, pad_to_multiple_of: 8, tokens: {x: {source: {kind: model_token, model: a, token_id: 1}}}}
chat_template: "{% for m in messages %}{{ m['content'] }}{% endfor %}"
dtype: bfloat16
out_dtype: float32
"""
JSONL = b"""{"prompt": "2 + 2", "choices": ["3", "4"], "answer": 1}
{"messages": [{"role": "user", "content": "hi"}], "choices": ["yes", "\\u00e9"], "answer": 0}
"""
INDEX = json.dumps({"metadata": {"total_size": 8}, "weight_map": {"w": "model.safetensors"}}).encode()
PLAN = json.dumps({"digest": "d", "facts": {}, "files": ["model.safetensors", "config.json"]}).encode()
CONFIG = json.dumps({"architectures": ["X"], "num_hidden_layers": 2, "layer_types": ["a", "b"]}).encode()
ADAPTER = json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 6, "use_dora": False, "use_rslora": True,
                      "rank_pattern": {"w": 3}, "alpha_pattern": {r"(layers\.)?[wv]": 8.5}}).encode()  # fmt: skip
TOKENIZER = json.dumps({
    "version": "1.0", "added_tokens": [
        {"id": 3, "content": "<x>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}],
    "normalizer": None, "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None,
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"], "unk_token": None},
}).encode()  # fmt: skip
TOKENIZER_CONFIG = json.dumps({
    "added_tokens_decoder": {"3": {"content": "<x>", "special": True}, "4": {"content": "<y>"}},
    "chat_template": [{"name": "default", "template": "{{ 1 }}"}],
}).encode()  # fmt: skip
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


def _texts(lines: bytes) -> bytes:
    """The texts of such lines."""
    return b"\n".join(line[9:] for line in lines.splitlines())


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


def _adapter(folder: Path, content: bytes) -> None:
    lora = folder / "lora"
    if not lora.exists():
        write_adapter(lora, {"w.weight": (2, 2)})
    (lora / "adapter_config.json").write_bytes(content)
    adapter = open_adapter(lora)
    changes_of(adapter, 1, {"w.weight": TensorSpec("w.weight", "BF16", (2, 2), 0, 0, 8)}, "base+lora")


def _tokenizer(folder: Path, content: bytes) -> None:
    (folder / "tokenizer.json").write_bytes(content)
    _join_with_another(folder)


def _tokenizer_config(folder: Path, content: bytes) -> None:
    (folder / "tokenizer.json").write_bytes(TOKENIZER)
    (folder / "tokenizer_config.json").write_bytes(content)
    _join_with_another(folder)
    template_of(folder)


def _join_with_another(folder: Path) -> None:
    own = load_vocabulary(folder)
    assert own is not None
    other = replace(own, ids={"other": 0, "<z>": 1}, added={})
    joined, _ = join(Tokenizer("union"), {"own": own.within(100), "other": other}, "own")
    tokenizer_files(joined)


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


def _cluster(file: str, content: Callable[[bytes], bytes] = bytes) -> Callable[[Path, bytes], None]:
    """A reader of one file of a cluster run, all others of which are sound."""

    def read(folder: Path, changed: bytes) -> None:
        out = folder.with_name("out")
        if not out.exists():
            recipe = write_recipe(folder / "copy.yaml", "passthrough", [folder])
            assert prepare(recipe, out, Options(), lambda _: None) is not None
            for name, sound in CLUSTER.items():
                _put(out, name, sound)
        _put(out, file, content(changed))
        progress = progress_of(out)
        progress_rows(progress)
        progress_table(progress)
        read_submission(out)
        workers_table([worker.worked for worker in progress.workers])

    return read


def _put(out: Path, name: str, content: bytes) -> None:
    folder = folder_of(out)
    (digest,) = (path.name for path in folder.iterdir() if path.is_dir())
    if name == "job.json":
        content = content.replace(b"DIGEST", digest.encode())
    (folder / name.replace("LEDGER", digest)).write_bytes(content)


CLUSTER = {
    "job.json": json.dumps(asdict(Job(
        "r", "r.yaml", "here", 0, "position", 5, False, 180.0, "DIGEST"))).encode(),
    "units.json": b'{"0": 24}',
    "submission.json": json.dumps(
        asdict(Submission("out", "here", 2, ("--threads=1",), rounds=(("1", "2", 0),)))).encode(),
    "LEDGER/workers/w.json": json.dumps(asdict(Worked("w", "h", 0, 1, 5, 1.5, failures=["x"]))).encode(),
    "LEDGER/done/00000": b"",
    "LEDGER/failed/00000": b"",
}  # fmt: skip
CLUSTER["LEDGER/done/00000"] = b"".join(map(checked_line, [
    asdict(Committed(0, "a", "w", 1.5, 2, 3, ())) | {"tensors": 1}, asdict(Done("w", "00"))]))  # fmt: skip
CLUSTER["LEDGER/failed/00000"] = checked_line(asdict(Failed(0, "why", 4, "w")))


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
    "adapter": (ADAPTER, _adapter),
    "manifest": (MANIFEST, _manifest),
    "tokenizer": (TOKENIZER, _tokenizer),
    "tokenizer's config": (TOKENIZER_CONFIG, _tokenizer_config),
    "job": (CLUSTER["job.json"], _cluster("job.json")),
    "units": (CLUSTER["units.json"], _cluster("units.json")),
    "submission": (CLUSTER["submission.json"], _cluster("submission.json")),
    "worker": (CLUSTER["LEDGER/workers/w.json"], _cluster("LEDGER/workers/w.json")),
    "commit": (_texts(CLUSTER["LEDGER/done/00000"]), _cluster("LEDGER/done/00000", _sound_lines)),
    "failure": (_texts(CLUSTER["LEDGER/failed/00000"]), _cluster("LEDGER/failed/00000", _sound_lines)),
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
    before = _resident(since="now")
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
    assert _resident(since="then") - before < 100_000_000


def _resident(*, since: str) -> int:
    """The most memory this process has had at a time since the last call for "now", in bytes."""
    if since == "now":
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:", 1)[1].split()[0]) * 1024


@pytest.mark.parametrize("kind", READERS)
def test_the_sound_file_is_no_error(tmp_path: Path, kind: str) -> None:
    sound, read = READERS[kind]
    (folder,) = make_models(tmp_path, 0, shapes={"w": (2, 2)})
    (folder / "q.jsonl").write_bytes(JSONL)
    read(folder, sound)


# --- what must not run, and must not be seen -------------------------------------------------------------------------


class _Bomb:
    """What touches a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self._marker,)


@pytest.mark.parametrize("command", ["merge", "plan", "inspect"])
def test_a_pickle_never_runs(tmp_path: Path, command: str) -> None:
    marker = tmp_path / "it-ran"
    torch.save({"w": _Bomb(marker)}, tmp_path / "bomb")
    bomb = (tmp_path / "bomb").read_bytes()
    torch.load(tmp_path / "bomb", weights_only=False)
    assert marker.exists(), "the bomb is no bomb"
    marker.unlink()
    base, *models = make_models(tmp_path)
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pkl"):
        (base / name).write_bytes(bomb)
    (models[0] / "model.safetensors").unlink()
    (models[0] / "pytorch_model.bin").write_bytes(bomb)
    recipe = write_recipe(tmp_path / "r.yaml", "linear", models, base=base, per_model={"weight": 0.5})
    arguments = {"merge": (recipe, tmp_path / "out"), "plan": (recipe,), "inspect": (models[0],)}
    refused = run(command, *arguments[command])
    assert refused.code == 4
    assert "pytorch_model.bin: not usable as pickled weights: its pickle asks for more than tensors" in refused.err
    assert not marker.exists()


def test_code_that_comes_with_a_model_never_runs(tmp_path: Path) -> None:
    marker = tmp_path / "it-ran"
    model = make_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    auto_map = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
    (model / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": auto_map}))
    (model / "evil.py").write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n")
    (tmp_path / "tasks.yaml").write_text("- {name: t, dev: dev.jsonl}\n")
    lines = [{"prompt": e.prompt, "choices": list(e.choices), "answer": e.answer} for e in make_examples(2)]
    write_lines(tmp_path / "dev.jsonl", *lines)
    refused = run("eval", model, "--tasks", tmp_path / "tasks.yaml")
    assert refused.code == 2, refused.err
    assert "Traceback" not in refused.err
    assert not marker.exists()
    # Merged it can be: that needs none of its code.
    recipe = write_recipe(tmp_path / "r.yaml", "linear", [model], per_model={"weight": 1})
    assert run(recipe, tmp_path / "out").code == 0
    assert not marker.exists()


def test_names_do_not_reach_the_terminal_raw(tmp_path: Path) -> None:
    evil = "layers.0.\x1b]0;owned\x07\x1b[2J\r\u202e\x9bw"
    base = save_model(tmp_path / "base\x1b[31m", make_tensors(0, shapes={evil: (3, 3), "w": (4, 4)}))
    other = save_model(tmp_path / "other", make_tensors(1, shapes={evil: (3, 4), "w": (4, 4)}))
    same = save_model(tmp_path / "same", make_tensors(1, shapes={evil: (3, 3), "w": (4, 4)}))
    wrong = write_recipe(tmp_path / "w.yaml", "linear", [base, other], per_model={"weight": 0.5})
    right = write_recipe(tmp_path / "r.yaml", "linear", [base, same], per_model={"weight": 0.5})
    log = tmp_path / "log"
    for code, arguments in (
        (0, ("inspect", base, "--tensors")),
        (2, (wrong, tmp_path / "out")),
        (0, ("plan", right)),
        (0, (right, tmp_path / "out", "--log", log)),
        (4, (tmp_path / "x\x1b[31m.yaml", tmp_path / "out")),
        (2, ("methods", evil)),
    ):
        done = run(*arguments)
        assert done.code == code, done.err
        shown = done.out + done.err
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", shown), repr(shown)
    flipped = bytearray((tmp_path / "out" / "model.safetensors").read_bytes())
    flipped[-1] ^= 1
    (tmp_path / "out" / "model.safetensors").write_bytes(flipped)
    found = run("verify", tmp_path / "out")
    assert found.code == 5
    assert "\x1b" not in found.out + found.err
    assert "\x1b" not in log.read_text()
