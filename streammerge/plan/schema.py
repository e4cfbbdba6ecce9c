"""The recipe language as JSON Schema, for editors: keys, values, and the parameters of every method."""

from __future__ import annotations

from typing import Any, get_args

from streammerge.base.dtypes import RECIPE_DTYPES
from streammerge.kernels.contract import Param
from streammerge.methods import METHODS
from streammerge.plan.analysis import AnalysisOptions, Decisions
from streammerge.plan.architecture import ARCHITECTURES
from streammerge.plan.moe import Gates
from streammerge.plan.template import AUTO, NAMES

_SCALARS: dict[str, dict[str, Any]] = {
    # YAML 1.1 reads 1e-5, without a dot, as text.
    "number": {
        "anyOf": [{"type": ["number", "boolean"]}, {"type": "string", "pattern": r"^[-+]?[0-9.]+([eE][-+]?[0-9]+)?$"}]
    },
    "integer": {"type": "integer"},
    "boolean": {"anyOf": [{"type": "boolean"}, {"enum": [0, 1]}]},
}


def recipe_schema() -> dict[str, Any]:
    """The schema of one document of a recipe (JSON Schema 2020-12)."""
    documents = [
        {"if": {"properties": {"merge_method": {"const": name}}}, "then": {"$ref": f"#/$defs/method {name}"}}
        for name in METHODS
    ]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "StreamMerge recipe",
        "type": "object",
        "properties": {
            "merge_method": {"enum": list(METHODS), "description": "see `streammerge methods`"},
            "name": {"type": "string", "description": "this document's result, for other documents to use as a model"},
            "base_model": {"$ref": "#/$defs/model"},
            "models": {"type": "array", "items": {"$ref": "#/$defs/source"}, "description": "whole models"},
            "slices": {"type": "array", "items": {"$ref": "#/$defs/slice"}, "description": "layers, slice by slice"},
            "modules": {
                "type": "object",
                "additionalProperties": {
                    "type": "object",
                    "properties": {
                        "models": {"type": "array", "items": {"$ref": "#/$defs/source"}},
                        "slices": {"type": "array", "items": {"$ref": "#/$defs/slice"}},
                        "parameters": {"type": "object"},
                    },
                },
                "description": "parts of the model, each merged in its own way",
            },
            "parameters": {"type": "object", "description": "parameters for all models and layers"},
            "dtype": {"$ref": "#/$defs/dtype", "description": "what the result is stored in"},
            "out_dtype": {"$ref": "#/$defs/dtype", "description": "the same, and comes before dtype"},
            "tokenizer_source": {
                "$ref": "#/$defs/tokenizer source", "description": "the same as tokenizer: {source: …}",
            },
            "tokenizer": {
                "type": "object",
                "properties": {
                    "source": {"$ref": "#/$defs/tokenizer source", "default": "union"},
                    "tokens": {
                        "type": "object",
                        "additionalProperties": {
                            "type": "object",
                            "properties": {
                                "source": {"$ref": "#/$defs/row source"},
                                "force": {
                                    "type": "boolean", "default": False,
                                    "description": "in all models, not only in those without it",
                                },
                            },
                        },
                        "description": "where rows of tokens come from in models that lack them",
                    },
                    "pad_to_multiple_of": {"type": "integer", "minimum": 1},
                },
                "description": "the tokens of the output",
            },
            "chat_template": {"type": "string", "description": f"{', '.join((AUTO, *NAMES))}, or a template itself"},
            "tasks": {"type": "array", "items": {"type": "object"}, "description": "hi_merging: questions"},
            "proxy": {"enum": ["weights"], "description": "hi_merging without data"},
            "decisions": {"enum": list(get_args(Decisions)), "description": "hi_merging: how conflicts are resolved"},
            "analysis": AnalysisOptions.model_json_schema(),
            "experts": {
                "type": "array", "items": {"$ref": "#/$defs/expert"}, "minItems": 2,
                "description": "in place of merge_method: MLPs of other models as experts of one",
            },
            "shared_experts": {
                "type": ["array", "null"], "items": {"$ref": "#/$defs/expert"}, "description": "one, for Qwen2-MoE",
            },
            "gate_mode": {"enum": list(get_args(Gates)), "description": "what the router knows experts by"},
            "experts_per_token": {"type": "integer", "minimum": 1, "default": 2},
            "architecture": {
                "type": "string", "description": f"{', '.join(ARCHITECTURES)}; without it, what the base can become",
            },
        },
        "if": {"required": ["experts"]},
        "then": {"required": ["base_model", "gate_mode"], "not": {"required": ["merge_method"]}},
        "else": {
            "required": ["merge_method"],
            "oneOf": [{"required": ["models"]}, {"required": ["slices"]}, {"required": ["modules"]}],
        },
        "allOf": documents,
        "$defs": {
            "model": {
                "anyOf": [{"type": "string"}, {"type": "object", "required": ["model"]}],
                "description": "a directory or a safetensors file, or the name of another document",
            },
            "tokenizer source": {
                "anyOf": [{"enum": ["union", "base"]}, {"$ref": "#/$defs/model"}],
                "description": "the tokens of all models, of the base (or first) model, or of one of the models",
            },
            "row source": {
                "anyOf": [
                    {
                        "type": "object", "required": ["kind"], "properties": {"kind": {"const": "zero"}},
                        "additionalProperties": False,
                    },
                    {
                        "type": "object",
                        "properties": {
                            "kind": {"const": "model_token"}, "model": {"$ref": "#/$defs/model"},
                            "token": {"type": "string"}, "token_id": {"type": "integer", "minimum": 0},
                        },
                        "required": ["kind", "model"],
                        "oneOf": [{"required": ["token"]}, {"required": ["token_id"]}],
                        "additionalProperties": False,
                    },
                    {"$ref": "#/$defs/model", "not": {"type": "object", "required": ["kind"]}},
                ],
            },
            "dtype": {"enum": [*RECIPE_DTYPES, *(f"torch.{name}" for name in RECIPE_DTYPES)]},
            "source": {
                "type": "object",
                "required": ["model"],
                "properties": {
                    "model": {"$ref": "#/$defs/model"},
                    "layer_range": {
                        "type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 2, "maxItems": 2,
                        "description": "first layer, and one after the last",
                    },
                    "names": {
                        "type": "object", "additionalProperties": {"type": "string"},
                        "description": "how its tensors' names begin, and what begins the output's in place of that",
                    },
                    "parameters": {"type": "object"},
                },
            },
            "expert": {
                "type": "object",
                "required": ["source_model"],
                "properties": {
                    "source_model": {"$ref": "#/$defs/model"},
                    "positive_prompts": {"type": "array", "items": {"type": "string"}},
                    "negative_prompts": {"type": "array", "items": {"type": "string"}},
                    "residual_scale": {"type": "number", "description": "times the last matrix of its MLPs"},
                    "noise_scale": {"type": "number", "minimum": 0, "description": "deviation of noise in its MLPs"},
                },
            },
            "slice": {
                "type": "object",
                "required": ["sources"],
                "properties": {
                    "sources": {"type": "array", "items": {"$ref": "#/$defs/source"}, "minItems": 1},
                    "base_model": {"$ref": "#/$defs/model"},
                    "parameters": {"type": "object"},
                },
            },
            **{f"setting {kind}": _setting(scalar) for kind, scalar in _SCALARS.items()},
            **{f"method {name}": _method(method.params) for name, method in METHODS.items()},
        },
    }  # fmt: skip


