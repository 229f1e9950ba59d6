"""Internal: words of strangers, made safe to show on a terminal, in a log or in a figure.

Knows: which characters a terminal obeys instead of showing, or shows as nothing; how they are
written out. Does not know: whose words they are, where they are shown.

    plain(text)        one line of visible characters
    quoted(word)       the same for a word of a command line that a person pastes into a shell
    command(words)     several of those
    paragraph(text)    a text of several lines, as a traceback is

Another process chooses its command line, another user a file's name, a guest what lies in memory,
a QMP peer its error texts. Printed as they are, such words move the cursor, set the title, reverse
the line (U+202E), or forge whole lines of our own output.

Invariants:
1. The result is one line, and `str.isprintable()`. What is invisible, but printable to Python
   (a variation selector, a Hangul filler) is written out, too.
2. Whatever is written out can be read: \\n, \\x1b, \\u202e, and \\xff for a byte that is not UTF-8.
   It is not reversible in all cases: a backslash stays as it is. That makes `plain(plain(text))`
   the same as `plain(text)`, and so each layer may make sure for itself.
3. The result has a length limit, and a mark where something was cut off.
"""

from __future__ import annotations

from collections.abc import Iterable

# A path has 4095 bytes at most (PATH_MAX); what is longer than that and some words is an attack.
MOST = 5000
NAME = 64  # for a name in a table
MARK = "..."

# What `str.isprintable` takes for a letter or a mark, and terminals show as nothing: of Unicode's
# Default_Ignorable_Code_Point those that are not of the category "format".
_INVISIBLE = frozenset(
    map(
        chr,
        [
            0x034F,  # combining grapheme joiner
            *(0x115F, 0x1160, 0x3164, 0xFFA0),  # Hangul fillers
            *(0x17B4, 0x17B5),  # Khmer inherent vowels
            *(0x180B, 0x180C, 0x180D, 0x180F),  # Mongolian variation selectors
            *range(0xFE00, 0xFE10),
            *range(0xE0100, 0xE01F0),
            0x2800,  # a Braille pattern without dots
        ],
    )
)
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def plain(text: str | bytes, most: int = MOST) -> str:
    """Return a text as one line that can be shown.

    Args:
        text: of any origin; bytes are taken for UTF-8, as far as they are.
        most: characters of the result, at least 3.
    """
    if isinstance(text, bytes):
        # One character has 4 bytes at most, so no more of them can count.
        text = text[: 4 * (most + 1)].decode(errors="surrogateescape")
    if text.isascii() and text.isprintable():
        return text if len(text) <= most else text[: most - len(MARK)] + MARK
    parts: list[str] = []
    length = kept = 0
    for character in text[: most + 1]:
        parts.append(_visible(character))
        length += len(parts[-1])
        if length <= most - len(MARK):
            kept = len(parts)
        elif length > most:
            return "".join(parts[:kept]) + MARK
    return "".join(parts)


def quoted(word: str) -> str:
    """Return a word as a shell reads it back, and as a person can read it before.

    Where a character has to be written out, that is $'..', which dash knows since 0.5.13 and all
    other shells have known for long.
    """
    from shlex import quote  # here: a server that begins quotes nothing, and shlex imports re

    if all(_visible(character) == character for character in word):
        return quote(word)
    octets = word.encode(errors="surrogateescape" if _has_bytes(word) else "surrogatepass")
    return f"$'{''.join(map(_octet, octets))}'"


def command(words: Iterable[str]) -> str:
    """Return words as one line that is pasted into a shell."""
    return " ".join(map(quoted, words))


def paragraph(text: str) -> str:
    """Return a text of several lines so that only the first can be taken for a line of ours."""
    first, *others = text.split("\n")
    return "\n".join([plain(first), *(f"    {plain(line)}" for line in others)])


def _visible(character: str) -> str:
    if character.isprintable() and character not in _INVISIBLE:
        return character
    code = ord(character)
    if short := _SHORT.get(character):
        return short
    if code < 0x80:
        return f"\\x{code:02x}"
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"  # PEP 383: a byte that is not UTF-8
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def _has_bytes(word: str) -> bool:
    return any("\udc80" <= character <= "\udcff" for character in word)


def _octet(octet: int) -> str:
    character = chr(octet)
    if character in "\\'":
        return "\\" + character
    return character if " " <= character <= "~" else f"\\{octet:03o}"


def counted(number: float, what: str) -> str:
    """Say how many there are of something: 1 peer, 0 peers, 2.5 seconds."""
    shown = str(number) if isinstance(number, int) else f"{number:g}"
    return f"{shown} {what}" if number == 1 else f"{shown} {what}s"


def all_of(number: int, what: str) -> str:
    """Begin a sentence about all of them: "its only writer is", "all its 2 writers are"."""
    return f"its only {what} is" if number == 1 else f"all its {counted(number, what)} are"
