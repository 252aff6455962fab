"""Ask a merged model, or a checkpoint without merging it, formatted as in training.

    python -m tools.generate --model MERGED | --checkpoint CKPT [--tensor_parallel_size T]
        [--instruction "What is the capital of France?" [--context ...] | --prompts FILE | --interactive
         | --chat [--system ...]]

--chat keeps a conversation, by the tokenizer's chat template: a line is a question, /reset forgets all turns,
/exit or Ctrl-D ends. Where it no longer fits, its oldest turns are left out, and that is said.
A file of prompts is JSON lines with instruction (and context), messages or prompt, or a text with a question
on each line. On a CPU, T virtual ranks are threads of this process. On NeuronCores, torchrun starts them:
torchrun --nproc_per_node=T -m tools.generate ...
"""

import argparse
import sys
from pathlib import Path

from parallel.runtime import asks_for_bf16, launch, leaves_at_once, prepare_environment, requested_world_size
from tools import cli
from tools.chat import LONGEST_CHAT, Conversation, chat

LONGEST_TYPED = 1024  # the most tokens of a question that is typed
Prompt = tuple[str, list[int]]  # (title, tokens)


class Terminal:
    """Prints answers while they are generated, each when those before it are complete.

    An answer stands below its title; without one (None), it stands alone.
    """

    def __init__(self, titles: list[str | None], tokenizer, ends: set[int], max_new_tokens: int):
        self._titles, self._tokenizer, self._ends, self._max = titles, tokenizer, ends, max_new_tokens
        self._tokens: list[list[int]] = [[] for _ in titles]
        self._current, self._printed = 0, None

    def __call__(self, number: int, token: int) -> None:
        """Take the next token of the answer to prompt `number`, and print what can be printed."""
        self._tokens[number].append(token)
        while self._current < len(self._titles):
            tokens = self._tokens[self._current]
            title = self._titles[self._current]
            if self._printed is None and title is not None:
                print(f"### Instruction\n{title}\n### Answer", flush=True)
            self._printed = self._printed or ""
            ended = bool(tokens) and tokens[-1] in self._ends
            text = self._tokenizer.decode(tokens[:-1] if ended else tokens, skip_special_tokens=True)
            done = ended or len(tokens) == self._max
            if done or not text.endswith("\ufffd"):  # else part of a character, whose rest is to come
                print(text[len(self._printed) :], end="\n" if done else "", flush=True)
                self._printed = text
            if not done:
                return
            self._current, self._printed = self._current + 1, None


def read_prompts(path: Path, prompt_format, tokenizer) -> list[Prompt]:
    """The prompts in a file, encoded by the model's PromptFormat; raises ValueError for what is no prompt."""
    from data.sources import BadRecord, Source

    if not path.is_file():
        raise ValueError(f"--prompts {path}: no such file")
    found = []
    if path.suffix.lower() == ".jsonl":
        for where, record in Source(str(path)):
            if isinstance(record, BadRecord):
                raise record
            found.append(encode_record(record, where, prompt_format, tokenizer))
    else:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"--prompts {path}: invalid UTF-8 at byte {error.start}; a text with a question a line, or a "
                ".jsonl file, was expected"
            ) from None
        found = [(line, prompt_format.encode(tokenizer, line)) for line in lines if line.strip()]
    if not found:
        raise ValueError(f"--prompts {path} holds no prompt")
    return found


def encode_record(record, where: str, prompt_format, tokenizer) -> Prompt:
    """The prompt of a record of a .jsonl file. Raises ValueError, which names its position `where`."""
    from data.formats import chat_of
    from trainer.prompts import chat_ids, text_ids

    fields = record if isinstance(record, dict) else {}
    texts = {name: fields.get(name) or "" for name in ("instruction", "context", "input", "prompt")}
    if not all(isinstance(text, str) for text in texts.values()):
        raise ValueError(f"{where}: instruction, context, input and prompt are texts")
    if chat := chat_of(fields, where):
        messages = [{"content": ""} | message for message in chat.messages]  # of a mere call
        messages = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        return messages[-1]["content"] if messages else "", chat_ids(tokenizer, messages, chat.tools)
    if texts["instruction"]:
        ids = prompt_format.encode(tokenizer, texts["instruction"], texts["context"] or texts["input"])
        return texts["instruction"], ids
    if texts["prompt"]:
        return texts["prompt"], text_ids(tokenizer, texts["prompt"])
    raise ValueError(f"{where}: an object with instruction, messages or prompt was expected")


def typed_prompts(runtime, source, longest: int):
    """Yield the prompt of each line that is typed, on all ranks, until a line is empty or the input ends."""
    while True:
        line = ""
        if runtime.rank == 0:
            try:
                line = input("> ").strip()
            except EOFError:
                print()
        line = runtime.share(line)
        if not line:
            return
        ids = source.prompts.encode(source.tokenizer, line)
        if len(ids) <= longest:
            yield line, ids
        elif runtime.rank == 0:
            print(f"the question has {len(ids)} tokens; {longest} are the most")


