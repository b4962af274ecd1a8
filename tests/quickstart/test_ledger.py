from ksr_distill.quickstart.ledger import Ledger
from ksr_distill.quickstart.processes import Usage

TRAIN = ["python", "train.py", "+experiment=quickstart_teacher"]


def test_an_interrupted_command_is_not_done_but_its_time_counts(tmp_path):
    path = tmp_path / "progress.json"
    Ledger(path).add(TRAIN, Usage(40.0, 1.5), is_done=False)
    ledger = Ledger(path)
    assert not ledger.is_done(TRAIN)
    ledger.add(TRAIN, Usage(60.0, 1.2), is_done=True)
    again = Ledger(path)
    assert again.is_done(TRAIN)
    assert again.seconds == 100.0
    assert again.peak_rss_gb == 1.5


def test_another_command_line_is_another_command(tmp_path):
    ledger = Ledger(tmp_path / "progress.json")
    ledger.add(TRAIN, Usage(1.0, 1.0), is_done=True)
    assert not ledger.is_done([*TRAIN, "seed=1"])


def test_nothing_was_done_at_first(tmp_path):
    ledger = Ledger(tmp_path / "progress.json")
    assert not ledger.is_done(TRAIN)
    assert ledger.seconds == 0.0
    assert ledger.peak_rss_gb == 0.0
