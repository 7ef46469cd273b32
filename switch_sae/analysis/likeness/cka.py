"""Debiased linear CKA of dense and sparse representations without n x n matrices.

Shapes: T rows, P pairs, M units, K slots. K~ is a Gram matrix whose diagonal is set to 0. HSIC_1 (Song et al. 2012, JMLR 13) is unbiased for
independent rows: [tr(K~L~) + 1'K~1 1'L~1 / ((T-1)(T-2)) - 2 1'K~L~1 / (T-2)] / (T (T-3)). The biased form is near 1 wherever there are more units
than rows: 0.9 for two independent sparse codes.
"""

import math

import torch
from torch import Tensor

from switch_sae.analysis.likeness.representation import Codes, Representation, Vectors
from switch_sae.analysis.likeness.rsa import Pairs

CROSS_ELEMENTS = 2**24
"""Largest block of M1 x M2 cross products held at once: 128 MB in float64."""


def hsic(first: Representation, second: Representation) -> float:
    """HSIC_1 from one pass over rows: tr(K~L~) = ||X'Y||_F^2 - sum_t |x_t|^2 |y_t|^2, and row sums of K~ from x_t' sum_u x_u.

    Raises ValueError for fewer than 4 rows, and for codes with a mixing matrix, whose cross products would cost M^3 (`centred_inner` samples them).
    """
    rows = len(first)
    if rows < 4:
        raise ValueError(f"{rows} rows leave no degree of freedom for a debiased CKA. Use at least 4.")
    trace = _cross_norm(first, second) - float(first.squared_T @ second.squared_T)
    a_T, b_T = first.others_T, second.others_T
    return (trace + float(a_T.sum() * b_T.sum()) / ((rows - 1) * (rows - 2)) - 2 * float(a_T @ b_T) / (rows - 2)) / (rows * (rows - 3))


def cka(first: Representation, second: Representation) -> float:
    """HSIC_1(X, Y) / sqrt(HSIC_1(X, X) HSIC_1(Y, Y)); around 0 and also below it for independent ones; NaN where one does not vary."""
    return normalised_hsic(hsic(first, second), hsic(first, first), hsic(second, second))


def normalised_hsic(both: float, first: float, second: float) -> float:
    """CKA of three HSICs."""
    return both / math.sqrt(first * second) if first > 0 and second > 0 else math.nan


def centred_inner(view: Representation, pairs: Pairs) -> Tensor:
    """[P] float64: inner products that are U-centred over all T rows, k(t, u) - (o_t + o_u) / (T-2) + sum(o) / ((T-1)(T-2)) with o_t the sum over
    others. Their mean product over all pairs is HSIC_1 exactly (Székely & Rizzo 2014); over sampled pairs, up to sampling."""
    rows, others_T = len(view), view.others_T
    mean = float(others_T.sum()) / ((rows - 1) * (rows - 2))
    return view.inner(pairs.left_P, pairs.right_P) - (others_T[pairs.left_P] + others_T[pairs.right_P]) / (rows - 2) + mean


def _cross_norm(first: Representation, second: Representation) -> float:
    """||X'Y||_F^2."""
    if isinstance(first, Vectors) and isinstance(second, Vectors):
        return float((first.x_TD.T.double() @ second.x_TD.double()).square().sum())
    if isinstance(first, Vectors):
        return _cross_norm(second, first)
    assert isinstance(first, Codes)
    if first.mix_MM is not None or (isinstance(second, Codes) and second.mix_MM is not None):
        raise ValueError("codes with a mixing matrix have no cheap cross products. Use the mean product of centred_inner.")
    if isinstance(second, Vectors):
        cross_MD = torch.zeros(first.units, second.units, dtype=torch.float64)
        for index_T, value_T in zip(first.indices_TK.T, first.values_TK.T.double(), strict=True):
            cross_MD.index_add_(0, index_T, value_T[:, None] * second.x_TD.double())
        return float(cross_MD.square().sum())
    assert isinstance(second, Codes)
    return _sparse_cross_norm(first, second)


def _sparse_cross_norm(first: Codes, second: Codes) -> float:
    height = max(1, CROSS_ELEMENTS // second.units)
    found = 0.0
    for start in range(0, first.units, height):
        cross = torch.zeros(min(height, first.units - start) * second.units, dtype=torch.float64)
        for index_T, value_T in zip(first.indices_TK.T, first.values_TK.T.double(), strict=True):
            here_T = ((index_T >= start) & (index_T < start + height) & (value_T != 0)).nonzero()[:, 0]
            place_TK = (index_T[here_T] - start)[:, None] * second.units + second.indices_TK[here_T]
            cross.index_add_(0, place_TK.flatten(), (value_T[here_T, None] * second.values_TK[here_T]).flatten())
        found += float(cross @ cross)
    return found