def answer(
    runtime, source, arguments, sampling, prompts: list[Prompt] | None, conversation: Conversation | None
) -> None:
    """Print on rank 0 the answers to the prompts, or, where these are None, to questions that are typed.

    With a conversation, which rank 0 keeps, these are its questions.
    """
    import torch

    from model.generation import Generator, capacity_for
    from parallel.mesh import Mesh

    mesh = Mesh.create(runtime.rank, runtime.world_size, arguments.tensor_parallel_size)
    model = source.build(mesh.tp, runtime.device, torch.bfloat16 if arguments.bf16 else torch.float32)
    runtime.mark_step()
    new, positions = arguments.max_new_tokens, source.config.max_positions
    longest = min(positions - new, LONGEST_CHAT if conversation else LONGEST_TYPED)
    longest = max(len(ids) for _, ids in prompts) if prompts else longest
    batch_size = min(arguments.batch_size, len(prompts)) if prompts else 1
    generator = Generator(runtime, model, mesh.tp, batch_size, capacity_for(longest, new, positions))

    def print_answers(batch: list[tuple[str | None, list[int]]]) -> list[list[int]]:
        terminal = None
        if runtime.rank == 0:
            terminal = Terminal([title for title, _ in batch], source.tokenizer, source.ends, new)
        return generator.generate([ids for _, ids in batch], new, source.ends, sampling, terminal)

    if conversation:
        chat(runtime, conversation, new, lambda ids: print_answers([(None, ids)])[0])
    else:
        for batch in [prompts] if prompts else ([typed] for typed in typed_prompts(runtime, source, longest)):
            print_answers(batch)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The flags of the command line."""
    parser = cli.parser("generate", __doc__)
    parser.allow_abbrev = False
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument(
        "--model", type=cli.path_text, help="directory or hub id of a merged model, or of any other Llama"
    )
    model.add_argument("--checkpoint", type=cli.path, help="a directory checkpoint-<step>")
    parser.add_argument(
        "--model_id",
        type=cli.path_text,
        help="the base model of --checkpoint, where it is no longer where training read it",
    )
    _add_questions(parser)
    parser.add_argument(
        "--max_new_tokens", type=int, help="the longest answer, in tokens; default 64, and 256 with --chat"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="0 takes the most probable token (default), 1 draws by the model's probabilities",
    )
    parser.add_argument(
        "--top_k", type=int, default=0, help="draw among the k most probable tokens; 0, the default: all"
    )
    parser.add_argument(
        "--top_p", type=float, default=1.0, help="draw among the most probable that together have so much"
    )
    parser.add_argument(
        "--repetition_penalty", type=float, default=1.0, help="above 1, what was said becomes less probable"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn; default 0")
    parser.add_argument(
        "--batch_size", type=int, default=8, help="prompts of a file that are answered at once; default 8"
    )
    parser.add_argument(
        "--tensor_parallel_size", type=int, default=1, help="ranks that share the weights; default 1"
    )
    parser.add_argument(
        "--bf16", action="store_true", default=asks_for_bf16(), help="weights and activations in bfloat16"
    )
    chosen = parser.parse_args(arguments)
    if chosen.system is not None and not chosen.chat:
        parser.error("--system is the system message of --chat")
    if chosen.max_new_tokens is None:
        chosen.max_new_tokens = 256 if chosen.chat else 64
    return chosen


def _add_questions(parser: argparse.ArgumentParser) -> None:
    """The flags that say what is asked."""
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--instruction", help="the question")
    prompt.add_argument("--prompts", type=cli.path, help="a file of questions")
    prompt.add_argument(
        "--interactive", action="store_true", help="questions are typed, each a conversation of its own"
    )
    prompt.add_argument(
        "--chat", action="store_true", help="questions are typed, in one conversation; /reset, /exit"
    )
    parser.add_argument("--system", metavar="TEXT", help="the system message of --chat")
    parser.add_argument(
        "--context", default="", help="text that the answer to --instruction should be taken from"
    )


def prepare(chosen: argparse.Namespace, world_size: int):
    """(model source, sampling, prompts or None, conversation or None) of the flags.

    Raises ValueError before anything is compiled.
    """
    from model.generation import capacity_for
    from model.llama import Llama
    from model.sampling import Sampling
    from parallel.mesh import Mesh
    from tools.model_source import ModelSource

    for name in ("max_new_tokens", "batch_size", "tensor_parallel_size"):
        if getattr(chosen, name) < 1:
            raise ValueError(f"--{name} {getattr(chosen, name)}: at least 1 was expected")
    sampling = Sampling(
        chosen.temperature, chosen.top_k, chosen.top_p, chosen.repetition_penalty, chosen.seed
    )
    if chosen.model:
        source = ModelSource.of_model(chosen.model)
    else:
        source = ModelSource.of_checkpoint(chosen.checkpoint, chosen.model_id)
    # Built on no device, which raises where the ranks cannot divide it.
    Llama(source.config, Mesh.create(0, world_size, chosen.tensor_parallel_size).tp)
    prompts = None
    if chosen.prompts:
        prompts = read_prompts(chosen.prompts, source.prompts, source.tokenizer)
    elif chosen.instruction is not None:
        ids = source.prompts.encode(source.tokenizer, chosen.instruction, chosen.context)
        prompts = [(chosen.instruction, ids)]
    longest = max(len(ids) for _, ids in prompts) if prompts else 1
    if prompts and not all(ids for _, ids in prompts):
        raise ValueError("the question has no token: a text was expected")
    capacity_for(longest, chosen.max_new_tokens, source.config.max_positions)
    conversation = None
    if chosen.chat:
        most = min(source.config.max_positions - chosen.max_new_tokens, LONGEST_CHAT)
        conversation = Conversation(source.tokenizer, most, chosen.system)
    return source, sampling, prompts, conversation


def main(arguments: list[str] | None = None) -> int:
    chosen = parse(arguments)
    try:
        if leaves_at_once():
            return 0
        world_size = requested_world_size(None, chosen.tensor_parallel_size)
        prepare_environment(world_size)
        source, *asked = prepare(chosen, world_size)
    except (ValueError, OSError) as error:
        return cli.fail(error)
    launch(lambda runtime: answer(runtime, source, chosen, *asked), world_size)
    return 0


if __name__ == "__main__":
    sys.exit(main())
