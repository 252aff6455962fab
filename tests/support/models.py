"""Small models in Hugging Face's format, made on the spot by transformers and peft: the independent
references."""

from pathlib import Path

import torch

from trainer.config import SAMPLE

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
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
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
        "tie_word_embeddings": tied,
        "rope_scaling": None if tied else dict(LLAMA3),  # transformers 5 adds to it
        "attn_implementation": "eager",
    } | changes
    model = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    disable_progress_bar()  # tests read what programs print
    model.save_pretrained(directory, max_shard_size="150KB")
    AutoTokenizer.from_pretrained(SAMPLE / "tiny").save_pretrained(directory)
    return model


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
