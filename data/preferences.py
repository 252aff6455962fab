"""Reads preference pairs: a prompt, a chosen and a rejected answer, in the spellings that data sets have."""

from os.path import commonprefix

from data.chats import Rendered
from data.formats import name_in, render
from data.messages import is_quoted, read_text, texts_in, without_nulls
from data.sources import BadRecord

PREFERENCE = "preference"  # the name of the format
PROMPT = ("prompt", "question", "instruction", "query")
CHOSEN = ("chosen", "chosen_response", "response_chosen")
REJECTED = ("rejected", "rejected_response", "response_rejected")
SYSTEM = ("system", "system_prompt")


def is_pair(record: object) -> bool:
    """Whether a record has a chosen and a rejected answer."""
    return isinstance(record, dict) and all(
        any(record.get(name) is not None for name in names) for names in (CHOSEN, REJECTED)
    )


def render_pair(record: object, where: str, tokenizer) -> tuple[Rendered, Rendered]:
    """(the example of the chosen answer, that of the rejected one), both with the prompt.

    Answers are texts or lists of messages. The prompt is a field of its own, or, as in Anthropic's and
    UltraFeedback's sets, what both answers begin with. An `instruction` is formatted as in dolly; a text with
    a system field becomes a chat. Raises BadRecord where a field is missing, empty or of another type, and
    where the answers are equal; ValueError where the tokenizer lacks a chat template that is needed. `where`
    is the record's position.
    """
    if not is_pair(record):
        found = ", ".join(map(repr, record)) if isinstance(record, dict) else type(record).__name__
        raise BadRecord(
            f"{where}: the fields {found} are no preference pair; a prompt ({', '.join(PROMPT)}), a chosen "
            f"({', '.join(CHOSEN)}) and a rejected answer ({', '.join(REJECTED)}) were expected: rename them "
            "by --format module:function"
        )
    names = [name_in(record, each) for each in (PROMPT, CHOSEN, REJECTED)]
    prompt, chosen, rejected = (without_nulls(record.get(name)) for name in names)
    if chosen == rejected:
        raise BadRecord(f"{where}: {names[1]!r} and {names[2]!r} are equal; two answers were expected")
    kinds = {type(chosen), type(rejected)}
    if kinds == {list}:
        pair = _split_messages(prompt, chosen, rejected, names, where)
    elif kinds == {str}:
        pair = _split_texts(record, names, where)
    else:
        raise BadRecord(
            f"{where}: {names[1]!r} is {type(chosen).__name__} and {names[2]!r} {type(rejected).__name__}; "
            "two texts, or two lists of messages, were expected"
        )
    rest = {name: value for name, value in record.items() if name not in names}
    return tuple(_render_answer(rest, *each, names[0], where, tokenizer) for each in pair)


def _split_messages(prompt, chosen: list, rejected: list, names: list[str], where: str):
    """((prompt, chosen answer), (prompt, rejected answer)), each a list of messages."""
    begins_with_answer = all(_role(answer) in ("assistant", "gpt") for answer in (chosen, rejected))
    if isinstance(prompt, str) and begins_with_answer:
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, list) and begins_with_answer:
        return (prompt, chosen), (prompt, rejected)
    parting = (n for n, (one, other) in enumerate(zip(chosen, rejected, strict=False)) if one != other)
    shared = chosen[: next(parting, min(len(chosen), len(rejected)))]
    if not shared or len(shared) == min(len(chosen), len(rejected)):
        raise BadRecord(
            f"{where}: {names[1]!r} and {names[2]!r} have {len(shared)} of {len(chosen)} and {len(rejected)} "
            f"messages in common; answers after the field {names[0]!r}, or two chats that part with their "
            "answers, were expected"
        )
    if prompt and not is_quoted(prompt if isinstance(prompt, str) else _contents(prompt), _joined(shared)):
        raise BadRecord(f"{where}: the chats do not begin with the field {names[0]!r}")
    return (shared, chosen[len(shared) :]), (shared, rejected[len(shared) :])


def _split_texts(record: dict, names: list[str], where: str):
    """((prompt, chosen answer), (prompt, rejected answer)), all texts."""
    prompt, chosen, rejected = (read_text(record, name, where, name != names[0]) for name in names)
    if prompt.strip():
        return (prompt, chosen), (prompt, rejected)
    # They part within a word, perhaps: the prompt ends with the last whole one.
    shared = commonprefix([chosen, rejected])
    prompt = shared[: max((n for n, letter in enumerate(shared) if letter.isspace()), default=0)]
    answers = [answer[len(prompt) :] for answer in (chosen, rejected)]
    if not prompt.strip() or not all(map(str.strip, answers)):
        raise BadRecord(
            f"{where}: there is no prompt: the field {names[0]!r}, or two texts that begin with it and part "
            "with their answers, was expected"
        )
    return (prompt, answers[0]), (prompt, answers[1])


def _render_answer(rest: dict, prompt, answer, prompt_name: str, where: str, tokenizer) -> Rendered:
    """The example of one answer; `rest` are the record's other fields."""
    if isinstance(prompt, str) and any(any(texts_in(rest.get(name))) for name in SYSTEM):
        prompt = [{"role": "user", "content": prompt}]
        answer = [{"role": "assistant", "content": answer}]
    if isinstance(prompt, str) and prompt_name == "instruction":
        return render(rest | {"instruction": prompt, "response": answer}, where, "dolly", tokenizer)
    return render(rest | {"prompt": prompt, "completion": answer}, where, "prompt_completion", tokenizer)


def _role(messages: list) -> str | None:
    first = messages[0] if messages and isinstance(messages[0], dict) else {}
    return first.get("role") or first.get("from")


def _contents(messages: list) -> list:
    return [message.get("content", message.get("value")) for message in messages if isinstance(message, dict)]


def _joined(messages: list) -> str:
    return "\n".join(text for content in _contents(messages) for text in texts_in(content))
