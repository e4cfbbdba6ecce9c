"""OUT: whose it is, when it is refused, and that only our own files are ever removed from it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest

import streammerge
from streammerge.api import make_plan as plan
from streammerge.base.errors import OutputError, StreamMergeError
from streammerge.plan.plan import Plan
from streammerge.run.journal import WORK_FOLDER
from streammerge.run.merge import Report
from streammerge.run.output import MANIFEST_NAME, clean, leftovers
from streammerge.storage.checkpoint import open_checkpoint
from tests.models import make_models, write_recipe
from tests.run.unfinished import before_the_end, before_the_side_files

SHAPES = {"embed": (70, 8), "layers.0.w": (16, 8), "layers.1.w": (16, 8), "norm": (8,)}
SHARD_BYTES = 1200


def merge(recipe: Path, out: Path, **options: Any) -> Report:
    options = {"out_shard_size": SHARD_BYTES, **options}
    return streammerge.merge(recipe, out, compile="off", threads=1, **options)


def plan_of(recipe: Path) -> Plan:
    return plan(recipe, out_shard_size=SHARD_BYTES)


def content_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


def write(path: Path, content: str = "mine") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    base, *models = make_models(tmp_path / "models", shapes=SHAPES)
    return write_recipe(tmp_path / "r.yaml", "task_arithmetic", models, base=base, per_model={"weight": 0.5})


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


# Refusals.


def test_a_directory_with_files_is_refused_and_left_as_it_is(recipe: Path, out: Path) -> None:
    for name in ("a.txt", "b.txt", "c.txt", "d.txt"):
        write(out / name)
    with pytest.raises(OutputError, match=r"out: is not empty \(it holds a\.txt, b\.txt, c\.txt and more\)") as caught:
        merge(recipe, out)
    assert caught.value.exit_code == 2
    with pytest.raises(OutputError, match="is not empty"):
        merge(recipe, out, restart=True)
    assert set(content_of(out)) == {"a.txt", "b.txt", "c.txt", "d.txt"}
    assert not (out / WORK_FOLDER).exists()


def test_an_empty_directory_and_a_new_one_in_new_ones_are_fine(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert merge(recipe, tmp_path / "empty").tensors == 4
    assert merge(recipe, tmp_path / "a" / "b" / "c").tensors == 4


def test_a_file_in_the_place_of_out_is_refused(recipe: Path, out: Path) -> None:
    write(out)
    with pytest.raises(OutputError, match=r"out: is a file. Choose a directory"):
        merge(recipe, out)
    assert out.read_text() == "mine"


def test_an_out_below_a_file_is_refused(recipe: Path, tmp_path: Path) -> None:
    write(tmp_path / "file")
    with pytest.raises(OutputError):
        merge(recipe, tmp_path / "file" / "out")


def test_an_input_as_out_is_refused_under_any_name(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "models" / "base")
    for name in ("models/base", "models/m1", "models/../models/m0/.", "link"):
        with pytest.raises(OutputError, match="is also an input"):
            merge(recipe, tmp_path / name)


def test_an_out_inside_or_around_an_input_is_refused(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"lies inside the input .*/models/m0"):
        merge(recipe, tmp_path / "models" / "m0" / "merged")
    with pytest.raises(OutputError, match=r"contains the input .*/models/base"):
        merge(recipe, tmp_path / "models")
    assert not (tmp_path / "models" / "m0" / "merged").exists()


def test_the_directory_of_an_input_file_is_refused(recipe: Path, tmp_path: Path) -> None:
    file = tmp_path / "models" / "m0" / "model.safetensors"
    single = write_recipe(tmp_path / "s.yaml", "linear", [file], per_model={"weight": 1})
    with pytest.raises(OutputError, match="contains the input"):
        merge(single, tmp_path / "models" / "m0")


def test_a_locked_out_is_refused(recipe: Path, out: Path) -> None:
    work = out / WORK_FOLDER
    work.mkdir(parents=True)
    lock = os.open(work / "lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for restart in (False, True):
            with pytest.raises(OutputError, match="another merge is running into it"):
                merge(recipe, out, restart=restart)
        with pytest.raises(OutputError, match="another merge is running into it"):
            clean(out, remove=True)
    finally:
        os.close(lock)
    assert merge(recipe, out).tensors == 4


def test_a_finished_out_of_the_same_plan_is_left_alone(recipe: Path, out: Path) -> None:
    merge(recipe, out)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert merge(recipe, out).already_finished
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


@pytest.mark.parametrize("restart", [False, True])
def test_a_finished_out_of_another_plan_is_refused(recipe: Path, out: Path, restart: bool) -> None:
    merge(recipe, out)
    before = content_of(out)
    with pytest.raises(
        OutputError, match=r"holds the finished result of another merge \(plan [0-9a-f]{12}, this one is"
    ):
        merge(recipe, out, seed=1, restart=restart)
    assert content_of(out) == before


def test_an_unfinished_out_of_another_plan_is_refused_and_the_difference_shown(recipe: Path, out: Path) -> None:
    merge(recipe, out)
    before_the_side_files(out, plan_of(recipe))
    before = content_of(out)
    recipe.write_text(recipe.read_text().replace("0.5", "0.75"))
    with pytest.raises(OutputError) as caught:
        merge(recipe, out, seed=7)
    message = str(caught.value)
    assert "holds an unfinished merge of another plan; what differs:\n" in message
    assert "\n  seed: 0 then, 7 now\n" in message
    assert "weight 0.5/0.5" in message
    assert "weight 0.75/0.75" in message
    assert "--restart" in message
    assert "inputs" not in message
    assert content_of(out) == before


def test_a_changed_input_is_shown_as_the_difference(recipe: Path, out: Path, tmp_path: Path) -> None:
    merge(recipe, out)
    before_the_side_files(out, plan_of(recipe))
    os.utime(tmp_path / "models" / "m0" / "model.safetensors", ns=(0, 12345))
    with pytest.raises(OutputError, match=r"inputs\[1\]\.files\.model\.safetensors\[1\]: \d+ then, 12345 now"):
        merge(recipe, out)


@pytest.mark.parametrize("content", ["", "{", "\0\0\0", "\udcff", "[" * 100_000])
def test_a_damaged_plan_is_called_damaged_and_restart_begins_again(recipe: Path, out: Path, content: str) -> None:
    merge(recipe, out)
    expected = content_of(out)
    before_the_side_files(out, plan_of(recipe))
    (out / WORK_FOLDER / "plan.json").write_text(content, errors="surrogateescape")
    with pytest.raises(OutputError, match=r"plan\.json: is damaged\. Give --restart to begin again"):
        merge(recipe, out)
    assert merge(recipe, out, restart=True).resumed == 0
    assert content_of(out) == expected


def test_a_plan_that_is_json_and_no_plan_is_no_crash(recipe: Path, out: Path) -> None:
    for content in (
        "null",
        "[]",
        "{}",
        '{"digest": 5, "facts": [], "shards": ["../x", 7]}',
        '{"shards": null}',
        '{"shards": 5}',
    ):
        write(out / WORK_FOLDER / "plan.json", content)
        with pytest.raises(OutputError, match="unfinished merge of another plan"):
            merge(recipe, out)
        leftovers(out)


def test_a_damaged_manifest_of_a_finished_out_gets_advice_that_helps(recipe: Path, out: Path) -> None:
    merge(recipe, out)
    (out / MANIFEST_NAME).write_text("{")
    with pytest.raises(OutputError, match="damaged") as caught:
        merge(recipe, out)
    if "--restart" in str(caught.value):
        assert merge(recipe, out, restart=True).tensors == 4


# Going on.


def test_an_unfinished_out_of_the_same_plan_goes_on_and_ends_with_the_same_bytes(recipe: Path, out: Path) -> None:
    merge(recipe, out)
    expected = content_of(out)
    before_the_end(out, plan_of(recipe))
    assert merge(recipe, out).resumed == 4
    before_the_side_files(out, plan_of(recipe))
    assert merge(recipe, out).resumed == 4
    assert content_of(out) == expected
    assert not (out / WORK_FOLDER).exists()


def test_a_work_folder_that_cannot_be_removed_yet_is_removed_later(
    recipe: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    # As on a network file system, when another process still has a file open in it.
    monkeypatch.setattr("shutil.rmtree", fail)
    assert merge(recipe, out).resumed == 0
    assert list(out.glob(f"{WORK_FOLDER}*"))
    assert not streammerge.verify(out).problems
    monkeypatch.undo()
    assert merge(recipe, out).already_finished
    assert not list(out.glob(f"{WORK_FOLDER}*"))


def test_shards_complete_but_not_yet_named_are_named(recipe: Path, out: Path) -> None:
    merge(recipe, out)
    expected = content_of(out)
    before_the_side_files(out, plan_of(recipe))
    for path in out.glob("*.safetensors"):
        path.rename(f"{path}.partial")
    assert merge(recipe, out).resumed == 4
    assert content_of(out) == expected


def same_bytes_or_refused(recipe: Path, out: Path, expected: dict[str, bytes], **options: Any) -> None:
    """Going on either ends with the right bytes or says why not. Never a finished output that is wrong."""
    try:
        merge(recipe, out, **options)
    except StreamMergeError:
        return
    assert content_of(out) == expected


def test_a_lost_journal_costs_time_and_nothing_else(recipe: Path, out: Path) -> None:
    merge(recipe, out)
    expected = content_of(out)
    before_the_side_files(out, plan_of(recipe))
    (out / WORK_FOLDER / "journal").unlink()
    assert merge(recipe, out).resumed == 0
    assert content_of(out) == expected


def test_a_damaged_journal_does_not_cost_the_bytes_of_a_finished_shard(recipe: Path, out: Path) -> None:
    merge(recipe, out, out_shard_size="5GB")
    expected = content_of(out)
    before_the_side_files(out, plan(recipe))
    journal = out / WORK_FOLDER / "journal"
    journal.write_bytes(journal.read_bytes()[:-10])
    same_bytes_or_refused(recipe, out, expected, out_shard_size="5GB")


def test_a_shard_that_is_gone_is_not_taken_for_done(recipe: Path, out: Path) -> None:
    merge(recipe, out)
    expected = content_of(out)
    before_the_side_files(out, plan_of(recipe))
    min(out.glob("*.safetensors")).unlink()
    same_bytes_or_refused(recipe, out, expected)


@pytest.mark.parametrize("left", [0, 1000])
def test_a_partial_file_that_is_gone_or_cut_is_not_taken_for_done(recipe: Path, out: Path, left: int) -> None:
    merge(recipe, out, out_shard_size="5GB")
    expected = content_of(out)
    before_the_side_files(out, plan(recipe), keeps=lambda name: "layers" in name)
    shard = out / "model.safetensors"
    if left:
        (out / "model.safetensors.partial").write_bytes(shard.read_bytes()[:left])
    shard.unlink()
    same_bytes_or_refused(recipe, out, expected, out_shard_size="5GB")


# Leftovers.


def test_leftovers_are_partial_files_finished_shards_and_work_files(recipe: Path, out: Path) -> None:
    merge(recipe, out)
    before_the_side_files(out, plan_of(recipe))
    first = min(out.glob("*.safetensors"))
    first.rename(f"{first}.partial")
    names = {str(path.relative_to(out)) for path in leftovers(out)}
    shards = {shard.name for shard in plan_of(recipe).shards} - {first.name}
    assert names == shards | {f"{first.name}.partial", f"{WORK_FOLDER}/plan.json", f"{WORK_FOLDER}/journal"}


def test_clean_lists_first_and_removes_when_asked(recipe: Path, out: Path) -> None:
    merge(recipe, out)
    before_the_side_files(out, plan_of(recipe))
    before = content_of(out)
    listed = clean(out, remove=False)
    assert content_of(out) == before
    assert clean(out, remove=True) == listed
    assert list(out.iterdir()) == []
    assert clean(out, remove=True) == []


def test_clean_does_not_touch_a_finished_out_or_a_directory_of_others(recipe: Path, out: Path, tmp_path: Path) -> None:
    merge(recipe, out)
    before = content_of(out)
    assert clean(out, remove=True) == []
    assert content_of(out) == before
    write(tmp_path / "other" / "x.partial")
    assert clean(tmp_path / "other", remove=True) == []
    assert clean(tmp_path / "nowhere", remove=True) == []
    assert (tmp_path / "other" / "x.partial").exists()


@pytest.mark.parametrize("how", ["clean", "restart"])
def test_files_that_are_not_ours_survive(recipe: Path, out: Path, how: str) -> None:
    merge(recipe, out)
    before_the_side_files(out, plan_of(recipe))
    mine = {"notes.txt", "model.bin", "other.safetensors", "sub/model-00001-of-00002.safetensors"}
    for name in mine:
        write(out / name)
    if how == "clean":
        clean(out, remove=True)
        assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == mine
    else:
        merge(recipe, out, restart=True)
    assert all((out / name).read_text() == "mine" for name in mine)


def test_a_partial_file_that_is_not_ours_survives(recipe: Path, out: Path) -> None:
    merge(recipe, out)
    before_the_side_files(out, plan_of(recipe))
    download = write(out / "download.partial")
    clean(out, remove=True)
    assert download.exists()


def test_a_plan_that_names_files_elsewhere_removes_nothing_there(out: Path, tmp_path: Path) -> None:
    names = ["../precious", "/precious", "sub/precious", "..", ".", "", "precious\0", WORK_FOLDER]
    others = [tmp_path / "precious", tmp_path / "out.partial", out / "sub" / "precious", out / "sub.partial"]
    for other in others:
        write(other)
    write(out / WORK_FOLDER / "plan.json", json.dumps({"digest": "x", "files": names, "shards": names}))
    clean(out, remove=True)
    assert all(other.exists() for other in others)


def test_restart_throws_the_work_of_another_plan_away(recipe: Path, out: Path, tmp_path: Path) -> None:
    merge(recipe, out)
    before_the_side_files(out, plan_of(recipe))
    report = merge(recipe, out, seed=1, out_shard_size="5GB", restart=True)
    assert report.resumed == 0
    merge(recipe, tmp_path / "fresh", seed=1, out_shard_size="5GB")
    assert content_of(out) == content_of(tmp_path / "fresh")


def test_restart_in_the_last_moment_of_another_plan_leaves_no_file_of_it(
    recipe: Path, out: Path, tmp_path: Path
) -> None:
    # The index of the plan before would make the new single file unreadable.
    merge(recipe, out)
    before_the_end(out, plan_of(recipe))
    merge(recipe, out, out_shard_size="5GB", restart=True)
    merge(recipe, tmp_path / "fresh", out_shard_size="5GB")
    assert content_of(out) == content_of(tmp_path / "fresh")
    open_checkpoint(out)


def test_restart_over_a_damaged_plan_leaves_no_shard_of_it(recipe: Path, out: Path, tmp_path: Path) -> None:
    merge(recipe, out)
    before_the_side_files(out, plan_of(recipe))
    (out / WORK_FOLDER / "plan.json").write_text("{")
    merge(recipe, out, out_shard_size="5GB", restart=True)
    merge(recipe, tmp_path / "fresh", out_shard_size="5GB")
    assert content_of(out) == content_of(tmp_path / "fresh")


@pytest.mark.parametrize("record", ["sound", "gone", "damaged"])
def test_clean_in_the_last_moment_does_not_leave_an_out_that_seems_finished(
    recipe: Path, out: Path, record: str
) -> None:  # fmt: skip
    # Stopped after the manifest was written and before the work folder was all removed; then cleaned; then run again.
    merge(recipe, out)
    expected = content_of(out)
    before_the_end(out, plan_of(recipe))
    if record == "gone":
        (out / WORK_FOLDER / "plan.json").unlink()
    elif record == "damaged":
        (out / WORK_FOLDER / "plan.json").write_text("{")
    clean(out, remove=True)
    try:
        merge(recipe, out)
    except OutputError:
        return
    assert content_of(out) == expected


def test_a_stop_while_the_work_folder_is_removed_ends_with_the_same_bytes(recipe: Path, out: Path) -> None:
    merge(recipe, out)
    expected = content_of(out)
    for gone in (["plan.json"], ["journal"], ["plan.json", "journal"], ["plan.json", "journal", "lock"]):
        before_the_end(out, plan_of(recipe))
        for name in gone:
            (out / WORK_FOLDER / name).unlink()
        merge(recipe, out)
        assert content_of(out) == expected
