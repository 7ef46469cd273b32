"""What must hold of SAEs that search, whose router learns by competition, or that select under one threshold: a training step in kernels against
float64 autograd on the CPU, with the rivals that the kernels drew.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from experiments.benchmarks import checks
from experiments.benchmarks.checks import Finding, poison, relative, update_findings
from experiments.benchmarks.contenders import LEARNING_RATE, NEVER, activations
from switch_kernels import Backend, Dispatch, Execution, Moments, Precision, Regime, Shape, resolve
from switch_sae.models import SAES
from switch_sae.models.fused_search import FusedSearch
from switch_sae.models.routers import CompetitionRouter
from switch_sae.models.routers.base import Rivals, Routing
from switch_sae.rows import Rows
from switch_sae.training import StepResult, Trainer, TrainerConfig, prepare

CPU = torch.device("cpu")
SMALL = Shape(T=16, D=12, M=36, E=3, K=2)
STEPS = 4
"""Gram matrices are renewed at every second."""
GRADIENT_LIMIT = {Precision.float32: 1e-4, Precision.bf16: 1e-2}
"""Relative. In float32 the kernels' Gram matrices and logits are of three bfloat16 products, which know a number to 2^-17; in bf16 what a batch left
over and the gradients themselves are rounded. Neither changes which latents are chosen (`settled_batch`)."""
ROUNDED_LIMIT = 0.15
"""In bf16, of all gradients where the encoder's rounded values decide which latents a token has: in some tokens the last one is another."""
MISSED_LIMIT = 0.1
"""In bf16, of the encoder's gradients and the loss of what was missed: of a few tokens another latent is the largest once what is left is rounded."""
LOSS_LIMIT = {Precision.float32: 2e-5, Precision.bf16: 1e-4}
"""Relative, of each term of the first loss."""
LAST_LIMIT = {Precision.float32: 1e-3, Precision.bf16: 1e-2}
"""Relative, of the last loss: by then updated weights differ, none is a number that bfloat16 has, and some choices flip."""
NOISE, DRAWS, ROUNDS = 1e-5, 3, 40
COMPETITION: dict[str, Any] = {"router": CompetitionRouter.Config()}
SEARCHES: dict[str, tuple[str, dict[str, Any]]] = {
    "switch_pursuit": ("switch_pursuit", {}),
    "switch_pursuit, stop rule, shared": ("switch_pursuit", {"stop": True, "shared": True}),
    "switch_refit": ("switch_refit", {}),
    "switch_refit, shared": ("switch_refit", {"shared": True}),
    "switch, competition": ("switch", COMPETITION),
    "switch, competition, gathered": ("switch", {**COMPETITION, "regime": Regime.sparse}),
    "switch_batch_topk": ("switch_batch_topk", {}),
    "switch_batch_topk, competition": ("switch_batch_topk", COMPETITION),
}
"""Architecture and settings; `regime` is of the plan, and shared latents come by number."""


@dataclass(frozen=True)
class SearchCase:
    """One configuration of a step that searches. `shape.M` counts the experts' latents; shared ones, a quarter of an expert's, come in addition."""

    name: str
    shape: Shape
    precision: Precision = Precision.bf16
    dead: int = 0
    """Latents of each expert, and shared ones, that count as dead in the check of one step."""

    def __str__(self) -> str:
        return f"{self.name}, {self.shape} {self.precision.value}" + (f", {self.dead} dead" if self.dead else "")

    def config(self) -> Any:
        s, (architecture, settings) = self.shape, SEARCHES[self.name]
        shared = s.F // 4 if settings.get("shared") else 0
        sizes = {"num_latents": s.M + shared, "k": s.K, "num_experts": s.E, "shared": shared, "gram_tokens": 2 * s.T}
        owner: Any = SAES[architecture].Config
        return owner(**{f.name: value for f in fields(owner) for value in [{**settings, **sizes}.get(f.name)] if value is not None})

    @property
    def regime(self) -> Regime | None:
        """None leaves the choice to the planner."""
        return SEARCHES[self.name][1].get("regime")

    @property
    def searches(self) -> bool:
        """By least squares or pursuit, and not by its encoder alone."""
        return issubclass(SAES[SEARCHES[self.name][0]], FusedSearch)

    @property
    def rounded(self) -> bool:
        """Whether the encoder's values are rounded before they decide which latents a token has."""
        return self.precision is Precision.bf16 and not self.searches

    def loss_limit(self, term: str) -> float:
        if self.rounded:
            return checks.LOSS_LIMIT[self.precision]
        return MISSED_LIMIT if self.precision is Precision.bf16 and term == "missed" else LOSS_LIMIT[self.precision]

    def gradient_limit(self, parameter: str) -> float:
        if self.rounded:
            return ROUNDED_LIMIT
        return MISSED_LIMIT if self.precision is Precision.bf16 and "_enc_" in parameter else GRADIENT_LIMIT[self.precision]


