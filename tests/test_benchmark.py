"""The benchmark's figures are JSON lines, one a part, on any machine."""

import json

from mmdit.scripts import benchmark


def test_each_part_gives_its_figures(tmp_path, capsys):
    words = ["--device", "cpu", "--workers", "1", "--pictures", "6", "--items", "512", "--batch_size", "2", "--seconds", "0.1"]
    assert benchmark.main([*words, "--folder", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["part"] for row in rows] == ["cache", "encode", *["loader"] * 4]
    cache, encode, *loader = rows
    assert cache["ratio"] == round(cache["ratio"], 3) > 0 and cache["decode_per_s"] > 0 and encode["images_per_s"] > 0
    assert [row["from"] for row in loader] == ["writing the cache", "memory", "files", "packed"]
    assert all(row["items_per_s"] > 0 for row in loader)
