"""The manifest, and that `verify` finds every bit that is not as it was written."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import xxhash

import streammerge
from streammerge.api import make_plan as plan
from streammerge.base.errors import InputError
from streammerge.run.output import MANIFEST_NAME
from streammerge.storage.checkpoint import INDEX_NAME, open_checkpoint, open_file
from tests.command import streammerge as run
from tests.models import make_models, make_tensors, save_model, write_recipe

SHAPES = {"embed": (70, 8), "layers.0.w": (16, 8), "layers.1.w": (16, 8), "norm": (8,), "s": (), "e": (0, 3)}
SHARD_BYTES = 1200


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished output of several shards with side files of every kind."""
    path = tmp_path_factory.mktemp("verify")
    base, *models = make_models(path, shapes=SHAPES)
    for name in ("tokenizer.json", "generation_config.json", "LICENSE", "tokenizer.model"):
        (base / name).write_bytes(name.encode() * 20)
    (base / "empty.txt").write_bytes(b"")
    recipe = write_recipe(path / "r.yaml", "task_arithmetic", models, base=base, per_model={"weight": 0.5})
    streammerge.merge(recipe, path / "out", compile="off", threads=1, out_shard_size=SHARD_BYTES)
    return path / "out"


@pytest.fixture
def out(merged: Path) -> Iterator[Path]:
    """The output, put back as it was afterwards."""
    before = {path: path.read_bytes() for path in merged.iterdir()}
    yield merged
    for path in merged.iterdir():
        if path not in before:
            path.unlink()
    for path, content in before.items():
        if not path.exists() or path.read_bytes() != content:
            path.write_bytes(content)


def problems(out: Path) -> tuple[str, ...]:
    return streammerge.verify(out).problems


