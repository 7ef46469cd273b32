"""English prose without a hub: books that Debian packages, as plain text files, one per chapter, page or book.

python -m experiments.real.text                       # downloads the packages and makes text/english
python -m experiments.real.text --out text/english --debs FOLDER

An FAQ on anarchism (GPL), the Debian Administrator's Handbook (GPL or CC-BY-SA), the Jargon File and the King James Bible (public domain):
about 18 MB. Packages are downloaded and unpacked, never installed; a folder that is there is left as it is.
"""

import gzip
import html.parser
import itertools
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from switch_sae.files import folder_atomically
from switch_sae.invocation import invocation

from ..arguments import parser_of
from ..errors import clear_errors

PACKAGES = ("anarchism", "bible-kjv-text", "debian-handbook", "jargon-text")
_BLOCKS = {"p", "div", "li", "dt", "dd", "tr", "pre", "blockquote", "br", "h1", "h2", "h3", "h4", "h5", "h6"}
_NO_PROSE = {"head", "script", "style", "table"}
_NAVIGATION = {"banner", "title", "docnav", "breadcrumbs", "toc"}


class _Prose(html.parser.HTMLParser):
    """Paragraphs of a page, without navigation, tables and scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[str] = [""]
        self._skipped: list[str] = []  # open tags since one that is skipped

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        names = {name for key, value in attributes if key in ("id", "class") for name in (value or "").split()}
        if self._skipped or tag in _NO_PROSE or names & _NAVIGATION:
            if not self._skipped or tag == self._skipped[0]:
                self._skipped.append(tag)
        elif tag in _BLOCKS:
            self.paragraphs.append("")

    def handle_endtag(self, tag: str) -> None:
        if self._skipped and tag == self._skipped[0]:
            self._skipped.pop()
        elif tag in _BLOCKS:
            self.paragraphs.append("")

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self.paragraphs[-1] += data


def prose(page: str) -> str:
    """The text of an HTML page: paragraphs, each in one line, with an empty line between two."""
    parser = _Prose()
    parser.feed(page)
    return "\n\n".join(" ".join(p.split()) for p in parser.paragraphs if p.strip()) + "\n"


def pages(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.glob("*.html")):
        yield path.stem, prose(path.read_text(encoding="utf-8", errors="replace"))


def jargon(path: Path) -> Iterator[tuple[str, str]]:
    """The lexicon, a document for each first letter of an entry's `   :term: kind`."""
    entries = re.split(r"^(?=   :\S[^\n]*:)", gzip.decompress(path.read_bytes()).decode(), flags=re.MULTILINE)[1:]
    lexicon = [re.sub(r"^   ", "", entry, flags=re.MULTILINE) for entry in entries]
    letters = [entry[1].upper() if entry[1].isalpha() else "0" for entry in lexicon]
    for letter in sorted(set(letters)):
        yield letter, "".join(itertools.compress(lexicon, [other == letter for other in letters]))


def bible(path: Path) -> Iterator[tuple[str, str]]:
    """Books, a verse per line, without its number.

    The file holds windows of 64 KiB that Unix's compress packed, their 3 bytes of header left out; big-endian offsets of them begin at byte 92.
    """
    packed = path.read_bytes()
    (windows,) = struct.unpack_from(">I", packed, 88)
    offsets = struct.unpack_from(f">{windows + 1}I", packed, 92)
    parts = (b"\x1f\x9d\x90" + packed[start:end] for start, end in itertools.pairwise(offsets))
    text = b"".join(subprocess.run(["gzip", "-dc"], input=part, capture_output=True, check=True).stdout for part in parts).decode("latin-1")
    verses = (match for line in text.splitlines() if (match := re.match(r"(\d?[A-Za-z]+)\d+:\d+ (.*)", line)))
    for book, group in itertools.groupby(verses, key=lambda match: match[1]):
        yield book, "\n".join(match[2] for match in group) + "\n"


def documents(root: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of everything English in the unpacked packages."""
    doc = root / "usr" / "share" / "doc"
    for package, found in {
        "anarchism": pages(doc / "anarchism" / "html"),
        "handbook": pages(doc / "debian-handbook" / "html" / "en-US"),
        "jargon": jargon(doc / "jargon-text" / "jargon.txt.gz"),
        "bible": bible(root / "usr" / "lib" / "bible.data"),
    }.items():
        yield from ((f"{package}-{name}", text) for name, text in found)


def fill(out: Path, debs: Path | None) -> None:
    """Writes a .txt for each document into `out`. Raises FileNotFoundError, ConnectionError where the packages are not to be had."""
    settings = ("source.text.kind=files", "source.text.dataset=null", "source.text.paths=[FOLDER]")
    way_out = f"Give text of your own instead: {invocation('train', *settings, make='TEXT=FOLDER')}"
    if missing := [tool for tool in ("apt-get", "dpkg-deb", "gzip") if shutil.which(tool) is None and (tool != "apt-get" or debs is None)]:
        raise FileNotFoundError(f"this machine has no {', '.join(missing)}: the text comes from Debian's packages. {way_out}")
    with tempfile.TemporaryDirectory() as work:
        folder = Path(debs or work)
        if debs is None:
            done = subprocess.run(["apt-get", "download", *PACKAGES], cwd=work, capture_output=True, text=True)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
                raise ConnectionError(f"apt-get download {' '.join(PACKAGES)} failed: {reason}. Try `apt-get update` first. {way_out}")
        for package in PACKAGES:
            if not (found := sorted(folder.glob(f"{package}_*.deb"))):
                raise FileNotFoundError(f"{folder} holds no {package}_*.deb. Download it with `apt-get download {package}`. {way_out}")
            subprocess.run(["dpkg-deb", "-x", str(found[-1]), f"{work}/root"], check=True)
        for name, text in documents(Path(work, "root")):
            (out / f"{name}.txt").write_text(text, encoding="utf-8")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--out", type=Path, default=Path("text/english"))
    parser.add_argument("--debs", type=Path, help="a folder that holds the .deb files already; default: apt-get downloads them")
    arguments = parser.parse_args()
    with clear_errors():
        if arguments.out.exists():
            print(f"{arguments.out} is there already; remove it to make it anew.")
            return
        folder_atomically(arguments.out, lambda part: fill(part, arguments.debs))
        files = list(arguments.out.glob("*.txt"))
        print(f"{arguments.out}: {len(files)} documents, {sum(file.stat().st_size for file in files) / 1e6:.1f} MB of English.")


if __name__ == "__main__":
    main()
