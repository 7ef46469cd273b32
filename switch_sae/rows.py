"""Rows of activations: what an SAE reads, what it must reconstruct, and which of them are outliers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

OUTLIER_FACTOR = 10.0
"""A row is an outlier when its norm exceeds this many median norms. A few such rows in ten thousand can hold half of the variance: position 0 of
GPT-2, attention sinks at ordinary positions of Llama-like models (saprmarks/dictionary_learning, pull request 52)."""


class Shapes:
    """What dataclasses of tensors inherit (`@dataclass(repr=False)`) to print as shapes: `Rows(x_TD=float32[26, 128], ...)`."""

    def __repr__(self) -> str:
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.repr}  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(f'{name}={_shape(value)}' for name, value in values.items())})"


def _shape(value: Any) -> str:
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}" if isinstance(value, Tensor) else repr(value)


@dataclass(frozen=True, repr=False)
class Rows(Shapes):
    """T activations and their targets. For an autoencoder both are one tensor, and stay one: nothing is copied or computed twice."""

    x_TD: Tensor
    """What is encoded: raw activations at the input hook."""
    target_TD: Tensor
    """What is reconstructed: the same rows at the same or another hook."""
    norms_CT: Tensor | None = field(default=None, repr=False)
    """[1 or 2, T] on the CPU: norms of x and of targets of their own, where somebody has read them from the device already (`measured`)."""

    @classmethod
    def of(cls, x_TD: Tensor, target_TD: Tensor | None = None) -> "Rows":
        """The rows of an autoencoder, whose target is its input, or those of a transcoder. Raises ValueError for different numbers of rows."""
        target_TD = x_TD if target_TD is None else target_TD
        if len(x_TD) != len(target_TD):
            raise ValueError(f"{len(x_TD)} activations have {len(target_TD)} targets; each needs one.")
        return cls(x_TD, target_TD)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Rows":
        """Both tensors changed alike; one tensor stays one."""
        x_TD = change(self.x_TD)
        return Rows(x_TD, x_TD if self.target_TD is self.x_TD else change(self.target_TD))

    def to(self, device: torch.device | str) -> "Rows":
        """On a device; from the CPU to a GPU the host does not wait for the copy (`moved`)."""
        return replace(self.map(lambda rows_TD: moved(rows_TD, device)), norms_CT=self.norms_CT)

    def clone(self) -> "Rows":
        return replace(self.map(torch.Tensor.clone), norms_CT=self.norms_CT)

    def measured(self) -> "Rows":
        """The same rows with their norms on the CPU: one wait for the device here, none where outliers are looked for."""
        return replace(self, norms_CT=torch.stack([norms(rows_TD) for rows_TD in _distinct(self)]).cpu())

    @staticmethod
    def cat(parts: "Sequence[Rows]") -> "Rows":
        """The rows of all parts, one after another."""
        if len(parts) == 1:
            return parts[0]
        x_TD = torch.cat([part.x_TD for part in parts])
        known = [part.norms_CT for part in parts if part.norms_CT is not None]
        norms_CT = torch.cat(known, dim=1) if len(known) == len(parts) and len({len(each) for each in known}) == 1 else None
        is_one = all(part.target_TD is part.x_TD for part in parts)
        return Rows(x_TD, x_TD if is_one else torch.cat([part.target_TD for part in parts]), norms_CT)

    def __getitem__(self, chosen: slice | Tensor) -> "Rows":
        """Of a slice the norms stay known."""
        part = self.map(lambda rows_TD: rows_TD[chosen])
        return part if self.norms_CT is None or isinstance(chosen, Tensor) else replace(part, norms_CT=self.norms_CT[:, chosen])

    def __len__(self) -> int:
        return len(self.x_TD)


@dataclass(frozen=True)
class NormLimit:
    """Norms above which rows are outliers."""

    x: float
    target: float
    """Of targets; equal to `x` for an autoencoder."""

    @classmethod
    def of(cls, rows: Rows, factor: float = OUTLIER_FACTOR) -> "NormLimit":
        """`factor` median norms of these rows. Raises ValueError where half of them are zero: their median says nothing."""
        limits = [factor * float(norms(rows_TD).median()) for rows_TD in _distinct(rows)]
        if min(limits) == 0:
            raise ValueError("at least half of the rows are zero, so their median norm says nothing about outliers. Check the hook point.")
        return cls(limits[0], limits[-1])

    def inlier_T(self, rows: Rows) -> Tensor:
        """Which rows are no outliers, bool."""
        small = [norms(rows_TD) <= limit for rows_TD, limit in zip(_distinct(rows), (self.x, self.target), strict=False)]
        return small[0] & small[-1]

    def inliers(self, rows: Rows) -> Rows:
        """The rows that are no outliers; the very same where none is. Waits for no device where their norms are known."""
        if rows.norms_CT is None:
            inlier_T = self.inlier_T(rows)
            return rows if bool(inlier_T.all()) else rows[inlier_T]
        inlier_T = (rows.norms_CT[0] <= self.x) & (rows.norms_CT[-1] <= self.target)
        return rows if bool(inlier_T.all()) else rows[moved(inlier_T.nonzero()[:, 0], rows.x_TD.device)]


def moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on a device. On the way from the CPU to a GPU by pinned memory, so that the host goes on at once; work on the GPU comes after it."""
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def norms(x_TD: Tensor) -> Tensor:
    """[T] Euclidean norms, float32."""
    return torch.linalg.vector_norm(x_TD.float(), dim=1)


def _distinct(rows: Rows) -> list[Tensor]:
    return [rows.x_TD] if rows.target_TD is rows.x_TD else [rows.x_TD, rows.target_TD]
