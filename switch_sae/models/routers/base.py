"""What a router is: it sends every activation to S of E experts. An SAE asks for routes, losses and cost, and knows no router by name.

Shapes: T tokens, D activation size, E experts, S experts per token. Activations are scaled (mean squared norm D).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from switch_kernels import ALONE, Group
from switch_sae.checks import Settings
from switch_sae.rows import Shapes


@dataclass(frozen=True, repr=False)
class Routing(Shapes):
    """What the router decided for one batch."""

    expert_TS: Tensor
    """The S chosen experts of each token (S is 1 in the paper), best first, int64 in [0, E)."""
    gate_TS: Tensor
    """What multiplies their latents: their probabilities, or 1 with a hard gate."""
    probs_TE: Tensor
    """How the router likes all experts, as shares that sum to 1: the softmax of its logits in the paper."""

    def shaped(self, leading: Sequence[int]) -> "Routing":
        """The same with other leading dimensions than T, of equal product."""
        return Routing(*(tensor.reshape(*leading, tensor.shape[-1]) for tensor in (self.expert_TS, self.gate_TS, self.probs_TE)))


@dataclass(frozen=True)
class RouterKernel:
    """What the Triton step computes of a router: p = softmax((x - b) W^T), the S likeliest experts, and alpha * E * sum_i f_i P_i."""

    W_ED: nn.Parameter
    b_D: nn.Parameter
    balance: float
    """alpha."""
    is_trained: bool
    rivals: float | None = None
    """Share of the tokens that a rival computes too, where it learns by competition; None where p of the chosen experts multiplies their latents."""


@dataclass(frozen=True, repr=False)
class Rivals(Shapes):
    """Experts that compute the first n tokens of a batch beside the chosen ones, so that a router can learn which are better."""

    expert_nS: Tensor
    """Experts of each, int64: the chosen ones, but another in the place of the weakest."""
    share_n: Tensor
    """The weakest chosen expert's part of its and the other's probability, with the router's gradient."""

    @property
    def expert_n1(self) -> Tensor:
        """The other expert of each."""
        return self.expert_nS[:, -1:]

    def loss(self, cost_n: Tensor, rival_cost_n: Tensor) -> Tensor:
        """mean(g * cost + (1 - g) * rival cost) of fixed costs."""
        return (self.share_n * cost_n + (1 - self.share_n) * rival_cost_n).mean()


