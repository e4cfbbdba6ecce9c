"""The models that a recipe names: found on this machine or on the Hub, and opened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from streammerge.base.errors import InputError, RecipeError
from streammerge.plan.adapter import Adapter, open_adapter
from streammerge.plan.pickled import open_model
from streammerge.plan.recipe import Recipe
from streammerge.plan.reference import Reference, find_local, parse_reference, resolve_local
from streammerge.plan.view import Model
from streammerge.plan.vocab import load_vocabulary, template_of
from streammerge.run.configuration import reserved_ids, says_tied, scale_block_of
from streammerge.run.hub import HUB_NAME, commit_of, fetch_model
from streammerge.run.sidefiles import tokenizer_directory
from streammerge.storage.checkpoint import Checkpoint


@dataclass(frozen=True)
class _Found:
    """Where a reference leads."""

    text: str
    path: Path
    adapter: Path | None

    @property
    def key(self) -> tuple[Path, Path | None]:
        """Equal for the same model under two names."""
        return self.path.resolve(), None if self.adapter is None else self.adapter.resolve()

    @property
    def commits(self) -> tuple[str, ...]:
        found = [commit_of(path) for path in (self.path, self.adapter) if path is not None]
        return tuple(commit for commit in found if commit is not None)


def open_models(recipe: Recipe, note: Callable[[str], None]) -> tuple[list[Model], list[Checkpoint]]:
    """The models of a recipe, and their checkpoints, each once, with those of adapters last.

    `note` hears of downloads. Raises InputError, with all that are not on this machine before anything is downloaded,
    and RecipeError when two are the same.
    """
    references = {text: parse_reference(text, recipe.path) for text in recipe.inputs}
    _check_local(references, recipe.path)
    found = [
        _Found(
            text,
            _locate(reference.model, reference.revision, recipe.path, note),
            None
            if reference.adapter is None
            else _locate(reference.adapter, reference.adapter_revision, recipe.path, note),
        )
        for text, reference in references.items()
    ]
    first: dict[tuple[Path, Path | None], str] = {}
    for each in found:
        if (same := first.setdefault(each.key, each.text)) != each.text:
            raise RecipeError(str(recipe.path), [f"{same} and {each.text} are the same model; list it once"])
    checkpoints: dict[Path, Checkpoint] = {}
    for each in found:
        if each.key[0] not in checkpoints:
            checkpoints[each.key[0]] = open_model(each.path)
    adapters: dict[Path | None, Adapter] = {
        each.key[1]: open_adapter(each.adapter) for each in found if each.adapter is not None
    }
    # A directory may hold both a model and an adapter.
    numbers = {path: number for number, path in enumerate(checkpoints)}
    after = {path: len(checkpoints) + number for number, path in enumerate(adapters)}
    models = [
        Model(
            each.text,
            numbers[each.key[0]],
            None if each.adapter is None else (after[each.key[1]], adapters[each.key[1]]),
            says_tied(checkpoints[each.key[0]]),
            each.commits,
            scale_block=scale_block_of(checkpoints[each.key[0]]),
        )
        for each in found
    ]
    opened = [*checkpoints.values(), *(adapter.checkpoint for adapter in adapters.values())]
    if recipe.needs_tokenizers:
        models = [
            _with_tokenizer(model, tokenizer_directory(model, opened), opened[model.checkpoint].directory)
            for model in models
        ]
    return models, opened


def _with_tokenizer(model: Model, directory: Path, beside: Path) -> Model:
    """The model with its tokenizer, which is in `directory`; `beside` has its configurations."""
    vocabulary = load_vocabulary(directory)
    if vocabulary is not None:
        vocabulary = replace(vocabulary, reserved=reserved_ids(beside))
    return replace(model, vocabulary=vocabulary, template=template_of(directory))


def _check_local(references: dict[str, Reference], recipe_path: Path) -> None:
    """Raise InputError with everything that is no path here and no name on the Hub."""
    missing = []
    for reference in references.values():
        for name in (reference.model, reference.adapter):
            if name is None or HUB_NAME.fullmatch(name) is not None:
                continue
            try:
                resolve_local(name, recipe_path)
            except InputError as error:
                missing.append(str(error))
    if missing:
        raise InputError("\n".join(missing))


def _locate(name: str, revision: str | None, recipe_path: Path, note: Callable[[str], None]) -> Path:
    local = find_local(name, recipe_path)
    if local is None:
        return fetch_model(name, revision, note)
    if revision is not None:
        raise InputError(f"{recipe_path}: {name}@{revision}: a directory of this machine has no revisions.")
    return local
