import json
import subprocess
import sys
from enum import Enum

import pytest

from switch_sae.activations.text import Document, TextConfig, TextKind, documents, is_held_out, local_split, standard_library


def files(*paths, **fields):
    return TextConfig(kind=TextKind.files, paths=[str(path) for path in paths], **fields)


def both_sides(config):
    return list(documents(config, held_out=False)), list(documents(config, held_out=True))


def test_the_held_out_rule_is_fixed_for_ever():
    names = [f"file{i}.py" for i in range(2000)]
    held_out = [name for name in names if is_held_out(name)]
    assert held_out[:3] == ["file3.py", "file6.py", "file15.py"]
    assert 60 < len(held_out) < 140
    assert Document(held_out[0], "x").held_out


def test_standard_library_sides_are_disjoint_and_hold_real_text():
    train, held_out = both_sides(TextConfig())
    assert {d.name for d in train}.isdisjoint(d.name for d in held_out)
    assert {d.text for d in train}.isdisjoint(d.text for d in held_out)
    assert all(d.held_out for d in held_out) and not any(d.held_out for d in train)
    assert sum(len(d.text) for d in train) > 2_000_000 and len(held_out) > 5
    assert {d.name for d in train} | {d.name for d in held_out} <= {d.name for d in standard_library()}


def test_one_big_file_is_cut_into_documents_with_a_held_out_part(tmp_path):
    text = "".join(f"line {i} of a long book without chapters\n" for i in range(5000))
    (tmp_path / "book.txt").write_text(text)
    train, held_out = both_sides(files(tmp_path))
    assert held_out and train
    pieces = sorted([*train, *held_out], key=lambda d: d.name)
    assert pieces[0].name == "book.txt#0001"
    assert "".join(d.text for d in pieces) == text
    assert all(d.text.endswith("\n") and len(d.text) <= 10_000 for d in pieces)


def test_text_without_line_ends_is_cut_at_words_and_else_anywhere(tmp_path):
    (tmp_path / "one.txt").write_text("x" * 10_000 + "y" * 10_000 + "z" * 5_003)
    (tmp_path / "words.txt").write_text("word " * 3_000)
    train, held_out = both_sides(files(tmp_path))
    lengths = {d.name: len(d.text) for d in [*train, *held_out]}
    assert lengths == {"one.txt#0001": 10_000, "one.txt#0002": 10_000, "one.txt#0003": 5_003, "words.txt#0001": 10_000, "words.txt#0002": 5_000}


@pytest.mark.parametrize("count", [2, 3, 7])
def test_a_few_short_files_still_leave_both_sides(tmp_path, count):
    for i in range(count):
        (tmp_path / f"{i}.txt").write_text(f"text number {i}")
    train, held_out = both_sides(files(tmp_path))
    assert len(train) + len(held_out) == count and train and held_out
    assert (train, held_out) == both_sides(files(tmp_path))


def test_one_short_file_is_cut_finer(tmp_path):
    (tmp_path / "note.txt").write_text("a short note, a few words. " * 40)
    train, held_out = both_sides(files(tmp_path / "note.txt"))
    assert len(held_out) >= 1 and len(train) >= 2


def test_copies_are_read_once_and_never_train_when_held_out(tmp_path):
    names = [f"{i}.txt" for i in range(40)]
    held_out_name = next(name for name in names if is_held_out(name))
    for name in names:
        (tmp_path / name).write_text("the same words" if name in (names[0], names[1], held_out_name) else f"words of {name}")
    train, held_out = both_sides(files(tmp_path))
    assert "the same words" not in {d.text for d in train}
    assert [d.text for d in [*train, *held_out]].count("the same words") == 1


def test_max_documents_caps_both_sides(tmp_path):
    for i in range(100):
        (tmp_path / f"{i}.txt").write_text(f"text number {i}")
    train, held_out = local_split(files(tmp_path, max_documents=2))
    assert len(train) == 2 and len(held_out) == 2


def test_json_lines(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"document {i}"}) for i in range(5)) + "\n\n")
    train, held_out = both_sides(files(path))
    assert {d.name for d in [*train, *held_out]} == {f"texts.jsonl:{i}" for i in range(1, 6)}
    path.write_text('{"body": 1}\n')
    with pytest.raises(ValueError, match=r"line 1: expected a JSON object with a 'text' key"):
        both_sides(files(path))


def test_empty_text_and_missing_paths_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        both_sides(files(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"holds no \.txt"):
        both_sides(files(tmp_path))
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"holds no text: every file is empty\. Give"):
        both_sides(files(tmp_path))
    (tmp_path / "empty.txt").write_text("too short")
    with pytest.raises(ValueError, match="Give at least 400 characters"):
        both_sides(files(tmp_path))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "files"}, r"text\.paths=\[FOLDER\]"),
        ({"kind": "dataset"}, r"text\.dataset="),
        ({"paths": ["x"]}, "would be ignored"),
        ({"dataset": "x"}, "would be ignored"),
        ({"kind": "web"}, "text.kind=.web. is not one of stdlib, packages, files, dataset"),
        ({"max_documents": 0}, "at least 1"),
    ],
)
def test_config_rejects_what_it_cannot_use(fields, message):
    with pytest.raises(ValueError, match=message):
        TextConfig(**fields)


def test_configs_compose_with_omegaconf():
    omegaconf = pytest.importorskip("omegaconf")
    from switch_sae.activations import SOURCES

    for source in SOURCES.values():
        schema = omegaconf.OmegaConf.structured(source.Config)
        assert omegaconf.OmegaConf.to_object(schema) == source.Config()
    overrides = {"text": {"kind": "files", "paths": ["a"]}, "packing": "truncated", "prepend_bos": False}
    config = omegaconf.OmegaConf.to_object(omegaconf.OmegaConf.merge(SOURCES["language_model"].Config, overrides))
    assert config == SOURCES["language_model"].Config(text=TextConfig("files", ["a"]), packing="truncated", prepend_bos=False)
    assert isinstance(config.packing, Enum) and isinstance(config.text.kind, TextKind)
    with pytest.raises(omegaconf.errors.ValidationError):
        omegaconf.OmegaConf.merge(SOURCES["synthetic"].Config, {"topics": "many"})


def test_dataset_folder_is_streamed_and_bad_names_are_explained(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "train.jsonl").write_text(
        "\n".join(json.dumps({"body": f"document {i}", "n": i}) for i in range(400))
    )  # names hold the folder: one in 20 is held out by chance
    config = TextConfig(kind="dataset", dataset=str(folder), text_column="body")
    train, held_out = both_sides(config)
    assert len(train) + len(held_out) == 400 and held_out and all(d.held_out for d in held_out)
    assert [d.text for d in train] == [f"document {d.name.rsplit('/', 1)[1]}" for d in train]
    with pytest.raises(ValueError, match=r"no text column 'text'\. Set text\.text_column to one of its text columns: \['body'\]"):
        both_sides(TextConfig(kind="dataset", dataset=str(folder)))
    with pytest.raises(ValueError, match=r"split 'test'\) could not be opened"):
        both_sides(TextConfig(kind="dataset", dataset=str(folder), split="test"))


def test_importing_the_sources_imports_no_language_model_library():
    code = "import sys, switch_sae.activations as a; a.SOURCES; print({'transformer_lens', 'transformers', 'datasets', 'hydra'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
