"""The processes that share a batch. Alone by default, where every method gives back what it was given."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Group:
    """One process: the batch is all its own. `ProcessGroup` is its twin for several, of which each holds an equal share of the batch's rows."""

    rank: int = 0
    size: int = 1

    def mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The means over processes, without gradients; the tensors stay as they are."""
        return list(tensors)

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Replaces tensors by their means over processes."""

    def any_(self, mask: Tensor) -> None:
        """Replaces a bool tensor by its disjunction over processes."""

    def gather(self, values_N: Tensor) -> list[Tensor]:
        """Every process's values, in order of rank; their lengths may differ."""
        return [values_N]

    def shard(self, x_TD: Tensor) -> Tensor:
        """This process's share of a batch's rows, T / size of them in order. Raises ValueError where size does not divide T."""
        return x_TD


ALONE = Group()


class ProcessGroup(Group):
    """The processes of `torch.distributed`'s default group, which must be initialised (`torch.distributed.init_process_group`).

    Means are sums over ranks in the back-end's fixed order, divided by the size: the same bits on every rank.
    """

    def __init__(self) -> None:
        self.rank, self.size = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        copies = [tensor.detach().clone() for tensor in tensors]
        self.mean_(copies)
        return copies

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)
            tensor.div_(self.size)

    def any_(self, mask: Tensor) -> None:
        counts = mask.to(torch.int32)
        torch.distributed.all_reduce(counts)
        mask.copy_(counts > 0)

    def gather(self, values_N: Tensor) -> list[Tensor]:
        length = torch.tensor([len(values_N)], device=values_N.device)
        lengths = [torch.zeros_like(length) for _ in range(self.size)]
        torch.distributed.all_gather(lengths, length)
        counts = [int(count) for count in lengths]
        padded = values_N.new_zeros(max(counts))
        padded[: len(values_N)] = values_N.detach()
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        torch.distributed.all_gather(parts, padded)
        return [part[:count] for part, count in zip(parts, counts, strict=True)]

    def shard(self, x_TD: Tensor) -> Tensor:
        if len(x_TD) % self.size:
            raise ValueError(f"a batch of {len(x_TD)} rows cannot be shared evenly by {self.size} processes. Use a multiple of {self.size}.")
        return x_TD.chunk(self.size)[self.rank]
