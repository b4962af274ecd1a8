from pathlib import Path

from ksr_distill.quickstart import path

SHIPPED = Path("ksr_distill/assets/mini_x2_teacher")


def words(commands):
    return [word for command in commands for word in command]


def test_the_shipped_teacher_is_distilled_and_none_is_trained(monkeypatch, tmp_path):
    monkeypatch.setattr(path, "bundled_models", lambda: {"mini_x2_teacher": tmp_path})
    teacher = path.shipped_teacher()
    assert teacher == tmp_path
    told = words([*path.distil(teacher), path.evaluate(teacher)])
    assert told.count(f"teacher={tmp_path}") == 2
    assert "+experiment=quickstart_teacher" not in told


def test_a_teacher_of_this_checkout_is_named_as_a_reader_would(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(path, "bundled_models", lambda: {"mini_x2_teacher": tmp_path / SHIPPED})
    assert path.shipped_teacher() == SHIPPED


def test_a_package_without_models_has_no_teacher_to_distil(monkeypatch):
    monkeypatch.setattr(path, "bundled_models", dict)
    assert path.shipped_teacher() is None


def test_a_teacher_that_was_trained_here_is_the_one_that_is_distilled():
    teacher = path.TRAINED_TEACHER
    told = words([*path.train_teacher(), *path.distil(teacher), path.evaluate(teacher)])
    exported = told[told.index("+experiment=quickstart_teacher") :]
    assert str(path.TRAINED_TEACHER) in exported
    assert told.count(f"teacher={path.TRAINED_TEACHER}") == 2
    assert "+experiment=quickstart_flash_tiny" in told
