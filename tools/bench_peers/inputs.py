"""What all sides train: a small Llama, a tokenizer, and examples of random words."""

import json
from pathlib import Path

import numpy as np

FILES = {"data": "data.jsonl", "settings": "settings.json", "tokens": "tokens", "rows": "rows.npz"}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": LINEAR, "task_type": "CAUSAL_LM"}
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

    settings: row_length, rows of a step, rows of a micro_batch (not trl's), steps, warmup, bf16,
    gradient_checkpointing (none, selective, full), device (cpu, cuda). The examples have lengths such as
    dolly's, cut to a row; 30 to 70 % of each is the prompt.
    """
    from tools.example_lengths import draw_lengths

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


def save_rows(directory: Path) -> None:
    """Write the rows that markstep packs of what make() wrote: input_ids, labels (int64 [rows, row_length],
    each label at its own token, as transformers wants them), and lengths without padding [rows]."""
    from data.packing import Pieces, Rows, pack
    from data.tokens import IGNORED

    tokens, settings = read(directory)
    pieces = Pieces(np.zeros(len(tokens), np.int64), tokens.offsets[:-1], tokens.offsets[1:])
    groups = pack(pieces.lengths.tolist(), settings["row_length"])
    packed = Rows([tokens], pieces, groups, settings["row_length"], MODEL["pad_token_id"])
    rows = [packed.row(number) for number in range(len(packed))]
    labels = np.roll([row["labels"] for row in rows], 1, axis=1)
    labels[:, 0] = IGNORED
    np.savez(
        directory / FILES["rows"],
        input_ids=np.array([row["input_ids"] for row in rows]),
        labels=labels,
        lengths=np.array([np.count_nonzero(row["segment_ids"]) for row in rows]),
    )


def read(directory: Path):
    """(the data.tokens.Tokens of the examples, the settings) that make() wrote."""
    from transformers import AutoTokenizer

    from data.token_cache import cache_directory
    from data.tokens import tokenize

    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    tokens = tokenize(
        str(directory / FILES["data"]), tokenizer, cache=cache_directory(str(directory / FILES["tokens"]))
    )
    return tokens, json.loads((directory / FILES["settings"]).read_text(encoding="utf-8"))
