"""What local text is read, how, and under which names; and what is refused instead of being trained on."""

import codecs
import gzip
import io
import json
import os
import random
import re
import zipfile
from pathlib import Path

import pytest

from switch_sae.activations import SOURCES
from switch_sae.activations.text import TextConfig, local_split
from switch_sae.activations.text_files import local_files
from switch_sae.files import RunError

WORDS = "Straße, déjà vu, 日本語, and plain words\n"


def read(*paths, said=None, **fields):
    """The documents of some paths, by name."""
    return {document.name: document.text for document in local_files(paths, say=(said if said is not None else []).append, **fields)}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("mark", ["", "utf-8-sig", "utf-16", "utf-32", "utf-16-be"])
def test_unicode_with_a_byte_order_mark_is_read_as_what_it_is(tmp_path, mark):
    data = codecs.BOM_UTF16_BE + WORDS.encode(mark) if mark == "utf-16-be" else WORDS.encode(mark or "utf-8")
    assert read(write(tmp_path / "a.txt", data)) == {"a.txt": WORDS}
    line = json.dumps({"text": WORDS}, ensure_ascii=False)
    data = codecs.BOM_UTF16_BE + line.encode(mark) if mark == "utf-16-be" else line.encode(mark or "utf-8")
    assert read(write(tmp_path / "a.jsonl", data)) == {"a.jsonl:1": WORDS}


def test_line_ends_are_read_as_pythons_own_and_a_few_odd_bytes_of_much_text_stay(tmp_path):
    assert read(write(tmp_path / "a.txt", b"one\r\ntwo\rthree\n")) == {"a.txt": "one\ntwo\nthree\n"}
    much = WORDS * 300
    odd = much.encode()[:5000] + b"\xe9 \x00" + much.encode()[5000:]
    (text,) = read(write(tmp_path / "a.txt", odd)).values()
    assert text.count("\ufffd") == 1 and len(text) == len(much) + 3
    kept = "\ufffd" * 500 + "x"
    assert read(write(tmp_path / "a.txt", kept)) == {"a.txt": kept}, "what stands there itself is no error"


def archive():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("word/document.xml", "words " * 100)
    return buffer.getvalue()


BYTES = {
    "parquet": (b"PAR1" + b"text" * 100, r"holds rows \(\.parquet\).*text\.kind=dataset text\.dataset=/.*a\.txt"),
    "arrow": (b"ARROW1\0\0" + b"text" * 100, r"holds rows \(\.arrow\)"),
    "gzip": (gzip.compress(WORDS.encode() * 9), r"compressed or an archive \(\.gz\)\. Unpack it\.$"),
    "docx": (archive(), r"compressed or an archive \(\.zip\)"),
    "pdf": (b"%PDF-1.7\n" + b"words " * 100, r"format of its own \(\.pdf\)\. Save its words as plain text"),
    "rtf": (b"{\\rtf1 words}", r"\(\.rtf\)"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 12\n", "git lfs pull"),
    "random": (random.Random(0).randbytes(5000), r"a\.txt', line \d+: byte 0x\w\w at offset \d+ is no UTF-8, and so are \d\d\.\d\d% of its"),
    "png": (b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" * 20, r"byte 0x89 at offset 0 is no UTF-8"),
    "no byte order mark": ("plain words " * 100).encode("utf-16-le"), 
    "latin-1": ("déjà vu\n" * 100).encode("latin-1"),
}  # fmt: skip


@pytest.mark.parametrize("name", BYTES)
def test_what_is_no_text_is_refused_by_its_content_named_or_found(tmp_path, name):
    data, message = BYTES[name] if isinstance(BYTES[name], tuple) else (BYTES[name], r"iconv -f LATIN1 -t UTF-8 a\.txt > NEW\.txt")
    file = write(tmp_path / "a.txt", data)
    write(tmp_path / "b.txt", WORDS * 50)
    for path in (file, tmp_path):
        with pytest.raises(ValueError, match=message):
            read(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.parquet", r"text\.kind=dataset text\.dataset="),
        ("a.JSON", r"holds rows \(\.json\)"),
        ("a.csv", "holds rows"),
        ("a.tsv", "holds rows"),
        ("a.jsonl.gz", r"Unpack it, or read its rows with text\.kind=dataset text\.dataset=.*a\.jsonl\.gz\.$"),
        ("a.txt.xz", r"archive \(\.xz\)\. Unpack it\.$"),
        ("a.tar", "Unpack it"),
        ("a.docx", "plain text"),
        ("a.ipynb", "plain text"),
    ],
)
def test_a_named_file_of_another_kind_is_refused_by_its_suffix(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        read(write(tmp_path / name, "words that could be text"))


def test_other_suffixes_are_text_when_named_and_all_bad_files_are_told_at_once(tmp_path):
    assert read(write(tmp_path / "a.tex", WORDS), write(tmp_path / "LICENSE", WORDS)) == {"a.tex": WORDS, "LICENSE": WORDS}
    for name in "123":
        write(tmp_path / "bad" / f"{name}.txt", b"\xff" * 10)
    with pytest.raises(ValueError, match=r"1\.txt'.*Likewise 2 more, the next: text file '.*2\.txt'"):
        read(tmp_path / "bad")


def test_a_folder_search_says_what_it_leaves_out_and_a_dataset_is_told_how_to_be_read(tmp_path):
    write(tmp_path / "README.md", WORDS)
    for name in ("data/1.parquet", "data/2.parquet", "code.c", "LICENSE", ".git/index", "data/.hidden"):
        write(tmp_path / name, "x" * 60_000)
    (tmp_path / "lost.txt").symlink_to("nowhere")
    said = []
    assert read(tmp_path, said=said) == {"README.md": WORDS}
    (line,) = said
    assert line.startswith(f"note: of folder {tmp_path}, 1 text file (README.md), 0.0 kB, is read; left out: ")
    assert line.endswith(f", 0.2 MB. Rows of datasets are read with text.kind=dataset text.dataset={tmp_path}.")
    for part in ("2 .parquet", "1 .c", "1 without suffix", "1 link to nothing"):
        assert part in line
    for name in ("1.jsonl.zst", "2.jsonl.zst"):
        write(tmp_path / "other" / name, "x")
    with pytest.raises(ValueError, match=r"holds no \.txt, .* files, but 2 \.zst\. Rows of datasets are read with text\.kind=dataset"):
        read(tmp_path / "other")
    assert read(write(tmp_path / "plain" / "a.TXT", WORDS).parent, said=said) == {"a.TXT": WORDS} and len(said) == 1


def test_links_are_followed_once_and_what_is_met_without_them_keeps_its_name(tmp_path):
    write(tmp_path / "in" / "real" / "a.txt", "words a")
    write(tmp_path / "out" / "deep" / "b.txt", "words b")
    write(tmp_path / "blob", "words c")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "again").symlink_to(tmp_path / "in" / "real")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "out")
    (tmp_path / "out" / "back").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "c.txt").symlink_to(tmp_path / "blob")
    assert read(tmp_path / "in") == {"real/a.txt": "words a", "linked/deep/b.txt": "words b", "c.txt": "words c"}
    (tmp_path / "all").symlink_to(tmp_path / "in")
    assert read(tmp_path / "all").keys() == {"real/a.txt", "linked/deep/b.txt", "c.txt"}


