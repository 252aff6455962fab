"""A conversation that is typed: its turns in the tokenizer's chat template, as long as they fit."""

import sys
from collections.abc import Callable, Iterator

from data.messages import is_written, squeeze
from trainer.prompts import chat_ids

LONGEST_CHAT = 4096  # the most tokens of a conversation: the cache and every new token grow with it
EXIT, RESET = "/exit", "/reset"


class Conversation:
    """The messages of a conversation with a model, of which at most `longest` tokens are a prompt.

    `longest` includes the system message, but not the answer. Raises ValueError where the tokenizer has no
    chat template, and where that does not write the `system` message.
    """

    def __init__(self, tokenizer, longest: int, system: str | None = None):
        self._tokenizer, self._longest = tokenizer, longest
        if tokenizer.chat_template is None:
            raise ValueError(
                "--chat needs a chat template, and the model's tokenizer has none; --interactive asks "
                "questions one by one, as in training"
            )
        self._system = [{"role": "system", "content": system}] if system else []
        self._turns: list[dict] = []
        question = [{"role": "user", "content": "?"}]
        length = len(chat_ids(tokenizer, self._system + question))
        if length > longest:
            raise ValueError(f"--system has about {length} tokens; a conversation has at most {longest}")
        if system:
            text = tokenizer.apply_chat_template(self._system + question, tokenize=False)
            if not is_written(system, squeeze(text)):
                raise ValueError("--system: the model's chat template does not write a system message")

    def ask(self, question: str) -> tuple[list[int], int]:
        """(the tokens of the conversation up to the answer to `question`, how many old turns were left out).

        A turn is a question with its answer; the oldest are left out for good where the conversation does not
        fit. Raises ValueError, and changes nothing, where the question does not fit, or the template fails.
        """
        turns = [*self._turns, {"role": "user", "content": question}]
        for dropped in range(0, len(turns), 2):
            ids = chat_ids(self._tokenizer, self._system + turns[dropped:])
            if len(ids) <= self._longest:
                self._turns = turns[dropped:]
                return ids, dropped // 2
        raise ValueError(f"the question has {len(ids)} tokens; a conversation has at most {self._longest}")

    def answered(self, tokens: list[int]) -> None:
        """Add the answer to the last question."""
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        self._turns.append({"role": "assistant", "content": text.strip()})

    def reset(self) -> None:
        """Forget all turns."""
        self._turns = []


def typed_turns(conversation: Conversation) -> Iterator[list[int]]:
    """Yield the tokens of the conversation after each line of stdin, until /exit or the end of the input.

    What is said about the conversation goes to stderr, so that stdout has the answers alone.
    """
    on_terminal = sys.stdin.isatty()
    while True:
        try:
            line = input("> " if on_terminal else "").strip()
        except EOFError:
            if on_terminal:
                print()
            return
        if line == EXIT:
            return
        if line == RESET:
            conversation.reset()
            _say("the conversation starts anew")
        elif line:
            try:
                ids, dropped = conversation.ask(line)
            except ValueError as error:
                _say(f"{error}: it is not asked, and the conversation stays as it was")
                continue
            if dropped:
                _say(
                    f"the conversation is too long: the model no longer sees the {dropped} oldest "
                    f"question{'s' * (dropped > 1)} and answer{'s' * (dropped > 1)}"
                )
            yield ids


def chat(
    runtime, conversation: Conversation, max_new_tokens: int, generate: Callable[[list[int]], list[int]]
) -> None:
    """Answer what is typed, on all ranks. Rank 0 reads it and keeps the conversation.

    `generate(ids)` prints an answer of up to so many new tokens, and returns its tokens.
    """
    turns = typed_turns(conversation) if runtime.rank == 0 else iter(())
    while (ids := runtime.share(next(turns, None))) is not None:
        tokens = generate(ids)
        if runtime.rank == 0:
            conversation.answered(tokens)
            if len(tokens) == max_new_tokens:  # without the token that ends an answer
                _say(f"the answer is cut off after --max_new_tokens {max_new_tokens}")


def _say(text: str) -> None:
    print(f"({text})", file=sys.stderr, flush=True)
