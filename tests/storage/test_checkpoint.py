"""Opening checkpoints: the ways they lie on disk, and the ways they are broken."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from streammerge.base.errors import InputError
from streammerge.storage.checkpoint import INDEX_NAME, open_checkpoint, open_file, read_index
from tests.models import make_tensors, save_model

SHAPES = {"b.weight": (4, 3), "a.0.weight": (5,), "a.1.weight": (2, 2, 2), "s": ()}
TENSORS = make_tensors(0, shapes=SHAPES)


def write_index(path: Path, weight_map: object, **more: object) -> None:
    (path / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map, **more}))


def test_a_single_file_in_a_directory_is_opened(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_model(tmp_path, TENSORS))
    assert set(checkpoint.tensors) == set(TENSORS)
    assert checkpoint.directory == tmp_path
    assert [file.name for file in checkpoint.files] == ["model.safetensors"]
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in TENSORS.values())


def test_a_file_itself_is_opened_and_its_directory_is_the_place_of_its_config(tmp_path: Path) -> None:
    save_model(tmp_path, TENSORS)
    (tmp_path / "model.safetensors").rename(tmp_path / "other name.safetensors")
    checkpoint = open_checkpoint(tmp_path / "other name.safetensors")
    assert set(checkpoint.tensors) == set(TENSORS)
    assert checkpoint.directory == tmp_path
    assert checkpoint.file_path(0) == tmp_path / "other name.safetensors"


def test_an_index_with_shards_is_opened_in_file_order(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_model(tmp_path, TENSORS, shards=3))
    assert [file.name for file in checkpoint.files] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    places = [(spec.file, spec.offset) for spec in checkpoint.tensors.values()]
    assert places == sorted(places)


def test_a_directory_of_files_without_an_index_is_opened(tmp_path: Path) -> None:
    for name, tensor in TENSORS.items():
        save_file({name: tensor}, tmp_path / f"{name}.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint.tensors) == set(TENSORS)
    assert [file.name for file in checkpoint.files] == sorted(f"{name}.safetensors" for name in TENSORS)


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_the_bytes_of_a_tensor_are_where_the_checkpoint_says(tmp_path: Path, shards: int) -> None:
    checkpoint = open_checkpoint(save_model(tmp_path, TENSORS, shards=shards))
    for name, tensor in TENSORS.items():
        spec = checkpoint.tensors[name]
        content = checkpoint.file_path(spec.file).read_bytes()[spec.offset : spec.offset + spec.nbytes]
        assert torch.frombuffer(bytearray(content), dtype=torch.bfloat16).view(tensor.shape).equal(tensor)
        assert (spec.dtype, spec.shape, spec.elements) == ("BF16", tuple(tensor.shape), tensor.numel())


def test_shards_that_are_links_into_a_cache_are_opened(tmp_path: Path) -> None:
    cache = tmp_path / "models--org--name"
    save_model(cache / "blobs", TENSORS)
    for folder, link in ((cache / "snapshots" / "1", "../../blobs"), (tmp_path / "copy", "../models--org--name/blobs")):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").symlink_to(Path(link) / "model.safetensors")
        assert set(open_checkpoint(folder).tensors) == set(TENSORS)


def test_a_directory_may_be_a_link_and_hold_links_within(tmp_path: Path) -> None:
    save_model(tmp_path / "model" / "weights", TENSORS)
    (tmp_path / "model" / "model.safetensors").symlink_to(Path("weights/model.safetensors"))
    (tmp_path / "link").symlink_to(tmp_path / "model")
    assert set(open_checkpoint(tmp_path / "link").tensors) == set(TENSORS)


@pytest.mark.parametrize("by_index", [False, True])
def test_weights_that_are_a_link_out_of_their_directory_are_refused(tmp_path: Path, by_index: bool) -> None:
    save_model(tmp_path / "private", TENSORS)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "x.safetensors").symlink_to(Path("../private/model.safetensors"))
    if by_index:
        write_index(tmp_path / "model", dict.fromkeys(TENSORS, "x.safetensors"))
    with pytest.raises(InputError, match=r"x\.safetensors: is a link to .*private.*, outside .*model\."):
        open_checkpoint(tmp_path / "model")


def test_the_fingerprint_changes_with_header_size_and_time(tmp_path: Path) -> None:
    path = save_model(tmp_path, TENSORS)
    before = open_checkpoint(path).files
    assert open_checkpoint(path).files == before
    save_file(TENSORS, path / "model.safetensors", metadata={"format": "np"})
    after = open_checkpoint(path).files
    assert after[0].header != before[0].header
    assert after[0].mtime_ns != before[0].mtime_ns


def test_a_missing_model_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: no such model\. Give a directory with safetensors files"):
        open_checkpoint(tmp_path / "nowhere")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    path = save_model(tmp_path, TENSORS, shards=3)
    (path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(InputError, match=r"names model-00002-of-00003\.safetensors, which is not there"):
        open_checkpoint(path)


def test_all_missing_shards_are_named_at_once(tmp_path: Path) -> None:
    write_index(tmp_path, {f"t{i}": f"model-{i}.safetensors" for i in range(8)})
    with pytest.raises(InputError, match=r"model-0.*model-4\.safetensors and 3 more, which are not there"):
        open_checkpoint(tmp_path)


def test_a_tensor_in_the_index_and_not_in_its_file_is_named(tmp_path: Path) -> None:
    path = save_model(tmp_path, TENSORS, shards=2)
    index = json.loads((path / INDEX_NAME).read_text())["weight_map"]
    write_index(path, index | {"ghost": "model-00001-of-00002.safetensors"})
    with pytest.raises(InputError, match=r"'ghost' should be in model-00001-of-00002\.safetensors and is not"):
        open_checkpoint(path)


def test_a_tensor_in_a_file_and_not_in_the_index_is_named(tmp_path: Path) -> None:
    path = save_model(tmp_path, TENSORS, shards=2)
    index = json.loads((path / INDEX_NAME).read_text())["weight_map"]
    del index["b.weight"]
    write_index(path, index)
    with pytest.raises(InputError, match=r"'b\.weight' is in model-00001-of-00002\.safetensors and not in the index"):
        open_checkpoint(path)


def test_a_tensor_in_another_file_than_the_index_says_is_named(tmp_path: Path) -> None:
    path = save_model(tmp_path, TENSORS, shards=2)
    index = json.loads((path / INDEX_NAME).read_text())["weight_map"]
    index["b.weight"] = "model-00002-of-00002.safetensors"
    write_index(path, index)
    with pytest.raises(InputError, match=r"'b\.weight' should be in model-00002\S* and is in model-00001"):
        open_checkpoint(path)


def test_everything_wrong_between_index_and_files_is_said_at_once(tmp_path: Path) -> None:
    path = save_model(tmp_path, TENSORS, shards=2)
    index = json.loads((path / INDEX_NAME).read_text())["weight_map"]
    del index["b.weight"]
    write_index(path, index | {f"ghost{i}": "model-00001-of-00002.safetensors" for i in range(15)})
    with pytest.raises(InputError) as caught:
        open_checkpoint(path)
    assert str(caught.value).count("\n  - tensor") == 10
    assert "and 6 more" in str(caught.value)
    assert "Download the model again." in str(caught.value)


@pytest.mark.parametrize("indexed", [True, False])
def test_a_tensor_in_two_files_is_refused(tmp_path: Path, indexed: bool) -> None:
    path = save_model(tmp_path, TENSORS, shards=2)
    save_file({"a.0.weight": TENSORS["a.0.weight"]}, path / "zz.safetensors")
    index = json.loads((path / INDEX_NAME).read_text())["weight_map"]
    if indexed:
        save_file(TENSORS, path / "model-00002-of-00002.safetensors")
        write_index(path, index)
    else:
        (path / INDEX_NAME).unlink()
    with pytest.raises(InputError, match=r"tensor '.*' is in both model-0000\S* and .*Remove the wrong file"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/passwd", "a/../../b", "..", "", "/", "x/..", "a\0b", "sub/../../../etc/passwd"],
)
def test_an_index_that_leaves_its_directory_is_refused(tmp_path: Path, name: str) -> None:
    save_model(tmp_path, TENSORS)
    path = tmp_path / "model"
    path.mkdir()
    write_index(path, {"a": name})
    with pytest.raises(InputError, match=r"outside its own directory. Refused"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"\xef\xbb\xbf{}", b"[" * 100_000, b"[]", b"null", b'{"weight_map": []}', b"{}",
     b'{"weight_map": {"a": 1}}', b'{"weight_map": {"a": null}}', b'{"weight_map": "model.safetensors"}'],
    ids=lambda content: repr(content[:20]),
)  # fmt: skip
def test_an_index_that_is_no_index_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    save_model(tmp_path, TENSORS)
    (tmp_path / INDEX_NAME).write_bytes(content)
    with pytest.raises(InputError, match=INDEX_NAME):
        open_checkpoint(tmp_path)


def test_an_index_that_is_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / INDEX_NAME).mkdir()
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read_index(tmp_path / INDEX_NAME)


def test_an_index_of_nothing_is_refused(tmp_path: Path) -> None:
    write_index(tmp_path, {})
    with pytest.raises(InputError, match="holds no tensors"):
        open_checkpoint(tmp_path)


def test_an_index_with_a_file_name_too_long_for_the_disk_is_refused(tmp_path: Path) -> None:
    write_index(tmp_path, {"a": "x" * 300 + ".safetensors"})
    with pytest.raises(InputError):
        open_checkpoint(tmp_path)


def test_a_model_name_too_long_for_the_disk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        open_checkpoint(tmp_path / ("x" * 300))


def test_a_single_file_beside_an_index_of_others_is_refused(tmp_path: Path) -> None:
    path = save_model(tmp_path, TENSORS, shards=2)
    save_model(path, TENSORS)
    with pytest.raises(InputError, match=r"holds both model\.safetensors and an index of other shards"):
        open_checkpoint(path)


def test_an_index_over_the_single_file_is_fine(tmp_path: Path) -> None:
    path = save_model(tmp_path, TENSORS)
    write_index(path, dict.fromkeys(TENSORS, "model.safetensors"))
    assert set(open_checkpoint(path).tensors) == set(TENSORS)


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"holds no safetensors file\.$"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04" + bytes(100), b"GGUF" + bytes(100), b"hello, world, how are you?"]
)
def test_a_file_of_another_kind_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"model\.bin: not a usable safetensors file"):
        open_checkpoint(path)


def test_a_directory_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(InputError, match=r"model\.safetensors: cannot be read: Is a directory"):
        open_checkpoint(tmp_path)


def test_a_pipe_in_the_place_of_a_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "model.safetensors"
    os.mkfifo(pipe)
    refused: list[InputError] = []

    def open_it() -> None:
        try:
            open_checkpoint(tmp_path)
        except InputError as error:
            refused.append(error)

    thread = threading.Thread(target=open_it)
    thread.start()
    thread.join(timeout=1)
    waited = thread.is_alive()
    if waited:
        os.close(os.open(pipe, os.O_WRONLY))  # lets it go
        thread.join()
    assert refused
    assert not waited


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    save_file({}, tmp_path / "model.safetensors")
    assert open_file(tmp_path / "model.safetensors")[0].entries == ()
    with pytest.raises(InputError, match="holds no tensors"):
        open_checkpoint(tmp_path)
