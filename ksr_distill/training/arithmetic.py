"""Counts the floating-point operations of an update."""

from typing import Any

from torch.utils.flop_counter import FlopCounterMode


class ArithmeticCounter(FlopCounterMode):
    """Counts convolutions and matrix products, without PyTorch's breakdown by module.

    Its hooks fail inside ``torch.func``, which R1 uses ("A leaf node was passed").
    """

    def __init__(self) -> None:
        super().__init__(display=False)
        self.mod_tracker = _NoModules()


class _NoModules:
    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *_: Any) -> None: ...
