"""Keys of ``config.json`` beside those that give a model its shape.

A key is inert, must hold a value under which it changes nothing, or is refused: one that nobody
looked at may be the one that makes every vector wrong.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

# Keys that change the maths, with the values under which they do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "rope_interleaved": (False, None),
    "partial_rotary_factor": (1.0, None),
    "hidden_act": ("silu",),
    "use_bidirectional_attention": (False, None),
    "is_causal": (True, False, None),  # read beside model_type
    "pretraining_tp": (1, None),
    "is_decoder": (False, True, None),
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "pruned_heads": ({}, None),
}

_INERT = frozenset(
    """_name_or_path architectures attention_dropout bos_token_id eos_token_id pad_token_id
    unk_token_id sep_token_id decoder_start_token_id dtype torch_dtype initializer_range
    transformers_version use_cache tie_word_embeddings tie_encoder_decoder is_llama_config
    is_encoder_decoder return_dict output_attentions output_hidden_states torchscript
    use_bfloat16 tf_legacy_loss finetuning_task id2label label2id tokenizer_class prefix
    task_specific_params problem_type chunk_size_feed_forward transformers.js_config
    _attn_implementation_autoset model_type_original license unsloth_version
    unsloth_fixed""".split()
)

# What transformers stores of text generation, which an embedding has no part in.
_GENERATION = frozenset(
    """bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id
    forced_eos_token_id length_penalty max_length min_length no_repeat_ngram_size num_beam_groups
    num_beams num_return_sequences output_scores remove_invalid_values repetition_penalty
    return_dict_in_generate suppress_tokens temperature top_k top_p typical_p""".split()
)

# Modules of published checkpoints whose maths is one that a contract names.
_KNOWN_CODE = ("configuration_nvembed", "modeling_gritlm7b", "modeling_nvembed")


def refuse_other_maths(value: dict[str, Any], read: Collection[str], problems: list[str]) -> None:
    """Lists the keys that change the maths, or may.

    Args:
        value: The parsed object.
        read: Keys that its reader takes in.
        problems: What is wrong is appended here.
    """
    for key, got in value.items():
        if key in read or key in _INERT or key in _GENERATION:
            continue
        if key in _NEUTRAL:
            if not any(type(got) is type(neutral) and got == neutral for neutral in _NEUTRAL[key]):
                problems.append(f"{key}={got!r} changes the maths and is not supported")
        elif key == "layer_types":
            kinds = got if isinstance(got, list) else [got]
            if got is not None and any(kind != "full_attention" for kind in kinds):
                problems.append("layer_types other than full_attention changes the maths")
        elif key == "auto_map":
            if not isinstance(got, dict) or not all(map(_is_known_code, got.values())):
                problems.append(f"auto_map names code that may change the maths: {got!r:.200}")
        else:
            problems.append(f"unknown key {key!r}, which may change the maths")


def _is_known_code(name: Any) -> bool:
    """Whether ``[OWNER/REPOSITORY--]MODULE.CLASS`` names a module whose maths is known."""
    return isinstance(name, str) and name.rpartition("--")[2].split(".")[0] in _KNOWN_CODE
