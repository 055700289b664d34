"""Pickles of checkpoints, followed step by step without building what they ask for.

A pickle is a program for a small stack machine. This is that machine with everything taken out but
what a checkpoint of tensors needs, and with a count of what it will cost, so that PyTorch's reader,
which runs afterwards, meets nothing that takes more memory or time than the file's size allows.
"""

import pickletools
from collections import OrderedDict, deque
from collections.abc import Mapping
from typing import Any, BinaryIO

from backbones.weights.untrusted.pickle_calls import (
    CALLS,
    Name,
    Object,
    Refused,
    Storage,
    checked_key,
    is_allowed,
    is_size,
)

__all__ = ["Refused", "PickleCheck"]

# The model of the zoo with most tensors, with its averages and optimizer, takes 1.4 million.
_MAX_STEPS = 2_000_000
_TENSOR_STEPS = 20  # what a tensor costs in memory and time, in steps
_OBJECT_STEPS = 8
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"}
_IMPORTS = {"GLOBAL", "INST", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4"}
_MADE_NEW = {"argparse.Namespace", "torch.nn.parameter.Parameter"}


class PickleCheck:
    """Follows the pickles of one file; `blocked` fills with the names they must not use."""

    def __init__(self, file_bytes: int, storages: Mapping[str, int] | None = None) -> None:
        """Take the file's size and, where known, the bytes of its storages by name."""
        self.blocked: set[str] = set()
        self.declared: dict[str, int] = {}
        """Bytes of each storage that the pickles declared."""
        self.declared_bytes = 0
        self._file_bytes = file_bytes
        self._storages = storages
        self._steps = 0

    def follow(self, stream: BinaryIO) -> Any:
        """Follow one pickle to its end and return a stand-in for its object.

        Raises:
            Refused: it does something no checkpoint needs; its names are in `blocked` even so.
            Exception: whatever `pickletools` makes of bytes that are no pickle.
        """
        machine = _Machine(self)
        names = _Names()
        refused: Refused | None = None
        for opcode, argument, _ in pickletools.genops(stream):
            self.charge(1)
            name = names.see(opcode.name, argument)
            if name is not None and not is_allowed(name):
                self.blocked.add(name[:80])
            if refused is None:
                try:
                    machine.step(opcode.name, argument, name)
                except Refused as error:
                    refused = error
                except (IndexError, KeyError, TypeError) as error:
                    refused = Refused(f"breaks its own rules at a step {opcode.name} ({error!r})")
        if refused is None and not machine.stack:
            refused = Refused("ends without an object")
        if refused is not None:
            raise refused
        return machine.stack.pop()

    def charge(self, steps: int) -> None:
        """Count steps of work; raise `Refused` when they are too many."""
        self._steps += steps
        if self._steps > _MAX_STEPS:
            raise Refused(f"takes more than {_MAX_STEPS} steps to read")

    def storage(self, identity: Any) -> Storage:
        """Check a reference to a block of numbers against what the file holds."""
        parts = 6 if self._storages is None else 5  # only the old format has views of storages
        if type(identity) is not tuple or len(identity) != parts or identity[0] != "storage":
            raise Refused("refers to something outside of it that is no storage")
        _, kind, key, location, count, *view = identity
        spelled = isinstance(kind, Name) and isinstance(key, str) and isinstance(location, str)
        if not spelled or not is_size(count) or view not in ([], [None]):
            raise Refused("refers to a storage in an unknown way")
        size = count * kind.item_bytes
        held = self._storages.get(key, -1) if self._storages is not None else size
        if held != size or self.declared.get(key, size) != size:
            raise Refused(f"declares {size} bytes for storage {key[:80]!r}, which has another size")
        if key not in self.declared:
            self.declared[key] = size
            self.declared_bytes += size
        if self.declared_bytes > self._file_bytes:
            raise Refused(f"declares storages larger than the file ({self._file_bytes} bytes)")
        return Storage(kind.item_bytes, size)


class _Names:
    """Reads off what a pickle imports.

    Names taken from the stack are known where the two steps before put them there, as picklers do;
    any other way to bring them about makes the name unreadable, and that is on no list.
    """

    def __init__(self) -> None:
        self._recent: deque[str | None] = deque([None, None], maxlen=2)
        self._memo: dict[int, str | None] = {}

    def see(self, opcode: str, argument: Any) -> str | None:
        """Take note of a step; return the name it imports, if any."""
        if opcode in _IMPORTS:
            above = ".".join(text or "?" for text in self._recent)
            self._recent.append(None)
            if opcode.startswith("EXT"):
                return f"copyreg extension {argument}"
            return _modern(above if opcode == "STACK_GLOBAL" else argument.replace(" ", ".", 1))
        if opcode in ("BINPUT", "LONG_BINPUT", "PUT"):
            self._memo[argument] = self._recent[-1]
        elif opcode == "MEMOIZE":
            self._memo[len(self._memo)] = self._recent[-1]
        elif opcode in ("BINGET", "LONG_BINGET", "GET"):
            self._recent.append(self._memo.get(argument))
        elif opcode not in ("PROTO", "FRAME"):
            self._recent.append(argument if isinstance(argument, str) else None)
        return None


class _Machine:
    """The stack machine, with stand-ins for objects."""

    def __init__(self, check: PickleCheck) -> None:
        self.stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._check = check

    def step(self, opcode: str, argument: Any, name: str | None) -> None:
        """Take one step; `name` is what it imports."""
        stack = self.stack
        if opcode in _LITERALS:
            stack.append(argument)
        elif opcode in _CONSTANTS:
            stack.append(_CONSTANTS[opcode])
        elif opcode in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif opcode in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif opcode == "MARK":
            self._marked.append(stack)
            self.stack = []
        elif opcode == "TUPLE":
            items = self._since_mark()
            self.stack.append(tuple(items))
        elif opcode in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(self._popped(int(opcode[-1]))))
        elif opcode == "GLOBAL":
            stack.append(Name(str(name)))
        elif opcode == "BINPERSID":
            stack.append(self._check.storage(stack.pop()))
        elif opcode in ("REDUCE", "NEWOBJ"):
            function, arguments = self._popped(2)
            stack.append(self._call(function, arguments, opcode))
        elif opcode == "BUILD":
            self._build(stack.pop(), stack[-1])
        elif opcode in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if opcode == "EMPTY_DICT" else [])
        elif opcode in ("SETITEM", "SETITEMS"):
            pairs = self._since_mark() if opcode == "SETITEMS" else self._popped(2)
            if not isinstance(self.stack[-1], dict) or len(pairs) % 2:
                raise Refused("sets items of something that is no dict")
            for key, value in zip(pairs[::2], pairs[1::2]):
                self.stack[-1][checked_key(key)] = value
        elif opcode in ("APPEND", "APPENDS"):
            items = self._since_mark() if opcode == "APPENDS" else self._popped(1)
            if type(self.stack[-1]) is not list:
                raise Refused("appends to something that is no list")
            self.stack[-1].extend(items)
        elif opcode not in ("PROTO", "STOP"):
            raise Refused(f"uses {opcode}, which torch.save never writes by itself")

    def _since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self._marked.pop()
        return items

    def _popped(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError("the stack is empty")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def _build(self, state: Any, target: Any) -> None:
        """Check attributes given to an object: a state dict's metadata, a namespace's content."""
        if not isinstance(state, dict):
            raise Refused("sets attributes in an unknown way")
        self._check.charge(_OBJECT_STEPS + len(state))
        # Any other attribute of a dict could stand in for one of its methods.
        metadata = type(target) is OrderedDict and state.keys() <= {"_metadata"}
        if not metadata and type(target) is not Object:
            raise Refused("sets attributes of something other than a namespace")

    def _call(self, function: Any, arguments: Any, opcode: str) -> Any:
        """Check a call and return a stand-in for its result."""
        name = function.name if isinstance(function, Name) else "something that is no function"
        made = opcode == "REDUCE" or name in _MADE_NEW
        if name not in CALLS or not made or type(arguments) is not tuple:
            raise Refused(f"calls {name[:80]}, which no checkpoint does")
        # Most of these copy what they are given.
        sizes = (len(a) for a in arguments if hasattr(a, "__len__"))
        tensor = "_rebuild" in name or "Parameter" in name
        self._check.charge(sum(sizes) + (_TENSOR_STEPS if tensor else _OBJECT_STEPS))
        result = CALLS[name](*arguments)
        if result is None:
            raise Refused(f"calls {name} with arguments that no checkpoint gives")
        return result


def _modern(name: str) -> str:
    """Return a name with the module spelled as in Python 3."""
    module, _, rest = name.partition(".")
    return f"builtins.{rest}" if module == "__builtin__" else name
