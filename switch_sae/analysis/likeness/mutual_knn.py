"""Mutual nearest neighbours: whether two representations agree on what is near, whatever they say of the rest.

Shapes: T rows, k neighbours.
"""

import torch
from torch import Tensor

from switch_sae.analysis.likeness.representation import BLOCK_ELEMENTS, Representation


def nearest_rows(view: Representation, neighbours: int, document_T: Tensor, seed: int = 0) -> Tensor:
    """[T, k] int64: the rows of other documents with the highest cosine; of equals, those that come first in a random order of `seed`.

    Neighbours of the same document share its words, and would be found by any representation. Codes have ties (nothing in common), which the same
    order would make two of them agree on: give each representation a seed of its own. Raises ValueError where a row has too few others.
    """
    rows = len(view)
    if rows - int(document_T.bincount().max()) < neighbours:
        raise ValueError(f"neighbours={neighbours}: some row has fewer rows of other documents than that. Use more rows or fewer neighbours.")
    length_T = view.squared_T.clamp(min=0).sqrt().to(torch.float32)
    unit_T = 1 / length_T.masked_fill(length_T == 0, torch.inf)
    tie_T = torch.rand(rows, generator=torch.Generator().manual_seed(seed)) * 1e-6
    found = []
    for start in range(0, rows, size := max(1, BLOCK_ELEMENTS // rows)):
        block = slice(start, start + size)
        cosine_TB = view.inner_with_all(block).float() * unit_T[:, None] * unit_T[block] + tie_T[:, None]
        cosine_TB.masked_fill_(document_T[:, None] == document_T[block], -torch.inf)
        found.append(cosine_TB.T.contiguous().topk(neighbours, dim=1).indices)
    return torch.cat(found)


def is_near(nearest_Tk: Tensor) -> Tensor:
    """[T, T] bool, for a few thousand rows: whether the second is among the first's neighbours."""
    return torch.zeros(len(nearest_Tk), len(nearest_Tk), dtype=torch.bool).scatter_(1, nearest_Tk, True)


def overlap(near_TT: Tensor, nearest_Tk: Tensor) -> Tensor:
    """[T] float64: the share of k neighbours in one representation (`nearest_Tk`) that are neighbours in the other too (`is_near`)."""
    return near_TT.gather(1, nearest_Tk).double().mean(1)
