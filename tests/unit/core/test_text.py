"""Text of others: one line at receipt, nothing that a terminal obeys where it is shown."""

from __future__ import annotations

import pytest

from memladder.core.text import clean, cleaned, shown

# ECMA-48 and xterm's own: what each would do is in its name.
SEQUENCES = {
    "colour": "\x1b[31;1m",
    "erase the display": "\x1b[2J",
    "title": "\x1b]0;pwned\x07",
    "hyperlink": "\x1b]8;;http://a.example\x1b\\",
    "8-bit CSI": "\x9b31m",
    "8-bit OSC": "\x9d0;pwned\x9c",
    "device control": "\x1bP1$r\x1b\\",
    "full reset": "\x1bc",
    "character set": "\x1b(0",
    "private mode": "\x1b[?1049h",
    "override of direction": "\u202e",
    "line separator": "\u2028",
    "bell and backspace": "\x07\x08",
    "nul": "\0",
    "a lone surrogate": "\udc9b",
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_no_sequence_is_left(name: str) -> None:
    text = f"before {SEQUENCES[name]}after"
    assert clean(text).replace(" ", "") == "beforeafter"
    for made in (clean(text), shown(text)):
        assert made.isprintable()
    assert shown(text).startswith("before ")
    assert shown(text).endswith("after")


def test_several_lines_become_one() -> None:
    assert clean("a\r\nb\n\n\tc\x85d\x0be") == "a b c d e"


def test_what_is_long_is_cut_quickly() -> None:
    assert clean("x" * 10**7, 300) == "x" * 299 + "…"
    assert clean("\x1b]" * 10**6) == ""
    assert clean("\x1b[" * 10**6, 10).isprintable()


def test_half_a_sequence_is_none() -> None:
    assert clean("x\x1b") == clean("x\x1b[") == clean("x\x1b]0;") == "x"


def test_plain_text_stays() -> None:
    text = "NVIDIA H100 80GB HBM3 – 2,4 × 10³ é 日本"
    assert clean(text) == shown(text) == text


def test_all_texts_of_a_message_are_cleaned() -> None:
    assert cleaned({"a\x1b[1m": ["\x1b[2Jb", 3, None, {"c\n": 1.5}]}) == {
        "a": ["b", 3, None, {"c": 1.5}]
    }
