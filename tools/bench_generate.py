"""Tokens a second of greedy generation, beside transformers' generate on the same CPU.

    python -m tools.bench_generate [--model DIR] [--batch_size 1] [--rounds 5]

20 prompts of 16 to 120 random tokens get --max_new_tokens each, and none ends early; fp32, one rank. Both
sides get the same batches (transformers' are padded on the left). The sides alternate, after a round for
warming up. Without --model: 6 layers, hidden 512, vocabulary 8,192, random weights.
"""

import sys
import tempfile
import time
from pathlib import Path

from parallel.runtime import launch, prepare_environment
from tools import cli

PROMPTS = 20
DEFAULT = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}


def generate_by_transformers(model, prompts: list[list[int]], batch_size: int, new: int) -> list[list[int]]:
    """`new` tokens for each prompt, by transformers' generate."""
    import torch

    answers = []
    for first in range(0, len(prompts), batch_size):
        batch = prompts[first : first + batch_size]
        length = max(map(len, batch))
        ids = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in batch])
        output = model.generate(
            ids, attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        answers += output[:, length:].tolist()
    return answers


def measure(runtime, directory: Path, batch_size: int, new: int, rounds: int) -> None:
    """Print tokens a second of both sides and their ratio. `runtime` is that of a single rank."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    from model.config import ModelConfig
    from model.generation import Generator, capacity_for
    from model.llama import Llama
    from model.weights.loading import fill
    from model.weights.sources import SafetensorsFiles

    config = ModelConfig.from_pretrained(directory)
    numbers = np.random.default_rng(0)
    prompts = [
        numbers.integers(3, config.vocab_size, length).tolist()
        for length in numbers.integers(16, 121, PROMPTS)
    ]
    reference = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=False).eval()
    model = Llama(config)
    fill(model, SafetensorsFiles(directory), runtime.device, 0)
    runtime.mark_step()
    before = runtime.compilations()
    generator = Generator(
        runtime,
        model,
        model.model.embed_tokens.tensor_parallel_group,
        batch_size,
        capacity_for(max(map(len, prompts)), new, config.max_positions),
    )
    ours, theirs = [], []
    for number in range(rounds + 1):
        begun = time.perf_counter()
        answers = generator.generate(prompts, new, set())
        between = time.perf_counter()
        expected = generate_by_transformers(reference, prompts, batch_size, new)
        if number:
            ours.append(PROMPTS * new / (between - begun))
            theirs.append(PROMPTS * new / (time.perf_counter() - between))
    equal = sum(answer == other for answer, other in zip(answers, expected, strict=True))
    ratios = np.divide(ours, theirs)
    print(f"markstep      {np.median(ours):8.1f} tokens/s, {runtime.compilations() - before} graphs")
    print(f"transformers  {np.median(theirs):8.1f} tokens/s, {torch.get_num_threads()} threads")
    print(
        f"ratio {np.median(ratios):.2f} ({ratios.min():.2f} - {ratios.max():.2f}); {equal} of {PROMPTS} "
        "answers equal"
    )


def main(arguments: list[str] | None = None) -> int:
    """The tool; returns its exit status."""
    parser = cli.parser("bench_generate", __doc__)
    parser.add_argument(
        "--model", type=cli.path_text, help="a directory of a merged model, or of any other Llama"
    )
    parser.add_argument(
        "--batch_size", type=int, default=1, help="prompts that are answered at once; default 1"
    )
    parser.add_argument("--max_new_tokens", type=int, default=64, help="of each answer; default 64")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that are measured; default 5")
    chosen = parser.parse_args(arguments)
    prepare_environment(1)
    with tempfile.TemporaryDirectory() as temporary:
        try:
            if min(chosen.batch_size, chosen.max_new_tokens, chosen.rounds) < 1:
                raise ValueError("--batch_size, --max_new_tokens and --rounds: at least 1 was expected")
            directory = Path(chosen.model or temporary)
            if not chosen.model:
                import transformers

                transformers.set_seed(0)
                transformers.LlamaForCausalLM(transformers.LlamaConfig(**DEFAULT)).save_pretrained(directory)
            from model.config import ModelConfig
            from model.weights.loading import check_weights
            from model.weights.sources import SafetensorsFiles

            check_weights(ModelConfig.from_pretrained(directory), SafetensorsFiles(directory))
        except ValueError as error:
            return cli.fail(error)
        launch(
            lambda runtime: measure(
                runtime, directory, chosen.batch_size, chosen.max_new_tokens, chosen.rounds
            ),
            1,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
