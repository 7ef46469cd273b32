"""Sources of activations. `build_source(config, batch_size)` builds the one that a config belongs to."""

from typing import Any

from switch_sae.activations.base import ActivationSource, EvaluationSet
from switch_sae.activations.language_model_source import LanguageModelSource
from switch_sae.activations.synthetic import SyntheticSource

SOURCES: dict[str, Any] = {
    "language_model": LanguageModelSource,
    "synthetic": SyntheticSource,
}

__all__ = ["SOURCES", "ActivationSource", "EvaluationSet", "LanguageModelSource", "SyntheticSource", "build_source"]


def build_source(config: Any, batch_size: int) -> ActivationSource:
    """The source whose `Config` this is. Raises ValueError for anything else."""
    for source in SOURCES.values():
        if type(config) is source.Config:
            return source(config, batch_size)
    raise ValueError(f"{type(config).__name__} is no source's config. Use {', '.join(f'SOURCES[{name!r}].Config' for name in SOURCES)}.")