class Router(nn.Module, ABC):
    """x_TD -> Routing. The nested `Config` is its part of an SAE's; what training changes beside gradients lives in buffers."""

    Config: type[Any]
    config: Any
    group: Group = ALONE
    """The processes that share a batch: shares and means are over all of them."""
    directions_are: str = "rows of its weights"
    """What `directions` are."""

    def __init__(self, config: Any, d_in: int, num_experts: int, experts_per_token: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config, self.d_in, self.num_experts, self.experts_per_token = config, d_in, num_experts, experts_per_token

    @abstractmethod
    def initialize(self, x_TD: Tensor, centre_D: Tensor) -> None:
        """The data-dependent start, from many scaled activations and their centre."""

    @abstractmethod
    def route(self, x_TD: Tensor) -> Routing:
        """The experts of scaled activations; a tie for one expert per token goes to the lowest."""

    def loss_terms(self, routing: Routing, unit: float) -> dict[str, Tensor]:
        """The router's own scalar losses by name, already weighted: a coefficient of 1 weighs `unit`, the size D of the target."""
        return {}

    def rivals(self, routing: Routing) -> Rivals | None:
        """Which other experts should compute some of the tokens in training, for a router that learns by competition; None for all others."""
        return None

    @property
    def rival_share(self) -> float:
        """Share of a batch's tokens that a rival expert computes too, in training."""
        return 0.0

    def begin_step(self, step: int, total_steps: int) -> None:
        """Called before training step `step` (from 0)."""

    def end_step(self, x_TD: Tensor, routing: Routing) -> None:
        """Called after a training step, without gradients, with its scaled activations: where running statistics are kept, in buffers."""

    @abstractmethod
    def flops(self) -> tuple[int, int]:
        """(forward, backward) FLOPs per token, a multiply-add counted as two."""

    @abstractmethod
    def fold_scale(self, scale: Tensor) -> None:
        """Makes routes of x what they were of x * scale, without gradients."""

    def directions(self) -> Tensor | None:
        """[E, D]: by its product with these, up to what is the same for all experts, an activation is sent; None where no such rows decide."""
        return None

    def kernel(self) -> RouterKernel | None:
        """What Triton kernels need to compute this router; None where they cannot, and always in a subclass that does not say otherwise."""
        return None


class LinearRouter(Router):
    """Logits (x - b) W^T with a bias of the router's own; parameters W_ED and b_D.

    In the paper b and the decoder's bias share their storage, a bug of its code (arXiv 2410.08201).
    """

    @dataclass
    class Config(Settings):
        train: bool = True
        """False freezes the router at its random start: the control that shows what learned routing is worth."""

        @property
        def learns_by_gate(self) -> bool:
            """Whether it learns from the reconstruction through gates, as it cannot where values are refitted."""
            return self.train

    def __init__(self, config: Any, d_in: int, num_experts: int, experts_per_token: int, generator: torch.Generator | None = None) -> None:
        super().__init__(config, d_in, num_experts, experts_per_token, generator)
        init_ED = (torch.rand(num_experts, d_in, generator=generator) * 2 - 1) / d_in**0.5
        self.W_ED = nn.Parameter(init_ED, requires_grad=config.train)
        self.b_D = nn.Parameter(torch.zeros(d_in), requires_grad=config.train)

    def initialize(self, x_TD: Tensor, centre_D: Tensor) -> None:
        self.b_D.data.copy_(centre_D)

    def logits(self, x_TD: Tensor) -> Tensor:
        """[T, E]."""
        return (x_TD - self.b_D) @ self.W_ED.T

    def directions(self) -> Tensor | None:
        return self.W_ED

    def flops(self) -> tuple[int, int]:
        product = 2 * self.d_in * self.num_experts
        return product, 2 * product if self.config.train else 0

    @torch.no_grad()
    def fold_scale(self, scale: Tensor) -> None:
        self.W_ED.mul_(scale)
        self.b_D.div_(scale)


def largest(score_TE: Tensor, experts_per_token: int) -> tuple[Tensor, Tensor]:
    """(values, experts) of the S largest scores of each token, both [T, S]; a tie for one goes to the lowest expert."""
    return score_TE.max(dim=1, keepdim=True) if experts_per_token == 1 else score_TE.topk(experts_per_token, dim=1)


def expert_shares(expert_TS: Tensor, num_experts: int) -> Tensor:
    """[E] share of (token, slot) pairs that each expert receives; sums to 1."""
    counts_E = torch.zeros(num_experts, device=expert_TS.device)
    counts_E.scatter_add_(0, expert_TS.flatten().long(), torch.ones(expert_TS.numel(), device=expert_TS.device))
    return counts_E / expert_TS.numel()


def load_balance_loss(expert_TS: Tensor, probs_TE: Tensor, group: Group = ALONE) -> Tensor:
    """L_aux = E * sum_i f_i P_i; 1 when balanced, E when one expert takes all (Fedus et al., arXiv 2101.03961, eq. 4; arXiv 2410.08201).

    f_i is the share of (token, slot) pairs routed to expert i, over all processes that share the batch, and carries no gradient; P_i is the mean
    probability of expert i. The mean of this over processes is the loss of the whole batch, and so are its gradients.
    """
    num_experts = probs_TE.shape[1]
    (share_E,) = group.mean([expert_shares(expert_TS, num_experts)])
    return num_experts * torch.dot(share_E.to(probs_TE.dtype), probs_TE.mean(dim=0))
