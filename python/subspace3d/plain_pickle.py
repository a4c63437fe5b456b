"""Arrays and plain values from pickles, without unpickling: no object is built and nothing is called by a name in it.

A pickle is a program for a small machine, and Python's runs whatever the program names. Here the program is only read:
its instructions build numbers, text, lists and dicts, and a few known names (numpy's arrays and types, torch's tensors)
become records that the readers in formats/ turn into arrays with checks of their own. Every other name, and
every instruction that such pickles do not need, is refused by name.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass, field
from typing import Any

MOST_INSTRUCTIONS = 2_000_000
_DEEPEST = 16
_MOST_TUPLE = 64
_LARGEST_STACK = 10_000
_MARK = object()
_VALUES = {
    "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE",
    "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8", "LONG1",
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NAMELESS = ("PROTO", "FRAME", "STOP")


@dataclass(frozen=True)
class Name:
    """``module.name``, which the program asks for."""

    name: str


@dataclass
class Call:
    """A call that the program asks for, and the state it wants the result to have."""

    name: str
    arguments: tuple
    state: Any = None
    has_state: bool = False


@dataclass(frozen=True)
class Reference:
    """Something that lies outside the pickle: the storage of a tensor."""

    key: tuple


@dataclass
class _Machine:
    names: frozenset[str]
    stack: list[Any] = field(default_factory=list)
    memo: list[Any] = field(default_factory=list)
    depths: dict[int, int] = field(default_factory=dict)
    """Nesting of every list and dict by its id, which stays theirs: ``kept`` keeps all of them alive."""
    kept: list[Any] = field(default_factory=list)

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise ValueError("it takes more than it has put")
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        items = []
        while self.stack and self.stack[-1] is not _MARK:
            items.append(self.stack.pop())
        if not self.stack:
            raise ValueError("it looks for a mark that is not there")
        self.stack.pop()
        return items[::-1]

    def container(self, value: Any) -> Any:
        self.depths[id(value)] = 1
        self.kept.append(value)
        return value

    def place(self, holder: Any, kind: type, items: list[Any]) -> None:
        """Count the nesting of ``items`` in ``holder``, which must be a list or dict of this program."""
        if type(holder) is not kind or id(holder) not in self.depths:
            raise ValueError(f"it adds to what is no {kind.__name__}")
        deepest = max((self.depths.get(id(item), 0) for item in items if isinstance(item, (list, dict))), default=0)
        depth = self.depths[id(holder)] = max(self.depths[id(holder)], deepest + 1)
        if depth > _DEEPEST:
            raise ValueError(f"it is nested more than {_DEEPEST} deep")

    def remember(self, index: int) -> None:
        if index != len(self.memo):
            if index >= len(self.memo):
                raise ValueError("it numbers what it remembers out of order")
            self.memo[index] = self.stack[-1]
        else:
            self.memo.append(self.stack[-1])

    def recall(self, index: int) -> Any:
        value = self.memo[index] if index < len(self.memo) else _MARK
        # one list or dict in two places could stand for more values than memory holds
        if value is _MARK or isinstance(value, (list, dict)):
            raise ValueError("it uses one list or dict twice")
        return value

    def make_tuple(self, items: list[Any]) -> tuple:
        flat = all(not isinstance(inner, tuple) for item in items if isinstance(item, tuple) for inner in item)
        if len(items) > _MOST_TUPLE or not flat:
            raise ValueError("it holds a tuple too long or too deep for an array's shape")
        return tuple(items)

    def ask(self, name: str) -> Name:
        if name not in self.names:
            raise ValueError(f"it holds a {name}, but only arrays and plain values are read")
        return Name(name)

    def step(self, kind: str, argument: Any) -> None:
        stack = self.stack
        if kind in _VALUES:
            stack.append(_value(kind, argument))
        elif kind in ("EMPTY_LIST", "EMPTY_DICT"):
            stack.append(self.container([] if kind == "EMPTY_LIST" else {}))
        elif kind == "MARK":
            stack.append(_MARK)
        elif kind in ("EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
            count = 0 if kind == "EMPTY_TUPLE" else int(kind[-1])
            stack.append(self.make_tuple([self.pop() for _ in range(count)][::-1]))
        elif kind == "TUPLE":
            stack.append(self.make_tuple(self.pop_mark()))
        elif kind in ("APPEND", "APPENDS"):
            items = [self.pop()] if kind == "APPEND" else self.pop_mark()
            self.place(stack[-1] if stack else None, list, items)
            stack[-1].extend(items)
        elif kind in ("SETITEM", "SETITEMS"):
            items = [self.pop(), self.pop()][::-1] if kind == "SETITEM" else self.pop_mark()
            if len(items) % 2 or not all(map(_is_key, items[::2])):
                raise ValueError("it holds a dict whose keys are not text or small numbers")
            self.place(stack[-1] if stack else None, dict, items[1::2])
            stack[-1].update(zip(items[::2], items[1::2]))
        elif kind in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            if not stack or stack[-1] is _MARK:
                raise ValueError("it remembers nothing")
            self.remember(len(self.memo) if kind == "MEMOIZE" else argument)
        elif kind in ("BINGET", "LONG_BINGET"):
            stack.append(self.recall(argument))
        else:
            self._step_names(kind, argument)
        if len(stack) > _LARGEST_STACK:
            raise ValueError("it puts more than it takes")

    def _step_names(self, kind: str, argument: Any) -> None:
        stack = self.stack
        if kind == "GLOBAL":
            stack.append(self.ask(".".join(argument.split(" ", 1))))
        elif kind == "STACK_GLOBAL":
            name, module = self.pop(), self.pop()
            if not (isinstance(name, str) and isinstance(module, str)):
                raise ValueError("it asks for a name that is no text")
            stack.append(self.ask(f"{module}.{name}"))
        elif kind == "REDUCE":
            arguments, name = self.pop(), self.pop()
            if not isinstance(name, Name) or not isinstance(arguments, tuple):
                raise ValueError("it calls what is no name")
            if name.name == "collections.OrderedDict":
                if arguments:
                    raise ValueError("it holds an OrderedDict that is not empty at first")
                stack.append(self.container({}))
            else:
                stack.append(Call(name.name, arguments))
        elif kind == "BUILD":
            state = self.pop()
            call = stack[-1] if stack else None
            if isinstance(call, dict) and isinstance(state, dict):
                return  # attributes of a state dict, such as the versions of its modules
            if not isinstance(call, Call) or call.has_state:
                raise ValueError("it sets a state on what has none")
            call.state, call.has_state = state, True
        elif kind == "BINPERSID":
            key = self.pop()
            if not isinstance(key, tuple):
                raise ValueError("it refers to something by what is no tuple")
            stack.append(Reference(key))
        elif kind not in _NAMELESS:
            raise ValueError(f"it has the instruction {kind}, which no pickle of arrays and plain values needs")


def parse(data: bytes, names: frozenset[str]) -> Any:
    """What a pickle describes: plain values, and a `Call` or `Reference` for everything else.

    Args:
        data (bytes): the pickle; what follows its end is not looked at.
        names (frozenset): the names it may ask for.

    Raises:
        ValueError: malformed, another name, an instruction that is not needed, too deep, or one list in two places.
    """
    machine = _Machine(names)
    for count, (instruction, argument, _) in enumerate(pickletools.genops(data)):
        if count > MOST_INSTRUCTIONS:
            raise ValueError(f"it has more than {MOST_INSTRUCTIONS} instructions")
        machine.step(instruction.name, argument)
    value = machine.pop()
    if machine.stack:
        raise ValueError("it puts more than it takes")
    return value


def _is_key(value: Any) -> bool:
    # large integers can be chosen so that a dict takes quadratic time
    return isinstance(value, str) or (isinstance(value, int) and abs(value) < 1 << 31)


def _value(kind: str, argument: Any) -> Any:
    if kind in _CONSTANTS:
        return _CONSTANTS[kind]
    if isinstance(argument, int) and not -(1 << 63) <= argument < 1 << 64:
        raise ValueError("it holds an integer of more than 64 bits")
    return bytes(argument) if isinstance(argument, bytearray) else argument
