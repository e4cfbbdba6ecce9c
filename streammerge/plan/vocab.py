"""The tokens of models: read from their tokenizers, and put together as the tokenizer of the output.

A tokenizer is its `tokenizer.json`, as the tokenizers library reads it; what has none (a sentencepiece file alone) is
converted by transformers. Nothing of a model's own code is ever run.

The union keeps the ids of the first model. Then come the ordinary tokens of the others, model by model in the order of
the recipe and by their ids, and then the tokens that are matched before any other, in the same order: the same ids on
every run. A new ordinary token has its row, but no merges (BPE), and the lowest score (Unigram): what was known is cut
up as before. Among whole words and pieces of them (WordLevel, WordPiece) it is used like the others. mergekit matches
it before any other, in the midst of words, too.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import xxhash

from streammerge.base.errors import InputError
from streammerge.plan.names import listing
from streammerge.plan.tokenizer import Tokenizer
from streammerge.storage.jsonfile import dump_map, parse_map, read_map, read_text

FILE_NAME, CONFIG_NAME, TEMPLATE_NAME = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
OTHER_TEMPLATE_NAME = "chat_template.json"
# What a tokenizer consists of else; of a changed one these would tell of another vocabulary.
_OTHER_FORMS = ("tokenizer.model", "tokenizer.model.v3", "spiece.model", "sentencepiece.bpe.model",
                "sentencepiece.model", "tiktoken.model", "vocab.json", "merges.txt", "vocab.txt", "vocab.bpe",
                "encoder.json", "added_tokens.json", "tekken.json")  # fmt: skip
_SPECIAL_NAME = "special_tokens_map.json"
_SETTINGS = (CONFIG_NAME, _SPECIAL_NAME, TEMPLATE_NAME, OTHER_TEMPLATE_NAME)
# How a token is matched in a text.
_PROPERTIES = ("single_word", "lstrip", "rstrip", "normalized", "special")
# So much less than the others, a logarithm of a probability is never among those of the likeliest cut.
_NEVER = 1e4


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The tokens of a model by their ids, which are row numbers, and the directory its tokenizer's files are in.

    `added` are the tokens that are matched in a text before any other, with their properties as tokenizer.json has
    them. `text` is a tokenizer.json that is not in the directory. A vocabulary is `changed` when it is not what the
    files say. `reserved` are ids that the model's configuration gives a meaning, whether or not they are tokens.
    """

    directory: Path
    ids: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]]
    kind: str
    text: str | None = None
    changed: bool = False
    reserved: frozenset[int] = frozenset()

    @cached_property
    def tokens(self) -> dict[int, str]:
        """The tokens by id."""
        return {number: token for token, number in self.ids.items()}

    @cached_property
    def digest(self) -> str:
        """Equal for the same tokens under the same ids, matched alike."""
        added = {token: dict(own) for token, own in sorted(self.added.items())}
        facts = [sorted(self.ids.items(), key=lambda item: item[1]), added, self.changed]
        return xxhash.xxh3_128_hexdigest(json.dumps(facts).encode())

    def agrees_with(self, other: Vocabulary) -> bool:
        """Whether no token has one id here and another one there, and no id two tokens."""
        mine, theirs = self.ids.items(), other.tokens
        return all(other.ids.get(token, i) == i and theirs.get(i, token) == token for token, i in mine)

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
    return name in (FILE_NAME, *_SETTINGS) or is_other_form(name)


def load_vocabulary(directory: Path) -> Vocabulary | None:
    """The vocabulary in a model's directory; None where there is no tokenizer. Raises InputError."""
    file = directory / FILE_NAME
    content = _tokenizer_text(directory)
    if content is None:
        return None
    text = None if file.is_file() else content
    loaded, ids = _by_library(content, f"{file}: its tokenizer")
    added = {
        token.content: {name: getattr(token, name) for name in _PROPERTIES}
        for token in loaded.get_added_tokens_decoder().values()
    }
    taken = set(ids.values())
    for number, own in _told(directory):
        token = own.pop("content")
        if token not in ids and number not in taken:
            ids[token], added[token] = number, own
            taken.add(number)
    if not ids:
        raise InputError(f"{file}: its tokenizer has no tokens.")
    return Vocabulary(directory, dict(sorted(ids.items(), key=lambda item: item[1])), added,
                      type(loaded.model).__name__, text)  # fmt: skip


