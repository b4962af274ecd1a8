import pytest

from ksr_distill.model_json import read_object


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", r"config\.json is damaged: .*line 1 column 2.*; copy the model folder again, or"),
        (b"\xff\xfe\x00", r"config\.json is damaged: .*; copy the model folder again, or make"),
        (b"null", r"config\.json holds None, not an object; copy the model folder again, or make"),
    ],
)
def test_what_is_no_object_is_said_with_its_file_and_what_to_do(tmp_path, content, message):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_object(file)


def test_an_object_is_read(tmp_path):
    (tmp_path / "config.json").write_text('{"a": [1]}')
    assert read_object(tmp_path / "config.json") == {"a": [1]}
