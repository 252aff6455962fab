"""The date that chat templates write as today's: one for a whole run, wherever and whenever it goes on."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import partial

CLOCK = "strftime_now"  # what chat templates call for the date: transformers.utils.chat_template_utils
CONSTANT = "2000-01-01"  # for texts that are only compared


def writes_date(tokenizer) -> bool:
    """Whether a chat template of the tokenizer asks for the date."""
    return CLOCK in json.dumps(tokenizer.chat_template)  # a text, {name: text}, or None


def pinned_date(tokenizer) -> str | None:
    """The date that `pin_date` has given the tokenizer; None where it is today's, or no template asks."""
    return getattr(tokenizer, "pinned_date", None)


def pin_date(tokenizer, date: str) -> None:
    """Make `date` (YYYY-MM-DD) today for the tokenizer's chat templates; the time of day is midnight.

    Raises ValueError for what is no date.
    """
    now = datetime.strptime(date, "%Y-%m-%d")
    apply = type(tokenizer).apply_chat_template
    tokenizer.apply_chat_template = partial(apply, tokenizer, **{CLOCK: now.strftime})
    tokenizer.pinned_date = date


@contextmanager
def on_constant_date(tokenizer) -> Iterator[None]:
    """Within the context, a tokenizer with a pinned date writes CONSTANT: equal texts on every day."""
    date = pinned_date(tokenizer)
    pin_date(tokenizer, CONSTANT)
    try:
        yield
    finally:
        pin_date(tokenizer, date)
