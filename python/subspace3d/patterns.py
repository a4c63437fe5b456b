"""Regular expressions over module names that always end: a plain subset of Python's, matched without backtracking.

Taken from files that others made, an expression may not cost more than its length. Read are characters, ``.``, classes
``[a-z]``, ``\\d \\w \\s`` and their opposites, escapes, groups ``( )`` and ``(?: )``, ``|``, ``* + ? {m,n}`` (greedy or
not: which names match is the same) and the anchors ``^`` and ``$``. Everything else is refused by name.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass

LONGEST_PATTERN = 4000
LONGEST_LIST = 1 << 16
"""Characters of alternatives that are plain names, which are looked up instead of matched."""
MOST_COPIES = 100
_DEEPEST = 50
_SPECIAL = set(r".[]()|*+?{}^$\\")
_CLASSES = {name: re.compile(rf"\{name}").fullmatch for name in "dDwWsS"}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v"}

Table = list[int]
"""For every position of a name, the positions at which a match that starts there may end, as bits."""


@dataclass(frozen=True)
class Pattern:
    """A compiled expression.

    A node gives, for a name of n characters, the `Table` of its matches; tables of parts are combined, so the work is
    at most the number of parts times n squared, whatever the expression.
    """

    text: str
    _node: Callable[[str], Table]
    _names: frozenset[str] | None
    _anchored: bool

    def matches(self, name: str) -> bool:
        """Whether all of ``name`` matches, as by `re.fullmatch`."""
        if self._names is not None:
            return name in self._names
        return bool(self._node(name)[0] >> len(name) & 1)

    def matches_suffix(self, name: str) -> bool:
        """Whether ``name`` or a dotted suffix of it matches, as PEFT reads the keys of rank_pattern."""
        starts = [0, *(index + 1 for index, character in enumerate(name) if character == ".")]
        if self._names is not None:
            return any(name[start:] in self._names for start in (starts[:1] if self._anchored else starts))
        table, length = self._node(name), len(name)
        return any(table[start] >> length & 1 for start in starts)


@functools.lru_cache(maxsize=4096)
def compile_pattern(text: str) -> Pattern:
    """Compile an expression.

    Raises:
        ValueError: it is malformed, too long, or uses what is not read here.
    """
    anchored = text.startswith("^")
    names = _plain_names(text[anchored:], anchored)
    if len(text) > (LONGEST_PATTERN if names is None else LONGEST_LIST):
        raise ValueError(f"an expression must have at most {LONGEST_PATTERN} characters, got {len(text)}")
    if names is not None:
        return Pattern(text, lambda name: [], names, anchored)
    parser = _Parser(text)
    node = parser.alternatives(0)
    if parser.at < len(text):
        raise ValueError(f"{_shown(text)} is no expression: ) without ( at {parser.at}")
    return Pattern(text, node, None, anchored)


def _plain_names(text: str, anchored: bool) -> frozenset[str] | None:
    """All names that match, where they can be read off: alternatives of characters and escaped punctuation alone."""
    names = [_literal(part) for part in text.split("|")]
    if any(name is None for name in names) or (anchored and len(names) > 1):
        return None
    return frozenset(name for name in names if name is not None)


def _literal(text: str) -> str | None:
    """The only name that matches ``text``, if it is characters and escaped punctuation alone."""
    plain = re.sub(r"\\([^0-9A-Za-z])", lambda match: "" if match[1] in _SPECIAL else match[1], text)
    return None if set(plain) & _SPECIAL else re.sub(r"\\(.)", r"\1", text)


class _Parser:
    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def alternatives(self, depth: int) -> Callable[[str], Table]:
        if depth > _DEEPEST:
            raise self._error(f"groups more than {_DEEPEST} deep")
        branches = [self._sequence(depth)]
        while self._peek() == "|":
            self.at += 1
            branches.append(self._sequence(depth))
        return branches[0] if len(branches) == 1 else functools.partial(_either, branches)

    def _sequence(self, depth: int) -> Callable[[str], Table]:
        parts: list[Callable[[str], Table]] = []
        while self._peek() not in ("", "|", ")"):
            parts.append(self._repeated(depth))
        return functools.partial(_one_after_another, parts)

    def _repeated(self, depth: int) -> Callable[[str], Table]:
        start = self.at
        part = self._atom(depth)
        least, most = self._quantifier()
        if (least, most) == (1, 1):
            return part
        if self.text[start] in "^$":
            raise self._error("a repeated anchor")
        return functools.partial(_repeat, part, least, most)

    def _quantifier(self) -> tuple[int, int | None]:
        character = self._peek()
        braces = re.compile(r"\{(\d{1,9})?(,)?(\d{1,9})?\}").match(self.text, self.at)
        if character and character in "*+?":
            self.at += 1
            bounds: tuple[int, int | None] = {"*": (0, None), "+": (1, None), "?": (0, 1)}[character]
        elif braces and (braces[1] or braces[2]):
            self.at = braces.end()
            least = int(braces[1] or 0)
            most = (int(braces[3]) if braces[3] else None) if braces[2] else least
            if max(least, most or 0) > MOST_COPIES or (most is not None and most < least):
                raise self._error(f"a repetition must be {{m,n}} with m <= n <= {MOST_COPIES}")
            bounds = least, most
        else:
            return 1, 1
        if self._peek() == "?":  # not greedy
            self.at += 1
        if self._peek() in ("*", "+") or re.compile(r"\?|\{\d").match(self.text, self.at):
            raise self._error("a repetition of a repetition")
        return bounds

    def _atom(self, depth: int) -> Callable[[str], Table]:
        character = self.text[self.at]
        self.at += 1
        if character == "(":
            return self._group(depth)
        if character == "[":
            return functools.partial(_character, self._class())
        if character == ".":
            return functools.partial(_character, lambda other: other != "\n")
        if character in "^$":
            return functools.partial(_anchor, character)
        if character in "*+?":
            raise self._error("nothing to repeat")
        if character == "\\":
            return functools.partial(_character, self._escape())
        return functools.partial(_text, self._run(character))

    def _run(self, text: str) -> str:
        """The plain characters from here on, without one that a quantifier repeats."""
        start = self.at
        while self._peek() and self._peek() not in _SPECIAL:
            self.at += 1
        if self.at > start and self._peek() and self._peek() in "*+?{":
            self.at -= 1
        return text + self.text[start : self.at]

    def _group(self, depth: int) -> Callable[[str], Table]:
        if self._peek() == "?":
            if not self.text.startswith("?:", self.at):
                raise self._error("inline flags, named groups and looking around are not read: (?")
            self.at += 2
        node = self.alternatives(depth + 1)
        if self._peek() != ")":
            raise self._error("( without )")
        self.at += 1
        return node

    def _escape(self) -> Callable[[str], object]:
        character = self._peek()
        self.at += 1
        if character in _CLASSES:
            return _CLASSES[character]
        if not character or (character.isalnum() and character not in _ESCAPES) or not character.isascii():
            raise self._error(f"an escape that is not read: \\{character}")
        wanted = _ESCAPES.get(character, character)
        return lambda other: other == wanted

    def _class(self) -> Callable[[str], object]:
        start = self.at
        negated = self._peek() == "^"
        self.at += negated
        members: list[Callable[[str], object]] = []
        first = True
        while first or self._peek() != "]":
            first = False
            low = self._member()
            if isinstance(low, str) and self._peek() == "-" and self.text[self.at + 1 : self.at + 2] not in ("", "]"):
                self.at += 1
                high = self._member()
                if not isinstance(high, str) or high < low:
                    raise self._error("a bad range in [ ]")
                members.append(functools.partial(_between, low, high))
            else:
                members.append(functools.partial(_between, low, low) if isinstance(low, str) else low)
        self.at += 1
        if self.at - start > 1 and re.search(r"\[|--|&&|~~|\|\|", self.text[start : self.at - 1]):
            raise self._error("sets inside [ ] are not read")
        return lambda other: any(member(other) for member in members) != negated

    def _member(self) -> str | Callable[[str], object]:
        character = self._peek()
        if not character:
            raise self._error("[ without ]")
        self.at += 1
        if character != "\\":
            return character
        escaped = self._peek()
        if escaped in _CLASSES and escaped:
            self.at += 1
            return _CLASSES[escaped]
        if not escaped or (escaped.isalnum() and escaped not in _ESCAPES) or not escaped.isascii():
            raise self._error(f"an escape that is not read: \\{escaped}")
        self.at += 1
        return _ESCAPES.get(escaped, escaped)

    def _peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def _error(self, reason: str) -> ValueError:
        return ValueError(f"{_shown(self.text)} is no expression that is read here: {reason} at {self.at}")


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}...")


def _between(low: str, high: str, character: str) -> bool:
    return low <= character <= high


def _character(fits: Callable[[str], object], name: str) -> Table:
    return [2 << index if fits(character) else 0 for index, character in enumerate(name)] + [0]


def _text(text: str, name: str) -> Table:
    return [1 << index + len(text) if name.startswith(text, index) else 0 for index in range(len(name) + 1)]


def _anchor(kind: str, name: str) -> Table:
    last = len(name)
    table = [0] * (last + 1)
    if kind == "^":
        table[0] = 1
    else:
        table[last] = 1 << last
        if name.endswith("\n"):
            table[last - 1] = 1 << last - 1
    return table


def _follow(ends: int, then: Table) -> int:
    found = 0
    while ends:
        lowest = ends & -ends
        found |= then[lowest.bit_length() - 1]
        ends ^= lowest
    return found


def _one_after_another(parts: list[Callable[[str], Table]], name: str) -> Table:
    table = [1 << index for index in range(len(name) + 1)]
    for part in parts:
        then = part(name)
        table = [_follow(ends, then) for ends in table]
    return table


def _either(branches: list[Callable[[str], Table]], name: str) -> Table:
    tables = [branch(name) for branch in branches]
    return [functools.reduce(int.__or__, column) for column in zip(*tables)]


def _repeat(part: Callable[[str], Table], least: int, most: int | None, name: str) -> Table:
    once = part(name)
    here = [1 << index for index in range(len(name) + 1)]
    table = here
    for _ in range(least):
        table = [_follow(ends, once) for ends in table]
    if most is None:
        # from the end: what any number of further repetitions reach from a later position is known by then
        more = [0] * (len(name) + 1)
        for index in range(len(name), -1, -1):
            more[index] = 1 << index | _follow(once[index] & ~(1 << index), more)
        return [_follow(ends, more) for ends in table]
    for _ in range(most - least):
        table = [ends | _follow(ends, once) for ends in table]
    return table