def search_cases(tiny: bool) -> list[SearchCase]:
    """All that one step is checked for: pursuit with fixed k and with the stop rule, refits, shared latents, dead ones; both precisions."""
    if tiny:
        small = [
            SearchCase("switch_refit, shared", SMALL, Precision.float32, dead=3),
            SearchCase("switch_batch_topk, competition", SMALL, Precision.float32),
        ]
        return [SearchCase("switch_pursuit", SMALL), *small]
    shape = Shape(T=400, D=200, M=1200, E=4, K=24)
    cases = [SearchCase(name, shape, precision) for precision in (Precision.bf16, Precision.float32) for name in SEARCHES]
    return [replace(case, dead=5) if case.precision is Precision.float32 and ("shared" in case.name or not case.searches) else case for case in cases]


def search_graph_cases(tiny: bool) -> list[SearchCase]:
    """All whose replayed steps are compared with eager ones."""
    if tiny:
        return [SearchCase("switch_pursuit, stop rule, shared", SMALL)]
    return [replace(case, dead=0) for case in search_cases(tiny)]


@contextmanager
def same_rivals() -> Iterator[list[Tensor]]:
    """Inside, PyTorch's `CompetitionRouter.rivals` gives the rivals that the kernels drew last, for they draw other ones; its own where none were.

    Yields what was drawn, [n] each.
    """
    if find_spec("triton") is None:
        yield []
        return
    from switch_kernels.gpu import pursuit_step

    drawn: list[Tensor] = []
    draw, own = pursuit_step.draw_rivals, CompetitionRouter.rivals

    def drawing(*arguments: Any) -> Tensor:
        drawn.append(draw(*arguments))
        return drawn[-1]

    def given(self: CompetitionRouter, routing: Routing) -> Rivals | None:
        if not drawn or not self.rival_share:
            return own(self, routing)
        return as_rivals(routing, drawn[-1])

    vars(pursuit_step)["draw_rivals"] = drawing
    CompetitionRouter.rivals = given  # type: ignore[method-assign]
    try:
        yield drawn
    finally:
        vars(pursuit_step)["draw_rivals"] = draw
        CompetitionRouter.rivals = own  # type: ignore[method-assign]


def as_rivals(routing: Routing, rival_n: Tensor) -> Rivals:
    """As the router gives them, g = p_e / (p_e + p_r)."""
    rival_n1 = rival_n.to(routing.probs_TE.device, torch.int64)[:, None]
    probs_nE, expert_n1 = routing.probs_TE[: len(rival_n1)], routing.expert_TS[: len(rival_n1)]
    own_n1, other_n1 = probs_nE.gather(1, expert_n1), probs_nE.gather(1, rival_n1)
    return Rivals(rival_n1, (own_n1 / (own_n1 + other_n1))[:, 0])


