"""Models that see, through transformers: their parts merged apart, and text models merged into their language part."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import streammerge
from streammerge.base.errors import RecipeError, ShapeMismatch, UserError
from streammerge.report import plan_json, plan_rows
from streammerge.run.merge import Options, make_plan, schedule_for
from tests.models import read_tensors
from tests.run.seeing import KINDS, LAYERS, Kind, loaded, look, make_seeing, make_text, put, weights
from tests.run.test_adapters import write_adapter
from tests.study.tiny import TOKENS, make_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own
# One name per line of the language part, on disk as of old.
LLAVA = KINDS["llava"].names


def write(path: Path, recipe: Any, *more: Any) -> Path:
    path.write_text(yaml.safe_dump_all([recipe, *more], sort_keys=False))
    return path


def entry(model: Path | str, weight: float = 0.5, **keys: Any) -> dict[str, Any]:
    return {"model": str(model), "parameters": {"weight": weight}, **keys}


def linear(*models: dict[str, Any], **keys: Any) -> dict[str, Any]:
    return {"merge_method": "linear", "models": list(models), "parameters": {"normalize": False}, **keys}


def merge(recipe: Path, out: Path, *, strict: bool = True) -> Path:
    """Merge; nothing may be worth a warning."""
    streammerge.merge(recipe, out, compile="off", threads=1, strict=strict)
    return out


def renamed(tensors: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """What `names` make of a text model, worked out in the simplest way: one beginning fits a name."""
    made = {}
    for name, tensor in tensors.items():
        begins = [begin for begin in names if name.startswith(begin)]
        made[names[begins[0]] + name.removeprefix(begins[0]) if begins else name] = tensor
    return made


def config_of(path: Path) -> Any:
    return json.loads((path / "config.json").read_text())


def changed(path: Path, change: Callable[[Any], None]) -> None:
    config = config_of(path)
    change(config)
    (path / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_seeing(tmp_path_factory.mktemp("llava") / "vlm", "llava")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text(tmp_path_factory.mktemp("llama") / "text", "llava", seed=1)


# --- a text model in the language part -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_model_merges_into_the_language_part_and_the_rest_stays(tmp_path: Path, kind: str) -> None:
    own: Kind = KINDS[kind]
    seeing, text = make_seeing(tmp_path / "vlm", kind), make_text(tmp_path / "text", kind, seed=1)
    recipe = write(tmp_path / "r.yaml", linear(entry(seeing, 0.5), entry(text, 0.25, names=own.names)))
    out = merge(recipe, tmp_path / "out")
    before, other, merged = weights(seeing), renamed(weights(text), own.names), weights(out)
    assert merged.keys() == before.keys()
    expected = {
        name: (0.5 * tensor.double() + 0.25 * other[name].double()).float() if name in other else tensor
        for name, tensor in before.items()
    }
    assert other.keys() <= before.keys()
    assert not any(name.startswith(own.begins) for name in other)
    assert all(torch.equal(merged[name], expected[name]) for name in before)
    assert config_of(out) == config_of(seeing)
    put(seeing, expected)
    model, plain = loaded(out), loaded(seeing)
    for picture in (True, False):
        assert torch.equal(look(model, kind, picture=picture), look(plain, kind, picture=picture))
    assert not torch.equal(look(model, kind)[:, :9], look(model, kind, picture=False))


def test_it_is_the_merge_of_the_language_part_as_a_text_model(tmp_path: Path, llava: Path, llama: Path) -> None:
    base = make_text(tmp_path / "base", "llava", seed=2)
    alone = make_text(tmp_path / "alone", "llava", seed=3)
    begin = "language_model."
    part = {name.removeprefix(begin): tensor for name, tensor in weights(llava).items() if name.startswith(begin)}
    put(alone, part)
    ties = {"merge_method": "ties", "parameters": {"density": 0.5, "weight": 0.7}, "dtype": "bfloat16"}
    plain = {**ties, "base_model": str(base), "models": [{"model": str(alone)}, {"model": str(llama)}]}
    apart = weights(merge(write(tmp_path / "a.yaml", plain), tmp_path / "a"))
    mapped = [{"model": str(base), "names": LLAVA}, {"model": str(llava)}, {"model": str(llama), "names": LLAVA}]
    recipe = write(tmp_path / "b.yaml", {**ties, "base_model": str(base), "models": mapped})
    out = merge(recipe, tmp_path / "b")
    within = weights(out)
    for name, tensor in apart.items():
        assert torch.equal(within[begin + name], tensor)
    for name in weights(llava).keys() - {begin + name for name in apart}:
        assert torch.equal(within[name], weights(llava)[name].bfloat16())
    # The base has a map, so the model that sees says what the output is.
    assert config_of(out)["architectures"] == ["LlavaForConditionalGeneration"]


def test_the_longest_beginning_counts(tmp_path: Path, llava: Path, llama: Path) -> None:
    names = {"model.": "language_model.model.", "": "nowhere.", "lm_head.weight": "language_model.lm_head.weight"}
    one = merge(write(tmp_path / "a.yaml", linear(entry(llava), entry(llama, names=names))), tmp_path / "a")
    two = merge(write(tmp_path / "b.yaml", linear(entry(llava), entry(llama, names=LLAVA))), tmp_path / "b")
    assert read_tensors(one) == read_tensors(two)


def test_filters_and_gradients_go_by_the_names_of_the_output(tmp_path: Path, llava: Path, llama: Path) -> None:
    weight = [{"filter": "language_model.model.layers.0.", "value": 1.0}, {"filter": "self_attn", "value": [0.0, 1.0]},
              {"value": 0.25}]  # fmt: skip
    models = [entry(llava), {"model": str(llama), "names": LLAVA, "parameters": {"weight": weight}}]
    out = weights(merge(write(tmp_path / "r.yaml", linear(*models)), tmp_path / "out"))
    x, y = weights(llava), renamed(weights(llama), LLAVA)
    for name, share in {"layers.0.self_attn.q_proj": 1.0, "layers.1.self_attn.q_proj": 0.5,
                        "layers.2.self_attn.q_proj": 1.0, "layers.2.mlp.up_proj": 0.25}.items():  # fmt: skip
        full = f"language_model.model.{name}.weight"
        assert torch.equal(out[full], (0.5 * x[full].double() + share * y[full].double()).float()), name


def test_text_models_are_merged_first_and_what_they_make_goes_in(tmp_path: Path, llava: Path, llama: Path) -> None:
    other = make_text(tmp_path / "other", "llava", seed=4)
    first = linear(entry(llama), entry(other), name="texts")
    second = linear(entry(llava), entry("texts", names=LLAVA))
    out = weights(merge(write(tmp_path / "r.yaml", first, second), tmp_path / "out"))
    x, a, b = weights(llava), weights(llama), weights(other)
    name = "model.layers.1.mlp.up_proj.weight"
    texts = (0.5 * a[name].double() + 0.5 * b[name].double()).float()
    full = f"language_model.{name}"
    assert torch.equal(out[full], (0.5 * x[full].double() + 0.5 * texts.double()).float())


def test_an_adapter_goes_by_the_names_of_its_own_base(tmp_path: Path, llava: Path, llama: Path) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    lora = write_adapter(tmp_path / "lora", {name: (32, 32)})
    written = merge(
        write(tmp_path / "a.yaml", {"merge_method": "passthrough", "models": [{"model": f"{llama}+{lora}"}]}),
        tmp_path / "a",
    )
    assert not torch.equal(weights(written)[name], weights(llama)[name])
    recipe = linear(entry(llava, 0.0), entry(f"{llama}+{lora}", 1.0, names=LLAVA))
    out = merge(write(tmp_path / "b.yaml", recipe), tmp_path / "b")
    for each, tensor in weights(written).items():
        assert torch.equal(weights(out)[f"language_model.{each}"], tensor)


def test_a_head_of_its_own_makes_the_output_untied_and_a_tied_text_model_has_its_embedding(tmp_path: Path) -> None:
    head, embedding = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
    names = KINDS["gemma3"].names
    for number, tied in enumerate((True, False)):
        folder = tmp_path / str(tied)
        folder.mkdir()
        seeing = make_seeing(folder / "vlm", "gemma3", seed=number)
        text = make_text(folder / "text", "gemma3", seed=2)
        x, y = weights(seeing), renamed(weights(text), names)
        assert head not in {**x, **y}
        untied = text if tied else seeing
        new = torch.randn_like(x[embedding])
        put(untied, {**weights(untied), (head.removeprefix("language_model.") if tied else head): new})
        changed(untied, lambda config: config.update(tie_word_embeddings=False))
        out = merge(write(folder / "r.yaml", linear(entry(seeing), entry(text, names=names))), folder / "out")
        assert torch.equal(weights(out)[head], ((x if tied else y)[embedding] * 0.5 + new * 0.5))
        assert config_of(out)["tie_word_embeddings"] is False
        model = loaded(out)
        assert torch.equal(model.lm_head.weight, weights(out)[head])
        assert look(model, "gemma3").isfinite().all()


def test_vocabularies_meet_through_the_names(tmp_path: Path) -> None:
    seeing = make_seeing(tmp_path / "vlm", "llava", vocab_size=300)
    text = make_text(tmp_path / "text", "llava", seed=1, vocab_size=298)
    make_tokenizer().save_pretrained(seeing)
    make_tokenizer().save_pretrained(text)
    short = json.loads((text / "tokenizer.json").read_text())
    lost = [token for token, number in short["model"]["vocab"].items() if number >= 298]
    short["model"]["vocab"] = {token: n for token, n in short["model"]["vocab"].items() if token not in lost}
    (text / "tokenizer.json").write_text(json.dumps(short))
    models = linear(entry(seeing), entry(text, names=LLAVA))
    with pytest.raises(
        ShapeMismatch, match=r"(?s)lm_head.*\[300, 32\].*\[298, 32\].*add  tokenizer: \{source: union\}"
    ):
        make_plan(write(tmp_path / "a.yaml", models), Options())
    recipe = write(tmp_path / "b.yaml", {**models, "tokenizer": {"source": "union"}})
    out = merge(recipe, tmp_path / "out")
    x, y, made = weights(seeing), renamed(weights(text), LLAVA), weights(out)
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        both = (0.5 * x[name][:298].double() + 0.5 * y[name].double()).float()
        assert torch.equal(made[name], torch.cat([both, x[name][298:]]))
    assert look(loaded(out), "llava").shape[-1] == 300


def test_what_nobody_learned_does_not_come_along(tmp_path: Path, llava: Path) -> None:
    text = make_text(tmp_path / "text", "llava", seed=1)
    put(text, {**weights(text), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    out = merge(write(tmp_path / "r.yaml", linear(entry(llava), entry(text, names=LLAVA))), tmp_path / "out")
    assert weights(out).keys() == weights(llava).keys()


def test_a_union_of_tokens_makes_the_language_part_larger(tmp_path: Path) -> None:
    seeing = make_seeing(tmp_path / "vlm", "llava", vocab_size=len(TOKENS))
    text = make_text(tmp_path / "text", "llava", seed=1, vocab_size=len(TOKENS) + 2)
    make_tokenizer().save_pretrained(seeing)
    longer = make_tokenizer()
    longer.add_tokens(["<one>", "<two>"])
    longer.save_pretrained(text)
    recipe = linear(entry(seeing), entry(text, names=LLAVA), tokenizer={"source": "union"})
    out = merge(write(tmp_path / "r.yaml", recipe), tmp_path / "out")
    assert config_of(out)["text_config"]["vocab_size"] == len(TOKENS) + 2
    assert config_of(out)["image_token_index"] == config_of(seeing)["image_token_index"]
    assert look(loaded(out), "llava").shape[-1] == len(TOKENS) + 2


def test_the_plan_says_what_a_model_takes_part_in(tmp_path: Path, llava: Path, llama: Path) -> None:
    recipe = write(tmp_path / "r.yaml", linear(entry(llava), entry(llama, names=LLAVA)))
    plan = make_plan(recipe, Options(strict=True))
    schedule = schedule_for(plan, Options())
    rows = [text for label, text in plan_rows(plan, schedule, 1.0, []) if label == "names"]
    assert rows == [f"{llama} is in 30 of 89 tensors (all → language_model.), and has no part in the other 59"]
    assert plan_json(plan, schedule, 1.0, [])["names"] == [
        {"model": str(llama), "names": LLAVA, "tensors": 30, "of": 89}
    ]


# --- what cannot be --------------------------------------------------------------------------------------------------


def refusal(folder: Path, *models: dict[str, Any], **keys: Any) -> str:
    """What planning a recipe says."""
    with pytest.raises(UserError) as caught:
        make_plan(write(folder / "r.yaml", linear(*models, **keys)), Options())
    return str(caught.value)


def test_a_text_model_of_another_width_is_refused(tmp_path: Path, llava: Path) -> None:
    wide = make_text(tmp_path / "wide", "llava", hidden_size=48)
    text = refusal(tmp_path, entry(llava), entry(wide, names=LLAVA))
    assert "language_model.lm_head.weight differs between" in text
    assert f"expected  {llava}" in text
    assert f"found     {wide}" in text
    assert "[128, 32]" in text
    assert "[128, 48]" in text
    assert "So do 29 more" in text
    assert "take the text model that the part was made of" in text


def test_nor_is_one_of_another_width_grafted_alone(tmp_path: Path, llava: Path) -> None:
    wide = make_text(tmp_path / "wide", "llava", hidden_size=48)
    parts = {"text_decoder": {"models": [{"model": str(wide), "names": LLAVA}]},
             "vision_tower": {"models": [{"model": str(llava)}]}}  # fmt: skip
    recipe = {"merge_method": "passthrough", "modules": parts}
    with pytest.raises(ShapeMismatch, match="take the text model that the part was made of"):
        make_plan(write(tmp_path / "r.yaml", recipe), Options())


@pytest.mark.parametrize("layers", [LAYERS - 1, LAYERS + 1])
def test_a_text_model_of_another_depth_is_refused(tmp_path: Path, llava: Path, layers: int) -> None:
    other = make_text(tmp_path / "other", "llava", num_hidden_layers=layers)
    text = refusal(tmp_path, entry(llava), entry(other, names=LLAVA))
    assert f"it has {layers} layers, and {llava} has {LAYERS} under language_model.model.layers" in text
    assert "1 problem" in text


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({"modle.": "language_model.model."}, r"none of its tensors begins with 'modle\.'\. Did you mean model\.\?"),
        ({"zzz": "x"}, r"begins with 'zzz'\. They begin with .*'model\.'"),
        ({"model.": "language_model.model."}, r"has no lm_head\.weight\. Should .* be 'language_model\.lm_head\.w"),
        ({"": "model."}, r"has none of its tensors, .* Should 'model\.' there be 'language_model\.'"),
        (
            {"": "language_model.", "model.norm.": "language_model.model.layers.0.input_layernorm."},
            r"layers\.0\.input_layernorm\.weight and model\.norm\.weight would both be language_model\.model\.lay",
        ),
        ({"": None}, "expected text, found None"),
        (["model."], "expected a map, found"),
    ],
)  # fmt: skip
def test_names_that_fit_nothing_are_refused_with_what_would(
    tmp_path: Path, llava: Path, llama: Path, names: Any, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        make_plan(write(tmp_path / "r.yaml", linear(entry(llava), entry(llama, names=names))), Options())


def test_a_text_model_that_lacks_a_tensor_of_the_part_is_refused(tmp_path: Path, llava: Path) -> None:
    text = make_text(tmp_path / "text", "llava")
    left = {"model.norm.weight", "model.layers.1.mlp.up_proj.weight"}
    put(text, {name: tensor for name, tensor in weights(text).items() if name not in left})
    said = refusal(tmp_path, entry(llava), entry(text, names=LLAVA))
    assert (
        "it has nothing for language_model.model.layers.1.mlp.up_proj.weight, language_model.model.norm.weight" in said
    )


def test_without_names_the_refusal_says_how_it_could_be(tmp_path: Path, llava: Path, llama: Path) -> None:
    said = refusal(tmp_path, entry(llava), entry(llama))
    assert f"If {llama} is to be merged into a part of {llava}" in said
    assert 'names: {"": "language_model."}' in said


def test_the_config_of_a_text_model_is_none_for_one_that_sees(tmp_path: Path) -> None:
    seeing, text = make_seeing(tmp_path / "vlm", "qwen2_vl"), make_text(tmp_path / "text", "qwen2_vl")
    said = refusal(tmp_path, entry(text), entry(seeing))
    assert f"visual.blocks is in {seeing}, and {text}, whose config" in said
    recipe = write(tmp_path / "b.yaml", linear(entry(text, names={"model.": "model."}), entry(seeing)))
    assert config_of(merge(recipe, tmp_path / "out")) == config_of(seeing)


def test_a_document_has_one_model_without_names_and_one_map_for_each_other(
    tmp_path: Path, llava: Path, llama: Path
) -> None:
    assert "every model has `names`" in refusal(tmp_path, entry(llama, names=LLAVA), entry(llava, names={"": ""}))
    parts = {"text_decoder": {"models": [entry(llava), entry(llama, names=LLAVA)]},
             "vision_tower": {"models": [entry(llava), entry(llama, names={"": "x."})]}}  # fmt: skip
    recipe = {"merge_method": "linear", "modules": parts}
    with pytest.raises(RecipeError, match="has other names elsewhere in this document"):
        make_plan(write(tmp_path / "r.yaml", recipe), Options())


# --- models that see with each other ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_models_that_see_merge_apart(tmp_path: Path, kind: str) -> None:
    own: Kind = KINDS[kind]
    one, two = make_seeing(tmp_path / "a", kind), make_seeing(tmp_path / "b", kind, seed=1)
    tower = own.begins.rstrip(".")
    weight = [{"filter": own.begins, "value": [0.0, 1.0]}, {"filter": "layers.", "value": [1.0, 0.0]}, {"value": 0.25}]
    models = [{"model": str(one), "parameters": {"weight": 1.0}}, {"model": str(two), "parameters": {"weight": weight}}]
    recipe = write(tmp_path / "r.yaml", linear(*models))
    out = merge(recipe, tmp_path / "out")
    x, y, merged = weights(one), weights(two), weights(out)
    inside = [name.partition(".0.")[0] for name in x if name.startswith(own.begins) and ".0." in name]
    stack = max(inside, key=inside.count)
    for i in range(LAYERS):
        # Each stack counts its own layers.
        seen = [name for name in x if name.startswith(f"{stack}.{i}.")]
        read = [name for name in x if f"layers.{i}." in name and not name.startswith(own.begins)]
        assert seen
        assert read
        for names, share in ((seen, i / (LAYERS - 1)), (read, 1 - i / (LAYERS - 1))):
            for name in names:
                assert torch.equal(merged[name], (x[name].double() + share * y[name].double()).float()), name
    assert look(loaded(out), kind).isfinite().all()
    apart = {
        "merge_method": "linear", "parameters": {"normalize": False},
        "modules": {tower.rpartition(".")[2]: {"models": [entry(one, 0.0), entry(two, 1.0)]},
                    "default": {"models": [entry(one, 1.0), entry(two, 0.0)]}},
    }  # fmt: skip
    merged = weights(merge(write(tmp_path / "m.yaml", apart), tmp_path / "m"))
    for name in x:
        assert torch.equal(merged[name], (y if name.startswith(own.begins) else x)[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_the_language_part_are_put_together_anew(tmp_path: Path, kind: str) -> None:
    own: Kind = KINDS[kind]
    seeing = make_seeing(tmp_path / "vlm", kind)
    text = make_text(tmp_path / "text", kind, seed=1, num_hidden_layers=LAYERS + 2)
    slices = [{"sources": [{"model": str(seeing), "layer_range": [0, 2]}]},
              {"sources": [{"model": str(text), "layer_range": [1, LAYERS + 2], "names": own.names}]}]  # fmt: skip
    tower = own.begins.rstrip(".").rpartition(".")[2]
    recipe = {"merge_method": "passthrough",
              "modules": {tower: {"models": [{"model": str(seeing)}]}, "default": {"slices": slices}}}  # fmt: skip
    out = merge(write(tmp_path / "r.yaml", recipe), tmp_path / "out", strict=False)
    config = config_of(out)
    assert config["text_config"]["num_hidden_layers"] == LAYERS + 3
    assert config["vision_config"] == config_of(seeing)["vision_config"]
    assert len(config["text_config"].get("layer_types", range(LAYERS + 3))) == LAYERS + 3
    model = loaded(out)
    assert look(model, kind).isfinite().all()


def test_a_tower_is_cut_without_the_language_part(tmp_path: Path, llava: Path) -> None:
    slices = [{"sources": [{"model": str(llava), "layer_range": [0, 2]}]}]
    recipe = {"merge_method": "passthrough", "modules": {"vision_tower": {"slices": slices},
                                                          "default": {"models": [{"model": str(llava)}]}}}  # fmt: skip
    out = merge(write(tmp_path / "r.yaml", recipe), tmp_path / "out")
    config = config_of(out)
    assert config["vision_config"]["num_hidden_layers"] == 2
    assert config["text_config"] == config_of(llava)["text_config"]
    assert look(loaded(out), "llava").isfinite().all()


def test_a_layer_of_the_tower_and_one_of_the_language_part_are_cut_apart(tmp_path: Path, llava: Path) -> None:
    other = make_seeing(tmp_path / "b", "llava", seed=1)
    recipe = {"merge_method": "hi_merging", "base_model": str(llava), "models": [{"model": str(other)}],
              "parameters": {"density": 0.5, "scale": 1.0, "weight": 1.0, "density_scope": "layer"}}  # fmt: skip
    out = weights(merge(write(tmp_path / "r.yaml", recipe), tmp_path / "out"))
    x = weights(llava)
    for begin in ("language_model.model.layers.1.", "vision_tower.encoder.layers.1."):
        names = [name for name in x if name.startswith(begin) and x[name].dim() > 1]
        total = sum(x[name].numel() for name in names)
        assert sum(int((out[name] != x[name]).sum()) for name in names) == pytest.approx(total / 2, abs=2)


def test_a_text_model_of_another_kind_is_told_of(tmp_path: Path, llava: Path) -> None:
    other = make_text(tmp_path / "other", "mistral3")
    plan = make_plan(write(tmp_path / "r.yaml", linear(entry(llava), entry(other, names=LLAVA))), Options())
    (said,) = plan.warnings
    assert said.startswith(f"{other} is of the type mistral, and the language part of {llava} of llama: merged")


def test_each_part_by_a_method_of_its_own(tmp_path: Path, llava: Path, llama: Path) -> None:
    other = make_seeing(tmp_path / "b", "llava", seed=1)
    reading = {"name": "reading", "merge_method": "ties", "base_model": str(llava),
               "models": [entry(other), entry(llama, names=LLAVA)], "parameters": {"density": 0.5}}  # fmt: skip
    seeing = {"name": "seeing", "merge_method": "slerp", "base_model": str(llava), "models": [{"model": str(other)}],
              "parameters": {"t": 0.3}}  # fmt: skip
    parts = {"vision_tower": {"models": [{"model": "seeing"}]}, "default": {"models": [{"model": "reading"}]}}
    both = {"merge_method": "passthrough", "modules": parts}
    out = weights(merge(write(tmp_path / "r.yaml", reading, seeing, both), tmp_path / "out"))
    made = {}
    for recipe in (reading, seeing):
        alone = {key: value for key, value in recipe.items() if key != "name"}
        made[recipe["name"]] = weights(merge(write(tmp_path / "a.yaml", alone), tmp_path / str(recipe["name"])))
    for name, tensor in out.items():
        assert torch.equal(tensor, made["seeing" if name.startswith("vision_tower.") else "reading"][name])
