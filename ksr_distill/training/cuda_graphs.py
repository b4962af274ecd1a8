"""CUDA graphs of an update: launched kernel by kernel at first, then captured and replayed.

An update of a small network is thousands of kernels, each shorter than its launch; beside a busy
host a large network fares no better. So each piece of device work between two decisions of the host
(whose turn it is, which timestep, which learning rate) is captured as one CUDA graph, and replayed
with a single launch from then on. A replay reads its inputs, and writes its results and gradients,
at the addresses that were captured.
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
"""Eager runs of a sequence before its capture: in them kernels are chosen and compiled."""


@runtime_checkable
class Graph(Protocol):
    """Captured work."""

    def replay(self) -> None:
        """Do the captured work again."""
        ...


@runtime_checkable
class GraphBackend(Protocol):
    """What captures graphs; tests bring their own."""

    def warm_up(self, work: Callable[[], T]) -> T:
        """Do the work eagerly, on the stream that it will be captured on."""
        ...

    def capture(self, work: Callable[[], T]) -> tuple[Graph, T]:
        """Capture the work without doing it; return the graph, and what a replay will fill."""
        ...


class CudaGraphBackend:
    """Captures on a side stream; all graphs share one memory pool.

    Graphs must be replayed in the order of their capture: a later one may reuse the memory of an
    earlier one's intermediates.
    """

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.pool: Any = torch.cuda.graph_pool_handle()

    def warm_up(self, work: Callable[[], T]) -> T:
        """Do the work on the side stream."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = work()
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    def capture(self, work: Callable[[], T]) -> tuple[Graph, T]:
        """Capture the work; loaders and loggers in other threads may use CUDA meanwhile."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
        ):
            result = work()
        return graph, result


@dataclass
class Captured(Generic[T]):
    """A captured piece: its graph, its results, and the gradients that it writes."""

    graph: Graph
    result: T
    gradients: list[Tensor | None]


@dataclass
class GraphSequence:
    """Pieces that follow one another in an update. All are captured in the same update."""

    runs: int = 0
    pieces: dict[str, Captured[Any]] = field(default_factory=dict)


class GraphRunner:
    """Runs an update's pieces: ``WARM_UPS`` times eagerly, then as captured graphs.

    Args:
        backend: Captures the graphs; None to run everything eagerly, as on a CPU.
    """

    def __init__(self, backend: GraphBackend | None) -> None:
        self.backend = backend
        self.sequences: dict[str, GraphSequence] = {}
        self.static_tensors: dict[type, dict[str, Tensor]] = {}
        self.current: GraphSequence | None = None

    def begin(self, name: str) -> None:
        """Begin a sequence of pieces. Updates that do different work need different names."""
        self.current = None
        if self.backend is not None:
            self.current = self.sequences.setdefault(name, GraphSequence())
            self.current.runs += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Run everything eagerly meanwhile; what was captured is kept."""
        backend, self.backend, self.current = self.backend, None, None
        try:
            yield
        finally:
            self.backend, self.current = backend, None

    def static(self, inputs: D) -> D:
        """Return a dataclass with its tensors copied to the fixed addresses that graphs read.

        Raises:
            ValueError: If a tensor has another shape than at its first copy.
        """
        if self.current is None:
            return inputs
        values = {f.name: getattr(inputs, f.name) for f in dataclasses.fields(inputs)}  # type: ignore[arg-type]
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        places = self.static_tensors.setdefault(
            type(inputs), {name: torch.empty_like(value) for name, value in tensors.items()}
        )
        for name, value in tensors.items():
            if places[name].shape != value.shape:
                raise ValueError(
                    f"{name} was {tuple(places[name].shape)} when the update was captured and is "
                    f"{tuple(value.shape)} now; give batches of one size, or use cuda_graphs=false"
                )
            places[name].copy_(value)
        return dataclasses.replace(inputs, **places)  # type: ignore[type-var]

    def run(self, name: str, work: Callable[[], T], *, trains: nn.Module | None = None) -> T:
        """Do a piece of the current sequence, and return its result.

        Args:
            name: Unique in the sequence.
            work: Must not synchronise or draw random numbers; reads what ``static`` returned.
            trains: The network whose gradients the work writes; they must be None before.
        """
        if self.backend is None or self.current is None:
            return work()
        if self.current.runs <= WARM_UPS:
            return self.backend.warm_up(work)
        weights = [] if trains is None else list(trains.parameters())
        if name not in self.current.pieces:
            graph, result = self.backend.capture(work)
            gradients = [weight.grad for weight in weights]
            self.current.pieces[name] = Captured(graph, result, gradients)
        piece = self.current.pieces[name]
        piece.graph.replay()
        for weight, gradient in zip(weights, piece.gradients, strict=True):
            weight.grad = gradient
        return piece.result
