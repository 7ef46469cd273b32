from typing import TYPE_CHECKING
from switch_sae.analysis.base import Table
if TYPE_CHECKING:
    from matplotlib.figure import Figure
def draw_lengths(table: Table, at: float) -> "Figure":
    raise NotImplementedError
