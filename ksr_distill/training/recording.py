"""CUDA graphs of an update: what the host launched once, the device repeats by itself.

An update of a small network is thousands of kernels, each shorter than its launch; one of a large
network beside a busy host is no better. So each piece of device work between two decisions of the
host (who moves, which timestep, which learning rate) is recorded, and from then on replayed with
one launch. A replay reads its inputs and writes its results and gradients where they lay when it
was recorded.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

D = TypeVar("D")
T = TypeVar("T")

WARM_UPS = 3
"""Times that a sequence is played before it is recorded: they choose and compile the kernels."""


@runtime_checkable
class Graph(Protocol):
    """What a recording leaves."""

    def replay(self) -> None:
        """Do the recorded work again."""
        ...


@runtime_checkable
class Tape(Protocol):
    """What records."""

    def rehearse(self, work: Callable[[], T]) -> T:
        """Do work where it will be recorded."""
        ...

    def record(self, work: Callable[[], T]) -> tuple[Graph, T]:
        """Record work without doing it; return what it will have written, too."""
        ...


class CudaTape:
    """Records on a stream of its own, all into one pool of memory.

    Pieces are replayed in the order in which they were recorded, so that what one is done with,
    the next may write over.
    """

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.pool: Any = torch.cuda.graph_pool_handle()

    def rehearse(self, work: Callable[[], T]) -> T:
        """Do work on the recording's stream."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = work()
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    def record(self, work: Callable[[], T]) -> tuple[Graph, T]:
        """Record work; loaders and loggers in other threads may go on meanwhile."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
        ):
            result = work()
        return graph, result


@dataclass
class Piece(Generic[T]):
    """A recorded piece: its results, and the gradients that it writes."""

    graph: Graph
    result: T
    gradients: list[Tensor | None]


@dataclass
class Sequence:
    """Pieces that follow each other in one update; they are recorded in one and the same update."""

    plays: int = 0
    pieces: dict[str, Piece[Any]] = field(default_factory=dict)


class Recorder:
    """Plays an update's pieces: a few times as they are written, then from their recordings.

    Args:
        tape: Records; None to play as it is written for ever, which is what a CPU does.
    """

    def __init__(self, tape: Tape | None) -> None:
        self.tape = tape
        self.sequences: dict[str, Sequence] = {}
        self.held: dict[type, Any] = {}
        self.now: Sequence | None = None

    def begin(self, name: str) -> None:
        """Begin a sequence of pieces. What differs in kind between two updates needs two names."""
        self.now = None
        if self.tape is not None:
            self.now = self.sequences.setdefault(name, Sequence())
            self.now.plays += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Play as it is written meanwhile; what is recorded stays."""
        tape, self.tape, self.now = self.tape, None, None
        try:
            yield
        finally:
            self.tape, self.now = tape, None

    def hold(self, inputs: D) -> D:
        """Return a dataclass with its tensors copied to where recordings read them."""
        if self.now is None:
            return inputs
        values = {f.name: getattr(inputs, f.name) for f in dataclasses.fields(inputs)}  # type: ignore[arg-type]
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        places = self.held.setdefault(
            type(inputs), {name: torch.empty_like(value) for name, value in tensors.items()}
        )
        for name, value in tensors.items():
            if places[name].shape != value.shape:
                raise ValueError(
                    f"{name} was {tuple(places[name].shape)} when the update was recorded and is "
                    f"{tuple(value.shape)} now; give batches of one size, or use cuda_graphs=false"
                )
            places[name].copy_(value)
        return dataclasses.replace(inputs, **places)  # type: ignore[type-var]

    def play(self, name: str, work: Callable[[], T], *, trains: nn.Module | None = None) -> T:
        """Do a piece of work of the sequence that was begun, and return its result.

        Args:
            name: Unique in the sequence.
            work: Waits for nothing on the host, draws nothing, and reads what ``hold`` returned.
            trains: The network whose gradients the work writes; they must be none before.
        """
        if self.tape is None or self.now is None:
            return work()
        if self.now.plays <= WARM_UPS:
            return self.tape.rehearse(work)
        weights = [] if trains is None else list(trains.parameters())
        if name not in self.now.pieces:
            graph, result = self.tape.record(work)
            gradients = [weight.grad for weight in weights]
            self.now.pieces[name] = Piece(graph, result, gradients)
        piece = self.now.pieces[name]
        piece.graph.replay()
        for weight, gradient in zip(weights, piece.gradients, strict=True):
            weight.grad = gradient
        return piece.result
