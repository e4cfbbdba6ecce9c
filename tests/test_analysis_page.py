"""The page of an analysis: needs no other file, trusts no word of the document, and shows whatever there is."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from streammerge import analysis_page as module
from streammerge import svg
from streammerge.analysis_page import analysis_page, write_pngs

Facts = dict[str, Any]

# Elements that have no end.
VOID = {"br", "meta", "wbr"}
HOSTILE = '<script>alert("x")</script> & \'>"><img src=x onerror=y>'


class Reading(HTMLParser):
    """What a page holds: tags with their attributes, and its text. Fails where an end does not fit its start."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)

    def rows_of(self, kind: str) -> int:
        return sum(1 for tag, attributes in self.tags if tag == "tr" and attributes.get("class") == kind)


def estimate(value: float, error: float = 0.02) -> Facts:
    return {"value": value, "error": error, "low": value - 2 * error, "high": value + 2 * error}


def contribution(gamma: float) -> Facts:
    keys = ("alpha_before", "alpha_after", "beta_before", "beta_after", "c_before", "c_after")
    return {key: estimate(0.1 * (i + 1)) for i, key in enumerate(keys)} | {"gamma": estimate(gamma)}


def step(label: str, gain: float, tasks: int, out: str | None = None) -> Facts:
    return {
        "label": label, "score": 0.8 + gain, "gain": gain, "gain_error": 0.004, "p": [-0.5 - gain] * tasks,
        "accuracy": [0.75] * tasks, "out": out,
    }  # fmt: skip


def make_facts(models: Sequence[str] = ("models/translate", "models/sort"), *, layers: int = 3) -> Facts:
    """An analysis with everything in it, as the guarded mode finds it."""
    tasks = [model.rsplit("/", 1)[-1] for model in models]
    count = len(models)
    names = ["base", *models, "task arithmetic", "stage 1", "Hi-Merging"]
    facts = {
        "streammerge": "0.1.0",
        "kind": "analysis",
        "verdict": "1 change, the first 1 of 2 steps",
        "decisions_mode": "guarded",
        "warnings": [],
        "models": list(models),
        "equal_models": [],
        "tasks": [
            {"name": task, "model": model, "metric": "choice_log_likelihood", "dev_examples": 200,
             "gain": estimate(1.75), "unit": 1.75}
            for task, model in zip(tasks, models, strict=True)
        ],
        "threshold": {"errors": 3.0, "fixed": None},
        "stage1": {"density": [0.9] * count, "scale": [1.0] * count, "weight": [0.8] * count},
        "surfaces": [
            {"model": model, "densities": [0.5, 0.9], "scales": [0.5, 1.0], "p": [[-1.5, -1.0], [-0.7, -0.123]]}
            for model in models
        ],
        "factors": [{"factor": factor, "score": 0.7, "p": [-0.6] * count} for factor in (0.4, 0.8, 1.2)],
        "layers": [
            {
                "name": f"model.layers.{layer}",
                "case": "partial" if layer == 0 else "mutual gain",
                "conflict": -0.111,
                "models": [
                    {"model": model, **contribution(0.345 if layer == m == 0 else -0.021), "tau": 0.06,
                     "beyond": layer == m == 0, "decision": "half" if layer == m == 0 else "keep", "density": 0.45,
                     "scale": 0.5, "in_result": contribution(0.234)}
                    for m, model in enumerate(models)
                ],
            }
            for layer in range(layers)
        ],
        "candidates": [
            step(f"model.layers.{layer}: drop {model}", 0.01 * (layer - 1), count, f"{tasks[0]} falls by 0.0100")
            for layer in range(layers) for model in models
        ],
        "prefixes": [step("nothing", 0.0, count), step(f"+ model.layers.0: half {models[0]}", 0.021, count)],
        "rounds": [],
        "changed": 1,
        "table": [
            {"name": name, "split": split,
             "tasks": {task: {"p": estimate(-0.521), "accuracy": estimate(0.654)} for task in tasks}}
            for split in ("dev", "test") for name in names
        ],
        "cost": {"jobs": 399, "waves": 7, "unit_loads": 168, "block_forwards": 2012, "bytes_read": 23698080,
                 "seconds": 61.4, "plain_loads": 9576, "plain_forwards": 2394},
    }  # fmt: skip
    return json.loads(json.dumps(facts))  # type: ignore[no-any-return]


def make_proxy() -> Facts:
    layers = [{"name": f"model.layers.{i}", "conflict_mass": 0.02 * i, "treated": i == 2} for i in range(3)]
    return {
        "streammerge": "0.1.0", "kind": "proxy", "verdict": "1 of 3 layers halved, by a proxy", "models": ["a", "b"],
        "layers": layers,
    }  # fmt: skip


