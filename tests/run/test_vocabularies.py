"""Models of different vocabularies: which tokens the output has under which ids, and which rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

import streammerge
from streammerge.base.errors import InputError, RecipeError, ShapeMismatch
from streammerge.run.merge import Options, make_plan
from tests.models import read_tensors, write_recipe
from tests.run.test_adapters import write_adapter
from tests.run.vocabularies import BIAS, EMBED, HEAD, WIDTH, Model, expected_mean, make_model, own_row, write_tokenizer

WORDS = ["<unk>", *(f"word{i}" for i in range(120))]


@pytest.fixture
def three(tmp_path: Path) -> list[Model]:
    """One model, one with more words and marks in another order, one with other words only."""
    return [
        make_model(tmp_path / "a", WORDS, ["<|end|>"], seed=1),
        make_model(tmp_path / "b", [*WORDS[:60], "new1", "new2", *WORDS[60:]], ["<|im|>", "<|end|>"], seed=2),
        make_model(tmp_path / "c", ["<unk>", "new2", "other", *WORDS[100:]], ["<|im|>"], seed=3),
    ]


def recipe_of(path: Path, models: list[Model], method: str = "linear", **top: Any) -> Path:
    content = {"merge_method": method, "dtype": "float32", **top}
    content["models"] = [{"model": str(model.path)} for model in models]
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def merge(path: Path, models: list[Model], method: str = "linear", *, name: str = "out", options: Any = (),
          **top: Any) -> Path:  # fmt: skip
    out = path / name
    top = {"parameters": {"weight": 1.0}, **top} if method == "linear" else top
    streammerge.merge(recipe_of(path / f"{name}.yaml", models, method, **top), out,
                      **{"compile": "off", "threads": 1, **dict(options)})  # fmt: skip
    return out


def ids_of(out: Path) -> dict[str, int]:
    """The ids of the output's tokens as the tokenizers library reads them."""
    from tokenizers import Tokenizer

    return dict(Tokenizer.from_file(str(out / "tokenizer.json")).get_vocab(with_added_tokens=True))


def warnings_of(path: Path, models: list[Model], **top: Any) -> list[str]:
    return list(
        make_plan(recipe_of(path / "w.yaml", models, **{"parameters": {"weight": 1}, **top}), Options()).warnings
    )


def refusal(path: Path, models: list[Model], **top: Any) -> str:
    with pytest.raises((RecipeError, InputError)) as caught:
        merge(path, models, **top)
    assert not (path / "out").exists()
    return str(caught.value)


def same_rows(table: Tensor, expected: dict[int, Tensor]) -> bool:
    # Weights of a third, and sums in float32.
    return all(torch.allclose(table[place].double(), row, rtol=0, atol=1e-6) for place, row in expected.items())


# Which tokens, under which ids.


def test_a_union_keeps_the_first_models_ids_and_adds_words_then_marks_in_the_recipes_order(
    tmp_path: Path, three: list[Model]
) -> None:
    ids = ids_of(merge(tmp_path, three, tokenizer={"source": "union"}))
    first = three[0].tokens
    assert {token: ids[token] for token in first} == first
    rest = [token for token in sorted(ids, key=ids.__getitem__) if token not in first]
    assert rest == ["new1", "new2", "other", "<|im|>"]
    assert [ids[token] for token in rest] == [*range(len(first), len(first) + 4)]


def test_the_ids_do_not_hang_on_a_hash(tmp_path: Path, three: list[Model]) -> None:
    # Defect 5: mergekit's differ from run to run.
    recipe = recipe_of(tmp_path / "r.yaml", three, tokenizer_source="union", parameters={"weight": 1})
    found = set()
    for seed in range(3):
        out = tmp_path / f"out{seed}"
        subprocess.run(
            [sys.executable, "-m", "streammerge", recipe, out, "--compile", "off", "--quiet"],
            env={**os.environ, "PYTHONHASHSEED": str(seed)}, check=True, timeout=120,
        )  # fmt: skip
        found.add(((out / "tokenizer.json").read_bytes(), (out / "model.safetensors").read_bytes()))
    assert len(found) == 1


@pytest.mark.parametrize("source", ["base", 1, 2])
def test_the_tokenizer_of_one_model_is_taken_as_it_is(tmp_path: Path, three: list[Model], source: Any) -> None:
    chosen = three[0] if source == "base" else three[source]
    (chosen.path / "special_tokens_map.json").write_text('{"of": "chosen"}')
    named = "base" if source == "base" else str(chosen.path)
    out = merge(tmp_path, three, tokenizer={"source": named})
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (out / name).read_bytes() == (chosen.path / name).read_bytes()
    table = load_file(out / "model.safetensors")[EMBED]
    assert table.shape == (len(chosen.tokens), WIDTH)
    assert same_rows(table, expected_mean(three, None, EMBED, chosen.tokens))


def test_transformers_reads_the_union_and_cuts_texts_as_planned(tmp_path: Path, three: list[Model]) -> None:
    from transformers import AutoTokenizer

    out = merge(tmp_path, three, tokenizer={"source": "union"})
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = ids_of(out)
    assert tokenizer.get_vocab() == ids
    words = ["word5", "new1", "<|im|>", "other", "<|end|>"]
    assert tokenizer(" ".join(words))["input_ids"] == [ids[word] for word in words]