class SearchStep:
    """The trainer on one case; takes the SAE over."""

    def __init__(self, sae: Any, tokens: int, execution: Execution) -> None:
        config = TrainerConfig(lr=LEARNING_RATE, warmup_steps=0, decay_fraction=0.0, dead_after_tokens=NEVER)
        self.trainer = Trainer(sae, config, 1_000_000_000, tokens, execution)

    def __call__(self, x_TD: Tensor) -> StepResult:
        return self.trainer.step(Rows.of(x_TD))

    def loss(self, x_TD: Tensor) -> Tensor:
        """Takes a step and returns the loss before it, still on the device."""
        return torch.stack([term.detach() for term in self(x_TD).terms.values()]).sum()

    def tensors(self) -> dict[str, Tensor]:
        """Weights, moments, thresholds, counters, Gram matrices, by the names of a checkpoint."""
        return self.trainer.state_dict()[0]

    def mark_dead(self, first: int, last: int) -> None:
        """Latents `first` to `last` of each expert, and of the shared ones, have not fired for long, all others have just now."""
        since_M, sae = self.trainer.tokens_since_fired_M.zero_(), self.trainer.sae
        shared: Any = sae.num_shared
        since_M[:shared][first:last] = NEVER
        since_M[shared:].view(sae.num_experts, -1)[:, first:last] = NEVER


def build_search(case: SearchCase, x_TD: Tensor) -> Any:
    """An SAE in mid-training, on the CPU. For bf16 its weights, scale and bias are numbers that bfloat16 has (`representable`)."""
    generator = torch.Generator().manual_seed(3)
    sae: Any = SAES.build(case.config(), case.shape.D, generator)
    if case.regime is not None:
        sae.regime = case.regime
    prepare(sae, Rows.of(x_TD[:2048]), normalize_activations=True)
    low = case.precision is Precision.bf16
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
        sae.W_dec_MD.div_(sae.W_dec_MD.norm(dim=1, keepdim=True))
        if low:
            sae.activation_scale.log2_().round_().exp2_()
            for name, parameter in sae.named_parameters():
                parameter.copy_(on_grid(parameter, 4.0) if name in ("b_pre_D", "router.b_D") else parameter.bfloat16())
    return sae


def on_grid(tensor: Tensor, most: float) -> Tensor:
    """Multiples of 1/16 up to `most`: the difference of two such numbers below 16 is one that bfloat16 has."""
    return (tensor * 16).round().div(16).clamp(-most, most)


def representable(sae: Any, x_TD: Tensor) -> Tensor:
    """Activations whose scaled differences from the bias bfloat16 has, so that rounding operands to it loses nothing: the same latents are chosen."""
    return on_grid(x_TD * sae.activation_scale, 8.0) / sae.activation_scale


def settled_batch(sae: Any, pool_TD: Tensor, tokens: int) -> Tensor:
    """As many tokens whose experts and latents, and those of any rival, stay the same when weights change by `NOISE`: no rounding can flip them.

    A refit's threshold depends on the whole batch: tokens that a change moves are replaced until there are none. Raises RuntimeError if that does
    not end.
    """
    left = torch.arange(len(pool_TD))
    for number in range(ROUNDS):
        batch = left[:tokens]
        if len(batch) < tokens:
            break
        moved_T = _moved(sae, pool_TD[batch], number)
        if not moved_T.any():
            return pool_TD[batch]
        left = torch.cat([batch[~moved_T], left[tokens:]])
    raise RuntimeError(f"no {tokens} of {len(pool_TD)} tokens are clear of ties in {ROUNDS} rounds")