def change(facts: Facts, **changes: Any) -> Facts:
    return {**facts, **changes}


def without_accuracy(facts: Facts) -> Facts:
    for row in facts["table"]:
        for found in row["tasks"].values():
            found["accuracy"] = None
    for tried in [*facts["candidates"], *facts["prefixes"]]:
        tried["accuracy"] = [None] * len(facts["models"])
    return facts


def without_after(facts: Facts) -> Facts:
    for layer in facts["layers"]:
        for one in layer["models"]:
            one["in_result"] = None
    return facts


def not_finite(facts: Facts) -> Facts:
    nothing = {"value": float("-inf"), "error": float("nan"), "low": float("-inf"), "high": float("nan")}
    facts["layers"][0]["models"][0] |= {"gamma": nothing, "alpha_after": nothing, "tau": float("nan")}
    facts["layers"][0]["conflict"] = float("nan")
    facts["table"][0]["tasks"]["sort"]["p"] = nothing
    facts["surfaces"][0]["p"][0][0] = float("-inf")
    facts["factors"][0] |= {"score": float("nan"), "p": [float("-inf")] * 2}
    facts["candidates"][0] |= {"gain": float("-inf"), "gain_error": float("nan")}
    return facts


def searched(facts: Facts) -> Facts:
    rounds = [
        step(f"{name}, {part}", 0.01, 2) for name in ("stage 1", "round 1") for part in ("searched over", "held back")
    ]
    return change(facts, decisions_mode="searched", candidates=[], prefixes=[], rounds=rounds)


def only(facts: Facts, *keys: str) -> Facts:
    return {key: value for key, value in facts.items() if key not in keys}


