"""One-to-one matching."""

import torch
from torch import Tensor

LARGEST = 8192
"""Rows or columns, whichever are fewer: time grows with their third power."""


def one_to_one(score_AB: Tensor) -> tuple[Tensor, Tensor]:
    """(a, b), both [min(A, B)] int64: the pairs with the largest sum of scores that use every row and column at most once (Kuhn 1955), by a.

    Raises ImportError without scipy, ValueError for scores that are not finite or more than `LARGEST` rows and columns.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError("one-to-one matching needs scipy. Type pip install 'switch-sae[analysis]'.") from error
    if min(score_AB.shape) > LARGEST:
        raise ValueError(f"{min(score_AB.shape)} rows to match one to one take too long; at most {LARGEST}. Match each to its best instead.")
    if not bool(score_AB.isfinite().all()):
        raise ValueError("scores to match by are not all finite. Leave out rows and columns that have none, such as dead latents.")
    rows, columns = linear_sum_assignment(score_AB.cpu().double().numpy(), maximize=True)
    return torch.as_tensor(rows), torch.as_tensor(columns)