def _moved(sae: Any, x_TD: Tensor, seed: int) -> Tensor:
    """bool [T]: the tokens whose choice some change of the weights changes."""
    generator = torch.Generator().manual_seed(seed)
    moved_T = torch.zeros(len(x_TD), dtype=torch.bool)
    expected = None
    for draw in range(1 + DRAWS):
        other = copy.deepcopy(sae).double()
        with torch.no_grad():
            for name, parameter in other.named_parameters() if draw else ():
                if name.rsplit(".")[-1].startswith("W_"):
                    parameter.mul_(1 + NOISE * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        chosen = _chosen(other, x_TD.double())
        expected = chosen if expected is None else expected
        for a, b in zip(expected, chosen, strict=True):
            moved_T |= (a != b).any(dim=1)
    return moved_T


def _chosen(sae: Any, x_TD: Tensor) -> list[Tensor]:
    """[T, _] each: experts and latents of each token, by its own expert and by each of the others."""
    own = CompetitionRouter.rivals
    found: list[Tensor] = []
    try:
        for shift in range(1, sae.num_experts):
            CompetitionRouter.rivals = (  # type: ignore[method-assign]
                lambda self, routing, shift=shift: as_rivals(routing, (routing.expert_TS[:, 0] + shift) % self.num_experts)
            )
            output = sae.train()(x_TD)
            theirs = getattr(output, "theirs", None)
            if theirs is None:
                rival_T1 = (output.routing.expert_TS + shift) % sae.num_experts
                theirs = sae._encode_by(sae._scaled(x_TD), Dispatch.from_experts(rival_T1, sae.num_experts), None)[0]
            for latents in (output.latents, theirs):
                found.append(torch.where(latents.values_TK != 0, latents.indices_TK, -1).sort(dim=1).values)
            found.append(output.routing.expert_TS)
    finally:
        CompetitionRouter.rivals = own  # type: ignore[method-assign]
    return found


def check_search(case: SearchCase, device: torch.device) -> list[Finding]:
    """Each loss term, gradients, update, thresholds and counters of one step, the loss after some more, and bits."""
    s = case.shape
    pool_TD = activations(replace(s, T=2 * s.T), 1, CPU)[0]
    sae = build_search(case, pool_TD)
    pool_TD = representable(sae, pool_TD) if case.precision is Precision.bf16 else pool_TD
    x_TD = settled_batch(sae, pool_TD, s.T)
    other_TD = pool_TD[-s.T :]
    start = {name: p.detach().clone().to(device) for name, p in sae.named_parameters()}
    poison(device)
    execution = resolve(Backend.triton, case.precision, device)
    truth = SearchStep(copy.deepcopy(sae).double(), s.T, Execution())
    ours, again = (SearchStep(copy.deepcopy(sae).to(device), s.T, execution) for _ in range(2))
    for step in (truth, ours, again):
        step.mark_dead(0, case.dead)
    findings = [Finding("steps that kernels do not compute", float(not ours.trainer.execution.is_triton), 0)]
    with same_rivals():
        found, expected = ours(x_TD.to(device)).terms, truth(x_TD.double()).terms
        findings.append(Finding("terms of the loss that only one of both has", len(found.keys() ^ expected.keys()), 0))
        for name, term in expected.items():
            findings.append(Finding(f"loss term {name}", abs(found[name].item() / term.item() - 1), case.loss_limit(name)))
        tensors, exact = ours.tensors(), truth.tensors()
        for name in start:
            key = f"adam/{name}/exp_avg"
            findings.append(Finding(f"gradient of {name}", relative(tensors[key].cpu(), exact[key]), case.gradient_limit(name)))
        findings += update_findings(start, tensors, Moments.float32)
        for name in [name for name in ("sae/theta", "sae/threshold") if name in tensors]:
            error = (tensors[name].cpu() - exact[name]).abs().item()
            limit = checks.LOSS_LIMIT[case.precision] if case.rounded else LOSS_LIMIT[Precision.float32]
            findings.append(Finding(f"{name.split('/')[1]} after the step", error, limit * max(1.0, exact[name].abs().item())))
        differ = (tensors["tokens_since_fired"].cpu() != exact["tokens_since_fired"]).sum().item()
        findings.append(Finding("latents that fired in one of both only", differ, 0.02 * len(tensors["tokens_since_fired"]) if case.rounded else 0))
        batches = [x_TD, other_TD]
        for number in range(1, STEPS):
            loss, exact_loss = ours.loss(batches[number % 2].to(device)).item(), truth.loss(batches[number % 2].double()).item()
            if number == STEPS - 1 and not case.dead:  # trainers look for dead latents at different steps
                findings.append(Finding(f"loss of step {STEPS}", abs(loss / exact_loss - 1), LAST_LIMIT[case.precision]))
    poison(device)
    for number in range(STEPS):
        again(batches[number % 2].to(device))
    tensors, repeated = ours.tensors(), again.tensors()
    differing = sorted(name for name, tensor in tensors.items() if not torch.equal(tensor, repeated[name]))
    findings.append(Finding(f"tensors whose bits differ between two runs of {STEPS} steps {differing[:3]}", len(differing), 0))
    return findings
