"""Power laws of loss against width or compute, with intervals of their exponent."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from switch_sae.results.rows import grouped

_FLOORS = 400
"""Candidates for the irreducible loss, over which the least squared error is looked for."""


@dataclass(frozen=True)
class PowerLaw:
    """L(x) = floor + coefficient * x^-exponent."""

    coefficient: float
    exponent: float
    low: float
    """95 % interval of the exponent; infinite where no degree of freedom is left."""
    high: float
    floor: float
    """The irreducible loss; 0 where it was not fitted."""
    points: int
    rms: float
    """Root of the mean squared residual of log L."""

    def __call__(self, x: float) -> float:
        return self.floor + self.coefficient * x**-self.exponent


def fit_power_law(x: Sequence[float], loss: Sequence[float], floor: bool = False) -> PowerLaw:
    """Least squares of log L on log x, L(x) = c x^-alpha; with `floor`, L(x) = L_0 + c x^-alpha, 0 <= L_0 < min L (Kaplan et al., arXiv 2001.08361).

    The interval of alpha is Student's t with P - 2 degrees of freedom (P - 3 with a floor, by linearisation at the optimum), P the number of points.
    Points must be independent: give one per width, such as the geometric mean over seeds (`mean_over_seeds`), not every seed, whose common misfit
    would be counted as often as there are seeds. Raises ValueError for values that are not positive and for fewer than 2 different x (3 with floor).
    """
    x_P, loss_P = torch.tensor(x, dtype=torch.float64), torch.tensor(loss, dtype=torch.float64)
    needed = 3 if floor else 2
    if x_P.shape != loss_P.shape or len(x_P.unique()) < needed:
        raise ValueError(f"{len(x_P)} values of x ({len(x_P.unique())} different) and {len(loss_P)} losses: a fit needs {needed} or more of both.")
    if not bool(((x_P > 0) & (loss_P > 0) & torch.isfinite(x_P) & torch.isfinite(loss_P)).all()):
        raise ValueError("x and loss must be positive and finite: the fit takes their logarithms. Leave out runs that diverged.")
    least = float(loss_P.min())
    line = _best_line(x_P, loss_P, torch.linspace(0, least * (1 - 1e-6), _FLOORS, dtype=torch.float64) if floor else torch.zeros(1).double())
    if floor:  # once more, finer, around the best
        low, high = max(0.0, line[2] - least / _FLOORS), min(least * (1 - 1e-9), line[2] + least / _FLOORS)
        line = _best_line(x_P, loss_P, torch.linspace(low, high, _FLOORS, dtype=torch.float64))
    intercept, exponent, irreducible, squared = line
    law = PowerLaw(math.exp(intercept), exponent, -math.inf, math.inf, irreducible, len(x_P), math.sqrt(squared / len(x_P)))
    half = _half_width(x_P, law, floor)
    return replace(law, low=exponent - half, high=exponent + half)


def choose_power_law(x: Sequence[float], loss: Sequence[float]) -> PowerLaw:
    """With an irreducible loss where there are at least 5 different x and it lowers the squared error of log L more than chance would, else without.

    More than chance: (S - S_0) / (S_0 / (P - 3)) above the 95 % point of F with 1 and P - 3 degrees of freedom, S and S_0 the sums of squared
    residuals without and with it.
    """
    plain = fit_power_law(x, loss)
    if len(set(x)) < 5:
        return plain
    curved = fit_power_law(x, loss, floor=True)
    freedom = curved.points - 3
    is_better = (plain.rms**2 - curved.rms**2) * freedom > t_quantile(freedom) ** 2 * curved.rms**2
    return curved if is_better and curved.floor > 0 else plain


def mean_over_seeds(x: Sequence[float], loss: Sequence[float]) -> tuple[list[float], list[float]]:
    """Each different x once, ascending, with the geometric mean of its losses."""
    groups = grouped(zip(x, loss, strict=True), lambda point: point[0])
    return sorted(groups), [math.exp(math.fsum(math.log(value) for _, value in groups[at]) / len(groups[at])) for at in sorted(groups)]


def t_quantile(freedom: int) -> float:
    """Student's t at 97.5 %; infinite for 0 degrees of freedom. Raises ImportError without scipy."""
    if freedom < 1:
        return math.inf
    try:
        from scipy.stats import t
    except ImportError as error:
        raise ImportError(f'intervals of power laws need scipy ({error}). Type pip install "switch-sae[analysis]", or pip install scipy.') from error
    return float(t.ppf(0.975, freedom))


def _best_line(x_P: Tensor, loss_P: Tensor, floor_C: Tensor) -> tuple[float, float, float, float]:
    """(log c, alpha, floor, sum of squared residuals of log L) of the candidate floor that fits best.

    log(L - L_0) is linear in log x; weights ((L - L_0) / L)^2 make its residuals, to first order, those of log L.
    """
    above_CP = loss_P - floor_C[:, None]
    weight_CP = (above_CP / loss_P).square()
    weight_CP = weight_CP / weight_CP.sum(1, keepdim=True)
    log_x_P, log_CP = x_P.log(), above_CP.log()
    mean_x_C, mean_y_C = weight_CP @ log_x_P, (weight_CP * log_CP).sum(1)
    from_mean_CP = log_x_P - mean_x_C[:, None]
    slope_C = (weight_CP * from_mean_CP * (log_CP - mean_y_C[:, None])).sum(1) / (weight_CP * from_mean_CP.square()).sum(1)
    intercept_C = mean_y_C - slope_C * mean_x_C
    fitted_CP = floor_C[:, None] + (intercept_C[:, None] + slope_C[:, None] * log_x_P).exp()
    squared_C = (loss_P / fitted_CP).log().square().sum(1).nan_to_num(torch.inf)
    best = int(squared_C.argmin())
    return float(intercept_C[best]), float(-slope_C[best]), float(floor_C[best]), float(squared_C[best])


def _half_width(x_P: Tensor, law: PowerLaw, floor: bool) -> float:
    freedom = len(x_P) - (3 if floor else 2)
    if freedom < 1:
        return math.inf
    power_P = law.coefficient * x_P**-law.exponent
    fitted_P = law.floor + power_P
    columns = [power_P / fitted_P, -x_P.log() * power_P / fitted_P] + ([1 / fitted_P] if floor else [])  # d log L by log c, alpha, L_0
    jacobian_PQ = torch.stack(columns, dim=1)
    covariance_QQ = torch.linalg.pinv(jacobian_PQ.T @ jacobian_PQ, hermitian=True) * (law.points * law.rms**2 / freedom)
    return t_quantile(freedom) * math.sqrt(max(0.0, float(covariance_QQ[1, 1])))