def test_tokens_beyond_the_embedding_count_as_missing_there(tmp_path: Path) -> None:
    # Defect 18: mergekit fails with a KeyError when another model has such a token properly.
    one = make_model(tmp_path / "a", WORDS, ["<|im|>", "<|lost|>"], seed=1, rows=len(WORDS))
    other = make_model(tmp_path / "b", WORDS, ["<|im|>"], seed=2)
    out = merge(tmp_path, [one, other], tokenizer={"source": "union"})
    ids = ids_of(out)
    assert ids == {**{word: i for i, word in enumerate(WORDS)}, "<|im|>": len(WORDS)}
    table = load_file(out / "model.safetensors")[EMBED]
    assert len(table) == len(WORDS) + 1
    assert torch.equal(table[-1], other.tensors[EMBED][-1].float())
    (warning,) = warnings_of(tmp_path, [one, other], tokenizer={"source": "union"})
    assert "has 121 rows, and none for '<|im|>', '<|lost|>'" in warning


# Which rows.


@pytest.mark.parametrize("name", [EMBED, HEAD, BIAS])
def test_every_row_of_a_union_is_what_it_should_be(tmp_path: Path, three: list[Model], name: str) -> None:
    out = merge(tmp_path, three, tokenizer={"source": "union"})
    table = load_file(out / "model.safetensors")[name]
    expected = expected_mean(three, None, name, ids_of(out))
    assert len(expected) == len(table)
    assert same_rows(table, expected)


def test_tokens_that_the_base_has_are_the_bases_where_a_model_lacks_them(tmp_path: Path, three: list[Model]) -> None:
    # So the delta of a model is zero there.
    out = merge(tmp_path, three[1:], "task_arithmetic", base_model=str(three[0].path), tokenizer={"source": "union"},
                parameters={"weight": 1.0})  # fmt: skip
    ids, table = ids_of(out), load_file(out / "model.safetensors")[EMBED]
    for token in ("word70", "word110"):
        base = own_row(three[0], EMBED, token)
        rows = [own_row(model, EMBED, token) for model in three[1:]]
        assert base is not None
        changes = sum(((row - base) for row in rows if row is not None), torch.zeros(WIDTH).double())
        assert torch.allclose(table[ids[token]].double(), base + changes, atol=1e-6, rtol=0)
    # Of a token that one model alone has, all have its row.
    only = own_row(three[2], EMBED, "other")
    assert only is not None
    assert torch.equal(table[ids["other"]].double(), only)


def test_rules_give_tokens_their_rows(tmp_path: Path, three: list[Model]) -> None:
    a, b, c = three
    tokens = {
        "new1": {"source": str(b.path)},
        "<|im|>": {"source": {"kind": "model_token", "model": str(c.path), "token": "other"}, "force": True},
        "new2": {"source": {"kind": "zero"}},
        "<|mine|>": {"source": {"kind": "model_token", "model": str(a.path), "token_id": 7}},
        "word5": {"source": {"model": {"path": str(b.path)}}, "force": True},
    }
    out = merge(tmp_path, three, tokenizer={"source": "union", "tokens": tokens})
    ids = ids_of(out)
    assert ids["<|mine|>"] == max(ids.values())
    table = load_file(out / "model.safetensors")[EMBED]
    zeros = torch.zeros(WIDTH).double()
    rules = {
        "new1": (own_row(b, EMBED, "new1"), False),
        "<|im|>": (own_row(c, EMBED, "other"), True),
        "new2": (zeros, False),
        "<|mine|>": (a.tensors[EMBED][7].double(), False),
        "word5": (own_row(b, EMBED, "word5"), True),
    }
    assert same_rows(table, expected_mean(three, None, EMBED, ids, rules))


def test_a_token_without_a_source_and_of_no_model_gets_zeros_and_a_warning(tmp_path: Path, three: list[Model]) -> None:
    chosen = {"source": "union", "tokens": {"<|mine|>": {}}}
    assert any(
        "no model has a row for '<|mine|>': zeros" in text for text in warnings_of(tmp_path, three, tokenizer=chosen)
    )
    out = merge(tmp_path, three, tokenizer=chosen)
    assert not load_file(out / "model.safetensors")[EMBED][ids_of(out)["<|mine|>"]].any()


def test_rows_that_no_token_has_are_kept(tmp_path: Path) -> None:
    # mergekit cuts them off (its issue 425), and the model no longer fits what others made for it.
    models = [make_model(tmp_path / name, WORDS, seed=seed, rows=128) for name, seed in (("a", 1), ("b", 2))]
    out = merge(tmp_path, models, tokenizer={"source": "base"})
    table = load_file(out / "model.safetensors")[EMBED]
    assert torch.equal(table, (models[0].tensors[EMBED].float() + models[1].tensors[EMBED].float()) / 2)
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 128


def test_a_table_that_is_padded_more_gives_way_to_the_base(tmp_path: Path) -> None:
    one = make_model(tmp_path / "a", WORDS, seed=1, rows=128)
    other = make_model(tmp_path / "b", WORDS, seed=2, rows=192)
    out = merge(tmp_path, [one, other], tokenizer={"source": "base"})
    table = load_file(out / "model.safetensors")[EMBED]
    assert torch.equal(table, (one.tensors[EMBED].float() + other.tensors[EMBED][:128].float()) / 2)
    out = merge(tmp_path, [other, one], tokenizer={"source": "base"}, name="turned")
    table = load_file(out / "model.safetensors")[EMBED]
    # Where one model ends, it has the other's rows.
    assert torch.equal(table[128:], other.tensors[EMBED][128:].float())


def test_padding_rows_are_a_mean_over_rows_of_the_model(tmp_path: Path, three: list[Model]) -> None:
    out = merge(tmp_path, three[:1], "passthrough", tokenizer={"source": "base", "pad_to_multiple_of": 64})
    table = load_file(out / "model.safetensors")[EMBED]
    count = len(three[0].tokens)
    assert table.shape == (128, WIDTH)
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 128
    mine = three[0].tensors[EMBED]
    spread = torch.linspace(0, count - 1, 64, dtype=torch.float64).long()
    mean = mine[spread].double().mean(0)
    assert torch.equal(table[:count], mine.float())
    assert all(torch.equal(row, mean.float()) for row in table[count:])