def test_equal_names_in_different_places_are_different_documents(tmp_path, monkeypatch):
    for place in ("en", "de", "x/fr"):
        write(tmp_path / place / "corpus.txt", "".join(f"line {i} in {place}\n" for i in range(20_000)))
        write(tmp_path / place / "rows.jsonl", "".join(json.dumps({"text": f"row {i} in {place}"}) + "\n" for i in range(80)))
        write(tmp_path / place / f"only_{place[-2:]}.txt", f"{place} alone")
    paths = [tmp_path / place / "corpus.txt" for place in ("en", "de", "x/fr")]
    assert read(*paths).keys() == {"en/corpus.txt", "de/corpus.txt", "x/fr/corpus.txt"}
    assert read(paths[0], paths[0]).keys() == {"corpus.txt"}, "a path given twice is one"
    assert read(paths[0], tmp_path / "en", paths[0]).keys() == read(tmp_path / "en").keys()
    (tmp_path / "elsewhere").symlink_to(tmp_path / "x" / "fr")
    assert len(read(tmp_path / "elsewhere" / ".." / "fr" / "corpus.txt", paths[2])) == 2, "`..` behind a link is no reason to go round in circles"
    folders = read(tmp_path / "en", tmp_path / "de")
    assert {"en/corpus.txt", "de/corpus.txt", "only_en.txt", "only_de.txt", "en/rows.jsonl:1", "de/rows.jsonl:1"} <= folders.keys()
    assert read(tmp_path / "en").keys() >= {"corpus.txt", "only_en.txt", "rows.jsonl:1"}, "one path keeps its names"
    monkeypatch.chdir(tmp_path / "de")
    assert read("../en/corpus.txt", "corpus.txt", "../x").keys() == {"en/corpus.txt", "de/corpus.txt", "fr/corpus.txt"} | {
        name for name in read("../x") if "corpus" not in name
    }, "only what is repeated is renamed"
    for name in ("corpus.txt", "rows.jsonl"):
        config = TextConfig("files", [str(path.parent / name) for path in paths])
        parts = [[re.split("[#:]", document.name) for document in side] for side in local_split(config)]
        held_out = {place: {number for file, number in parts[True] if file.startswith(place)} for place in ("en", "de", "x/fr")}
        assert len({frozenset(numbers) for numbers in held_out.values()}) == 3, "no two files hold out the same pieces"
        assert len({file for file, _ in parts[False]}) == 3


