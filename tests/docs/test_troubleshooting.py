"""The page of messages says what the code says, and leaves nothing out."""

from __future__ import annotations

import re

import pytest

from .messages import HOLE, ROOT, Message, messages, texts_elsewhere

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
ROWS = [line for line in PAGE.splitlines() if line.startswith("| `")]
QUOTES = [quote for row in ROWS for quote in re.findall(r"`([^`]+)`", row.split(" | ")[0])]
SAID = list(messages())
TEXTS = [message.text for message in SAID] + list(texts_elsewhere())
LEAST = 7  # letters that a quote must have to speak for a message; "Unknown" has as many
# Verbs whose messages stand on pages of their own.
OWN_PAGES = ("bench", "compare", "estimate", "tune", "tuning")


def pattern(quote: str) -> re.Pattern[str]:
    """Texts that begin as a quote does, whatever is filled in."""
    return re.compile(".*?".join(re.escape(part) for part in quote.split(HOLE)), re.S)


def letters(text: str) -> int:
    return sum(sign.isalpha() for sign in text)


def test_there_are_messages_and_quotes() -> None:
    assert len(SAID) > 200 and len(QUOTES) > 100
    assert len(set(QUOTES)) == len(QUOTES)


@pytest.mark.parametrize("quote", QUOTES)
def test_a_quote_is_said_somewhere(quote: str) -> None:
    assert any(pattern(quote).match(text) for text in TEXTS), f"nothing in the code says {quote!r}"


def belongs_here(message: Message) -> bool:
    """Whether the page must tell it: not a verb's with a page of its own, nor nothing but what is filled in."""
    own = tuple(f"dit_accel/{'cli/' * cli}{name}" for name in OWN_PAGES for cli in (0, 1))
    return not message.place.startswith(own) and letters(message.text) >= LEAST


@pytest.mark.parametrize("message", filter(belongs_here, SAID), ids=lambda message: message.place)
def test_a_message_is_on_the_page(message: Message) -> None:
    telling = [quote for quote in QUOTES if letters(quote) >= LEAST]
    assert any(pattern(quote).match(message.text) for quote in telling), (
        f"{message.place} says {message.text!r}: add how it begins to docs/troubleshooting.md"
    )


def test_a_changed_message_is_noticed() -> None:
    """The comparison can fail: a word more, and no quote fits."""
    assert not pattern("… frames: this model makes single images").match(
        "8 frames: that model makes single images"
    )
    assert pattern("… frames: this model makes single images").match(
        "8 frames: this model makes single images; 1"
    )
