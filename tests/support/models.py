"""Small models in Hugging Face's format, made on the spot by transformers and peft: the independent
references."""

from pathlib import Path

import torch

from trainer.config_derived import SAMPLE

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def save_llama(directory: Path, tied: bool = False, seed: int = 0, **changes):
    """A random GQA Llama with llama3 rope scaling (or with tied embeddings) in several files, beside the
    sample's tokenizer."""
    rope = {"rope_scaling": None if tied else dict(LLAMA3)}  # transformers 5 adds to it
    return save_model(directory, "llama", seed, tie_word_embeddings=tied, **(rope | changes))


def save_model(directory: Path, model_type: str, seed: int = 0, **changes):
    """A random model of transformers' class for `model_type`, in several files, beside the sample's
    tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    torch.manual_seed(seed)
    settings = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
        "initializer_range": 0.15,
        "attn_implementation": "eager",
    } | changes
    config = AutoConfig.for_model(model_type, **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    disable_progress_bar()  # tests read what programs print
    model.save_pretrained(directory, max_shard_size="150KB")
    AutoTokenizer.from_pretrained(SAMPLE / "tiny").save_pretrained(directory)
    return model


# Small relatives of Llama with odd shapes: one KV head, head_dim that is not hidden_size / heads, a tied head
# or not, windows of 24 positions on all layers or some, and each type of rope scaling: (model_type, changes).
RELATIVES = {
    "mistral": ("mistral", {"sliding_window": 24, "num_key_value_heads": 1}),
    "qwen2": (
        "qwen2",
        {
            "num_hidden_layers": 5,
            "use_sliding_window": True,
            "sliding_window": 24,
            "max_window_layers": 3,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        },
    ),
    "qwen3": ("qwen3", {"head_dim": 24, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "qwen3 with windows": (
        "qwen3",
        {
            "num_hidden_layers": 4,
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        },
    ),
    "granite": (
        "granite",
        {
            "tie_word_embeddings": True,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.2,
            "logits_scaling": 2.0,
            "attention_bias": True,
        },
    ),
    "smollm3": (
        "smollm3",
        {
            "num_hidden_layers": 5,
            "no_rope_layers": [1, 0, 1, 1, 0],
            "use_sliding_window": True,
            "sliding_window": 24,
            "pad_token_id": None,
            "bos_token_id": None,
            "eos_token_id": None,
        },
    ),
    "longrope": (
        "llama",
        {
            "original_max_position_embeddings": 256,
            "rope_scaling": {
                "rope_type": "longrope",
                "short_factor": [1.0, 1.5, 2.0, 3.0],
                "long_factor": [2.0, 3.0, 4.0, 6.0],
            },
        },
    ),
}


def save_adapter(model, directory: Path, targets: list[str] | str, **changes):
    """A peft adapter with both factors random, saved to `directory`; returns the PeftModel."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    config = LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM", **changes
    )
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    adapted.save_pretrained(directory)
    return adapted


def peft_losses(adapted, rows):
    """Ten steps of peft and torch.optim.AdamW on the rows, each segment alone in a row of its own."""
    from data.loader import Loader

    loader = Loader(rows, batch_size=1, accumulation=4, dp_rank=0, dp_size=1, seed=42)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    adapted.train()
    curve = []
    for step in range(10):
        total, count = 0.0, 0
        for batch in loader.step(step):
            for segment in range(1, int(batch["segment_ids"].max()) + 1):
                where = batch["segment_ids"][0] == segment
                ids, labels = batch["input_ids"][0, where][None], batch["labels"][0, where]
                logits = adapted(input_ids=ids).logits[0]
                total = total + torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
                count += int((labels != -100).sum())
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        curve.append(total.item() / count)
    return curve