def test_a_model_with_the_base_as_its_head_gets_one_table(tmp_path: Path) -> None:
    names = [EMBED]
    tied = {"tie_word_embeddings": True}
    models = [
        make_model(tmp_path / "a", WORDS, seed=1, names=names, config=tied),
        make_model(tmp_path / "b", [*WORDS, "more"], seed=2, names=names, config=tied),
    ]
    out = merge(tmp_path, models, tokenizer={"source": "union"})
    tensors = load_file(out / "model.safetensors")
    assert HEAD not in tensors
    assert same_rows(tensors[EMBED], expected_mean(models, None, EMBED, ids_of(out)))


# The same bits.


@pytest.mark.parametrize("method", ["linear", "ties", "slerp", "della"])
def test_tiles_and_threads_do_not_change_a_byte(
    tmp_path: Path, three: list[Model], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = None if method == "linear" else str(three[0].path)
    models = three if method != "slerp" else three[:2]
    parameters = {"linear": {"weight": 1}, "slerp": {"t": 0.3}}.get(method, {"weight": 0.5, "density": 0.4})
    found = []
    for tile_blocks, threads in ((1, 1), (2, 2), (64, 1)):
        monkeypatch.setattr("streammerge.plan.budget._TILE_BLOCKS", tile_blocks)
        top = {"tokenizer": {"source": "union", "pad_to_multiple_of": 8}, "parameters": parameters}
        top |= {} if base is None else {"base_model": base}
        out = merge(tmp_path, models, method, name=f"{tile_blocks}", options={"threads": threads}, **top)
        found.append(read_tensors(out))
    assert found[0] == found[1] == found[2]


def test_models_of_one_vocabulary_give_the_bytes_of_a_merge_without_a_tokenizer(tmp_path: Path) -> None:
    models = [make_model(tmp_path / name, WORDS, ["<|end|>"], seed=seed) for name, seed in (("a", 1), ("b", 2))]
    plain = merge(tmp_path, models, name="plain")
    for number, source in enumerate(("union", "base", str(models[1].path))):
        out = merge(tmp_path, models, name=f"out{number}", tokenizer={"source": source})
        assert read_tensors(out) == read_tensors(plain)


def test_an_interrupted_merge_goes_on_with_the_same_ids(tmp_path: Path, three: list[Model]) -> None:
    recipe = recipe_of(tmp_path / "r.yaml", three, parameters={"weight": 1}, tokenizer_source="union")
    digest = make_plan(recipe, Options()).digest
    assert make_plan(recipe, Options()).digest == digest
    # Another token of the same count in a model is another output.
    write_tokenizer(three[2].path, ["<unk>", "new2", "changed", *WORDS[100:]], ["<|im|>"])
    assert make_plan(recipe, Options()).digest != digest


# Special tokens and templates.


def test_ids_of_special_tokens_follow(tmp_path: Path) -> None:
    ids = {"bos_token_id": 0, "eos_token_id": [1, 2], "pad_token_id": None, "text_config": {"image_token_index": 3}}
    base = make_model(tmp_path / "a", ["<unk>", "one", "two", "picture"], seed=1, config=ids)
    (base.path / "generation_config.json").write_text('{"eos_token_id": 2, "top_k": 5}')
    other = make_model(tmp_path / "b", ["<unk>", "picture", "stop", "two", "one"], seed=2,
                       config={"eos_token_id": 2})  # fmt: skip
    (other.path / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    out = merge(tmp_path, [base, other], tokenizer={"source": str(other.path)})
    config = json.loads((out / "config.json").read_text())
    # What the tokenizer's model says of its own; what only the first one knows by its tokens.
    assert config["eos_token_id"] == 2
    assert config["bos_token_id"] == 0
    assert config["pad_token_id"] is None
    assert config["text_config"]["image_token_index"] == 1
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": [2, 0], "top_k": 5}
    kept = merge(tmp_path, [base, other], tokenizer={"source": "union"}, name="kept")
    config = json.loads((kept / "config.json").read_text())
    assert config["eos_token_id"] == [1, 2]
    assert json.loads((kept / "generation_config.json").read_text()) == {"eos_token_id": 2, "top_k": 5}


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Ho"},
    {"role": "user", "content": "So?"},
]


CHATS = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    "Ho<|im_end|>\n<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user"
    "<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHo<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nSo?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "alpaca": "<s>Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHo</s>\n\n### Instruction:\nSo?\n\n"
    "### Response:\n",
    "mistral": "<s>[INST] Be brief.\n\nHi [/INST] Ho</s>[INST] So? [/INST]",
    "exaone": "[|system|]Be brief.[|endofturn|]\n[|user|]Hi\n[|assistant|]Ho[|endofturn|]\n[|user|]So?\n[|assistant|]",
}


@pytest.mark.parametrize(("name", "text"), CHATS.items())
def test_a_named_template_writes_chats_as_its_models_do(tmp_path: Path, name: str, text: str) -> None:
    from transformers import AutoTokenizer

    model = make_model(tmp_path / "a", ["<unk>", "<s>", "</s>"], seed=1)
    write_tokenizer(model.path, ["<unk>", "<s>", "</s>"], bos_token="<s>", eos_token="</s>",
                    chat_template="{{ 'an old one' }}")  # fmt: skip
    out = merge(tmp_path, [model], "passthrough", chat_template=name)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True) == text
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert config["chat_template"] == (out / "chat_template.jinja").read_text()


