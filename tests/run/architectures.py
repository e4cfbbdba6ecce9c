"""Architectures of transformers, each made so small that it runs in a moment; and docs/architectures.md of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["dense", "experts", "hybrid", "encoder", "encoder-decoder", "vision and text"]

VOCABULARY = 96
# The token that stands for a piece of an image.
IMAGE = VOCABULARY - 1

_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
_PLAIN: dict[str, Any] = {
    **_TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64,
}  # fmt: skip
_GROUPED = {**_PLAIN, "num_key_value_heads": 2}
_HEADS = {**_GROUPED, "head_dim": 8}
_GPT = {**_TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_FOUR = {"num_local_experts": 4, "num_experts_per_tok": 2}
_NAMED_FOUR = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LATENT: dict[str, Any] = {
    **_PLAIN, "num_key_value_heads": 4, "head_dim": 8, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16, "v_head_dim": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "first_k_dense_replace": 1, "n_routed_experts": 8, "n_group": 2, "topk_group": 1,
}  # fmt: skip
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 4, "mamba_chunk_size": 8}
_TWO_SIDES: dict[str, Any] = {
    **_TOKENS, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_start_token_id": 0,
}  # fmt: skip
_PICTURE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


@dataclass(frozen=True)
class Architecture:
    """A `model_type`, the class that runs it, a tiny configuration, and what is to be found in its checkpoint.

    `stacks` are the numbers of layers by the name before the number; `head` is None where the embedding is the head, or
    where there is none. `inputs` are the shapes of what it is run with, and `image_tokens` how many of its tokens stand
    for the image.
    """

    name: str
    kind: Kind
    model: str
    config: dict[str, Any]
    stacks: dict[str, int]
    embedding: str | None = "model.embed_tokens.weight"
    head: str | None = "lm_head.weight"
    inputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    image_tokens: int = 0


def _causal(name: str, kind: Kind, config: dict[str, Any], stack: str = "model.layers", layers: int = 2,
            **found: Any) -> Architecture:  # fmt: skip
    return Architecture(name, kind, "AutoModelForCausalLM", config, {stack: layers}, **found)


def _masked(name: str, stack: str, embedding: str, config: dict[str, Any]) -> Architecture:
    return Architecture(name, "encoder", "AutoModelForMaskedLM", config, {stack: 2}, embedding, None)


def _seeing(name: str, config: dict[str, Any], stacks: dict[str, int], embedding: str, head: str | None,
            image_tokens: int, **inputs: tuple[int, ...]) -> Architecture:  # fmt: skip
    return Architecture(name, "vision and text", "AutoModelForImageTextToText", config, stacks, embedding, head, inputs,
                        image_tokens)  # fmt: skip


_WTE = {"stack": "transformer.h", "embedding": "transformer.wte.weight"}
_WORDS = {"stack": "transformer.h", "embedding": "transformer.word_embeddings.weight", "head": None}
_IN_BACKBONE = {"stack": "backbone.layers", "embedding": "backbone.embeddings.weight"}

ARCHITECTURES = [
    _causal("llama", "dense", _GROUPED),
    _causal("mistral", "dense", _HEADS),
    _causal("qwen2", "dense", {**_GROUPED, "tie_word_embeddings": True}, head=None),
    _causal("qwen3", "dense", _HEADS),
    _causal("gemma2", "dense", _HEADS, head=None),
    _causal("gemma3_text", "dense", _HEADS, head=None),
    _causal("phi", "dense", _GROUPED),
    _causal("phi3", "dense", _GROUPED),
    _causal("olmo2", "dense", _GROUPED),
    _causal("gpt2", "dense", _GPT, **_WTE, head=None),
    _causal("gptj", "dense", {**_GPT, "rotary_dim": 4}, **_WTE),
    _causal("gpt_bigcode", "dense", _GPT, **_WTE, head=None),
    _causal("gpt_neox", "dense", _PLAIN, "gpt_neox.layers", embedding="gpt_neox.embed_in.weight",
            head="embed_out.weight"),
    _causal("falcon", "dense", {**_TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
            **_WORDS),
    _causal("bloom", "dense", {**_TOKENS, "hidden_size": 32, "n_layer": 2, "n_head": 4}, **_WORDS),
    _causal("mpt", "dense", {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
            "transformer.blocks", embedding="transformer.wte.weight", head=None),
    _causal("opt", "dense", {**_PLAIN, "ffn_dim": 48, "word_embed_proj_dim": 32}, "model.decoder.layers",
            embedding="model.decoder.embed_tokens.weight", head=None),
    _causal("starcoder2", "dense", _GROUPED, head=None),
    _causal("cohere2", "dense", _HEADS, head=None),
    _causal("granite", "dense", _GROUPED),
    _causal("stablelm", "dense", _GROUPED),
    _causal("glm4", "dense", _HEADS),
    _causal("mixtral", "experts", {**_HEADS, **_FOUR}),
    _causal("qwen2_moe", "experts", {**_GROUPED, **_NAMED_FOUR, "shared_expert_intermediate_size": 24}),
    _causal("qwen3_moe", "experts", {**_HEADS, **_NAMED_FOUR}),
    _causal("deepseek_v2", "experts", {**_LATENT, "q_lora_rank": None}),
    _causal("deepseek_v3", "experts", _LATENT),
    _causal("olmoe", "experts", {**_GROUPED, **_NAMED_FOUR}),
    _causal("granitemoe", "experts", {**_GROUPED, **_FOUR}),
    _causal("gpt_oss", "experts", {**_HEADS, **_FOUR, "sliding_window": 8}),
    _causal("llama4_text", "experts", {**_HEADS, "num_local_experts": 2, "num_experts_per_tok": 1,
                                       "intermediate_size_mlp": 48, "attention_chunk_size": 8}),
    _causal("jamba", "hybrid", {**_GROUPED, "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1,
                                "num_experts": 4, "num_experts_per_tok": 2, "mamba_d_state": 4, "mamba_dt_rank": 4,
                                "use_mamba_kernels": False}, layers=4),
    _causal("mamba", "hybrid", {**_TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4,
                                "time_step_rank": 4}, **_IN_BACKBONE, head=None),
    _causal("falcon_h1", "hybrid", {**_HEADS, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8,
                                    "mamba_d_state": 4, "mamba_n_groups": 1, "mamba_chunk_size": 8}),
    _causal("bamba", "hybrid", {**_GROUPED, **_MAMBA, "attn_layer_indices": [1]}),
    _causal("recurrent_gemma", "hybrid", {**_HEADS, "num_hidden_layers": 3, "lru_width": 32,
                                          "attention_window_size": 8}, layers=3, head=None),
    _causal("qwen3_next", "hybrid", {**_HEADS, **_NAMED_FOUR, "num_hidden_layers": 4, "linear_num_value_heads": 4,
                                     "shared_expert_intermediate_size": 16, "linear_num_key_heads": 2,
                                     "linear_key_head_dim": 8, "linear_value_head_dim": 8}, layers=4),
    _causal("lfm2", "hybrid", {**_GROUPED, "full_attn_idxs": [1], "block_ff_dim": 48}, head=None),
    _masked("bert", "bert.encoder.layer", "bert.embeddings.word_embeddings.weight", _PLAIN),
    _masked("roberta", "roberta.encoder.layer", "roberta.embeddings.word_embeddings.weight", _PLAIN),
    _masked("distilbert", "distilbert.transformer.layer", "distilbert.embeddings.word_embeddings.weight",
            {**_TOKENS, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 64}),
    _masked("deberta-v2", "deberta.encoder.layer", "deberta.embeddings.word_embeddings.weight",
            {**_PLAIN, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    _masked("modernbert", "model.layers", "model.embeddings.tok_embeddings.weight",
            {**_PLAIN, "cls_token_id": 0, "sep_token_id": 0}),
    Architecture("vit", "encoder", "AutoModelForImageClassification", _PICTURE, {"vit.encoder.layer": 3}, None, None,
                 {"pixel_values": (1, 3, 16, 16)}),
    Architecture("t5", "encoder-decoder", "AutoModelForSeq2SeqLM",
                 {**_TOKENS, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 3,
                  "num_heads": 4, "decoder_start_token_id": 0},
                 {"encoder.block": 2, "decoder.block": 3}, "shared.weight", None, {"decoder_input_ids": (1, 5)}),
    Architecture("bart", "encoder-decoder", "AutoModelForSeq2SeqLM", {**_TWO_SIDES, "max_position_embeddings": 64},
                 {"model.encoder.layers": 2, "model.decoder.layers": 3}, "model.shared.weight", None,
                 {"decoder_input_ids": (1, 5)}),
    Architecture("whisper", "encoder-decoder", "AutoModelForSpeechSeq2Seq",
                 {**_TWO_SIDES, "max_source_positions": 16, "max_target_positions": 32, "num_mel_bins": 8},
                 {"model.encoder.layers": 2, "model.decoder.layers": 3}, "model.decoder.embed_tokens.weight", None,
                 {"input_features": (1, 8, 32), "decoder_input_ids": (1, 5)}),
    Architecture("clip", "vision and text", "AutoModel",
                 {"projection_dim": 16, "text_config": _PLAIN, "vision_config": _PICTURE},
                 {"text_model.encoder.layers": 2, "vision_model.encoder.layers": 3},
                 "text_model.embeddings.token_embedding.weight", None, {"pixel_values": (1, 3, 16, 16)}),
    _seeing("llava", {"text_config": {**_GROUPED, "model_type": "llama"}, "image_token_index": IMAGE,
                      "vision_config": {**_PICTURE, "model_type": "clip_vision_model", "projection_dim": 16}},
            {"language_model.model.layers": 2, "vision_tower.encoder.layers": 3},
            "language_model.model.embed_tokens.weight", "language_model.lm_head.weight", 4,
            pixel_values=(1, 3, 16, 16)),
    _seeing("gemma3", {"text_config": _HEADS, "vision_config": _PICTURE, "mm_tokens_per_image": 4,
                       "image_token_index": IMAGE},
            {"language_model.model.layers": 2, "vision_tower.encoder.layers": 3},
            "language_model.model.embed_tokens.weight", None, 4, pixel_values=(1, 3, 16, 16)),
    _seeing("qwen2_vl", {"text_config": {**_GROUPED, "rope_parameters": _MROPE}, "image_token_id": IMAGE,
                         "vision_config": {"depth": 3, "embed_dim": 32, "hidden_size": 32, "num_heads": 4,
                                           "mlp_ratio": 2, "patch_size": 8}},
            {"model.layers": 2, "visual.blocks": 3, "visual.merger.mlp": 3}, "model.embed_tokens.weight",
            "lm_head.weight", 4, pixel_values=(16, 384)),
    _seeing("idefics3", {"text_config": {**_GROUPED, "model_type": "llama"}, "vision_config": _PICTURE,
                         "scale_factor": 2, "image_token_id": IMAGE},
            {"model.text_model.layers": 2, "model.vision_model.encoder.layers": 3},
            "model.text_model.embed_tokens.weight", "lm_head.weight", 1, pixel_values=(1, 1, 3, 16, 16)),
    _seeing("internvl", {"text_config": {**_GROUPED, "model_type": "qwen2"}, "image_token_id": IMAGE,
                         "vision_config": {**_PICTURE, "image_size": [16, 16], "patch_size": [8, 8]}},
            {"language_model.model.layers": 2, "vision_tower.encoder.layer": 3},
            "language_model.model.embed_tokens.weight", None, 1, pixel_values=(1, 3, 16, 16)),
]  # fmt: skip


def page(transformers_version: str) -> str:
    """docs/architectures.md."""
    rows = [
        f"| {each.name} | {each.kind} | "
        + ", ".join(f"`{stack}` {count}" for stack, count in each.stacks.items())
        + f" | {_code(each.embedding)} | {_code(each.head)} |"
        for each in ARCHITECTURES
    ]
    return _BEFORE.format(count=len(rows), version=transformers_version) + "\n".join(rows) + _AFTER


def _code(name: str | None) -> str:
    return "—" if name is None else f"`{name}`"


_BEFORE = """# Architectures

StreamMerge has no table of architectures: names and shapes decide. A name's first number between dots is its layer, and
what comes before it is the name of its stack; words in names say what is an embedding, a head, or before the first
layer. So what is not listed here merges, too. What is listed is tried by `tests/run/test_architectures.py`:
{count} architectures of transformers {version}, made tiny with two fine-tunes each, merged, compared with a merge
by hand, loaded back without a missing or unexpected tensor, and run.

| `model_type` | kind | layers found | embedding | head |
|---|---|---|---|---|
"""
_AFTER = """

Without a head the embedding is the head, or there is none. A list of numbered parts that are no layers, such as the
`mlp` of Qwen2-VL's merger, is a stack of its own; slices of a model with several stacks need `modules`. Names are those
on disk, and the output has those of the inputs. This page is made from the list in `tests/run/architectures.py`.
"""