def test_a_small_file_of_each_language_trains(tmp_path):
    for place in ("en", "de"):
        write(tmp_path / place / "corpus.txt", f"some words in {place}. " * 300)
    train, held_out = local_split(TextConfig("files", [str(tmp_path / place / "corpus.txt") for place in ("en", "de")]))
    assert train and held_out


def test_the_home_folder_is_meant_by_its_sign(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "books" / "a.txt", WORDS)
    assert read("~/books") == read("~/books/a.txt") == {"a.txt": WORDS}
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read("~nobody_of_that_name/books")
    with pytest.raises(ValueError, match=r"empty path.*the working directory is `\.`"):
        TextConfig("files", ["", "x"])


def test_what_cannot_be_read_is_one_message(tmp_path, monkeypatch):
    file = write(tmp_path / "a.txt", WORDS)
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        read("/dev/null")
    if Path("/proc/self/mem").exists():
        with pytest.raises(RunError, match=r"cannot read /proc/self/mem: .*\. Make it readable, or leave it out"):
            read("/proc/self/mem")

    def refuse(path, *_):
        raise PermissionError(13, os.strerror(13), str(path))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", refuse)
        with pytest.raises(RunError, match=rf"cannot read {file}: Permission denied\."):
            read(tmp_path)
    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(RunError, match=rf"cannot read {tmp_path}: Permission denied\."):
        read(tmp_path)


GOOD = [{"text": f"document {i}"} for i in range(20)]


def lines(path, rows, **fields):
    return read(write(path, "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)), **fields)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": 7}, r"'text' is 7, of type int, but a document is a string"),
        ({"text": True}, "of type bool"),
        ({"text": ["a"], "body": "b", "n": 1}, r"of type list.*text\.text_column to one of its text columns: \['body'\]"),
        ({"text": {"a": "x" * 99}}, r"\.\.\., of type dict"),
        ('{"text": "\\ud83d"}', r"half a surrogate pair, '\\ud83d', at character 0"),
        ({"body": "b"}, r"expected a JSON object with a 'text' key, found the keys \['body'\]"),
        (["a"], "found a list"),
        ("null", "found a NoneType"),
        ("{", "found Expecting property name"),
        ("[" * 100_000, "found .*recursion"),
        ("9" * 5000, "found .*digits"),
    ],
    ids=lambda value: str(value)[:20] if not isinstance(value, str) or len(value) < 30 else "",
)
def test_a_line_that_is_no_text_is_named(tmp_path, row, message):
    with pytest.raises(ValueError, match=rf"data\.jsonl, line 21: {'.*' if message[0] != 'e' else ''}{message}"):
        lines(tmp_path / "data.jsonl", [*GOOD, row])


def test_null_is_no_text_and_other_keys_can_be_named(tmp_path):
    assert len(lines(tmp_path / "data.jsonl", [{"text": None}, *GOOD, {"text": None}])) == 20
    rows = [{"text": f"title {i}", "body": f"long body {i}"} for i in range(20)]
    for name in ("data.jsonl", "data.ndjson", "DATA.JSONL"):
        assert lines(tmp_path / name, rows, text_column="body")[f"{name}:3"] == "long body 2"
    with pytest.raises(ValueError, match=r"text_column='body' would be ignored: no text file ends in \.jsonl or \.ndjson"):
        read(write(tmp_path / "a.txt", WORDS), text_column="body")
    with pytest.raises(ValueError, match=r"latin\.jsonl', line 2: byte 0xe9 at offset \d+ is no UTF-8.*iconv"):
        read(write(tmp_path / "latin.jsonl", '{"text": "cafe"}\n{"text": "café"}\n'.encode("latin-1")))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"split": "test"}, r"text\.split='test' would be ignored by text\.kind=stdlib\. Set text\.kind=dataset, or leave text\.split out"),
        ({"kind": "files", "paths": ["x"], "split": "test"}, "by text.kind=files"),
        ({"kind": "files", "paths": ["x"], "dataset_config": "en"}, r"text\.dataset_config='en'"),
        ({"kind": "packages", "text_column": "body"}, r"Set text\.kind=files or text\.kind=dataset"),
        ({"dataset_revision": "main"}, r"text\.dataset_revision='main'"),
    ],
)
def test_settings_that_a_kind_of_text_would_ignore_are_refused_and_old_files_that_have_them_load(fields, message):
    with pytest.raises(ValueError, match=message):
        TextConfig(**fields)
    plain = SOURCES.to_plain(SOURCES["language_model"].Config()) | {"text": {"kind": "stdlib", **fields}}
    kept = {key: value for key, value in fields.items() if key in ("kind", "paths")}
    assert SOURCES.from_plain(plain).text == TextConfig(**kept)
