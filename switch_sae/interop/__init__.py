"""SAEs of other libraries. Add a format by adding a file and a line to `FORMATS`; `load_sae` then reads it."""

from switch_sae.choices import Choice
from switch_sae.interop.base import Format

FORMATS: Choice[Format] = Choice("format", "format", {})

__all__ = ["FORMATS", "Format"]
