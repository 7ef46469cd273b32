"""The contract of an analysis of trained SAEs: a table that is computed once and kept in the run folder, and a figure of it."""

import hashlib
import inspect
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from switch_sae.activations.base import ActivationSource
from switch_sae.files import RunError, write_atomically
from switch_sae.plain import to_plain
from switch_sae.results.rows import ResultRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Table = list[dict[str, Any]]
"""Records with equal keys; values are text, numbers or None, never NaN."""


class Analysis(ABC):
    """One file and one line in `ANALYSES`. Its settings are a nested dataclass `Config`, so that a kept table says what it was made with."""

    Config: ClassVar[type[Any]]
    needs: ClassVar[Literal["weights", "rows", "text"]] = "weights"
    """What it looks at beside the weights: "rows" asks for a source of activations, "text" for one with a language model."""
    each_alone: ClassVar[bool] = True
    """Whether an SAE's records depend on that SAE only; otherwise all SAEs are given at once."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def compute(self, saes: Sequence[ResultRow], source: ActivationSource | None) -> Table:
        """The records of finished SAEs; `source` is that of the first one's run, or None where only weights are needed."""

    def shown(self, table: Table) -> Table:
        """What a terminal shows of a table: all of it, unless an analysis finds that too much."""
        return table

    @abstractmethod
    def draw(self, table: Table) -> "Figure":
        """A figure of any of its tables."""


OpenSource = Callable[[ResultRow], ActivationSource]
"""The activations that a row's run trained on."""


def kept_table(analysis: Analysis, name: str, saes: Sequence[ResultRow], open_source: OpenSource | None) -> Table:
    """What `compute` gave for these weights, settings and code, from analysis/NAME.json beside the first SAE's weights; else computed and kept.

    Raises ValueError for SAEs without weights, and for an analysis whose needs are not met.
    """
    if missing := [row.name for row in saes if not row.has_weights]:
        raise ValueError(f"{', '.join(missing)} have no weights: not finished, or their files are gone. Name finished runs.")
    file = saes[0].model_file.parent / "analysis" / f"{name}.json"
    models = {str(row.model_file.resolve()): [(stat := row.model_file.stat()).st_mtime_ns, stat.st_size] for row in saes}
    about: dict[str, Any] = {"settings": to_plain(analysis.config), "models": models, "code": _code(type(analysis))}
    kept: list[dict[str, Any]] = []
    with suppress(OSError, json.JSONDecodeError):
        kept = json.loads(file.read_text())
    table: Table
    for one in kept:
        if about == {key: one.get(key) for key in about}:
            table = one["table"]
            return table
    source = None
    if analysis.needs != "weights":
        if open_source is None:
            raise ValueError(f"the analysis {name} needs {analysis.needs}, but no source of activations was given. Give open_source.")
        source = open_source(saes[0])
        if analysis.needs == "text" and source.language_model is None:
            raise ValueError(f"the analysis {name} needs text, but the activations of {saes[0].path} come from no language model.")
    table = [{key: _plain(value) for key, value in record.items()} for record in analysis.compute(saes, source)]
    others = [one for one in kept if one["settings"] != about["settings"] or one["models"].keys() != models.keys()]
    with suppress(RunError):  # somebody else's folder: the next time computes it again
        write_atomically(file, (json.dumps([*others, {**about, "table": table}]) + "\n").encode())
    return table


@cache
def _code(analysis: type[Analysis]) -> str:
    """A hash of what computes an analysis: this folder's modules, and the file of one that stands elsewhere. A mended estimator computes anew."""
    files = {*Path(__file__).parent.rglob("*.py"), Path(inspect.getfile(analysis))}
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()[:16]


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
