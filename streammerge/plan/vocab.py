"""The tokens of models: read from their tokenizers, and put together as the tokenizer of the output.

A tokenizer is its `tokenizer.json`, as the tokenizers library reads it; what has none (a sentencepiece file alone) is
converted by transformers. Nothing of a model's own code is ever run.

The union keeps the ids of the first model. Then come the ordinary tokens of the others, model by model in the order of
the recipe and by their ids, and then the tokens that are matched before any other, in the same order: the same ids on
every run. As in mergekit, a new ordinary token has no merges: it has its row, and a text seldom becomes it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import xxhash

from streammerge.base.errors import InputError
from streammerge.plan.tokenizer import Tokenizer
from streammerge.storage.jsonfile import dump_map, parse_map, read_map, read_text

FILE_NAME, CONFIG_NAME, TEMPLATE_NAME = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
OTHER_TEMPLATE_NAME = "chat_template.json"
# What a tokenizer consists of else; of a changed one these would tell of another vocabulary.
_OTHER_FORMS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "merges.txt", "vocab.txt",
                "added_tokens.json", "tekken.json")  # fmt: skip
_SETTINGS = (CONFIG_NAME, "special_tokens_map.json", TEMPLATE_NAME, OTHER_TEMPLATE_NAME)
_SHOWN = 3


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The tokens of a model by their ids, which are row numbers, and the directory its tokenizer's files are in.

    `added` are the tokens that are matched in a text before any other, with their properties as tokenizer.json has
    them. `text` is a tokenizer.json that is not in the directory. A vocabulary is `changed` when it is not what the
    files say; `scores` then has those of new ordinary tokens, where tokens have scores (Unigram).
    """

    directory: Path
    ids: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]]
    kind: str
    text: str | None = None
    changed: bool = False
    scores: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def tokens(self) -> dict[int, str]:
        """The tokens by id."""
        return {number: token for token, number in self.ids.items()}

    @cached_property
    def digest(self) -> str:
        """Equal for the same tokens under the same ids."""
        facts = [sorted(self.ids.items(), key=lambda item: item[1]), sorted(self.added), self.changed]
        return xxhash.xxh3_128_hexdigest(json.dumps(facts).encode())

    def within(self, rows: int) -> Vocabulary:
        """Without the tokens that a table of so many rows has none for."""
        if all(number < rows for number in self.ids.values()):
            return self
        ids = {token: number for token, number in self.ids.items() if number < rows}
        added = {token: own for token, own in self.added.items() if token in ids}
        return replace(self, ids=ids, added=added, changed=True)


def has_tokenizer(directory: Path) -> bool:
    """Whether there are files of a tokenizer in a directory."""
    return any((directory / name).is_file() for name in (FILE_NAME, *_OTHER_FORMS))


def is_of_tokenizer(name: str) -> bool:
    """Whether a file of this name is part of a tokenizer."""
    return name in (FILE_NAME, *_OTHER_FORMS, *_SETTINGS) or name.endswith(".tiktoken")


def load_vocabulary(directory: Path) -> Vocabulary | None:
    """The vocabulary in a model's directory; None where there is no tokenizer. Raises InputError."""
    file, text = directory / FILE_NAME, None
    if file.is_file():
        content = read_text(file)
    elif has_tokenizer(directory):
        content = text = _converted(directory)
    else:
        return None
    from tokenizers import Tokenizer as Loaded

    try:
        loaded = Loaded.from_str(content)
        ids, kind = loaded.get_vocab(with_added_tokens=True), type(loaded.model).__name__
        added = {
            token.content: {
                "single_word": token.single_word, "lstrip": token.lstrip, "rstrip": token.rstrip,
                "normalized": token.normalized, "special": token.special,
            }
            for token in loaded.get_added_tokens_decoder().values()
        }  # fmt: skip
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001 - the library panics over some files, and a panic is no Exception
        raise InputError(f"{file}: its tokenizer cannot be loaded: {_brief(error)}.") from None
    for number, own in _told(directory):
        token = own.pop("content")
        if token not in ids and number not in ids.values():
            ids[token], added[token] = number, own
    return Vocabulary(directory, dict(sorted(ids.items(), key=lambda item: item[1])), added, kind, text)


