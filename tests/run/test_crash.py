"""A merge that is killed, loses its power or meets a fault anywhere goes on, and ends with the bytes it would have had.

The suite takes some of the places, `scripts/nightly` every one (docs/reliability.md).
"""

from __future__ import annotations

import json
import pickle
import random
import shutil
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from streammerge.base.errors import DoesNotFit, InputError, OutputError
from streammerge.run.journal import WORK_FOLDER
from tests.command import Result
from tests.models import make_models, write_recipe
from tests.run.breaking import CHANGES, SYNCS, WRITES
from tests.run.zygote import Zygote

SHAPES = {f"model.layers.{i}.mlp.up_proj.weight": (300, 1024) for i in range(8)}
SOME, EVERY = 12, 1
strides = pytest.mark.parametrize("stride", [SOME, pytest.param(EVERY, marks=pytest.mark.nightly)])


@dataclass(frozen=True)
class Bench:
    """A merge to break: how long it takes unbroken, its calls, and what it writes."""

    zygote: Zygote
    recipe: Path
    whole: dict[str, bytes]
    counts: dict[str, int]
    seconds: float

    def arguments(self, out: Path) -> list[str | Path]:
        return [self.recipe, out, "--out-shard-size", "2MB", "--compile", "off", "--json", "--threads", "2"]

    def made(self, calls: Iterable[str]) -> int:
        """How many of these calls an unbroken run makes; another may make a few more or less, as its threads go."""
        return sum(self.counts.get(call, 0) for call in calls)

    def assert_nothing_wrong(self, out: Path) -> None:
        """No file has a final name and other bytes than it should."""
        for name, content in files(out).items():
            if name in self.whole:
                assert content == self.whole[name], name

    def assert_goes_on(self, out: Path) -> Result:
        result = self.zygote.run(self.arguments(out))
        assert result.code == 0, result.err
        assert files(out) == self.whole
        assert not list(out.glob(f"{WORK_FOLDER}*"))
        return result


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} if folder.is_dir() else {}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("crash")
    base, *models = make_models(folder, shapes=SHAPES)
    recipe = write_recipe(folder / "recipe.yaml", "ties", models, base=base, per_model={"weight": 0.5, "density": 0.4})
    with Zygote() as zygote:
        bench = Bench(zygote, recipe, {}, {}, 0.0)
        assert zygote.run(bench.arguments(folder / "first")).code == 0
        began = time.perf_counter()
        whole = folder / "whole"
        assert zygote.run(bench.arguments(whole), "count", file=str(folder / "counts")).code == 0
        seconds = time.perf_counter() - began
        yield Bench(zygote, recipe, files(whole), json.loads((folder / "counts").read_text()), seconds)


def numbers(count: int, stride: int) -> range:
    """1 to count, or some of them; another part of them for every length."""
    assert count > 0
    return range(1 + count % stride, count + 1, stride)


@strides
@pytest.mark.parametrize("way", ["kill_at", "kill_in_write"])
def test_killed_at_any_call(bench: Bench, tmp_path: Path, stride: int, way: str) -> None:
    killed = 0
    for number in numbers(bench.made(CHANGES if way == "kill_at" else WRITES), stride):
        out = tmp_path / str(number)
        code = bench.zygote.run(bench.arguments(out), way, number=number).code
        assert code in (0, -signal.SIGKILL)
        killed += code != 0
        bench.assert_nothing_wrong(out)
        bench.assert_goes_on(out)
        shutil.rmtree(out)
    assert killed > 0


@pytest.mark.parametrize("times", [12, pytest.param(200, marks=pytest.mark.nightly)])
def test_killed_at_any_moment(bench: Bench, tmp_path: Path, times: int) -> None:
    chance = random.Random(times)
    killed = 0
    for number in range(times):
        out = tmp_path / str(number)
        seconds = chance.random() * bench.seconds
        code = bench.zygote.run(bench.arguments(out), "kill_after", seconds=seconds).code
        assert code in (0, -signal.SIGKILL)
        killed += code != 0
        bench.assert_nothing_wrong(out)
        bench.assert_goes_on(out)
        shutil.rmtree(out)
    assert killed > times // 3