def test_auto_takes_the_template_that_most_models_have(tmp_path: Path, three: list[Model]) -> None:
    a, b, c = three
    (a.path / "chat_template.jinja").write_text("{{ 'one of its own' }}")
    (b.path / "chat_template.json").write_text('{"chat_template": "{{ 1 }}"}')
    entries = [{"name": "tool_use", "template": "{{ 2 }}"}, {"name": "default", "template": "{{ 1 }}"}]
    write_tokenizer(c.path, list(c.tokens)[:-1], ["<|im|>"], chat_template=entries)
    out = merge(tmp_path, three, tokenizer={"source": "union"}, chat_template="auto")
    assert (out / "chat_template.jinja").read_text() == "{{ 1 }}"
    assert not (out / "chat_template.json").exists()


def test_marks_of_a_template_that_are_no_tokens_are_told(tmp_path: Path, three: list[Model]) -> None:
    (warning,) = warnings_of(tmp_path, three[:1], chat_template="chatml")
    assert "'<|im_start|>', '<|im_end|>' are no token of the output" in warning


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("chatlm", "'chatlm' is no template: write auto, alpaca, chatml"),
        ("a sentence of more than twenty letters", "is no template"),
        ("{% for message in messages %}{{ message }}", "is no template that Jinja can read"),
    ],
)
def test_what_is_no_template_is_refused_while_planning(
    tmp_path: Path, three: list[Model], template: str, what: str
) -> None:
    # mergekit says so after it has written all weights.
    assert what in refusal(tmp_path, three, chat_template=template)


# What cannot be.


def test_different_sizes_without_a_tokenizer_say_what_to_write(tmp_path: Path, three: list[Model]) -> None:
    with pytest.raises(ShapeMismatch, match=r"add  tokenizer: \{source: union\}  to the recipe\."):
        merge(tmp_path, three)


@pytest.mark.parametrize(
    ("tokenizer", "what"),
    [
        ({"source": "nobody"}, "nobody is no model of this recipe"),
        ({"tokens": {"x": {"source": {"kind": "model_token", "model": "A"}}}}, "either token or token_id"),
        ({"tokens": {"x": {"source": {"kind": "model_token", "model": "A", "token": "y", "token_id": 3}}}},
         "either token or token_id"),
        ({"tokens": {"x": {"source": {"kind": "mean"}}}}, "'mean' is no kind of source"),
        ({"tokens": {"x": {"source": {"kind": "model_token", "model": "A", "token_id": 100000}}}},
         "has no row 100000: it has 122"),
        ({"tokens": {"x": {"source": {"kind": "model_token", "model": "A", "token": "nowhere"}}}},
         "has no token 'nowhere'"),
        ({"tokens": {"x": {"source": "A"}}}, "has no token 'x'"),
        ({"pad_to_multiple_of": 0}, "greater than or equal to 1"),
        ({"tokens": {"x": {"source": "A", "forced": True}}}, "unknown key"),
    ],
)  # fmt: skip
def test_mistakes_in_the_tokenizers_map_are_named(
    tmp_path: Path, three: list[Model], tokenizer: dict[str, Any], what: str
) -> None:
    # Defect 19 among them: mergekit takes a model_token without a token for the model itself.
    text = json.dumps(tokenizer).replace('"A"', json.dumps(str(three[0].path)))
    assert what in refusal(tmp_path, three, tokenizer=json.loads(text), options={"strict": True})


def test_both_ways_of_naming_a_tokenizer_exclude_each_other(tmp_path: Path, three: list[Model]) -> None:
    assert "keep one of the two" in refusal(tmp_path, three, tokenizer={}, tokenizer_source="base")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}'])
def test_a_tokenizer_that_cannot_be_loaded_is_an_error(tmp_path: Path, three: list[Model], content: str) -> None:
    (three[1].path / "tokenizer.json").write_text(content)
    assert f"{three[1].path}/tokenizer.json: its tokenizer cannot be loaded" in refusal(
        tmp_path, three, tokenizer={"source": "union"}
    )


def test_a_first_model_without_a_tokenizer_is_an_error(tmp_path: Path, three: list[Model]) -> None:
    (three[0].path / "tokenizer.json").unlink()
    assert f"{three[0].path} has none in its directory" in refusal(tmp_path, three, tokenizer={"source": "union"})


def test_another_model_without_one_is_taken_to_have_the_firsts(tmp_path: Path) -> None:
    models = [make_model(tmp_path / name, WORDS, seed=seed) for name, seed in (("a", 1), ("b", 2))]
    plain = read_tensors(merge(tmp_path, models, name="plain"))
    (models[1].path / "tokenizer.json").unlink()
    (warning,) = warnings_of(tmp_path, models, tokenizer={"source": "union"})
    assert "has none; it is taken to be that of" in warning
    assert read_tensors(merge(tmp_path, models, tokenizer={"source": "union"})) == plain


# Documents that use each other.


def staged(path: Path, *documents: dict[str, Any]) -> Path:
    recipe = path / "staged.yaml"
    recipe.write_text(yaml.safe_dump_all(documents, sort_keys=False))
    streammerge.merge(recipe, path / "staged", compile="off", threads=1)
    return path / "staged"


def document(models: list[Any], **more: Any) -> dict[str, Any]:
    listed = [{"model": str(getattr(model, "path", model))} for model in models]
    return {"merge_method": "linear", "dtype": "float32", "parameters": {"weight": 1}, "models": listed, **more}


def test_a_stage_in_a_union_feeds_another_of_the_same_tokens(tmp_path: Path, three: list[Model]) -> None:
    a, b, _ = three
    first = document([a, b], name="ab", tokenizer={"source": "union"})
    out = staged(tmp_path, first, document(["ab", "ab2"]), {**first, "name": "ab2"})
    alone = merge(tmp_path, [a, b], tokenizer={"source": "union"})
    assert read_tensors(out) == read_tensors(alone)
    assert (out / "tokenizer.json").read_bytes() == (alone / "tokenizer.json").read_bytes()


