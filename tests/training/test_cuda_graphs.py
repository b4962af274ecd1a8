"""What runs eagerly, what is captured, and what a replay reads and leaves behind."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from ksr_distill.training.cuda_graphs import WARM_UPS, GraphRunner


class FakeBackend:
    """Captures by doing; replays by counting."""

    def __init__(self):
        self.told = []

    def warm_up(self, work):
        self.told.append("warmed up")
        return work()

    def capture(self, work):
        self.told.append("captured")
        return self, work()

    def replay(self):
        self.told.append("replayed")


@dataclass
class Inputs:
    image: Tensor
    timestep: int
    draw: Tensor | None = None


def run(graphs, name="piece", work=lambda: torch.ones(1), **how):
    graphs.begin("update")
    return graphs.run(name, work, **how)


def test_a_piece_is_warmed_up_then_captured_once_then_replayed():
    backend = FakeBackend()
    graphs = GraphRunner(backend)
    for _ in range(WARM_UPS + 3):
        run(graphs)
    assert backend.told == ["warmed up"] * WARM_UPS + ["captured", *["replayed"] * 3]


def test_pieces_of_a_sequence_are_captured_in_one_update_and_sequences_count_for_themselves():
    backend = FakeBackend()
    graphs = GraphRunner(backend)
    for _ in range(WARM_UPS):
        run(graphs, "first")
        graphs.begin("another")
        graphs.run("first", list)
    backend.told.clear()
    graphs.begin("update")
    graphs.run("first", list)
    graphs.run("second", list)  # new, but its sequence has had its warm-ups
    assert backend.told == ["captured", "replayed"] * 2


def test_without_a_backend_everything_runs_eagerly():
    graphs = GraphRunner(None)
    inputs = Inputs(torch.ones(2), 3)
    graphs.begin("update")
    assert graphs.static(inputs) is inputs
    assert [graphs.run("piece", lambda i=i: i) for i in range(9)] == list(range(9))


def test_a_replay_leaves_the_gradients_that_it_wrote():
    network = nn.Linear(2, 1)

    def work():
        network(torch.ones(1, 2)).sum().backward()
        return network.weight.grad

    graphs = GraphRunner(FakeBackend())
    for _ in range(WARM_UPS + 1):
        network.zero_grad()
        captured = run(graphs, work=work, trains=network)
    network.zero_grad()
    run(graphs, work=work, trains=network)
    assert network.weight.grad is captured
    assert network.bias.grad is not None


def test_static_tensors_keep_their_place_and_the_rest_is_this_updates():
    graphs = GraphRunner(FakeBackend())
    graphs.begin("update")
    first = graphs.static(Inputs(torch.zeros(2), 1))
    second = graphs.static(Inputs(torch.ones(2), 2))
    assert first.image is second.image
    assert second.image.tolist() == [1, 1]
    assert (second.timestep, second.draw) == (2, None)


def test_another_batch_size_is_refused():
    graphs = GraphRunner(FakeBackend())
    graphs.begin("update")
    graphs.static(Inputs(torch.zeros(2), 1))
    with pytest.raises(ValueError, match=r"image was \(2,\) .* is \(3,\) now; .* use cuda_"):
        graphs.static(Inputs(torch.zeros(3), 1))


def test_a_pause_runs_eagerly_and_keeps_what_was_captured():
    backend = FakeBackend()
    graphs = GraphRunner(backend)
    for _ in range(WARM_UPS + 1):
        run(graphs)
    backend.told.clear()
    with graphs.paused():
        run(graphs)
    assert backend.told == []
    run(graphs)
    assert backend.told == ["replayed"]


def test_several_micro_batches_are_refused(make_module):
    module = make_module(cuda_graphs=True)
    module.micro_batches_per_update = 2
    with pytest.raises(
        ValueError, match=r"cuda_graphs=true with 2 micro-batches .* use data.micro"
    ):
        module.on_train_start()


def test_a_cpu_captures_nothing(make_module):
    module = make_module(cuda_graphs=True)
    module.on_train_start()
    assert module.graphs.backend is None


def test_a_value_that_is_no_switch_is_refused(make_module):
    with pytest.raises(ValueError, match="cuda_graphs='graphs' is not allowed; use true or false"):
        make_module(cuda_graphs="graphs")
