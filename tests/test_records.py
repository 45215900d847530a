"""Metadata: what is wrong is told with file and line; ids reach the file system unchanged and never meet."""

import json

import pytest

from mmdit.data.records import check_id, read_records


def write(path, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def image(id, caption="a cat", **more):
    return {"id": id, "image_path": f"pictures/{id}.png", "caption": caption, **more}


def test_reads_any_script_keeps_facts_and_resolves_paths_from_its_own_folder(tmp_path):
    path = write(tmp_path / "meta.jsonl", "\ufeff" + json.dumps(image("猫")), "", image("犬 2", "", licence="CC0"))
    first, second = read_records(path, "image")
    assert (first.id, first.path) == ("猫", str(tmp_path / "pictures/猫.png"))
    assert second.caption == "" and second.facts == {"licence": "CC0"}


@pytest.mark.parametrize(
    "line, told",
    [
        ('{"id": "a", "image_path": ', "not valid JSON"),
        ("[1, 2]", "not an object"),
        ({"id": "a", "image_path": "a.png"}, 'no "caption"'),
        ({"id": "a", "frames_dir": "a", "caption": ""}, "cache it with the other script"),
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


def test_duplicate_id_names_both_lines_and_errors_come_together(tmp_path):
    path = write(tmp_path / "meta.jsonl", image("a"), image("b"), image("a"), "{")
    with pytest.raises(ValueError, match="(?s)meta.jsonl:3: id 'a' was already used in line 1.*meta.jsonl:4"):
        read_records(path, "image")


def test_empty_file_and_missing_file_are_explained(tmp_path):
    with pytest.raises(ValueError, match="holds no record"):
        read_records(write(tmp_path / "meta.jsonl"), "image")
    with pytest.raises(ValueError, match="cannot read the metadata"):
        read_records(tmp_path / "absent.jsonl", "image")


@pytest.mark.parametrize("id", ["", " ", "a/b", "a\\b", "..", ".hidden", "a\nb", "\ud800", "x" * 300, "字" * 100, 3])
def test_an_id_that_is_no_file_name_is_refused(id):
    with pytest.raises(ValueError, match="id"):
        check_id(id)


def test_ids_that_a_sanitiser_would_merge_stay_apart():
    ids = ["a b.jpg", "a_b.jpg", "猫", "犬", "a.b", "Ünï"]
    assert [check_id(id) for id in ids] == ids
