"""What must hold before a GPU's speed means anything: one step against float64, the same bits twice, and a parity run against float32 PyTorch."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.benchmarks.cases import Case
from experiments.benchmarks.contenders import LEARNING_RATE, MaskedDense, OurStep, activations, build_sae
from switch_kernels import Backend, Moments, Precision, Shape
from switch_kernels.adam import BETAS
from switch_sae.models import TopKSAE
from switch_sae.rows import Rows
from switch_sae.training import TrainerConfig

SLACK = {Precision.float32: 2e-6, Precision.bf16: 5e-4}
"""Relative error of a gradient allowed on top of twice PyTorch's own: where its own is zero by luck."""
LOSS_LIMIT = {Precision.float32: 2e-6, Precision.bf16: 3e-3}
"""Relative error of the first loss. A scalar's own error can be small by luck, so there is no factor; the last loss may be 10 times as far."""
STEPS = 8
"""Enough for a trainer that captures its step in a graph to replay it."""
LOSS_TOLERANCE, L0_TOLERANCE, DEAD_TOLERANCE = 0.01, 0.005, 0.01


class NotTrustedError(Exception):
    """A check failed, so speeds mean nothing."""


@dataclass(frozen=True)
class Finding:
    """One comparison: it holds when `error` is at most `limit`."""

    what: str
    error: float
    limit: float

    @property
    def holds(self) -> bool:
        return self.error <= self.limit  # NaN does not

    def __str__(self) -> str:
        return f"{self.what}: {self.error:.1e} (limit {self.limit:.1e})"


def check_step(case: Case, device: torch.device, backend: Backend) -> list[Finding]:
    """Loss, gradients, update, loss after some steps, and bits."""
    shape = case.shape
    candidates_BTD = activations(Shape(2 * shape.T, shape.D, shape.M, shape.E, shape.K), 2, device)
    sae = build_sae(shape, candidates_BTD[0])
    x_BTD = torch.stack([settled(sae, candidates_TD)[: shape.T] for candidates_TD in candidates_BTD])
    if x_BTD.shape[1] < shape.T:
        raise RuntimeError(f"only {x_BTD.shape[1]} of {2 * shape.T} tokens are clear of ties at {shape}; {shape.T} are needed")
    truth, own = references(sae, case)
    poison(device)
    ours, again = (OurStep(copy.deepcopy(sae), case, backend) for _ in range(2))
    start = {name: p.detach().clone() for name, p in sae.named_parameters()}
    steps = {"truth": (truth, x_BTD.double()), "own": (own, x_BTD), "ours": (ours, x_BTD)}
    losses = {name: [step.loss(own_x_BTD[0]).item()] for name, (step, own_x_BTD) in steps.items()}
    findings = []
    expected, theirs, found = (step.moments() for step in (truth, own, ours))
    for name, moment in expected.items():
        factor = 4 if name == "router.b_D" else 2  # it varies in E - 1 directions only: two draws of its error often differ by a factor of two
        limit = factor * relative(theirs[name], moment) + SLACK[case.precision] + (2**-8 if case.moments is Moments.bfloat16 else 0)
        findings.append(Finding(f"gradient of {name}", relative(found[name], moment), limit))
    findings += update_findings(start, ours.tensors(), case.moments)
    for number in range(1, STEPS):
        for name, (step, own_x_BTD) in steps.items():
            losses[name].append(step.loss(own_x_BTD[number % 2]).item())
    for number, limit in ((0, LOSS_LIMIT[case.precision]), (STEPS - 1, 10 * LOSS_LIMIT[case.precision])):
        if number == 0 or not case.dead:  # trainers look for dead latents at different steps
            findings.append(Finding(f"loss of step {number + 1}", abs(losses["ours"][number] / losses["truth"][number] - 1), limit))
    poison(device)
    for number in range(STEPS):
        again(x_BTD[number % 2])
    other = again.tensors()
    differing = sorted(name for name, tensor in ours.tensors().items() if not torch.equal(tensor, other[name]))
    findings.append(Finding(f"tensors whose bits differ between two runs of {STEPS} steps {differing[:3]}", len(differing), 0))
    return findings


def references(sae: TopKSAE, case: Case) -> tuple[MaskedDense | OurStep, MaskedDense | OurStep]:
    """(float64 truth, PyTorch in the case's precision). With dead latents both are our trainer on PyTorch, which knows AuxK, in float32 at best."""
    if not case.dead:
        return MaskedDense(sae, "float64", dense_decode=True), MaskedDense(sae, case.precision.value, dense_decode=True)
    assert case.precision is Precision.float32, "PyTorch's trainer has no lower precision to compare with"
    return OurStep(copy.deepcopy(sae).double(), case, Backend.torch), OurStep(copy.deepcopy(sae), case, Backend.torch)