def encode(directory: Path, texts: Sequence[str]) -> list[list[int]] | None:
    """The ids of the tokens of each text, by the tokenizer in a directory, without special ones around it.

    None where there is no tokenizer. Raises InputError.
    """
    content = _tokenizer_text(directory)
    if content is None:
        return None
    loaded, _ = _by_library(content, f"{directory / FILE_NAME}: its tokenizer")
    loaded.no_truncation()
    loaded.no_padding()
    try:
        return [list(found.ids) for found in loaded.encode_batch(list(texts), add_special_tokens=False)]
    except Exception as error:  # noqa: BLE001 - the library has no kind of its own
        raise InputError(f"{directory / FILE_NAME}: its tokenizer cannot cut up a text: {_brief(error)}.") from None


def template_of(directory: Path) -> str | None:
    """The chat template of a model, or None. Of several the one named `default`. Raises InputError."""
    file = directory / TEMPLATE_NAME
    if file.is_file():
        return read_text(file)
    for name in (OTHER_TEMPLATE_NAME, CONFIG_NAME):
        found = read_map(directory / name).get("chat_template")
        if isinstance(found, list):
            usual = [entry for entry in found if isinstance(entry, dict) and entry.get("name") == "default"]
            found = usual[0].get("template") if usual else None
        if isinstance(found, str):
            return found
    return None


def join(chosen: Tokenizer, models: Mapping[str, Vocabulary], source: str) -> tuple[Vocabulary, list[str]]:
    """The vocabulary of the output, and warnings.

    `models` are the vocabularies of all models, each with the tokens it has rows for, in the order of the recipe;
    `source` names the one that is kept, to which the others add their own if it is a union.
    """
    first = models[source]
    ids, added = dict(first.ids), {token: dict(own) for token, own in first.added.items()}
    union = chosen.source == "union"
    warnings = []
    if union and (strange := [f"{name} ({own.kind})" for name, own in models.items() if own.kind != first.kind]):
        warnings.append(f"tokenizer: {', '.join(strange)} and {source} ({first.kind}) cut texts up in different "
                        f"ways: tokens of the same name may mean different things")  # fmt: skip
    free = (number for number in count(max(ids.values(), default=-1) + 1) if number not in first.reserved)
    for own in models.values() if union else ():
        ids |= {token: next(free) for token in own.ids if token not in ids and token not in own.added}
    asked = {token for token in chosen.rules if token not in ids}
    for name, own in models.items():
        matched = {token: dict(properties) for token, properties in own.added.items() if union or token in asked}
        unlike = [token for token, properties in matched.items() if added.get(token, properties) != properties]
        if unlike:
            warnings.append(f"tokenizer: {listed(unlike)} {'are' if len(unlike) > 1 else 'is'} matched in another way "
                            f"by {name} than by {source} or those before it, whose way is kept")  # fmt: skip
        for token, properties in matched.items():
            # A token that one model matches before any other is one of the output, also where another has it as a word.
            added.setdefault(token, properties)
            if token not in ids:
                ids[token] = next(free)
    for token in chosen.rules:
        if token not in ids:
            ids[token], added[token] = next(free), dict.fromkeys(_PROPERTIES, False)
    changed = first.changed or len(ids) > len(first.ids) or len(added) > len(first.added)
    return replace(first, ids=ids, added=added, changed=changed), warnings


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
    for name, settings in ((CONFIG_NAME, config), (_SPECIAL_NAME, read_map(directory / _SPECIAL_NAME))):
        if settings:
            made[name] = dump_map(_without_lost(settings, vocabulary.ids))
    _check_loads(made[FILE_NAME], vocabulary, file)
    return made


