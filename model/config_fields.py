"""The fields of a config.json: their defaults, those that change nothing, and checks of values."""

import math
from typing import Any

# What transformers' LlamaConfig has for a field that the file lacks; model/config.py's rows may have another.
# Null, of the last two, is the number of attention heads, and what a head has of hidden_size.
DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "num_key_value_heads": None,
    "head_dim": None,
}
# Model types that users ask for, and what of them is not computed.
REFUSED = {
    "deepseek_v3": "its latent attention and mixture of experts",
    "gemma": "its norms' weights, which are added to one, and its GELU",
    "gemma2": "its norms' weights, which are added to one, its GELU and its capped logits",
    "gemma3": "its norms' weights, which are added to one, its GELU and its rotary bases by layer",
    "gemma3_text": "its norms' weights, which are added to one, its GELU and its rotary bases by layer",
    "gpt_oss": "its mixture of experts and attention sinks",
    "granitemoe": "its mixture of experts",
    "mixtral": "its mixture of experts",
    "phi3": "its projections, which are stored as one weight (qkv_proj, gate_up_proj)",
    "qwen2_moe": "its mixture of experts",
    "qwen3_moe": "its mixture of experts",
}
# Fields that do not change the logits of these models, nor their loss. All other fields are refused unless
# they are off.
WITHOUT_EFFECT = frozenset(
    (
        # classes, files and programs
        "_name_or_path",
        "name_or_path",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "tokenizer_class",
        "auto_map",  # code of its own, which is never run
        "is_llama_config",
        "unsloth_version",
        "unsloth_fixed",
        "unsloth_training",
        "transformers.js_config",
        "_commit_hash",
        # tokens, and the tokenizer
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "sep_token_id",
        "decoder_start_token_id",
        "prefix",
        "max_sequence_length",
        "model_max_length",
        "tokenizer_model_max_length",
        "tokenizer_padding_side",
        # what a forward pass returns, and by which implementation
        "use_cache",
        "gradient_checkpointing",
        "use_flash_attention",
        "keys_to_ignore_at_inference",
        "return_dict",
        "output_hidden_states",
        "output_attentions",
        "torchscript",
        "tf_legacy_loss",
        "use_bfloat16",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_flash_attn_2_enabled",
        "pretraining_tp",
        "chunk_size_feed_forward",
        "is_decoder",
        "is_encoder_decoder",
        # other tasks than language modelling
        "id2label",
        "label2id",
        "num_labels",
        "problem_type",
        "finetuning_task",
        "task_specific_params",
        # generation, for which the tools have flags
        "max_length",
        "min_length",
        "max_new_tokens",
        "do_sample",
        "early_stopping",
        "num_beams",
        "num_beam_groups",
        "diversity_penalty",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
        "repetition_penalty",
        "length_penalty",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "bad_words_ids",
        "num_return_sequences",
        "output_scores",
        "return_dict_in_generate",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "remove_invalid_values",
        "exponential_decay_length_penalty",
        "suppress_tokens",
        "begin_suppress_tokens",
    )
)
# What is off, where it is not null, false, 0 or empty.
NEUTRAL = {"partial_rotary_factor": 1}


def check_number(name: str, value: Any, kind: type) -> None:
    """Raise ValueError unless the value is a number above 0, of type `kind`: int or float."""
    if isinstance(value, bool) or not isinstance(value, int | kind) or not 0 < value < math.inf:
        raise ValueError(
            f"{name} is {value!r}; {'an integer' if kind is int else 'a number'} above 0 was expected"
        )


def check_unknown(values: dict[str, Any]) -> None:
    """Raise ValueError for the first field that is not off: what is ignored would train another model."""
    for name, value in values.items():
        if value and value != NEUTRAL.get(name.rsplit(".", 1)[-1]):
            raise ValueError(
                f"{name} is {str(value)[:80]!r}, which markstep does not compute; where it changes nothing, "
                "take it out of the file"
            )
