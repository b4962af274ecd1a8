import json

import pytest

from benchmarks import folder


@pytest.mark.slow
def test_a_folder_is_timed_and_compared_with_float32(tmp_path, capsys):
    folder.main(["--tiny", "--starts", "1", "--json", str(tmp_path / "folder.json")])
    results = json.loads((tmp_path / "folder.json").read_text())
    assert all(row["seconds"] > 0 for row in results["alone"])
    rows = results["rows"]
    assert [row["way"] for row in rows][:2] == ["float32", "plain modules"]
    assert rows[0]["psnr_db"] == pytest.approx(90)  # a file against itself
    assert 40 < rows[1]["lowest_psnr_db"] <= rows[1]["psnr_db"]
    assert {row["pictures"] for row in rows} == {3}
    assert "| float32 | 1 |" in capsys.readouterr().out
