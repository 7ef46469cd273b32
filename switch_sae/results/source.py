"""The activations behind a finished run."""

from functools import lru_cache
from pathlib import Path

from switch_sae.activations import ActivationSource, build_source
from switch_sae.config import config_from_plain
from switch_sae.results.rows import ResultRow
from switch_sae.runs import RunDir


def source_of(row: ResultRow) -> ActivationSource:
    """The source that a row's run trained on, opened once."""
    return _opened(row.path.resolve())


@lru_cache(maxsize=4)
def _opened(run: Path) -> ActivationSource:
    config = config_from_plain(RunDir(run).read_json("config.json"))
    return build_source(config.source, config.batch_size)
