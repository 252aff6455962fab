"""Ask a merged model a question, formatted as in training.

    python -m tools.generate --model merged --instruction "What is the capital of France?" [--context ...]
"""
import argparse
import sys

from data.formats import format_prompt
from model.files import in_one_line


def generate(model_directory: str, instruction: str, context: str, max_new_tokens: int) -> str:
    """The model's greedy answer, computed by transformers on this machine's CPU."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(model_directory)
    model = AutoModelForCausalLM.from_pretrained(model_directory).eval()
    inputs = tokenizer(format_prompt(instruction, context), return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=tokenizer.eos_token_id,
                            pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.generate", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="directory of a merged model")
    parser.add_argument("--instruction", required=True, help="the question")
    parser.add_argument("--context", default="", help="text that the answer should be taken from")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="the longest answer, in tokens")
    arguments = parser.parse_args()
    try:
        answer = generate(arguments.model, arguments.instruction, arguments.context, arguments.max_new_tokens)
    except (ValueError, OSError) as error:
        print(f"error: {in_one_line(error)}", file=sys.stderr)
        return 1
    print(f"### Instruction\n{arguments.instruction}\n### Answer\n{answer}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
