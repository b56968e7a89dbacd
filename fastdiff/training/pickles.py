"""What a pickle describes, written down: it is run on a stack machine that has no calls, so that nothing in it happens.

What a pickle would import, call or restore becomes a `Record`. A `pickle.Unpickler` with a find_class of one's own is not
enough: it calls what copyreg has registered, takes memory by numbers in the file, and hashes what the file nests, however deep.
Torch's reader of weights alone refuses files with any class that it does not know, as those of most trainings.
"""

from __future__ import annotations

import pickletools
from typing import IO, Any

# of one pickle, and one more for each 16 bytes of the file; a network of 1000 tensors takes 30,000
OPERATIONS = 1 << 20
STORAGE = "storage of the file"  # the name of what a pickle says of data outside of it
_VALUES = frozenset((
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
    "BYTEARRAY8",
))  # fmt: skip


class Record:
    """A dict, or an object: the name that is imported, what that would be called with (None: it is not), items, state.

    Of what is read only strings and integers may be hashed, compared or printed: all else can be deep, or hold itself.
    """

    __slots__ = ("args", "items", "name", "state")

    def __init__(self, name: str, args: tuple[Any, ...] | None = None) -> None:
        self.name, self.args = name, args
        self.items: list[tuple[Any, Any]] = []
        self.state: Any = None

    def append(self, value: Any) -> None:
        self.items.append((len(self.items), value))

    def extend(self, values: list[Any]) -> None:
        for value in values:
            self.append(value)

    def get(self, key: str) -> Any:
        """The value of a dict's key; None where there is none."""
        return next((value for each, value in reversed(self.items) if isinstance(each, str) and each == key), None)


class Bounded:
    """A file whose reads take no more memory than it has bytes, whatever number they are asked for."""

    def __init__(self, handle: IO[bytes], size: int) -> None:
        self.handle, self.size, self.readline = handle, size, handle.readline

    def read(self, count: int) -> bytes:
        return self.handle.read(min(count, self.size))


def described(handle: IO[bytes], size: int) -> tuple[Any, list[Record]]:
    """(what the pickle at the handle's position describes, its records of storages); `size` is the file's.

    Numbers, strings, bytes, lists (also for sets), tuples and records. ValueError and other errors where it is broken.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    storages: list[Record] = []

    def marked() -> list[Any]:
        at = marks.pop()
        items = stack[at:]
        del stack[at:]
        return items

    for count, (operation, value, _) in enumerate(pickletools.genops(Bounded(handle, size))):  # type: ignore[arg-type]
        if count > OPERATIONS + size // 16:
            raise ValueError(f"it holds more than {OPERATIONS} things beside its tensors")
        name = operation.name
        if name in _VALUES:
            stack.append(value)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[value] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[value])
        elif name == "NONE":
            stack.append(None)
        elif name in ("NEWTRUE", "NEWFALSE"):
            stack.append(name == "NEWTRUE")
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "TUPLE":
            stack.append(tuple(marked()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            at = len(stack) - int(name[-1])
            stack[at:] = [tuple(stack[at:])]
        elif name == "EMPTY_TUPLE":
            stack.append(())
        elif name in ("EMPTY_LIST", "EMPTY_SET"):
            stack.append([])
        elif name in ("LIST", "FROZENSET"):
            stack.append(marked())
        elif name == "EMPTY_DICT":
            stack.append(Record("dict"))
        elif name == "DICT":
            items = marked()
            stack.append(Record("dict"))
            stack[-1].items.extend(zip(items[::2], items[1::2]))
        elif name == "APPEND":
            item = stack.pop()
            stack[-1].append(item)
        elif name in ("APPENDS", "ADDITEMS"):
            items = marked()
            stack[-1].extend(items)
        elif name == "SETITEM":
            item, key = stack.pop(), stack.pop()
            stack[-1].items.append((key, item))
        elif name == "SETITEMS":
            items = marked()
            stack[-1].items.extend(zip(items[::2], items[1::2]))
        elif name == "GLOBAL":
            stack.append(Record(value.replace(" ", ".")))
        elif name == "STACK_GLOBAL":
            item, module = stack.pop(), stack.pop()
            stack.append(Record(".".join((module, item))))
        elif name in ("REDUCE", "NEWOBJ"):
            args, function = stack.pop(), stack.pop()
            stack.append(_call(function, args))
        elif name == "NEWOBJ_EX":
            keywords, args, function = stack.pop(), stack.pop(), stack.pop()
            stack.append(_call(function, (*args, keywords)))
        elif name == "OBJ":
            function, *rest = marked()
            stack.append(_call(function, tuple(rest)))
        elif name == "INST":
            stack.append(Record(value.replace(" ", "."), tuple(marked())))
        elif name == "BUILD":
            item = stack.pop()
            stack[-1].state = item
        elif name == "BINPERSID":
            storages.append(_call(Record(STORAGE), stack.pop()))
            stack.append(storages[-1])
        elif name == "POP" and (not marks or marks[-1] < len(stack)):
            stack.pop()
        elif name in ("POP", "POP_MARK"):
            marked()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "STOP":
            return stack.pop(), storages
        elif name not in ("PROTO", "FRAME"):  # copyreg's codes, buffers outside of the file, storages named by a text
            raise ValueError(f"it asks for {name}, which no file of tensors does")
    raise ValueError("it ends early")


def _call(function: Record, args: Any) -> Record:
    """A call, written down; one of what another call would return has no name."""
    if not isinstance(args, tuple):
        raise ValueError("it calls something with what is no list of arguments")
    return Record(function.name if function.args is None else "", args)
