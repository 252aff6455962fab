"""Writes a chat by the tokenizer's chat template, and finds its trained part."""

import json
import os
from dataclasses import dataclass, replace

from data.messages import SURROGATE, Chat, calls_of, is_written, squeeze, texts_in
from data.sources import BadRecord, in_one_line

REASONING = ("reasoning_content", "reasoning", "thinking")  # keys of an answer for what comes before it
# Keys of messages that decide what is written. Another one is named where the template does not write it.
READ = ("role", "content", "name", "tool_calls", "tool_call_id", "id", *REASONING)
INSTEAD = "take a template that does, or write prompt and completion as texts"


@dataclass(frozen=True)
class Rendered:
    """The text of an example: `prompt`, which is not trained, followed by `text`, which is.

    A chat is a `text` without a prompt, in which only the characters in `spans` are trained, and those in
    `untrained` never are. `question` is what a model would be prompted with: the prompt, the chat up to its
    first answer, or the whole plain text. `unread` are the record's fields that the format does not read, and
    `warnings` says what else may not be meant.
    """

    prompt: str
    text: str
    question: str
    spans: tuple[tuple[int, int], ...] | None = None
    untrained: tuple[tuple[int, int], ...] = ()
    unread: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def render_chat(chat: Chat, first: int, where: str, tokenizer) -> Rendered:
    """A chat in the tokenizer's template. Trained are the assistant's messages from number `first` on.

    With a message, the end that the template gives it is trained. Raises BadRecord where nothing would be
    trained, and where the template fails or does not write what the record says; ValueError where the
    tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            "the tokenizer has no chat template, which --format messages needs: take an instruct model's "
            "tokenizer, or write prompt and completion"
        )
    if all("content" in message for message in chat.messages):
        return _render(chat, first, where, tokenizer)
    # Of a call without a text, some templates expect no content (None, which transformers 5 leaves out), and
    # others an empty text.
    try:
        return _render(_fill_content(chat, None), first, where, tokenizer)
    except BadRecord as error:
        try:
            return _render(_fill_content(chat, ""), first, where, tokenizer)
        except BadRecord as second:
            about_content = "None" in str(error) or "'content'" in str(error)
            raise second if about_content else error from None


def _fill_content(chat: Chat, content: str | None) -> Chat:
    """The chat with `content` in the messages that have none."""
    messages = [m if "content" in m else m | {"content": content} for m in chat.messages]
    return replace(chat, messages=messages)


def _render(chat: Chat, first: int, where: str, tokenizer) -> Rendered:
    """The chat, each of whose messages has a content."""
    answers = [number for number, message in enumerate(chat.messages) if message["role"] == "assistant"]
    trained = [number for number in answers if number >= first and number not in chat.untrained]
    if not trained:
        weights = " with a weight other than 0" if chat.untrained else ""
        raise BadRecord(f"{where}: no message of the assistant{weights}: nothing would be trained")
    whole = _apply_template(chat, where, tokenizer)
    if not whole:
        raise BadRecord(f"{where}: the chat template writes nothing")
    if SURROGATE.search(whole):
        raise BadRecord(f"{where}: the chat has a lone surrogate; Unicode text was expected")
    spans = _answer_spans(chat, answers, whole, where, tokenizer)
    ends = {number: _end_token(whole[slice(*spans[number])], tokenizer) for number in answers}
    for number in answers:
        if _ends_twice(chat.messages[number], whole[slice(*spans[number])], ends[number]):
            message = chat.messages[number]
            once = message | {"content": message["content"].rstrip().removesuffix(ends[number])}
            messages = [*chat.messages[:number], once, *chat.messages[number + 1 :]]
            return _render(replace(chat, messages=messages), first, where, tokenizer)
    squeezed = squeeze(whole)
    warnings = _check_written(chat, whole, squeezed, spans, trained, where)
    warnings += _check_tools(chat, squeezed, where)
    prompted = [spans[number][0] for number in answers if number]
    question = whole[: prompted[0]] if prompted else whole
    return Rendered(
        "",
        whole,
        question,
        tuple(spans[number] for number in trained),
        tuple(spans[number] for number in answers if number in chat.untrained),
        unread=_unread_keys(chat, squeezed),
        warnings=tuple(dict.fromkeys(warnings + _warnings(chat, whole, [ends[n] for n in trained]))),
    )


def _answer_spans(
    chat: Chat, answers: list[int], whole: str, where: str, tokenizer
) -> dict[int, tuple[int, int]]:
    """{number of an assistant's message: (start, stop) of its characters in the chat's text `whole`}.

    Few templates say where a message is. So it is what the template adds to the messages before it and the
    generation prompt. Raises BadRecord where the template does not add to that text, but changes it.
    """
    spans = {}
    for number in answers:
        after = _apply_template(_first_messages(chat, number + 1), where, tokenizer)
        if number:
            before = _apply_template(
                _first_messages(chat, number), where, tokenizer, add_generation_prompt=True
            )
        else:
            before = _opening(chat, where, tokenizer)
        if not (whole.startswith(after) and after.startswith(before)):
            raise BadRecord(
                f"{_position(chat, number, where)}: the chat template writes the turns before an answer "
                "differently once the answer is there, or opens a reasoning that the answer lacks, so what "
                "it adds cannot be told; write prompt and completion instead"
            )
        spans[number] = (len(before), len(after))
    return spans


def _first_messages(chat: Chat, count: int) -> Chat:
    return replace(chat, messages=chat.messages[:count])


def _opening(chat: Chat, where: str, tokenizer) -> str:
    """What the template writes before an answer that opens a chat.

    Templates fail on empty chats, so it is what two such chats have in common.
    """
    chats = [replace(chat, messages=[{"role": "assistant", "content": content}]) for content in "01"]
    return os.path.commonprefix([_apply_template(each, where, tokenizer) for each in chats])


def _apply_template(chat: Chat, where: str, tokenizer, add_generation_prompt: bool = False) -> str:
    """The text of a chat; raises BadRecord where the template fails."""
    try:
        return tokenizer.apply_chat_template(
            chat.messages, tools=chat.tools, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # templates raise errors of their own
        raise BadRecord(f"{where}: the chat template fails: {in_one_line(error)}") from None


def _check_written(
    chat: Chat, whole: str, squeezed: str, spans: dict[int, tuple[int, int]], trained: list[int], where: str
) -> list[str]:
    """Compare what the messages say with what the template writes, `whole`; returns warnings.

    What an answer says (content, reasoning, calls) has to be in what is written since the answer before, the
    content of other messages anywhere. A message of which nothing is written as it is raises BadRecord, and
    one of which a part is not is a warning; so is an answer that is not trained, as some templates leave out
    the reasoning of earlier turns.
    """
    warnings, since = [], 0
    for number, message in enumerate(chat.messages):
        position, text = _position(chat, number, where), squeezed
        if number in spans:
            start, stop = spans[number]
            text, since = squeeze(whole[since:stop]), stop
            if message["content"] is None and "None" in whole[start:stop]:
                raise BadRecord(f"{position}: the chat template writes None for a content that is missing")
        parts = [("content", message["content"])]
        parts += [("reasoning", message.get(key)) for key in REASONING]
        parts += [("call", [call.get("name"), _arguments(call, text)]) for call in calls_of(message)]
        parts = [(kind, part) for kind, part in parts if part]
        missing = [(kind, part) for kind, part in parts if not is_written(part, text)]
        if missing and missing == parts and (number in trained or number not in spans):
            raise BadRecord(
                f"{position}: the chat template does not write what the {message['role']} says, or changes "
                f"it: {str(missing[0][1])[:60]!r}; {INSTEAD}"
            )
        kinds = " and ".join(dict.fromkeys(kind for kind, _ in missing))
        if missing:
            warnings.append(f"the chat template leaves out, or changes, a part of an answer: its {kinds}")
    return warnings


def _arguments(call: dict, squeezed: str) -> object:
    """The arguments of a call; of a JSON text that is not written as it is, what it holds."""
    arguments = call.get("arguments")
    if isinstance(arguments, str) and not is_written(arguments, squeezed):
        try:
            return json.loads(arguments)
        except ValueError:
            pass
    return arguments


def _check_tools(chat: Chat, squeezed: str, where: str) -> list[str]:
    """Raise BadRecord where the template does not write the names of the tools; returns warnings of what else
    of them it leaves out."""
    warnings = []
    for tool in chat.tools or ():
        function = tool.get("function", tool)
        if not is_written(function.get("name", function), squeezed):
            raise BadRecord(
                f"{where}: the field 'tools' decides the answer, and the chat template does not write it; "
                f"{INSTEAD}"
            )
        parameters = function.get("parameters")
        names = parameters.get("properties", parameters) if isinstance(parameters, dict) else parameters
        names = list(names) if isinstance(names, dict) else names
        if not is_written([function.get("description"), names], squeezed):
            warnings.append("the chat template leaves out a part of the tools: a description or parameters")
    return warnings


def _unread_keys(chat: Chat, squeezed: str) -> tuple[str, ...]:
    """The keys of messages that the template does not write."""
    unread = [
        f"{key} of a message"
        for message in chat.messages
        for key, value in message.items()
        if key not in READ and any(texts_in(value)) and not is_written(value, squeezed)
    ]
    return tuple(dict.fromkeys(unread))


def _position(chat: Chat, number: int, where: str) -> str:
    """Where message `number` of a chat is, in words."""
    return f"{where}, message {number - chat.added}" if number >= chat.added else f"{where}, its system field"


def _end_token(text: str, tokenizer) -> str:
    """The special token that the text ends in, white space aside; "" for none."""
    text = text.rstrip()
    if tokenizer.eos_token and text.endswith(tokenizer.eos_token):
        return tokenizer.eos_token
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return next((token for token in special if text.endswith(token)), "")


def _ends_twice(message: dict, written: str, end: str) -> bool:
    """Whether a message ends in an end token, and the template writes the same one after it."""
    if not end or not (message["content"] or "").rstrip().endswith(end):
        return False
    return written.rstrip().removesuffix(end).rstrip().endswith(end)


def _warnings(chat: Chat, whole: str, ends: list[str]) -> list[str]:
    """What the template does with a chat that is probably not meant. `ends`: of the trained answers."""
    found = []
    if not all(ends):
        found.append(
            "the chat template writes no end token after an answer, so the model does not learn to end one"
        )
    arguments = [call.get("arguments") for message in chat.messages for call in calls_of(message)]
    if any(isinstance(each, str) and json.dumps(each, ensure_ascii=False) in whole for each in arguments):
        found.append(
            "the arguments of a call are a JSON text, which the chat template quotes once more; "
            "it expects an object"
        )
    return found
