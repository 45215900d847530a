"""Metadata: what is wrong is told with file and line; ids reach the file system unchanged and never
meet."""

import json

import pytest
import torch

from mmdit.data.cache.items import load_item, make_item
from mmdit.data.dataset.records import check_id, read_records


def write(path, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def image(id, caption="a cat", **more):
    return {"id": id, "image_path": f"pictures/{id}.png", "caption": caption, **more}


def test_reads_any_script_keeps_facts_and_resolves_paths_from_its_own_folder(tmp_path):
    path = write(
        tmp_path / "meta.jsonl",
        "\ufeff" + json.dumps(image("猫")),
        "",
        image("犬 2", "", licence="CC0"),
    )
    first, second = read_records(path, "image")
    assert (first.id, first.path) == ("猫", str(tmp_path / "pictures/猫.png"))
    assert second.caption == "" and second.facts == {"licence": "CC0"}


@pytest.mark.parametrize(
    "line, told",
    [
        ('{"id": "a", "image_path": ', "not valid JSON"),
        ("[1, 2]", "not an object"),
        ({"id": "a", "image_path": "a.png"}, 'no "caption"'),
        ({"id": "a", "frames_dir": "a", "caption": ""}, "cache it with mmdit cache-latents"),
        ({"id": 5, "image_path": "a.png", "caption": ""}, "must be text"),
        ({"id": "a", "image_path": "a.png", "caption": ["x"]}, "must be text"),
        ({"id": "a", "image_path": "", "caption": "x"}, "must be the path"),
        (image("../a"), "path separator"),
    ],
)
def test_wrong_line_is_named_by_file_and_line(tmp_path, line, told):
    path = write(tmp_path / "meta.jsonl", image("fine"), line)
    with pytest.raises(ValueError, match="meta.jsonl:2: .*" + told):
        read_records(path, "image")


@pytest.mark.parametrize(
    "value, told",
    [
        ('"x \\ud83d"', "half a surrogate pair"),
        ('{"in": ["\\udc00"]}', "half a surrogate pair"),
        ('{"\\ud800": 1}', "half a surrogate pair"),
        ("1" + "0" * 4000, "more than 64 bits"),
        (str(1 << 64), "more than 64 bits"),
        ("NaN", "no JSON number"),
        ("-Infinity", "no JSON number"),
        ("[1e400]", "no JSON number"),
        ('"x", "note": {"deep": 1, "deep": 2}', '"deep" is there twice'),
        ('"x", "caption": "y", "image_path": "z", "note": 1', "is there twice, and one would"),
        ("[" * 40 + "]" * 40, "deep in each other"),
        ("[" * 5000 + "]" * 5000, "not valid JSON|deep in each other"),
        ('"' + "x" * (17 << 20) + '"', "at most 16777216 are read"),
    ],
    ids=lambda value: value[:40],  # else xdist sends an id of 17 MB to and fro
)
@pytest.mark.parametrize("key", ["caption", "image_path", "note"])
def test_what_cannot_be_stored_is_refused_at_its_line(tmp_path, key, value, told):
    row = {"id": "a", "image_path": "a.png", "caption": "x"} | {key: 0}
    path = write(
        tmp_path / "meta.jsonl",
        image("fine"),
        json.dumps(row).replace(f'"{key}": 0', f'"{key}": {value}'),
    )
    with pytest.raises(ValueError, match=f"meta.jsonl:2: .*({told})"):
        read_records(path, "image")


def test_every_value_that_is_accepted_comes_back_from_an_item(tmp_path):
    nested = 1
    for _ in range(30):
        nested = [nested]
    facts = {
        "big": (1 << 64) - 1,
        "small": -(1 << 64) + 1,
        "tiny": 5e-324,
        "none": None,
        "yes": True,
        "nested": nested,
        "": {"猫🐞": ["\0", "\ufeff", "x" * 70_000]},
    }
    (record,) = read_records(write(tmp_path / "meta.jsonl", image("a", **facts)), "image")
    assert record.facts == facts
    latents = torch.zeros(1, 2, 2, 3, dtype=torch.float16)
    pieces, _ = make_item("a", "a.pt", latents, record.caption, record.facts, {})
    data = b"".join(pieces)
    (tmp_path / "a.pt").write_bytes(data)
    assert load_item(tmp_path / "a.pt")["facts"] == facts


def test_text_in_another_encoding_or_form_is_explained(tmp_path):
    rows = [json.dumps(image(name, "caf\xe9"), ensure_ascii=False) for name in "ab"]
    path = tmp_path / "meta.jsonl"
    path.write_bytes(
        "\r\n".join(["\ufeff" + row for row in rows]).encode()
    )  # two files of an editor, one behind the other
    assert [record.caption for record in read_records(path, "image")] == ["caf\xe9"] * 2
    path.write_bytes((rows[0] + "\n").encode() + rows[1].encode("latin-1"))
    with pytest.raises(ValueError, match="meta.jsonl:2: is not UTF-8 text .byte 0xe9"):
        read_records(path, "image")
    for binary in (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0\x00\x10JFIF"):
        path.write_bytes(binary)
        with pytest.raises(ValueError, match="meta.jsonl:1: the file is no text"):
            read_records(path, "image")
    path.write_bytes(rows[0].encode("utf-16"))
    with pytest.raises(ValueError, match="meta.jsonl:1: the file is UTF-16"):
        read_records(path, "image")
    for text in (
        json.dumps([image("a"), image("b")], indent=2),
        json.dumps([image("a")]),
        "\n [" + rows[0] + "]",
    ):
        path.write_text(text)
        with pytest.raises(
            ValueError, match="the file is a JSON array; write one object a line"
        ) as told:
            read_records(path, "image")
        assert len(str(told.value).splitlines()) == 1
    path.write_bytes("\r".join(rows).encode())
    with pytest.raises(ValueError, match="meta.jsonl:1: .*CR alone"):
        read_records(path, "image")
    path.write_text(json.dumps(image("a"), indent=2))
    with pytest.raises(ValueError, match="meta.jsonl:1: .*may not be spread over lines"):
        read_records(path, "image")


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    row = {"id": "a", "image_path": "~/x.png", "caption": ""}
    assert (
        read_records(write(tmp_path / "meta.jsonl", row), "image")[0].path == "/home/someone/x.png"
    )


def test_duplicate_id_names_both_lines_and_errors_come_together(tmp_path):
    path = write(tmp_path / "meta.jsonl", image("a"), image("b"), image("a"), "{")
    with pytest.raises(
        ValueError, match="(?s)meta.jsonl:3: id 'a' was already used in line 1.*meta.jsonl:4"
    ):
        read_records(path, "image")


def test_empty_file_and_missing_file_are_explained(tmp_path):
    with pytest.raises(ValueError, match="holds no record"):
        read_records(write(tmp_path / "meta.jsonl"), "image")
    with pytest.raises(ValueError, match="cannot read the metadata"):
        read_records(tmp_path / "absent.jsonl", "image")


@pytest.mark.parametrize(
    "id", ["", " ", "a/b", "a\\b", "..", ".hidden", "a\nb", "\ud800", "x" * 300, "字" * 100, 3]
)
def test_an_id_that_is_no_file_name_is_refused(id):
    with pytest.raises(ValueError, match="id"):
        check_id(id)


def test_ids_that_a_sanitiser_would_merge_stay_apart():
    ids = ["a b.jpg", "a_b.jpg", "猫", "犬", "a.b", "Ünï"]
    assert [check_id(id) for id in ids] == ids
