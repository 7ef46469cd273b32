"""Parsers of command lines, for the commands that are not Hydra's."""

import argparse
from pathlib import Path

from switch_sae.files import user_path
from switch_sae.invocation import as_typed


def parser_of(text: str | None) -> argparse.ArgumentParser:
    """A parser whose description is `text`, line by line, with its examples as they are typed where this runs."""
    return argparse.ArgumentParser(description=as_typed(text or ""), formatter_class=argparse.RawDescriptionHelpFormatter)


def add_paths(parser: argparse.ArgumentParser) -> None:
    """`paths`: where results are; runs in the current folder unless it is said."""
    what = "run folders, sweep folders or folders that hold them; default: runs"
    parser.add_argument("paths", nargs="*", type=user_path, default=[Path("runs")], metavar="PATH", help=what)