def test_rows_of_a_stages_result_cannot_be_moved(tmp_path: Path, three: list[Model]) -> None:
    a, b, c = three
    with pytest.raises(RecipeError, match="write ab to a directory of its own first"):
        staged(tmp_path, document([a, b], name="ab", tokenizer={"source": "union"}),
               document([c, "ab"], tokenizer={"source": "union"}))  # fmt: skip


# Tables of all kinds.


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens_per_layer.weight",  # Gemma 3n's, shorter than its embedding
        "model.layers.0.embed_tokens.weight",  # DeepSeek's, for predicting several tokens
        "model.layers.0.shared_head.head.weight",
        "final_logits_bias",  # Marian's and BART's, of one row
    ],
)
def test_other_tables_of_tokens_are_put_in_order_too(tmp_path: Path, name: str) -> None:
    rows = len(WORDS) - (5 if "per_layer" in name else 0)
    shape = (1, rows) if name == "final_logits_bias" else (rows, 7)
    models = []
    for seed, words in enumerate((WORDS, WORDS[::-1])):
        path = tmp_path / str(seed)
        models.append(make_model(path, words, seed=seed, names=(EMBED, HEAD), extra={name: shape}))
    out = merge(tmp_path, models, tokenizer={"source": "base"})
    table = load_file(out / "model.safetensors")[name]
    assert table.shape == shape

    def row(model: Model, token: str) -> Tensor | None:
        values, number = model.tensors[name].float(), model.tokens[token]
        values = values.T if len(values) == 1 else values
        return values[number] if number < len(values) else None

    table = table.T if len(table) == 1 else table
    for token, place in models[0].tokens.items():
        found = [each for model in models if (each := row(model, token)) is not None]
        if place < rows and len(found) == 2:
            assert torch.allclose(table[place], (found[0] + found[1]) / 2, atol=1e-6, rtol=0)
        elif place < rows:
            assert torch.equal(table[place], found[0])


def test_a_head_of_another_length_keeps_it(tmp_path: Path) -> None:
    # Llama 3.2 Vision: its picture token has a row in the embedding and none in the head.
    extra = {HEAD: (len(WORDS), WIDTH)}
    models = [
        make_model(tmp_path / name, WORDS, ["<|image|>"], seed=seed, names=(EMBED,), extra=extra, rows=len(WORDS) + 8,
                   config={"vocab_size": len(WORDS)})
        for seed, name in enumerate("ab")
    ]  # fmt: skip
    plain = merge(tmp_path, models, name="plain")
    kept = merge(tmp_path, models, tokenizer={"source": "base"}, name="kept")
    assert read_tensors(kept) == read_tensors(plain)
    assert json.loads((kept / "config.json").read_text())["vocab_size"] == len(WORDS)
    for chosen in ({"tokens": {"<|x|>": {}}}, {"pad_to_multiple_of": 64}):
        assert "how more tokens would be put in both is not known here" in refusal(tmp_path, models, tokenizer=chosen)


def test_bart_is_saved_with_a_shared_table_alone(tmp_path: Path) -> None:
    shape = (len(WORDS), 9)
    models = [
        make_model(tmp_path / str(seed), words, seed=seed, names=(), extra={"model.shared.weight": shape})
        for seed, words in enumerate((WORDS, WORDS[::-1]))
    ]
    out = merge(tmp_path, models, tokenizer={"source": "base"})
    assert same_rows(
        load_file(out / "model.safetensors")["model.shared.weight"],
        expected_mean(models, None, "model.shared.weight", models[0].tokens),
    )


def test_other_forms_of_a_changed_tokenizer_are_left_out(tmp_path: Path, three: list[Model]) -> None:
    for name in ("tokenizer.model", "vocab.bpe", "own.tiktoken"):
        (three[0].path / name).write_text("of the old one")
    kept = merge(tmp_path, three, name="kept", tokenizer={"source": "base"})
    assert (kept / "own.tiktoken").exists()
    out = merge(tmp_path, three, tokenizer={"source": "union"})
    assert not any((out / name).exists() for name in ("tokenizer.model", "vocab.bpe", "own.tiktoken"))


@pytest.mark.parametrize(
    ("changed", "chosen"),
    [({EMBED: (121, 5)}, {"tokenizer": {}}), ({"embed_positions.weight": (4, 7)}, {})],
    ids=["there is one", "positions"],
)
def test_a_tokenizer_is_not_advised_where_it_would_not_help(
    tmp_path: Path, changed: dict[str, tuple[int, ...]], chosen: dict[str, Any]
) -> None:
    shapes: dict[str, tuple[int, ...]] = {EMBED: (121, 7), "embed_positions.weight": (3, 7)}
    one = make_model(tmp_path / "a", WORDS, seed=1, names=(), extra=shapes)
    other = make_model(tmp_path / "b", WORDS, seed=2, names=(), extra=shapes | changed)
    with pytest.raises(ShapeMismatch) as caught:
        merge(tmp_path, [one, other], **chosen)
    assert "source: union" not in str(caught.value)


def test_positions_are_no_tokens_however_many_there_are(tmp_path: Path) -> None:
    extra = {"transformer.wpe.weight": (len(WORDS), 7), "embed_positions.weight": (len(WORDS), 7)}
    models = [
        make_model(tmp_path / str(seed), words, seed=seed, names=(EMBED,), extra=extra)
        for seed, words in enumerate((WORDS, WORDS[::-1]))
    ]
    tensors = load_file(merge(tmp_path, models, tokenizer={"source": "base"}) / "model.safetensors")
    for name in extra:
        assert torch.equal(tensors[name], (models[0].tensors[name].float() + models[1].tensors[name].float()) / 2)


