"""What all sides train: a small Llama, a tokenizer, and examples of random words."""

import json
from pathlib import Path

import numpy as np

from data.token_cache import cache_directory
from data.tokens import Tokens, tokenize
from tools.example_lengths import draw_lengths

FILES = {"data": "data.jsonl", "settings": "settings.json", "tokens": "tokens"}
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make(directory: Path, model: dict, settings: dict, examples: int = 1000, seed: int = 0) -> None:
    """Write config.json, a tokenizer with a word for each token of the vocabulary, examples, and settings.

    settings: row_length, rows of a step, steps, warmup. The examples have lengths such as dolly's, cut to a
    row; 30 to 70 % of each is the prompt.
    """
    words = ["<pad>", "<s>", "</s>", *(f"w{number}" for number in range(3, model["vocab_size"]))]
    _save_tokenizer(directory, words)
    (directory / "config.json").write_text(json.dumps(model), encoding="utf-8")
    (directory / FILES["settings"]).write_text(json.dumps(settings), encoding="utf-8")
    rng = np.random.default_rng(seed)
    lengths = np.minimum(draw_lengths(rng, examples), settings["row_length"])
    with open(directory / FILES["data"], "w", encoding="utf-8") as file:
        for length in lengths:
            # The tokenizer of the data adds an EOS at the end.
            chosen = [words[number] for number in rng.integers(3, len(words), length - 1)]
            prompt = int(length * rng.uniform(0.3, 0.7))
            example = {"prompt": " ".join(chosen[:prompt]), "completion": " ".join(chosen[prompt:])}
            file.write(json.dumps(example) + "\n")


def _save_tokenizer(directory: Path, words: list[str]) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(directory)


def read(directory: Path) -> tuple[Tokens, dict]:
    """(the tokens of the examples, the settings) that make() wrote."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    tokens = tokenize(
        str(directory / FILES["data"]), tokenizer, cache=cache_directory(str(directory / FILES["tokens"]))
    )
    return tokens, json.loads((directory / FILES["settings"]).read_text(encoding="utf-8"))