def _method(params: tuple[Param, ...]) -> dict[str, Any]:
    """What a method adds to a document: its parameters, wherever they may be."""
    everywhere = {"properties": {param.name: _of(param) for param in params}}
    of_models = {"properties": {param.name: _of(param) for param in params if param.per_model}}
    sources = {"items": {"properties": {"parameters": of_models}}}
    slices = {"items": {"properties": {"parameters": everywhere, "sources": sources}}}
    module = {"properties": {"parameters": everywhere, "models": sources, "slices": slices}}
    return {
        "properties": {
            "parameters": everywhere,
            "models": sources,
            "slices": slices,
            "modules": {"additionalProperties": module},
        }
    }


def _of(param: Param) -> dict[str, Any]:
    described: dict[str, Any] = {"description": param.meaning}
    if param.default is not None:
        described["default"] = param.default
    if param.kind == "text":
        return {**_setting({"enum": list(param.choices)}), **described}
    return {"$ref": f"#/$defs/setting {param.kind}", **described}


def _setting(scalar: dict[str, Any]) -> dict[str, Any]:
    """A scalar, a gradient, {filter, value}, or a list of those."""
    value = {"anyOf": [scalar, {"type": "array", "items": scalar, "minItems": 1}]}
    entry = {
        "type": "object",
        "required": ["value"],
        "properties": {"filter": {"type": ["string", "null"]}, "value": value},
        "additionalProperties": False,
    }
    return {"anyOf": [value, entry, {"type": "array", "items": entry}]}
