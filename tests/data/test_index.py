import numpy as np
import pytest

from ksr_distill.data.index import index_path, read_header, read_index
from ksr_distill.data.patterns import expand_shards


def test_200_of_200_bit_flips_in_an_index_are_noticed(shards, tmp_path):
    shard = tmp_path / "train-000000.tar"
    content = index_path(shards / shard.name).read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(content)
        damaged[rng.integers(len(content))] ^= 1 << rng.integers(8)
        index_path(shard).write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged"):
            read_index(shard)


def test_a_header_is_read_from_the_first_line_alone(shards, tmp_path):
    shard = tmp_path / "train-000000.tar"
    content = index_path(shards / shard.name).read_bytes()
    index_path(shard).write_bytes(content[: content.index(b"\n") + 1] + b"no more")
    assert read_header(shard) == read_index(shards / shard.name).header
    with pytest.raises(ValueError, match="is damaged"):
        read_index(shard)


def test_a_shard_without_an_index_is_named_with_the_remedy(tmp_path):
    with pytest.raises(ValueError, match=r"has no index .*ksr shards pack.*data=stream"):
        read_header(tmp_path / "train-000000.tar")


def test_a_pattern_may_begin_at_home(shards, monkeypatch):
    monkeypatch.setenv("HOME", str(shards.parent))
    [path] = expand_shards(f"~/{shards.name}/train-000000.tar", key="data.shards")
    assert path == shards / "train-000000.tar"


def test_braces_globs_and_lists_name_shards(shards):
    braces = expand_shards(f"{shards}/train-{{000000..000002}}.tar", key="data.shards")
    globbed = expand_shards(f"{shards}/train-00000[0-2].tar", key="data.shards")
    listed = expand_shards([str(path) for path in braces], key="data.shards")
    assert [path.name for path in braces] == [f"train-00000{n}.tar" for n in range(3)]
    assert braces == globbed == listed


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{}/train-{{000000..000099}}.tar", r"matches nothing: no file .*train-000006.tar"),
        ("{}/other-*.tar", "data.shards=.*matches nothing.*ksr shards pack"),
        ("pipe:cat {}/train-000000.tar", "runs a shell command and is refused"),
        ("https://example.org/a.tar", "is a URL, but indexed shards are local"),
        (["{}/train-000000.tar", "{}/train-*.tar"], "twice"),
        ([], "names no shards"),
    ],
)
def test_a_pattern_that_cannot_be_meant_is_refused_in_one_line(shards, pattern, message):
    if isinstance(pattern, str):
        pattern = pattern.format(shards)
    else:
        pattern = [part.format(shards) for part in pattern]
    with pytest.raises(ValueError, match=message) as caught:
        expand_shards(pattern, key="data.shards")
    assert "\n" not in str(caught.value)
