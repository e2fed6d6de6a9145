"""Pickles, read without running them.

A pickle is a program. Python's unpicklers call what the program names, the compiled one allocates what it claims, and
both hash whatever it makes a key. `Interpreter` has no means to import or to call anything: it knows the instructions
that plain values are made with, and asks its subclass what the few names that a format needs stand for.
"""

from __future__ import annotations

import collections
import pickletools
from collections.abc import Callable
from typing import Any

_MOST_INSTRUCTIONS = 2_000_000


class Refused(Exception):
    """The pickle wants something that has no place in a file of its kind."""


class Interpreter:
    """Runs the instructions of a pickle (protocol 2 and later) on plain values only.

    A subclass says with `find`, `call`, `build`, `create` and `persistent` what may be named and made; by default
    nothing. Time and memory are in proportion to the length of the program.
    """

    WRITER = "pickle"  # what writes such files, for messages

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._left = 0

    def find(self, name: str) -> Any:
        """Returns what "module name" stands for. Raises Refused for a name that has no place here."""
        raise Refused(f"this pickle wants {name.replace(' ', '.')}, which has no place here")

    def call(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        """Returns what a call of a found name on `arguments` makes."""
        raise Refused(f"this pickle wants to call a {type(function).__name__}")

    def create(self, kind: Any, arguments: Any) -> Any:
        """Returns what an instance of a found name is."""
        raise Refused(f"this pickle wants to make a {type(kind).__name__}")

    def build(self, target: Any, state: Any) -> None:
        """Gives `target` a state."""
        raise Refused(f"this pickle wants to set the state of a {type(target).__name__}")

    def persistent(self, pid: Any) -> Any:
        """Returns what an id of something outside of the pickle stands for."""
        raise Refused("this pickle refers to something outside")

    def spend(self, work: int) -> None:
        """Counts work that a single instruction makes, so that a short program cannot make much of it."""
        self._left -= work
        if self._left < 0:
            raise Refused("this pickle asks for more work than its length allows")

    def run(self, program: bytes) -> Any:
        """Returns the value that a program makes.

        Raises:
            Refused: it wants more than plain values and the names of the format.
            Exception: of almost any kind where it makes no sense.
        """
        self._left = _MOST_INSTRUCTIONS
        for instruction, argument, _ in pickletools.genops(program):
            self.spend(1)
            name = instruction.name
            if name == "STOP":
                break
            if name in _LITERALS:
                self._stack.append(argument)
            elif name in _INSTRUCTIONS:
                _INSTRUCTIONS[name](self, argument)
            else:
                raise Refused(f"this pickle uses the instruction {name}, which {self.WRITER} never writes")
        (result,) = self._stack
        if self._marked:
            raise ValueError("a mark without an end")
        return result

    # Instructions: each takes the argument that follows it in the file, if any.

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _mark(self, _: None) -> None:
        self._marked.append(self._stack)
        self._stack = []

    def _since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marked.pop()
        return items

    def _tuple(self, size: int | None) -> None:
        items = self._since_mark() if size is None else [self._stack.pop() for _ in range(size)][::-1]
        self._push(tuple(items))

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not list:
            raise Refused(f"this pickle wants to append to a {type(target).__name__}")
        target.extend(items)

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) not in (dict, collections.OrderedDict):
            raise Refused(f"this pickle wants to set items of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[scalar_key(key)] = value

    def _remember(self, index: int | None) -> None:
        self._memo[len(self._memo) if index is None else index] = self._stack[-1]

    def _global(self, name: str) -> None:
        self._push(self.find(name))

    def _stack_global(self, _: None) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._global(f"{module} {name}")

    def _reduce(self, _: None) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if type(arguments) is not tuple:
            raise Refused(f"this pickle wants to call a {type(function).__name__}")
        self._push(self.call(function, arguments))

    def _new_object(self, _: None) -> None:
        arguments, kind = self._stack.pop(), self._stack.pop()
        self._push(self.create(kind, arguments))

    def _build(self, _: None) -> None:
        state = self._stack.pop()
        self.build(self._stack[-1], state)

    def _persistent(self, _: None) -> None:
        self._push(self.persistent(self._stack.pop()))


_LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
_INSTRUCTIONS: dict[str, Callable[[Interpreter, Any], None]] = {
    "PROTO": lambda self, _: None,
    "FRAME": lambda self, _: None,
    "NONE": lambda self, _: self._push(None),
    "NEWTRUE": lambda self, _: self._push(True),
    "NEWFALSE": lambda self, _: self._push(False),
    "EMPTY_DICT": lambda self, _: self._push({}),
    "EMPTY_LIST": lambda self, _: self._push([]),
    "EMPTY_TUPLE": lambda self, _: self._push(()),
    "MARK": Interpreter._mark,
    "TUPLE": lambda self, _: self._tuple(None),
    "TUPLE1": lambda self, _: self._tuple(1),
    "TUPLE2": lambda self, _: self._tuple(2),
    "TUPLE3": lambda self, _: self._tuple(3),
    "APPEND": lambda self, _: self._extend([self._stack.pop()]),
    "APPENDS": lambda self, _: self._extend(self._since_mark()),
    "SETITEM": lambda self, _: self._set_items([self._stack.pop(), self._stack.pop()][::-1]),
    "SETITEMS": lambda self, _: self._set_items(self._since_mark()),
    "BINPUT": Interpreter._remember,
    "LONG_BINPUT": Interpreter._remember,
    "MEMOIZE": lambda self, _: self._remember(None),
    "BINGET": lambda self, index: self._push(self._memo[index]),
    "LONG_BINGET": lambda self, index: self._push(self._memo[index]),
    "GLOBAL": Interpreter._global,
    "STACK_GLOBAL": Interpreter._stack_global,
    "REDUCE": Interpreter._reduce,
    "NEWOBJ": Interpreter._new_object,
    "BUILD": Interpreter._build,
    "BINPERSID": Interpreter._persistent,
}


def scalar_key(value: Any) -> Any:
    """Returns the value, which may be a dictionary's key. Raises Refused for others: hashing nested tuples need never
    end."""
    if value is not None and type(value) not in (str, int, float, bool):
        raise Refused(f"this pickle wants a {type(value).__name__} as a dictionary's key")
    if type(value) is int and value.bit_length() > 64:
        raise Refused("this pickle wants an integer of more than 64 bits as a dictionary's key")
    return value