def test_killed_again_and_again(bench: Bench, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for number in range(3, bench.made(CHANGES), 5):
        code = bench.zygote.run(bench.arguments(out), "kill_at", number=number).code
        bench.assert_nothing_wrong(out)
        if code == 0:
            break
    bench.assert_goes_on(out)


@strides
@pytest.mark.parametrize("survives", ["nothing", "names", "pages"])
def test_without_power_at_any_call(bench: Bench, tmp_path: Path, stride: int, survives: str) -> None:
    """What was not synced is gone: all of it, or the bytes and not the names, or half of the pages."""
    resumed = []
    for number in numbers(bench.made(CHANGES), stride):
        out = tmp_path / str(number)
        options = {"number": number, "survives": survives, "seed": number, "out": str(out)}
        code = bench.zygote.run(bench.arguments(out), "power_cut", **options).code
        if code == 0:
            continue
        assert code == -signal.SIGKILL
        restore(out)
        bench.assert_nothing_wrong(out)
        resumed.append(bench.assert_goes_on(out).done["resumed"])
        shutil.rmtree(out)
    # Towards the end everything was safe.
    assert resumed[-1] == len(SHAPES)


def restore(out: Path) -> None:
    """The folder as it is when the power is back."""
    disk = pickle.loads(Path(f"{out}.disk").read_bytes())
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    for name, content in disk.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(content)


FAULTS = [
    *[(call, code) for call in ("pwritev", "pwrite", "write") for code in ("ENOSPC", "EDQUOT", "EIO", "ESTALE")],
    *[(call, code) for call in ("fdatasync", "fsync") for code in ("ENOSPC", "EDQUOT", "EIO", "ESTALE")],
    *[("fallocate", code) for code in ("ENOSPC", "EDQUOT", "EIO", "EPERM")],
    *[("rename", code) for code in ("ENOSPC", "EDQUOT", "EIO", "ESTALE", "EACCES")],
    *[(call, code) for call in ("mkdir", "unlink", "ftruncate") for code in ("EIO", "EACCES", "ENOSPC")],
    *[("open", code) for code in ("EIO", "ESTALE", "EMFILE", "EACCES", "ENOSPC")],
    *[("preadv", code) for code in ("EIO", "ESTALE")],
]
FULL = ("ENOSPC", "EDQUOT")
# A merge cannot do without any of these. (A read is tried again, an open may be to look, a file to remove may be gone.)
NEEDED = (*WRITES, *SYNCS, "fallocate", "rename", "mkdir", "ftruncate")


@strides
@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize(("call", "code"), FAULTS)
def test_a_fault_at_any_call(bench: Bench, tmp_path: Path, stride: int, call: str, code: str, lasting: bool) -> None:
    """One error that says what and where, the right exit code, nothing wrong in OUT, and then it goes on."""
    for number in numbers(bench.counts[call], stride):
        out = tmp_path / str(number)
        told = tmp_path / "told"
        options = {"call": call, "code": code, "number": number, "lasting": lasting, "told": str(told)}
        result = bench.zygote.run(bench.arguments(out), "fail", **options)
        failed = told.read_text() != ""
        told.unlink()
        bench.assert_nothing_wrong(out)
        assert failed or result.code == 0, result.err
        if result.code != 0 or (failed and (lasting or call in NEEDED)):
            assert_one_error(result, call, code)
        bench.assert_goes_on(out)
        shutil.rmtree(out)


def assert_one_error(result: Result, call: str, code: str) -> None:
    text = result.out + result.err
    assert text.count('"event": "error"') == 1 or text.count("error:") == 1, text
    assert "Traceback" not in text, text
    allowed = {InputError.exit_code, OutputError.exit_code}
    if code in FULL and call not in ("open", "preadv"):
        allowed = {DoesNotFit.exit_code}
    assert result.code in allowed | ({DoesNotFit.exit_code} if code in FULL else set()), (result.code, text)


@pytest.mark.parametrize("seed", range(3))
def test_reads_and_writes_cut_short_are_gone_on_with(bench: Bench, tmp_path: Path, seed: int) -> None:
    out = tmp_path / "out"
    assert bench.zygote.run(bench.arguments(out), "shorten", seed=seed).code == 0
    assert files(out) == bench.whole
