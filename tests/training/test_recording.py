"""What is played as it is written, what is recorded, and what a replay reads and leaves behind."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from ksr_distill.training.recording import WARM_UPS, Recorder


class Tape:
    """Records by doing; replays by counting."""

    def __init__(self):
        self.told = []

    def rehearse(self, work):
        self.told.append("rehearsed")
        return work()

    def record(self, work):
        self.told.append("recorded")
        return self, work()

    def replay(self):
        self.told.append("replayed")


@dataclass
class Inputs:
    image: Tensor
    timestep: int
    draw: Tensor | None = None


def play(recorder, name="piece", work=lambda: torch.ones(1), **how):
    recorder.begin("update")
    return recorder.play(name, work, **how)


def test_a_piece_is_rehearsed_then_recorded_once_then_replayed():
    tape = Tape()
    recorder = Recorder(tape)
    for _ in range(WARM_UPS + 3):
        play(recorder)
    assert tape.told == ["rehearsed"] * WARM_UPS + ["recorded", *["replayed"] * 3]


def test_pieces_of_a_sequence_are_recorded_in_one_update_and_sequences_count_for_themselves():
    tape = Tape()
    recorder = Recorder(tape)
    for _ in range(WARM_UPS):
        play(recorder, "first")
        recorder.begin("another")
        recorder.play("first", list)
    tape.told.clear()
    recorder.begin("update")
    recorder.play("first", list)
    recorder.play("second", list)  # never rehearsed by itself: it belongs to what was
    assert tape.told == ["recorded", "replayed"] * 2


def test_without_a_tape_work_is_simply_done():
    recorder = Recorder(None)
    inputs = Inputs(torch.ones(2), 3)
    recorder.begin("update")
    assert recorder.hold(inputs) is inputs
    assert [recorder.play("piece", lambda i=i: i) for i in range(9)] == list(range(9))


def test_a_replay_leaves_the_gradients_that_it_wrote():
    network = nn.Linear(2, 1)

    def work():
        network(torch.ones(1, 2)).sum().backward()
        return network.weight.grad

    recorder = Recorder(Tape())
    for _ in range(WARM_UPS + 1):
        network.zero_grad()
        recorded = play(recorder, work=work, trains=network)
    network.zero_grad()
    play(recorder, work=work, trains=network)
    assert network.weight.grad is recorded
    assert network.bias.grad is not None


def test_held_tensors_lie_where_they_lay_and_the_rest_is_this_updates():
    recorder = Recorder(Tape())
    recorder.begin("update")
    first = recorder.hold(Inputs(torch.zeros(2), 1))
    second = recorder.hold(Inputs(torch.ones(2), 2))
    assert first.image is second.image
    assert second.image.tolist() == [1, 1]
    assert (second.timestep, second.draw) == (2, None)


def test_another_batch_size_is_refused():
    recorder = Recorder(Tape())
    recorder.begin("update")
    recorder.hold(Inputs(torch.zeros(2), 1))
    with pytest.raises(ValueError, match=r"image was \(2,\) .* is \(3,\) now; .* use cuda_"):
        recorder.hold(Inputs(torch.zeros(3), 1))


def test_a_pause_plays_as_it_is_written_and_keeps_the_recordings():
    tape = Tape()
    recorder = Recorder(tape)
    for _ in range(WARM_UPS + 1):
        play(recorder)
    tape.told.clear()
    with recorder.paused():
        play(recorder)
    assert tape.told == []
    play(recorder)
    assert tape.told == ["replayed"]


def test_several_micro_batches_are_refused(make_module):
    module = make_module(cuda_graphs=True)
    module.micro_batches_per_update = 2
    with pytest.raises(
        ValueError, match=r"cuda_graphs=true with 2 micro-batches .* use data.micro"
    ):
        module.on_train_start()


def test_a_cpu_records_nothing(make_module):
    module = make_module(cuda_graphs=True)
    module.on_train_start()
    assert module.recorder.tape is None


def test_a_value_that_is_no_switch_is_refused(make_module):
    with pytest.raises(ValueError, match="cuda_graphs='graphs' is not allowed; use true or false"):
        make_module(cuda_graphs="graphs")
