"""SAEs of other libraries. Add a format by adding a file and a line to `FORMATS`; `load_sae` then reads it."""

from switch_sae.choices import Choice
from switch_sae.interop.base import Format
from switch_sae.interop.circuit_tracer import CircuitTracer
from switch_sae.interop.dictionary_learning import DictionaryLearning
from switch_sae.interop.openai import OpenAI
from switch_sae.interop.original_switch import OriginalSwitch
from switch_sae.interop.sae_lens import SAELens
from switch_sae.interop.sparsify import Sparsify

FORMATS: Choice[Format] = Choice(
    "format",
    "format",
    {
        "sae_lens": SAELens,
        "sparsify": Sparsify,
        "circuit_tracer": CircuitTracer,
        "openai": OpenAI,
        "original_switch": OriginalSwitch,
        "dictionary_learning": DictionaryLearning,  # the last: it takes whatever else torch saved, and says what is wrong with it
    },
)

__all__ = ["FORMATS", "Format"]