def template_of(directory: Path) -> str | None:
    """The chat template of a model, or None. Of several the one named `default`. Raises InputError."""
    file = directory / TEMPLATE_NAME
    if file.is_file():
        return read_text(file)
    for name in (OTHER_TEMPLATE_NAME, CONFIG_NAME):
        found = read_map(directory / name).get("chat_template")
        if isinstance(found, list):
            named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
            found = named.get("default")
        if isinstance(found, str):
            return found
    return None


def join(chosen: Tokenizer, models: Mapping[str, Vocabulary], source: str) -> tuple[Vocabulary, list[str]]:
    """The vocabulary of the output, and warnings.

    `models` are the vocabularies of all models, each with the tokens it has rows for, in the order of the recipe;
    `source` names the one that is kept, to which the others add their own if it is a union.
    """
    first = models[source]
    ids, added, scores = dict(first.ids), {token: dict(own) for token, own in first.added.items()}, dict(first.scores)
    warnings = []
    last = max(ids.values(), default=-1)
    if chosen.source == "union":
        if strange := [f"{name} ({own.kind})" for name, own in models.items() if own.kind != first.kind]:
            warnings.append(f"tokenizer: {', '.join(strange)} and {source} ({first.kind}) cut texts up in different "
                            f"ways: tokens of the same name may mean different things")  # fmt: skip
        for own in models.values():
            ordinary = [token for token in own.ids if token not in ids and token not in own.added]
            ids.update((token, last + 1 + i) for i, token in enumerate(ordinary))
            last += len(ordinary)
            if ordinary and first.kind == "Unigram":
                known = _scores(own)
                scores |= {token: known[token] for token in ordinary if token in known}
    asked = [token for token in chosen.rules if token not in ids]
    for name, own in models.items():
        for token, properties in own.added.items():
            if token in ids:
                if token in added and added[token] != properties:
                    warnings.append(f"tokenizer: {token!r} is matched in another way by {name} than by {source}; "
                                    f"the output matches it as the first of them does")  # fmt: skip
            elif chosen.source == "union" or token in asked:
                last += 1
                ids[token], added[token] = last, dict(properties)
    for token in asked:
        if token not in ids:
            last += 1
            ids[token], added[token] = last, _properties(special=False)
    changed = first.changed or len(ids) > len(first.ids)
    return replace(first, ids=ids, added=added, changed=changed, scores=scores), warnings


def tokenizer_files(vocabulary: Vocabulary) -> dict[str, bytes]:
    """The tokenizer's files that differ from those in its directory, by name. Raises InputError."""
    if not vocabulary.changed:
        return {}
    directory, file = vocabulary.directory, vocabulary.directory / FILE_NAME
    content = _content(vocabulary)
    _set_tokens(content, vocabulary, file)
    made = {FILE_NAME: dump_map(content)}
    config = read_map(directory / CONFIG_NAME)
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        config["added_tokens_decoder"] = {str(number): entry for number, entry in _entries(vocabulary, decoder)}
        made[CONFIG_NAME] = dump_map(config)
    _check_loads(made[FILE_NAME], vocabulary, file)
    return made


def is_other_form(name: str) -> bool:
    """Whether a file has a tokenizer in another form than tokenizer.json: of a changed vocabulary it knows nothing."""
    return name in _OTHER_FORMS


def listed(tokens: Sequence[str]) -> str:
    """The first three tokens, and how many more there are."""
    shown = ", ".join(map(repr, tokens[:_SHOWN]))
    return shown + (f" and {len(tokens) - _SHOWN} more" if len(tokens) > _SHOWN else "")


def _properties(*, special: bool) -> dict[str, bool]:
    return {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}


def _told(directory: Path) -> list[tuple[int, dict[str, Any]]]:
    """The tokens that tokenizer_config.json tells of, with their properties, by id: older programs add them later."""
    decoder = read_map(directory / CONFIG_NAME).get("added_tokens_decoder")
    if not isinstance(decoder, dict):
        return []
    told = []
    for number, entry in decoder.items():
        if number.isascii() and number.isdigit() and len(number) < 10 and isinstance(entry, dict):
            content = entry.get("content")
            if isinstance(content, str):
                kept = {key: bool(entry.get(key)) for key in _properties(special=False)}
                told.append((int(number), {"content": content, **kept}))
    return sorted(told, key=lambda item: item[0])