def test_single_files_get_the_tokenizer_that_was_asked_for(tmp_path: Path, three: list[Model]) -> None:
    for model in three:
        (model.path / "config.json").unlink()
    files = [Model(model.path / "model.safetensors", model.tokens, model.tensors) for model in three]
    out = merge(tmp_path, files, tokenizer={"source": str(files[1].path)})
    assert ids_of(out) == three[1].tokens
    assert (out / "tokenizer_config.json").exists()


# Which ids, once more.


def test_ids_that_the_configuration_names_are_not_given_to_new_tokens(tmp_path: Path) -> None:
    count = len(WORDS)
    base = make_model(tmp_path / "a", WORDS, seed=1, rows=count + 8,
                      config={"pad_token_id": count, "text_config": {"image_token_index": count + 2}})  # fmt: skip
    other = make_model(tmp_path / "b", [*WORDS, "new1", "new2"], seed=2)
    out = merge(tmp_path, [base, other], tokenizer={"source": "union"})
    assert {token: i for token, i in ids_of(out).items() if i >= count} == {"new1": count + 1, "new2": count + 3}


def test_what_one_model_matches_as_a_mark_is_one_though_another_has_it_as_a_word(tmp_path: Path) -> None:
    one = make_model(tmp_path / "a", [*WORDS, "<|im|>"], seed=1)
    other = make_model(tmp_path / "b", WORDS, ["<|im|>"], seed=2)
    out = merge(tmp_path, [one, other], tokenizer={"source": "union"})
    from tokenizers import Tokenizer

    read = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert read.encode("word1<|im|>word2").tokens == ["word1", "<|im|>", "word2"]
    assert ids_of(out)["<|im|>"] == len(WORDS)


def test_another_tokenizer_is_another_merge_though_its_ids_are_the_same(tmp_path: Path) -> None:
    models = [
        make_model(tmp_path / name, WORDS, seed=seed, config={"eos_token_id": seed})
        for seed, name in enumerate("ab")
    ]  # fmt: skip
    recipe = recipe_of(tmp_path / "r.yaml", models, parameters={"weight": 1}, tokenizer_source="base")
    before = make_plan(recipe, Options()).digest
    recipe = recipe_of(tmp_path / "r.yaml", models, parameters={"weight": 1}, tokenizer_source=str(models[1].path))
    assert make_plan(recipe, Options()).digest != before


def test_a_special_token_that_the_output_lacks_is_told_of_and_becomes_null(tmp_path: Path) -> None:
    lists = {"suppress_tokens": [1, 2], "bad_words_ids": [[1], [2, 1], [1, 1]], "forced_decoder_ids": [[1, 1], [2, 2]]}
    base = make_model(tmp_path / "a", ["<unk>", "one", "gone"], seed=1, config={"eos_token_id": 2})
    (base.path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2], **lists}))
    other = make_model(tmp_path / "b", ["<unk>", "x", "y", "one"], seed=2)
    chosen = {"source": str(other.path)}
    told = warnings_of(tmp_path, [base, other], tokenizer=chosen)
    assert "config.json: what eos_token_id names is no token of the output; it becomes null" in told
    assert "generation_config.json: what eos_token_id names is no token of the output; it becomes null" in told
    assert "it becomes null" in refusal(tmp_path, [base, other], tokenizer=chosen, options={"strict": True})
    out = merge(tmp_path, [base, other], tokenizer=chosen)
    assert json.loads((out / "config.json").read_text())["eos_token_id"] is None
    assert json.loads((out / "generation_config.json").read_text()) == {
        "eos_token_id": None, "suppress_tokens": [3], "bad_words_ids": [[3], [3, 3]], "forced_decoder_ids": [[1, 3]],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("config", "where"),
    [
        ({"vocab_size": None, "text_config": {"hidden_size": 8}}, ("text_config",)),
        ({"vocab_size": None, "thinker_config": {"text": {"vocab_size": 121}}}, ("thinker_config", "text")),
    ],
)  # fmt: skip
def test_the_number_of_tokens_is_told_wherever_the_config_has_it(
    tmp_path: Path, config: dict[str, Any], where: tuple[str, ...]
) -> None:
    models = [make_model(tmp_path / "a", WORDS, seed=1), make_model(tmp_path / "b", [*WORDS, "more"], seed=2)]
    kept = {key: value for key, value in config.items() if value is not None}
    (models[0].path / "config.json").write_text(json.dumps(kept))
    found = json.loads((merge(tmp_path, models, tokenizer={"source": "union"}) / "config.json").read_text())
    for key in where:
        found = found[key]
    assert found["vocab_size"] == 122


def test_special_tokens_beyond_the_table_are_taken_out_of_the_settings(tmp_path: Path) -> None:
    # A loader would add them again, under an id that has no row.
    one = make_model(tmp_path / "a", WORDS, ["<|pad|>"], seed=1, rows=len(WORDS))
    write_tokenizer(one.path, WORDS, ["<|pad|>"], pad_token="<|pad|>", extra_special_tokens=["<|pad|>"])
    out = merge(tmp_path, [one], "passthrough", tokenizer={"source": "base"})
    from transformers import AutoTokenizer

    assert len(AutoTokenizer.from_pretrained(out)) == len(WORDS)


def test_the_base_gives_missing_rows_to_methods_that_take_it_for_one_more_model(tmp_path: Path) -> None:
    base = make_model(tmp_path / "a", [*WORDS, "more"], seed=1)
    one = make_model(tmp_path / "b", WORDS, seed=2)
    two = make_model(tmp_path / "c", [*WORDS, "more"], seed=3)
    out = merge(tmp_path, [one, two], base_model=str(base.path), tokenizer={"source": "union"})
    table = load_file(out / "model.safetensors")[EMBED]
    ids = ids_of(out)
    assert same_rows(table, expected_mean([one, two, base], base, EMBED, ids))