def update_findings(start: dict[str, Tensor], tensors: dict[str, Tensor], moments: Moments) -> list[Finding]:
    """Whether the first update follows from the moments that it left: Adam, then unit rows of W_dec."""
    exact, findings = moments is Moments.float32, []
    for name, before in start.items():
        mean, square = (tensors[f"adam/{name}/{key}"].double() / (1 - beta) for key, beta in zip(("exp_avg", "exp_avg_sq"), BETAS, strict=True))
        findings.append(Finding(f"second moment of {name}", relative(square, mean * mean), 1e-4 if exact else 2e-2))
        after = before.double() - LEARNING_RATE * mean / (square.sqrt() + 1e-8)
        if name == "W_dec_MD":
            after /= torch.linalg.vector_norm(after, dim=1, keepdim=True)
        step = (tensors[f"sae/{name}"].double() - after).abs().max().item() / LEARNING_RATE
        findings.append(Finding(f"update of {name} in learning rates", step, 2e-3 if exact else 2e-2))
    return findings


def relative(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|; NaN stays NaN."""
    difference = torch.linalg.vector_norm(found.double() - expected.double())
    return (difference / torch.linalg.vector_norm(expected.double()).clamp_min(1e-300)).item()


def settled(sae: TopKSAE, x_TD: Tensor, draws: int = 8) -> Tensor:
    """The tokens whose experts and latents stay the same when weights change by 1e-5, in float64: no rounding of float32 can flip them."""
    generator = torch.Generator(x_TD.device).manual_seed(3)

    @torch.no_grad()
    def chosen(noise: float) -> Tensor:
        peer = MaskedDense(sae, "float64")
        for name in [n for n in ("W_enc_MD", "router.W_ED") if n in peer.parameters]:
            weight = peer.parameters[name]
            weight.mul_(1 + noise * torch.randn(weight.shape, device=weight.device, generator=generator))
        scaled_TD = x_TD.double() * sae.activation_scale
        expert_TS, gate_TS, _ = peer.route(scaled_TD)
        _, values_TK, indices_TK = peer.reconstruct(scaled_TD, expert_TS, gate_TS)
        return torch.cat([expert_TS, torch.where(values_TK > 0, indices_TK, -1).sort(dim=1).values], dim=1)

    choice, stays_T = chosen(0.0), torch.ones(x_TD.shape[0], dtype=torch.bool, device=x_TD.device)
    for _ in range(draws):
        stays_T &= (chosen(1e-5) == choice).all(dim=1)
    return x_TD[stays_T]


def poison(device: torch.device) -> None:
    """Leaves NaN in the blocks that the allocator will hand out next, so that memory which nothing wrote shows."""
    if device.type == "cuda":
        blocks = [torch.full((2**exponent // 4,), float("nan"), device=device) for exponent in range(9, 29) for _ in range(8 if exponent < 24 else 2)]
        del blocks


@dataclass(frozen=True)
class Trained:
    """How a training run ended."""

    train_loss: float
    """Reconstruction loss, mean of the last 5 % of the steps."""
    loss: float
    """Reconstruction loss on held-out activations, by PyTorch in float32."""
    l0: float
    dead: float
    """Share of latents."""

    def __str__(self) -> str:
        return f"training loss {self.train_loss:.4f}, held-out loss {self.loss:.4f}, L0 {self.l0:.3f}, dead {self.dead:.2%}"


def train(
    case: Case, backend: Backend, config: TrainerConfig, steps: int, x_BTD: Tensor, held_out_BTD: Tensor, goes_on: Callable[[], bool]
) -> Trained | None:
    """Trains on cached activations, over and over; None if `goes_on` says that time is up (asked every 50 steps)."""
    sae = build_sae(case.shape, x_BTD[0])
    step = OurStep(sae, case, backend, config, total_steps=steps)
    last: list[Tensor] = []
    for number in range(steps):
        if number % 50 == 0 and not goes_on():
            return None
        result = step(x_BTD[number % len(x_BTD)])
        if number >= steps - max(1, steps // 20):
            last.append(result.terms["mse"].clone())
    judge = build_sae(case.shape, x_BTD[0])  # a plain SAE, whose forward is PyTorch's
    judge.load_state_dict(step.trainer.sae.state_dict())
    losses, active = [], []
    with torch.no_grad():
        for x_TD in held_out_BTD:
            output = judge(x_TD)
            losses.append(judge.loss_terms(Rows.of(x_TD), output)["mse"])
            active.append((output.latents.values > 0).sum() / x_TD.shape[0])
    trainer = step.trainer
    dead = (trainer.tokens_since_fired_M >= trainer.dead_after_tokens).float().mean()
    train_loss, loss, l0 = (torch.stack(values).mean().item() for values in (last, losses, active))
    return Trained(train_loss, loss, l0, dead.item())


def compare(found: Trained, expected: Trained) -> list[Finding]:
    return [
        Finding("training loss, relative", abs(found.train_loss / expected.train_loss - 1), LOSS_TOLERANCE),
        Finding("held-out loss, relative", abs(found.loss / expected.loss - 1), LOSS_TOLERANCE),
        Finding("L0, relative", abs(found.l0 / expected.l0 - 1), L0_TOLERANCE),
        Finding("share of dead latents", abs(found.dead - expected.dead), DEAD_TOLERANCE),
    ]