def flip(path: Path, place: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def test_a_sound_output_has_no_problems_and_is_read_whole(merged: Path) -> None:
    verdict = streammerge.verify(merged)
    assert verdict.problems == ()
    assert verdict.tensors == len(SHAPES)
    files = [path for path in merged.iterdir() if path.name != MANIFEST_NAME]
    assert verdict.files == len(files)
    assert verdict.nbytes == sum(path.stat().st_size for path in files)


def test_the_manifest_says_what_the_output_is_made_of(merged: Path) -> None:
    content = json.loads((merged / MANIFEST_NAME).read_text())
    recipe = merged.parent / "r.yaml"
    made = plan(recipe, out_shard_size=SHARD_BYTES)
    assert content["digest"] == made.digest
    assert content["recipe"] == recipe.read_text()
    assert content["method"] == "task_arithmetic"
    assert content["seed"] == 0
    assert content["versions"]["streammerge"] == streammerge.__version__
    assert [source["model"] for source in content["inputs"]] == list(made.recipe.inputs)
    assert list(content["tensors"]) == [tensor.name for tensor in made.tensors]
    checkpoint = open_checkpoint(merged)
    for name, checksum in content["tensors"].items():
        spec = checkpoint.tensors[name]
        stored = checkpoint.file_path(spec.file).read_bytes()[spec.offset : spec.offset + spec.nbytes]
        assert checksum == xxhash.xxh3_128_hexdigest(stored)
    listed = {*content["files"], *content["shards"], MANIFEST_NAME}
    assert listed == {path.name for path in merged.iterdir()}


def test_numbers_that_are_not_finite_are_counted_in_report_and_manifest(tmp_path: Path) -> None:
    tensors = make_tensors(0, shapes=SHAPES)
    tensors["norm"][:3] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    models = [save_model(tmp_path / "a", tensors), save_model(tmp_path / "b", make_tensors(1, shapes=SHAPES))]
    recipe = write_recipe(tmp_path / "r.yaml", "linear", models, per_model={"weight": 0.5})
    report = streammerge.merge(recipe, tmp_path / "out", compile="off", threads=1)
    assert report.nonfinite == {"norm": (3, 3)}
    content = json.loads((tmp_path / "out" / MANIFEST_NAME).read_text())
    assert content["nonfinite"] == {"norm": {"inputs": [3, 0], "output": 3}}
    assert problems(tmp_path / "out") == ()


def test_a_flipped_bit_in_any_shard_is_found_and_its_tensor_named(out: Path) -> None:
    chance = random.Random(0)
    for path in sorted(out.glob("*.safetensors")):
        content = path.read_bytes()
        header, _ = open_file(path)
        places = {0, 7, 8, header.data_start - 1, header.data_start, len(content) - 1}
        places |= {chance.randrange(len(content)) for _ in range(15)}
        places |= {chance.randrange(header.data_start) for _ in range(15)}
        for place in sorted(places):
            flip(path, place, place % 8)
            found = problems(out)
            assert any(path.name in problem for problem in found), place
            if place >= header.data_start:
                (hit,) = (entry.name for entry in header.entries if entry.start <= place < entry.stop)
                assert found == (f"{path}: tensor {hit} differs from what was written.",)
            path.write_bytes(content)
    assert problems(out) == ()


@pytest.mark.nightly
def test_a_thousand_random_flips_are_found(out: Path) -> None:
    """Anywhere in the output, byte by byte as likely; a tensor's are found under its name."""
    chance = random.Random(1000)
    files = {path: path.read_bytes() for path in sorted(out.iterdir())}
    found = 0
    for _ in range(1000):
        path = chance.choices(list(files), [len(content) for content in files.values()])[0]
        place = chance.randrange(len(files[path]))
        flip(path, place, chance.randrange(8))
        try:
            told = " ".join(problems(out))
        except InputError as error:
            told = str(error)
        name = path.name
        if path.suffix == ".safetensors":
            path.write_bytes(files[path])
            entries = open_file(path)[0].entries
            name = next((entry.name for entry in entries if entry.start <= place < entry.stop), name)
        found += name in told
        path.write_bytes(files[path])
    assert found == 1000


def test_a_flipped_bit_in_any_side_file_is_found_and_the_file_named(out: Path) -> None:
    names = json.loads((out / MANIFEST_NAME).read_text())["files"]
    assert {"config.json", "README.md", "mergekit_config.yml", INDEX_NAME, "tokenizer.json", "LICENSE"} <= set(names)
    chance = random.Random(1)
    for name in names:
        path = out / name
        content = path.read_bytes()
        for place in {0, len(content) - 1, *(chance.randrange(len(content)) for _ in range(5))} if content else ():
            flip(path, place, place % 8)
            assert problems(out) == (f"{path}: differs from what was written.",)
        path.write_bytes(content + b"\0")
        assert problems(out) == (f"{path}: differs from what was written.",)
        path.write_bytes(content)


def test_a_flipped_bit_in_the_manifest_is_never_a_crash(out: Path) -> None:
    path = out / MANIFEST_NAME
    content = path.read_bytes()
    for place in range(0, len(content), 5):
        flip(path, place, place % 8)
        try:
            problems(out)
        except InputError as error:
            assert MANIFEST_NAME in str(error)  # noqa: PT017
        path.write_bytes(content)


def test_a_flipped_bit_in_the_checksums_of_the_manifest_is_found(out: Path) -> None:
    path = out / MANIFEST_NAME
    content = path.read_bytes()
    for part in ("tensors", "files", "shards"):
        start = content.index(f'"{part}"'.encode())
        for checksum in json.loads(content)[part].values():
            text = checksum["header"] if part == "shards" else checksum
            flip(path, content.index(text.encode(), start), 0)
            with suppress(InputError):
                assert len(problems(out)) == 1
            path.write_bytes(content)


def test_a_flipped_bit_anywhere_in_the_manifest_is_found(out: Path) -> None:
    # Digest, recipe and inputs are in it, too: by the digest the next run decides that OUT is finished.
    path = out / MANIFEST_NAME
    content = path.read_bytes()
    for part in ("digest", "recipe", "inputs", "seed"):
        place = content.index(b" ", content.index(f'"{part}":'.encode())) + 2
        flip(path, place, 0)
        with suppress(InputError):
            assert problems(out), part
        path.write_bytes(content)


def test_a_missing_file_is_named(out: Path) -> None:
    for name in ("config.json", INDEX_NAME, "empty.txt"):
        content = (out / name).read_bytes()
        (out / name).unlink()
        assert problems(out) == (f"{out / name}: is missing.",)
        (out / name).write_bytes(content)


def test_a_missing_shard_is_named_with_its_tensors(out: Path) -> None:
    shard = min(out.glob("*.safetensors"))
    names = [entry.name for entry in open_file(shard)[0].entries]
    shard.unlink()
    found = problems(out)
    assert any(f"{shard}: cannot be read: No such file" in problem for problem in found)
    assert all(f"{out}: tensor {name} is missing." in found for name in names)


def test_a_cut_or_grown_shard_is_named(out: Path) -> None:
    shard = min(out.glob("*.safetensors"))
    content = shard.read_bytes()
    for damaged in (content[:-1], content + b"\0", content[:10], b""):
        shard.write_bytes(damaged)
        assert any(str(shard) in problem for problem in problems(out))


def test_a_missing_tensor_is_named(out: Path) -> None:
    # Another sound file in the place of a shard: without one tensor, and with one that does not belong there.
    shard = next(path for path in sorted(out.glob("*.safetensors")) if len(open_file(path)[0].entries) > 1)
    gone = open_file(shard)[0].entries[0].name
    save_model(out.parent / "other", {"stranger": torch.zeros(3)})
    shard.write_bytes((out.parent / "other" / "model.safetensors").read_bytes())
    found = problems(out)
    assert f"{out}: tensor {gone} is missing." in found
    assert f"{shard}: tensor stranger differs from what was written." in found
    assert f"{shard}: its header is not the one that was written." in found


def test_two_tensors_that_changed_places_are_both_named(out: Path) -> None:
    shard = next(path for path in out.glob("*.safetensors") if b'"layers.0.w"' in path.read_bytes())
    content = shard.read_bytes()
    entries = {entry.name: entry for entry in open_file(shard)[0].entries}
    a, b = entries["layers.0.w"], entries["layers.1.w"]
    swapped = bytearray(content)
    swapped[a.start : a.stop], swapped[b.start : b.stop] = content[b.start : b.stop], content[a.start : a.stop]
    shard.write_bytes(swapped)
    assert len(problems(out)) == 2


def test_what_is_no_finished_output_is_an_input_error(tmp_path: Path, merged: Path) -> None:
    with pytest.raises(InputError, match="Is this the finished output of a merge"):
        streammerge.verify(tmp_path)
    for content, reason in [("{", "is not JSON"), ("[]", "is no manifest of ours"), ("{}", "is no manifest of ours"),
                            ('{"files": {}, "shards": [], "tensors": {}}', "is no manifest of ours"),
                            ("[" * 100_000, "is not JSON")]:  # fmt: skip
        (tmp_path / MANIFEST_NAME).write_text(content)
        with pytest.raises(InputError, match=reason):
            streammerge.verify(tmp_path)
    assert problems(merged) == ()


# --- inputs and output, checked by a merge ---------------------------------------------------------------------------


def test_inputs_are_compared_with_their_manifest(tmp_path: Path, out: Path) -> None:
    model, _ = make_models(tmp_path, shapes=SHAPES, count=1)
    recipe = write_recipe(tmp_path / "again.yaml", "linear", [out, model], per_model={"weight": 0.5})
    notes: list[str] = []
    streammerge.merge(recipe, tmp_path / "one", verify_inputs=True, note=notes.append)
    assert [note for note in notes if "no checksums" in note] == [f"{model}: has no checksums to verify it by"]
    shard = min(out.glob("*.safetensors"))
    flip(shard, shard.stat().st_size - 3, 0)
    result = run(recipe, tmp_path / "two", "--verify-inputs")
    assert result.code == 5
    assert str(shard) in result.err
    assert "differs from what was written" in result.err
    assert not (tmp_path / "two").exists()


def test_inputs_are_compared_with_the_names_of_the_hubs_blobs(tmp_path: Path) -> None:
    models = make_models(tmp_path, shapes=SHAPES, count=1)
    blobs = tmp_path / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    for model in models:
        weights = model / "model.safetensors"
        blob = blobs / hashlib.sha256(weights.read_bytes()).hexdigest()
        weights.rename(blob)
        weights.symlink_to(blob)
    recipe = write_recipe(tmp_path / "r.yaml", "linear", models, per_model={"weight": 0.5})
    notes: list[str] = []
    streammerge.merge(recipe, tmp_path / "one", verify_inputs=True, note=notes.append)
    assert not [note for note in notes if "no checksums" in note]
    flip(blob, blob.stat().st_size - 3, 0)
    result = run(recipe, tmp_path / "two", "--verify-inputs")
    assert result.code == 5
    assert f"{weights}: is not what was downloaded" in result.err
    assert not (tmp_path / "two").exists()


def test_an_output_that_did_not_reach_the_disk_is_found_at_once(tmp_path: Path) -> None:
    models = make_models(tmp_path, shapes=SHAPES, count=1)
    recipe = write_recipe(tmp_path / "r.yaml", "linear", models, per_model={"weight": 0.5})
    assert run(recipe, tmp_path / "sound", "--verify-output").code == 0
    # A disk that changes the first byte of every write of weights.
    bad = (
        "import os\nwrite = os.pwritev\n"
        "os.pwritev = lambda fd, data, *rest: write(fd, [bytes([data[0][0] ^ 1]) + bytes(data[0][1:])]"
        " if len(data[0]) else data, *rest)\n"
        "from streammerge.cli import main\nmain()\n"
    )
    command = [sys.executable, "-c", bad, str(recipe), str(tmp_path / "bad"), "--verify-output", "--compile", "off"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 5, done.stderr
    assert "differs from what was written" in done.stderr


@pytest.mark.parametrize("name", ["../r.yaml", "/etc/hostname", "a/b", ""])
@pytest.mark.parametrize("part", ["files", "shards"])
def test_a_manifest_that_names_files_elsewhere_is_refused(out: Path, part: str, name: str) -> None:
    path = out / MANIFEST_NAME
    content = json.loads(path.read_text())
    del content["checksum"]
    content[part][name] = {} if part == "shards" else "0"
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    path.write_text(json.dumps(content | {"checksum": xxhash.xxh3_128_hexdigest(text.encode())}))
    with pytest.raises(InputError, match="outside its own directory"):
        streammerge.verify(out)


def test_verify_reads_from_the_disk_what_lies_in_the_page_cache(tmp_path: Path) -> None:
    models = make_models(tmp_path, shapes={"w": (1024, 2048)}, count=1)
    recipe = write_recipe(tmp_path / "r.yaml", "linear", models, per_model={"weight": 0.5})
    streammerge.merge(recipe, tmp_path / "out", compile="off")
    (tmp_path / "out" / "model.safetensors").read_bytes()

    def read_from_disk() -> int:
        fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        return int(fields["read_bytes"])

    before = read_from_disk()
    if before == 0:
        pytest.skip("NOTHING IS READ FROM A DISK HERE: whether verify goes past the page cache is not tested")
    assert streammerge.verify(tmp_path / "out").problems == ()
    assert read_from_disk() - before >= 1024 * 2048 * 2
