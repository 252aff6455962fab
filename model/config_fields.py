"""The fields of a Llama's config.json: their defaults, and those that change nothing."""

# What transformers' LlamaConfig has for a field that the file lacks. Null, of the last two, is
# the number of attention heads, and what a head has of hidden_size.
DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "initializer_range": 0.02,
    "num_key_value_heads": None,
    "head_dim": None,
}
# Fields that do not change the logits of LlamaForCausalLM, nor its loss. All other fields are refused unless
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
