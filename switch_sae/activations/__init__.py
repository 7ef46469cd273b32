"""Sources of activations. `build_source(config, batch_size, rows)` builds the one that a config belongs to."""

from typing import Any

from switch_sae.activations.base import ActivationSource, EvaluationSet
from switch_sae.activations.cache import CachedSource
from switch_sae.activations.language_model_source import CacheDtype, LanguageModelSource
from switch_sae.activations.synthetic import SyntheticSource
from switch_sae.choices import Choice

SOURCES: Choice[ActivationSource] = Choice("source of activations", "kind", {"language_model": LanguageModelSource, "synthetic": SyntheticSource})

__all__ = ["SOURCES", "ActivationSource", "CacheDtype", "CachedSource", "EvaluationSet", "LanguageModelSource", "SyntheticSource", "build_source"]


def build_source(config: Any, batch_size: int, rows: int | None = None) -> ActivationSource:
    """The source whose `Config` this is; with a cache on disk where `config.cache` names a folder. Raises ValueError for anything else.

    `rows` is how many rows the job will read, calibration included: a cache is built that long. None reads what the cache holds.
    """
    if isinstance(config, LanguageModelSource.Config) and config.cache is not None:
        return CachedSource(config, batch_size, rows)
    return SOURCES.build(config, batch_size)
