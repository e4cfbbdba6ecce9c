"""Everything in OUT that is not weights: what is copied from the donor, and the model card.

The donor is the base, or else the first model, of those that the recipe does not rename. Copied is every file beside
its weights that is not weights itself: tokenizer, chat template, generation config, processors, code, licence. The
recipe may take the tokenizer from another model, or put several together; configuration.py makes config.json true to
the output.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from streammerge.plan.plan import Plan
from streammerge.plan.view import Model
from streammerge.plan.vocab import CONFIG_NAME as TOKENIZER_CONFIG_NAME
from streammerge.plan.vocab import (
    OTHER_TEMPLATE_NAME,
    TEMPLATE_NAME,
    has_tokenizer,
    is_of_tokenizer,
    is_other_form,
    tokenizer_files,
)
from streammerge.run.configuration import CONFIG_NAME, GENERATION_NAME, output_config, output_generation_config
from streammerge.run.hub import HUB_NAME
from streammerge.storage.checkpoint import Checkpoint, leads_outside
from streammerge.storage.jsonfile import dump_map, parse_map, read_bytes

RECIPE_NAME = "mergekit_config.yml"
CARD_NAME = "README.md"
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".npz", ".partial"}
_OURS = {CARD_NAME, RECIPE_NAME, "streammerge.manifest.json"}
_LARGEST = 256_000_000


def side_files(plan: Plan) -> dict[str, bytes]:
    """Everything in OUT but weights, index and manifest: name to content. Raises InputError."""
    files = {file.name: _content(plan, file) for file in _beside_weights(plan) if _why_left(file) is None}
    if plan.vocabulary is not None:
        files |= tokenizer_files(plan.vocabulary)
    if plan.template is not None:
        files |= _with_template(files, plan.template)
    return files | {RECIPE_NAME: plan.recipe.text.encode(), CARD_NAME: model_card(plan)}


def left_files(plan: Plan) -> list[str]:
    """A sentence for each of the donor's files that would go along and does not."""
    return [f"{file}: {why}, and is not copied" for file in _beside_weights(plan) if (why := _why_left(file))]


def _why_left(file: Path) -> str | None:
    if (target := leads_outside(file.parent, file.name)) is not None:
        return f"is a link to {target}, outside its directory"
    return "is larger than a side file should be" if file.stat().st_size > _LARGEST else None


def _beside_weights(plan: Plan) -> list[Path]:
    """The donor's files, unless it is one file without a config; and those of the tokenizer, if it is another's."""
    donor, joined = plan.checkpoints[0], plan.vocabulary
    alone = not donor.path.is_dir() and not (donor.directory / CONFIG_NAME).exists()
    tokenizer = tokenizer_directory(plan.models[0], plan.checkpoints) if joined is None else joined.directory
    files = [] if alone else [file for file in _small_files(donor.directory) if not is_of_tokenizer(file.name)]
    if not alone or joined is not None:
        files += [file for file in _small_files(tokenizer) if is_of_tokenizer(file.name)]
    if joined is not None and joined.changed:
        files = [file for file in files if not is_other_form(file.name)]
    if plan.template is not None:
        files = [file for file in files if file.name != OTHER_TEMPLATE_NAME]
    return files


def _small_files(directory: Path) -> list[Path]:
    return [
        file
        for file in sorted(directory.iterdir())
        if file.is_file()
        and file.suffix not in _WEIGHTS
        and not file.name.startswith(".")
        and not file.name.endswith(".index.json")
        and file.name not in _OURS
    ]


def tokenizer_directory(model: Model, checkpoints: Sequence[Checkpoint]) -> Path:
    """Where a model's tokenizer is: in its adapter's directory if there is one, or else in its own."""
    if model.adapter is not None and has_tokenizer(own := checkpoints[model.adapter[0]].directory):
        return own
    return checkpoints[model.checkpoint].directory


def _content(plan: Plan, file: Path) -> bytes:
    """The content a copied file gets in OUT. Raises InputError."""
    if file.name == CONFIG_NAME:
        return output_config(plan, file)
    if file.name == GENERATION_NAME and plan.vocabulary is not None:
        return output_generation_config(plan, file)
    return read_bytes(file)


def _with_template(files: Mapping[str, bytes], template: str) -> dict[str, bytes]:
    """The chat template as a file, and where older programs look for it, if there was one."""
    made = {TEMPLATE_NAME: template.encode("utf-8", "surrogatepass")}
    if TOKENIZER_CONFIG_NAME in files:
        config = parse_map(files[TOKENIZER_CONFIG_NAME], Path(TOKENIZER_CONFIG_NAME))
        made[TOKENIZER_CONFIG_NAME] = dump_map(config | {"chat_template": template})
    return made


def model_card(plan: Plan) -> bytes:
    """A README.md the Hub understands: what was merged, how, from what under which licence."""
    licences = [_licences(plan, model) for model in plan.models]
    every = {licence for own in licences for licence in own}
    known = sorted({licence for licence in every if licence})
    front: dict[str, object] = {
        "library_name": "transformers",
        "tags": ["merge", "mergekit", "streammerge"],
    }
    # The Hub knows names, not somebody's folders.
    parts = [part.partition("@")[0] for model in plan.models for part in model.reference.split("+")]
    named = [part for part in dict.fromkeys(parts) if HUB_NAME.fullmatch(part)]
    if named:
        front["base_model"] = named
    if len(known) == 1 and None not in every:
        front["license"] = known[0]
    elif known:
        front["license"] = "other"
        front["license_name"] = "licences-of-the-inputs"
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", plan.recipe.text)), default=0))
    rows = "\n".join(
        f"| {'base' if model.reference in plan.recipe.bases else 'model'} | {_cell(model.reference)} | "
        f"{' and '.join(licence or 'not stated' for licence in own)} |"
        for model, own in zip(plan.models, licences, strict=True)
    )
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n"
        f"# {_title(plan)}\n\n"
        f"Made with StreamMerge. What went in:\n\n| role | model | licence |\n|---|---|---|\n{rows}\n\n"
        f"The licences of all inputs apply.\n\n## Recipe\n\n{fence}yaml\n{plan.recipe.text.rstrip()}\n{fence}\n\n"
        f"Checksums and versions are in `streammerge.manifest.json`; `streammerge verify` checks them.\n"
    ).encode()


def _title(plan: Plan) -> str:
    if plan.ground is None:
        return f"A merge by {plan.method.name}"
    return f"A {plan.ground.architecture.title} model made of dense ones"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _licences(plan: Plan, model: Model) -> list[str | None]:
    """The licence of a model, and that of its adapter."""
    numbers = [model.checkpoint, *([] if model.adapter is None else [model.adapter[0]])]
    return [_licence(plan.checkpoints[number].directory) for number in numbers]


def _licence(directory: Path) -> str | None:
    """The licence that a model's own card states, or None."""
    card = directory / CARD_NAME
    if not card.is_file() or card.stat().st_size > _LARGEST:
        return None
    match = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        front = yaml.safe_load(match[1]) if match else None
    except (yaml.YAMLError, RecursionError, ValueError, KeyError, AttributeError, TypeError):
        return None
    licence = front.get("license") if isinstance(front, dict) else None
    return licence if isinstance(licence, str) else None