SHAPES: dict[str, Facts] = {
    "guarded": make_facts(),
    "searched": searched(make_facts()),
    "nothing searched": change(make_facts(), surfaces=[], factors=make_facts()["factors"][:1]),
    "no lists": only(make_facts(), "candidates", "prefixes", "rounds", "surfaces", "factors", "equal_models"),
    "no layers": change(make_facts(), layers=[], candidates=[], prefixes=[]),
    "dev only": change(make_facts(), table=[row for row in make_facts()["table"] if row["split"] == "dev"]),
    "test only": change(make_facts(), table=[row for row in make_facts()["table"] if row["split"] == "test"]),
    "no accuracy": without_accuracy(make_facts()),
    "nothing changed": without_after(make_facts()),
    "not finite": not_finite(make_facts()),
    "one model": make_facts(["models/alone"]),
    "eight models": make_facts([f"a/long/way/to/specialist-{i}" for i in range(8)], layers=128),
    "fixed threshold": change(make_facts(), threshold={"errors": 3.0, "fixed": 0.0}),
    "equal models": change(make_facts(), equal_models=[["models/translate", "models/sort"]]),
    "same last names": make_facts(["one/model", "other/model"]),
    "all known": change(make_facts(), cost=dict.fromkeys(make_facts()["cost"], 0)),
    "proxy": make_proxy(),
    "proxy of nothing": change(make_proxy(), layers=[]),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_document_gives_a_well_formed_page_with_every_name(shape: str) -> None:
    facts = SHAPES[shape]
    page = analysis_page(facts)
    text = Reading(page).text
    for name in [facts["verdict"], *facts["models"], *(layer["name"] for layer in facts["layers"])]:
        assert name in text
    for drawing in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(drawing)
        assert "nan" not in drawing


@pytest.mark.parametrize("shape", SHAPES)
def test_the_page_needs_nothing_from_outside(shape: str) -> None:
    page = analysis_page(SHAPES[shape])
    reading = Reading(page)
    assert not {tag for tag, _ in reading.tags} & {"script", "link", "img", "iframe", "object", "embed", "base"}
    anchors = {attributes.get("id") for _, attributes in reading.tags}
    for _, attributes in reading.tags:
        assert "src" not in attributes
        target = attributes.get("href")
        assert target is None or (target.startswith("#") and target[1:] in anchors)
    assert not re.search(r"https?:|url\(|@import", page)


def hostile(value: Any) -> Any:
    """The same document with a hostile tail to every word that comes from people or files."""
    if isinstance(value, dict):
        kept = {"kind", "split"}
        return {
            key if key in _KEYS else key + HOSTILE: one if key in kept else hostile(one) for key, one in value.items()
        }
    if isinstance(value, list):
        return [hostile(one) for one in value]
    return value + HOSTILE if isinstance(value, str) else value


# Every key of the document; what else is a key is the name of a task.
_KEYS = set(re.findall(r'"(\w+)":', json.dumps([make_facts(), make_proxy()]))) - {"translate", "sort"}


@pytest.mark.parametrize(
    "facts", [make_facts(), searched(make_facts()), make_proxy()], ids=["guarded", "searched", "proxy"]
)
def test_every_word_of_the_document_is_escaped(facts: Facts) -> None:
    reading = Reading(analysis_page(change(hostile(facts), warnings=[HOSTILE], equal_models=[[HOSTILE, HOSTILE]])))
    assert not {tag for tag, _ in reading.tags} & {"script", "img"}
    assert not any(name.startswith("on") for _, attributes in reading.tags for name in attributes)
    for name in [*hostile(facts)["models"], *(layer["name"] for layer in hostile(facts)["layers"])]:
        assert name in reading.text


def test_test_and_dev_are_apart_and_the_test_split_is_said_to_be_unseen() -> None:
    text = Reading(analysis_page(make_facts())).text
    assert text.index("Test split") < text.index("No decision has seen this split") < text.index("Dev data")
    assert "No test split was given" in Reading(analysis_page(SHAPES["dev only"])).text


def test_numbers_are_the_documents_own() -> None:
    text = Reading(analysis_page(make_facts())).text
    for number in ("−0.521", "[−0.561, −0.481]", "0.654", "+0.345", "−0.111", "→ +0.234", "−0.12", "9,576", "22.6 MiB"):
        assert number in text


def test_a_gamma_beyond_its_threshold_is_marked_and_no_other() -> None:
    tags = Reading(analysis_page(make_facts())).tags
    classes = [attributes.get("class") for tag, attributes in tags if tag == "td"]
    assert (classes.count("gamma beyond"), classes.count("gamma")) == (1, 5)


def test_the_nested_step_with_the_scores_of_the_result_is_marked() -> None:
    facts = make_facts()
    assert Reading(analysis_page(facts)).rows_of("result") == 3  # Hi-Merging on test and dev, and the step
    facts["prefixes"][1]["p"] = [-9.0, -9.0]
    assert Reading(analysis_page(facts)).rows_of("result") == 2


def test_many_candidates_are_folded_and_none_is_left_out() -> None:
    facts = make_facts(layers=20)
    page = analysis_page(facts)
    assert "16 more" in page
    assert all(candidate["label"] in page for candidate in facts["candidates"])


def test_rounds_stand_side_by_side() -> None:
    text = Reading(analysis_page(searched(make_facts()))).text
    assert text.index("searched over") < text.index("held back")
    assert text.count("round 1") == 2


def test_an_overview_comes_only_with_many_layers_or_models() -> None:
    assert "All layers at a glance" in analysis_page(SHAPES["eight models"])
    assert "All layers at a glance" not in analysis_page(make_facts())


def test_a_proxy_says_that_it_is_one() -> None:
    text = Reading(analysis_page(make_proxy())).text
    assert "This is a proxy" in text
    assert "No data confirmed" in text


def test_pictures_are_written_where_matplotlib_is(tmp_path: Path) -> None:
    facts = make_facts(["models/$x^{", "models/日本"])
    pictures = write_pngs(facts, tmp_path / "new")
    assert [path.name for path in pictures] == ["gamma.png", "surface-1--x-.png", "surface-2--.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    assert write_pngs(make_proxy(), tmp_path) == []


@pytest.mark.parametrize("shape", ["eight models", "no lists", "no layers", "not finite"])
def test_every_shape_of_document_gives_pictures(shape: str, tmp_path: Path) -> None:
    facts = SHAPES[shape]
    assert len(write_pngs(facts, tmp_path)) == bool(facts["layers"]) + len(facts.get("surfaces", []))


def test_without_matplotlib_there_are_no_pictures_and_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert write_pngs(make_facts(), tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_colours_tell_the_sign() -> None:
    assert svg.diverging(0.0, 1.0) == "#ffffff"
    below, above = svg.diverging(-1.0, 1.0), svg.diverging(1.0, 1.0)
    assert int(below[1:3], 16) < int(below[5:7], 16)
    assert int(above[1:3], 16) > int(above[5:7], 16)
    assert svg.diverging(5.0, 1.0) == above


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.3, 1.5, [0.4, 0.6, 0.8, 1.0, 1.2, 1.4]), (-8.0, 0.0, [-8, -6, -4, -2, 0]), (2.0, 2.0, [2.0])],
)
def test_ticks_are_round_numbers(low: float, high: float, expected: list[float]) -> None:
    assert svg.ticks(low, high) == pytest.approx(expected)


def test_a_whisker_beyond_the_scale_ends_in_an_arrow() -> None:
    inside = svg.whisker(0.0, -0.1, 0.1, (-1.0, 1.0), "x")
    beyond = svg.whisker(-5.0, -6.0, -4.0, (-1.0, 1.0), "x")
    assert ("<circle" in inside, "<path" in inside) == (True, False)
    assert ("<circle" in beyond, "<path" in beyond) == (False, True)
