"""Hugging Face datasets on this machine: every form they come in, rows that are no text, and what tells one content from another."""

import gzip
import json

import pytest

from switch_sae.activations.text import TextConfig, documents, first_documents
from switch_sae.activations.text_dataset import dataset_version, hugging_face_dataset

datasets = pytest.importorskip("datasets")
ROWS = [{"text": f"story {i}", "n": i} for i in range(120)]


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def lines(rows):
    return "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows).encode()


def folder(path, rows, name="train.jsonl"):
    path.mkdir(exist_ok=True)
    (path / name).write_bytes(lines(rows))
    return path


def texts(name, **fields):
    return [document.text for document in hugging_face_dataset(str(name), **fields)]


STORIES = [row["text"] for row in ROWS]


def parquet(path):
    datasets.Dataset.from_list(ROWS).to_parquet(path / "a.parquet")
    return path / "a.parquet"


def saved(path):
    datasets.Dataset.from_list(ROWS).save_to_disk(path / "saved")
    return path / "saved"


def zipped(path):
    (path / "a.jsonl.gz").write_bytes(gzip.compress(lines(ROWS)))
    return path / "a.jsonl.gz"


def one_json(path):
    (path / "a.json").write_text(json.dumps(ROWS))
    return path / "a.json"


def linked(path):
    (path / "link").symlink_to(folder(path / "real", ROWS))
    return path / "link"


@pytest.mark.parametrize("make", [parquet, saved, zipped, one_json, linked])
def test_every_form_is_read(tmp_path, make):
    (tmp_path / "other.jsonl").write_bytes(lines([{"text": "of no interest"}]))
    assert texts(make(tmp_path)) == STORIES


def test_a_folder_is_read_whatever_it_is_called_and_wherever_home_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("json", "text"):  # readers of the datasets package are called so
        folder(tmp_path / name, ROWS)
        assert texts(name) == texts(f"~/{name}") == STORIES
    assert next(hugging_face_dataset("~/text")).name == "~/text/train/0", "names do not follow the machine"
    for name in ("~/nowhere", "./nowhere", "a/b/c"):
        with pytest.raises(ValueError, match=f"dataset '{name}' does not exist"):
            texts(name)


def test_what_save_to_disk_wrote_has_its_splits(tmp_path):
    both = datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list(ROWS[:7]))
    both.save_to_disk(tmp_path / "both")
    assert texts(tmp_path / "both") == STORIES and texts(tmp_path / "both", split="test") == STORIES[:7]
    with pytest.raises(ValueError, match=r"^text\.split='val': .* with the splits \['train', 'test'\]\. Set text\.split to one of them\.$"):
        texts(tmp_path / "both", split="val")
    for fields, message in (({"config": "en"}, "dataset_config='en' would be ignored"), ({"revision": "main"}, "dataset_revision='main' would be")):
        with pytest.raises(ValueError, match=message):
            texts(tmp_path / "both", **fields)
    with pytest.raises(ValueError, match=r"text\.split='test'"):
        texts(saved(tmp_path), split="test")


def test_null_has_no_text_wherever_it_stands(tmp_path):
    rows = [{"text": None}, *ROWS, {"text": None}, {"n": 3}]
    assert texts(folder(tmp_path / "a", rows)) == ["", *STORIES, "", ""]
    train = list(documents(TextConfig("dataset", dataset=str(tmp_path / "a")), held_out=False))
    assert all(document.text for document in train) and len(train) > 90
    with pytest.raises(ValueError, match=r"no (training|held-out) documents among 30 rows, of which empty ones do not count"):
        first_documents(TextConfig("dataset", dataset=str(folder(tmp_path / "b", [{"text": None}] * 30))))


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ({"text": 7}, r"row 120: 'text' is 7, of type int, but a document is a string"),
        ({"text": ["a"]}, r"row 120: 'text' is \['a'\], of type list"),
        ('{"text": "\\ud83d"}', r"could not be (opened|read at row 120): .*surrogate"),
        ('{"text": ', r"could not be (opened|read at row 120): "),
    ],
)
def test_rows_that_are_no_text_are_named(tmp_path, odd, message):
    with pytest.raises(ValueError, match=message):
        texts(folder(tmp_path / "a", [*({"text": text} for text in STORIES), odd]))


def test_all_rows_of_another_type_point_to_the_columns_that_are_text(tmp_path):
    place = folder(tmp_path / "a", [{"n": 1, "body": "b"}] * 3)
    with pytest.raises(ValueError, match=r"row 0: 'n' is 1, of type int.*text\.text_column to one of its text columns: \['body'\]"):
        texts(place, text_column="n")
    (place / "train.jsonl").write_bytes('{"text": "café"}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"dataset .* could not be .*'utf-8' codec"):
        texts(place)


def test_the_version_follows_the_content_and_nothing_else(tmp_path, monkeypatch):
    place = folder(tmp_path / "a", ROWS)
    version = dataset_version(str(place))
    (place / "README.md").write_text("a card")
    (place / ".cache").mkdir()
    (place / ".cache" / "x").write_text("hidden")
    monkeypatch.chdir(tmp_path)
    assert dataset_version("a") == version and dataset_version("a/train.jsonl") != version
    (place / "train.jsonl").write_bytes(lines([*ROWS[:-1], {"text": "story X", "n": 11}]).ljust(len(lines(ROWS))))
    other = dataset_version("a")
    assert other != version
    (place / "train.jsonl").rename(place / "train-0.jsonl")
    assert dataset_version("a") not in (version, other)
    assert dataset_version("nowhere") is None


def test_a_large_files_version_is_sampled_from_head_to_tail(tmp_path, monkeypatch):
    from switch_sae.activations import text_dataset

    monkeypatch.setattr(text_dataset, "_CHUNK_BYTES", 16)
    monkeypatch.setattr(text_dataset, "_SAMPLED_BYTES", 64)
    data, found = bytes(1600), set()
    for place in (None, 0, 530, 1060, 1599):  # heads, tails and what lies between
        (tmp_path / "a.bin").write_bytes(data if place is None else data[:place] + b"x" + data[place + 1 :])
        found.add(dataset_version(str(tmp_path / "a.bin")))
    assert len(found) == 5