def is_other_form(name: str) -> bool:
    """Whether a file has a tokenizer in another form than tokenizer.json: of a changed vocabulary it knows nothing."""
    return name in _OTHER_FORMS or name.endswith(".tiktoken")


def listed(tokens: Sequence[str]) -> str:
    """The first three tokens, and how many more there are."""
    return listing([repr(token) for token in tokens])


def _tokenizer_text(directory: Path) -> str | None:
    """The tokenizer.json in a directory, or what another form of it comes to; None where there is neither."""
    if (file := directory / FILE_NAME).is_file():
        return read_text(file)
    return _converted(directory) if has_tokenizer(directory) else None


def _told(directory: Path) -> list[tuple[int, dict[str, Any]]]:
    """The tokens that tokenizer_config.json tells of, with their properties, by id: older programs add them later."""
    decoder = read_map(directory / CONFIG_NAME).get("added_tokens_decoder")
    if not isinstance(decoder, dict):
        return []
    told = []
    for number, entry in decoder.items():
        if number.isascii() and number.isdigit() and len(number) < 10 and isinstance(entry, dict):
            content = entry.get("content")
            if isinstance(content, str) and _is_text(content):
                kept = {key: bool(entry.get(key)) for key in _PROPERTIES}
                told.append((int(number), {"content": content, **kept}))
    return sorted(told, key=lambda item: item[0])


def _is_text(content: str) -> bool:
    """Whether no half of a character is in it."""
    return not any("\ud800" <= letter <= "\udfff" for letter in content)


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


def _by_library(content: str, what: str) -> tuple[Any, dict[str, int]]:
    """A tokenizer.json as the library reads it, and its ids. Raises InputError, that begins with `what`."""
    from tokenizers import Tokenizer as Loaded

    try:
        loaded = Loaded.from_str(content)
        return loaded, loaded.get_vocab(with_added_tokens=True)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001 - the library panics over some files, and a panic is no Exception
        raise InputError(f"{what} cannot be loaded: {_brief(error)}.") from None


def _brief(error: BaseException) -> str:
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return text.rstrip(".")[:300]


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
        known = dict(model["vocab"])
        lowest = min(known.values(), default=0.0) - _NEVER
        if sorted(ids.values()) != list(range(len(ids))):
            raise InputError(f"{file}: ids without a token lie between its others; such a one cannot be extended.")
        model["vocab"] = [[token, known.get(token, lowest)] for token in ids]
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


def _without_lost(settings: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, Any]:
    """Settings of a tokenizer without special tokens that are none any more: a loader would add them again."""

    def known(value: Any) -> bool:
        token = value.get("content") if isinstance(value, dict) else value
        return not isinstance(token, str) or token in ids

    kept = {key: value for key, value in settings.items() if not key.endswith("_token") or known(value)}
    for key in ("additional_special_tokens", "extra_special_tokens"):
        if isinstance(kept.get(key), list):
            kept[key] = [value for value in kept[key] if known(value)]
    return kept


def _entries(vocabulary: Vocabulary, before: Mapping[str, Any]) -> list[tuple[int, Any]]:
    """The added tokens as tokenizer_config.json has them, by id."""
    entries_before = [entry for entry in before.values() if isinstance(entry, dict)]
    kept = {entry["content"]: entry for entry in entries_before if isinstance(entry.get("content"), str)}
    entries = [
        (vocabulary.ids[token], kept.get(token, {"content": token, **own})) for token, own in vocabulary.added.items()
    ]
    return sorted(entries, key=lambda item: item[0])


def _check_loads(content: bytes, vocabulary: Vocabulary, file: Path) -> None:
    """Raise InputError when what was made is not read as what it should be."""
    _, found = _by_library(content.decode(), f"{file}: with the tokens of the output it")
    if found != vocabulary.ids:
        wrong = [token for token, number in vocabulary.ids.items() if found.get(token) != number]
        raise InputError(
            f"{file}: the tokenizers library gives {listed(wrong or sorted(set(found) - set(vocabulary.ids)))} other "
            f"ids than planned; such a vocabulary cannot be extended."
        )