def test_a_rule_of_a_model_without_tables_is_an_error(tmp_path: Path, three: list[Model]) -> None:
    bare = make_model(tmp_path / "bare", WORDS, seed=7, names=())
    tokens = {"<q>": {"source": {"kind": "model_token", "model": str(bare.path), "token": "word3"}}}
    told = refusal(tmp_path, [three[0], bare], tokenizer={"tokens": tokens})
    assert f"tokenizer.tokens.<q>: {bare.path} has no tensor with a row for it" in told


def test_many_marks_that_are_matched_otherwise_are_one_warning(tmp_path: Path) -> None:
    marks = [f"<{i}>" for i in range(50)]
    one = make_model(tmp_path / "a", WORDS, marks, seed=1)
    other = make_model(tmp_path / "b", WORDS, marks, seed=2)
    file = other.path / "tokenizer.json"
    file.write_text(file.read_text().replace('"lstrip": false', '"lstrip": true'))
    (warning,) = warnings_of(tmp_path, [one, other], tokenizer={"source": "union"})
    assert "'<0>', '<1>', '<2>' and 47 more are matched in another way" in warning


def test_rows_that_are_merged_as_they_lie_are_told_of(tmp_path: Path) -> None:
    models = [make_model(tmp_path / "a", WORDS, seed=1), make_model(tmp_path / "b", WORDS[::-1], seed=2)]
    (models[0].path / "chat_template.jinja").write_text("{{ 1 }}")
    (warning,) = warnings_of(tmp_path, models, chat_template="auto")
    assert f"{models[1].path} and {models[0].path} give tokens other ids" in warning


def test_a_template_in_a_document_that_is_not_the_output_is_told_of(tmp_path: Path, three: list[Model]) -> None:
    first = document(three[:1], name="one", chat_template="chatml")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump_all([first, document(["one"])], sort_keys=False))
    assert any(
        "chat_template of the document one has no effect" in text for text in make_plan(recipe, Options()).warnings
    )


@pytest.mark.parametrize(
    "config",
    [
        {"chat_template": [{"name": [], "template": "x"}]},
        {"added_tokens_decoder": {"5": {"content": ["x"]}, "6": {"content": "\ud800"}, "x": 1}},
    ],
)
def test_odd_settings_of_a_tokenizer_do_no_harm(tmp_path: Path, three: list[Model], config: dict[str, Any]) -> None:
    path = three[0].path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config).replace("\\\\", "\\"))
    merge(tmp_path, three, tokenizer={"source": "union"})


def test_a_tokenizer_without_tokens_is_an_error(tmp_path: Path, three: list[Model]) -> None:
    empty = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
    (three[1].path / "tokenizer.json").write_text(json.dumps(empty))
    assert "its tokenizer has no tokens" in refusal(tmp_path, three, tokenizer={"source": "union"})


# Adapters that bring tokens.


def with_adapter(path: Path, base: Model, added: list[str], seed: int, **config: Any) -> str:
    """A reference to `base` with an adapter that was trained with more tokens, and has its tables whole."""
    tokens = write_tokenizer(path / "tokenizer", list(base.tokens), added)
    shapes = dict.fromkeys((EMBED, HEAD), (len(tokens), WIDTH))
    tensors = {}
    generator = torch.Generator().manual_seed(seed)
    for name, shape in shapes.items():
        tensors[f"base_model.model.{name}"] = torch.randn(shape, generator=generator)
    write_adapter(path / "adapter", {"model.layers.0.mlp.up_proj.weight": (8, WIDTH)}, seed=seed)
    saved = load_file(path / "adapter" / "adapter_model.safetensors")
    save_file(saved | tensors, path / "adapter" / "adapter_model.safetensors")
    for file in (path / "tokenizer").iterdir():
        file.rename(path / "adapter" / file.name)
    return f"{base.path}+{path / 'adapter'}"


def test_an_adapters_own_tokenizer_goes_along(tmp_path: Path) -> None:
    # mergekit's issue 548: a base with its adapter folded in lost the tokens it was trained with.
    base = make_model(tmp_path / "base", WORDS, seed=1, names=(EMBED, HEAD))
    model = with_adapter(tmp_path / "lora", base, ["<|im|>"], 2)
    recipe = write_recipe(tmp_path / "r.yaml", "passthrough", [model])
    streammerge.merge(recipe, tmp_path / "out", compile="off", threads=1)
    assert ids_of(tmp_path / "out")["<|im|>"] == len(WORDS)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == len(WORDS) + 1


