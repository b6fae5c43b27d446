"""Which keys and values a looped stage keeps for later tokens.

A stage of k layers and L loops computes L k keys and values of a token. Positions of one pass (a prompt) see each other
at their own loop whatever the policy; it decides what a later pass finds of them. With n the loops that a token ran:

full              loop t reads loop t                                                     L slots
latest-available  loop t reads loop min(t, n - 1): tokens may exit early                  L slots
last              every loop reads loop n - 1                                             1 slot
cyclic-S          loop t reads the last loop below n that equals t modulo S               S slots
block-R           loop t reads the last loop below n that equals t divided by R           ceil(L / R) slots
window-W          loop t reads loop min(t, n - 1) of the last W positions before the
                  pass, and loop n - 1 of the older ones                                  1 slot, L - 1 of W positions

Where cyclic and block find no such loop, because the token exited before, they read loop n - 1.
"""

import re
from dataclasses import dataclass

_NAMED = ("full", "latest-available", "last")
_SIZED = ("cyclic", "block", "window")
_SIZE = re.compile(rf"({'|'.join(_SIZED)})-([0-9]+)")
KNOWN = (*_NAMED, "cyclic-S", "block-R", "window-W")


@dataclass(frozen=True)
class KVPolicy:
    """A policy by name; `size` is S, R or W, and 0 for the others.

    Raises:
        ValueError: there is none of this name, or the size breaks its rule.
        TypeError: the size is no whole number.
    """

    kind: str
    size: int = 0

    def __post_init__(self) -> None:
        if self.kind not in (*_NAMED, *_SIZED):
            raise ValueError(f"KVPolicy: policy must be one of {', '.join(KNOWN)}, got {self.kind!r}")
        if type(self.size) is not int:
            raise TypeError(f"KVPolicy: size must be a whole number, got {self.size!r}")
        if self.kind in _SIZED and self.size < 1:
            raise ValueError(f"KVPolicy: the size of {self.kind} must be at least 1, got {self.size}")
        if self.kind in _NAMED and self.size != 0:
            raise ValueError(f"KVPolicy: the size of {self.kind} must be 0, got {self.size}")

    @staticmethod
    def parse(text: "str | KVPolicy") -> "KVPolicy":
        """The policy called "full", "last", "latest-available", "cyclic-2", "block-2" or "window-64".

        Raises:
            ValueError: there is none of this name, or its size is 0.
            TypeError: it is neither.
        """
        if isinstance(text, KVPolicy):
            return text
        if not isinstance(text, str):
            raise TypeError(f"KVPolicy: policy must be a name or a KVPolicy, got {text!r}")
        match = _SIZE.fullmatch(text)
        if match is None and text not in _NAMED:
            raise ValueError(f"KVPolicy: policy must be one of {', '.join(KNOWN)}, got {text!r}")
        return KVPolicy(text) if match is None else KVPolicy(match[1], int(match[2]))

    def __str__(self) -> str:
        return f"{self.kind}-{self.size}" if self.size else self.kind

    @property
    def allows_exits(self) -> bool:
        """Whether tokens may run fewer loops than others."""
        return self.kind != "full"

    def num_slots(self, loops: int) -> int:
        """Slots of all positions that a layer has."""
        if self.kind in ("last", "window"):
            return 1
        if self.kind == "cyclic":
            return min(self.size, loops)
        if self.kind == "block":
            return -(-loops // self.size)
        return loops

    def num_rings(self, loops: int) -> int:
        """Slots of `size` positions beside them."""
        return loops - 1 if self.kind == "window" else 0

    def slot(self, loop: int) -> int:
        """Where `loop` reads and writes."""
        if self.kind in ("last", "window"):
            return 0
        if self.kind == "cyclic":
            return loop % self.size
        return loop // self.size if self.kind == "block" else loop