def _converted(directory: Path) -> str:
    """A tokenizer.json of what lies in a directory in another form. Raises InputError."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise InputError(
            f"{directory}: has no {FILE_NAME}; converting what it has needs transformers: "
            f"pip install 'streammerge[eval]'."
        ) from None
    try:
        loaded = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        backend = loaded.backend_tokenizer
        return str(backend.to_str())
    except Exception as error:  # noqa: BLE001 - of any kind, by whichever class reads this form
        raise InputError(f"{directory}: its tokenizer cannot be loaded: {_brief(error)}.") from None


def _brief(error: BaseException) -> str:
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return text.rstrip(".")[:300]


def _scores(vocabulary: Vocabulary) -> dict[str, float]:
    """The scores of a Unigram vocabulary's tokens; none of any other kind."""
    pieces = _content(vocabulary)["model"].get("vocab")
    return {piece: float(score) for piece, score in pieces} if isinstance(pieces, list) else {}


def _content(vocabulary: Vocabulary) -> dict[str, Any]:
    """The tokenizer.json that a vocabulary was read from."""
    file = vocabulary.directory / FILE_NAME
    return read_map(file) if vocabulary.text is None else parse_map(vocabulary.text, file)


def _set_tokens(content: dict[str, Any], vocabulary: Vocabulary, file: Path) -> None:
    """Give a tokenizer.json the tokens and ids of a vocabulary."""
    model, ids = content["model"], vocabulary.ids
    if isinstance(model.get("vocab"), dict):
        gone = set(model["vocab"]) - set(ids)
        # All of them, also those that are added: then their ids are these, whatever their order.
        model["vocab"] = dict(ids)
        if gone and isinstance(model.get("merges"), list):
            model["merges"] = [merge for merge in model["merges"] if not _is_of(merge, gone)]
    elif isinstance(model.get("vocab"), list):
        known = dict(model["vocab"]) | dict(vocabulary.scores)
        if sorted(ids.values()) != list(range(len(ids))):
            raise InputError(f"{file}: ids without a token lie between its others; such a one cannot be extended.")
        model["vocab"] = [[token, known.get(token, 0.0)] for token in ids]
    else:
        raise InputError(f"{file}: a vocabulary of this kind ({model.get('type')}) cannot be extended.")
    entries = [
        {"id": ids[entry["content"]], **{key: value for key, value in entry.items() if key != "id"}}
        for entry in content.get("added_tokens") or []
        if entry["content"] in ids
    ]
    there = {entry["content"] for entry in entries}
    entries += [
        {"id": ids[token], "content": token, **own} for token, own in vocabulary.added.items() if token not in there
    ]
    content["added_tokens"] = sorted(entries, key=lambda entry: entry["id"])


def _is_of(merge: Any, tokens: Collection[str]) -> bool:
    """Whether a merge takes or makes one of some tokens."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    return any(part in tokens for part in (*parts, "".join(parts)))


def _entries(vocabulary: Vocabulary, before: Mapping[str, Any]) -> list[tuple[int, Any]]:
    """The added tokens as tokenizer_config.json has them, by id."""
    kept = {entry["content"]: entry for entry in before.values() if isinstance(entry, dict) and "content" in entry}
    entries = [
        (vocabulary.ids[token], kept.get(token, {"content": token, **own})) for token, own in vocabulary.added.items()
    ]
    return sorted(entries, key=lambda item: item[0])


def _check_loads(content: bytes, vocabulary: Vocabulary, file: Path) -> None:
    """Raise InputError when what was made is not read as what it should be."""
    from tokenizers import Tokenizer as Loaded

    try:
        found = Loaded.from_str(content.decode()).get_vocab(with_added_tokens=True)
    except Exception as error:  # noqa: BLE001 - the library has no kinds of errors
        raise InputError(f"{file}: with the tokens of the output it cannot be loaded: {_brief(error)}.") from None
    if found != vocabulary.ids:
        wrong = [token for token, number in vocabulary.ids.items() if found.get(token) != number]
        raise InputError(
            f"{file}: the tokenizers library gives {listed(wrong or sorted(set(found) - set(vocabulary.ids)))} other "
            f"ids than planned; such a vocabulary cannot be extended."
        )