def test_adapters_with_tokens_of_their_own_are_merged_in_a_union(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", WORDS, seed=1, names=(EMBED, HEAD))
    added = [["<|im|>"], ["<|x|>", "<|im|>"]]
    references = [with_adapter(tmp_path / f"lora{i}", base, own, 5 + i) for i, own in enumerate(added)]
    written = []
    for i, reference in enumerate(references):
        recipe = write_recipe(tmp_path / "w.yaml", "passthrough", [reference], dtype="float32")
        streammerge.merge(recipe, tmp_path / f"w{i}", compile="off", threads=1)
        written.append(str(tmp_path / f"w{i}"))
    found = []
    for models in (references, written):
        recipe = write_recipe(tmp_path / "r.yaml", "linear", [str(base.path), *models], dtype="float32",
                              parameters={"weight": 1}, tokenizer_source="union")  # fmt: skip
        out = tmp_path / f"out{len(found)}"
        streammerge.merge(recipe, out, compile="off", threads=1)
        found.append((read_tensors(out), (out / "tokenizer.json").read_bytes()))
    assert found[0] == found[1]


def test_a_lora_of_an_embedding_whose_rows_move_is_refused(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", WORDS, seed=1, names=(EMBED, HEAD))
    other = make_model(tmp_path / "other", ["<unk>", "first", *WORDS[1:]], seed=2, names=(EMBED, HEAD))
    lora = write_adapter(tmp_path / "lora", {HEAD: (len(WORDS), WIDTH)})
    recipe = write_recipe(tmp_path / "r.yaml", "linear", [f"{base.path}+{lora}", str(other.path)],
                          parameters={"weight": 1}, tokenizer_source="union")  # fmt: skip
    with pytest.raises(RecipeError, match=r"(?s)lm_head.*to a directory of its own first"):
        streammerge.merge(recipe, tmp_path / "out", compile="off")
    # Where none moves, nothing stands in the way.
    recipe = write_recipe(tmp_path / "r.yaml", "linear", [f"{base.path}+{lora}", str(base.path)],
                          parameters={"weight": 1}, tokenizer_source="union")  # fmt: skip
    streammerge.merge(recipe, tmp_path / "out", compile="off")


# Tokenizers of other kinds.


def bpe(words: list[str], added: list[str]) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(words * 5, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    tokenizer.add_tokens([AddedToken(token, special=True) for token in added])
    return tokenizer


def unigram(words: list[str], added: list[str]) -> Any:
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=60, unk_token="<unk>", special_tokens=["<pad>", "</s>", "<unk>"])
    tokenizer.train_from_iterator(words * 5, trainer)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in added])
    return tokenizer


def wordpiece(words: list[str], added: list[str]) -> Any:
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordPieceTrainer(vocab_size=80, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    tokenizer.train_from_iterator(words * 5, trainer)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in added])
    return tokenizer


KINDS = {
    "PreTrainedTokenizerFast": bpe, "GPT2TokenizerFast": bpe, "Qwen2TokenizerFast": bpe,
    "T5TokenizerFast": unigram, "BertTokenizerFast": wordpiece,
}  # fmt: skip
TEXTS = ["the quick brown fox jumps", "over the lazy dogs"]


@pytest.mark.parametrize("kind", KINDS)
def test_unions_of_every_kind_load_in_transformers_and_read_old_texts_as_before(tmp_path: Path, kind: str) -> None:
    from transformers import AutoTokenizer

    made = []
    for seed, (name, words, added) in enumerate(
        [("a", TEXTS[:1], ["<|endoftext|>", "<|x|>"]), ("b", TEXTS, ["<|endoftext|>", "<|y|>"])]
    ):
        tokenizer = KINDS[kind](words, added)
        model = make_model(tmp_path / name, ["<unk>"], seed=seed, rows=len(tokenizer.get_vocab()))
        tokenizer.save(str(model.path / "tokenizer.json"))
        config = {"tokenizer_class": kind, "extra_ids": 0, "added_tokens_decoder": {
            str(number): {"content": token.content, "special": True}
            for number, token in tokenizer.get_added_tokens_decoder().items()}}  # fmt: skip
        (model.path / "tokenizer_config.json").write_text(json.dumps(config))
        made.append((model, tokenizer))
    (one, before), (_, other) = made
    out = merge(tmp_path, [model for model, _ in made], tokenizer={"source": "union"})
    loaded = AutoTokenizer.from_pretrained(out)
    ids = loaded.get_vocab()
    assert set(before.get_vocab()) | set(other.get_vocab()) <= set(ids)
    assert {token: ids[token] for token in before.get_vocab()} == before.get_vocab()
    assert max(ids.values()) < len(load_file(out / "model.safetensors")[EMBED])
    old = AutoTokenizer.from_pretrained(one.path)
    # What was unknown to the first one may be known now, but for BPE, where only merges make tokens.
    for text in TEXTS if KINDS[kind] is bpe else TEXTS[:1]:
        assert loaded(text)["input_ids"] == old(text)["input_ids"]
    assert ids["<|y|>"] in loaded("the <|y|> fox")["input_ids"]


def test_a_tokenizer_without_its_json_is_converted(tmp_path: Path) -> None:
    # vocab.json and merges.txt, as GPT-2 came first.
    tokenizer = bpe(TEXTS, [])
    tokens = tokenizer.get_vocab()
    models = []
    for name, seed in (("a", 1), ("b", 2)):
        model = make_model(tmp_path / name, ["<unk>"], seed=seed, rows=len(tokens) + 1, config={"model_type": "gpt2"})
        (model.path / "tokenizer.json").unlink()
        tokenizer.model.save(str(model.path))
        (model.path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
        models.append(model)
    chosen = {"source": "union", "tokens": {"<|mine|>": {"source": {"kind": "zero"}}}}
    out = merge(tmp_path, models, tokenizer=chosen)
    # GPT-2's class brings a token of its own, the one that had the last row.
    assert ids_of(out) == {**tokens, "<|endoftext|>": len(tokens), "<|mine|>": len(tokens) + 1}
    assert not (out / "vocab.json").exists()
    assert not (out / "merges.txt").exists()
    assert len(load_file(out / "model.safetensors")[EMBED]) == len(tokens) + 2


def test_a_tokenizer_of_a_models_own_code_is_refused_and_the_code_not_run(tmp_path: Path, three: list[Model]) -> None:
    path = three[1].path
    (path / "tokenizer.json").unlink()
    (path / "vocab.json").write_text("{}")
    (path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}})
    )
    assert f"{path}: its tokenizer cannot be loaded" in refusal(tmp_path, three, tokenizer={"source": "union"})
    assert not (tmp_path / "ran").exists()
