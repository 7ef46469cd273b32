"""Whole training steps on a GPU, all from the same weights and on the same activations: ours, and what others would run.

A step is forward, loss, backward, clipping, projection, Adam, unit norm and dead-latent bookkeeping, without AuxK (no latent is dead). Letters as
in `experiments.benchmarks.roofline`.
"""

import importlib.util
import subprocess
import sys
from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.benchmarks.cases import Case
from experiments.benchmarks.peers import PEERS, Sparsify
from switch_kernels import Backend, Moments, Precision, Shape, resolve
from switch_kernels.adam import BETAS
from switch_sae.engines import TritonEngine
from switch_sae.models import SwitchSAE, TopKSAE
from switch_sae.models.losses import reconstruction_loss
from switch_sae.models.routers.base import load_balance_loss
from switch_sae.rows import Rows
from switch_sae.training import StepResult, Trainer, TrainerConfig, prepare

LEARNING_RATE = 1e-3
CLIP = 1.0
NEVER = 2**62
REVIVAL = TritonEngine.INTERVAL
SPARSIFY, SPARSIFY_VERSION = Sparsify.PACKAGE, Sparsify.VERSION
SPARSIFY_FOLDER = PEERS / "kernels"


def activations(shape: Shape, batches: int, device: torch.device, seed: int = 1) -> Tensor:
    """[batches, T, D] float32: 24 of 4096 sparse features (Zipf), a Gaussian of rank 32 with falling spectrum, a mean, and noise."""
    generator = torch.Generator(device).manual_seed(seed)
    world = torch.Generator(device).manual_seed(0)
    D, features, active, rank = shape.D, 4096, 24, 32

    def normal(*size: int, source: torch.Generator = generator) -> Tensor:
        return torch.randn(*size, device=device, generator=source)

    dictionary_GD = F.normalize(normal(features, D, source=world), dim=1)
    directions_RD = F.normalize(normal(rank, D, source=world), dim=1) * (4.0 / torch.arange(1, rank + 1, device=device).sqrt())[:, None]
    mean_D = normal(D, source=world) * 0.2
    frequency_G = 1.0 / torch.arange(1, features + 1, device=device)
    out_BTD = torch.empty(batches, shape.T, D, device=device)
    for x_TD in out_BTD:
        chosen_TA = torch.multinomial(frequency_G, shape.T * active, replacement=True, generator=generator).view(shape.T, active)
        strength_TA = 2.0 + normal(shape.T, active).abs()
        x_TD.copy_(F.embedding_bag(chosen_TA, dictionary_GD, mode="sum", per_sample_weights=strength_TA))
        x_TD.add_(normal(shape.T, rank) @ directions_RD).add_(mean_D).add_(normal(shape.T, D), alpha=0.05)
    return out_BTD


def build_sae(
    shape: Shape, x_TD: Tensor, seed: int = 0, owners: tuple[type[TopKSAE], type[SwitchSAE]] = (TopKSAE, SwitchSAE), normalize: bool = True
) -> TopKSAE:
    """An SAE at its start, on the device of `x_TD`: of the first of `owners` with one expert (the dense TopK SAE), else of the second."""
    dense, switch = owners
    with x_TD.device:
        generator = torch.Generator(x_TD.device).manual_seed(seed)
        if shape.E == 1:
            sae = dense(TopKSAE.Config(num_latents=shape.M, k=shape.K), shape.D, generator)
        else:
            config = SwitchSAE.Config(num_latents=shape.M, k=shape.K, num_experts=shape.E, experts_per_token=shape.S)
            sae = switch(config, shape.D, generator)
    prepare(sae, Rows.of(x_TD[:2048]), normalize_activations=normalize)
    return sae


def skew(sae: TopKSAE, x_BTD: Tensor, seed: int = 2) -> Tensor:
    """The activations moved along rows of the router, so that expert e receives tokens in proportion to 1 / (e + 1)."""
    assert isinstance(sae, SwitchSAE)
    generator = torch.Generator(x_BTD.device).manual_seed(seed)
    weight_E = 1.0 / torch.arange(1, sae.num_experts + 1, device=x_BTD.device)
    rows = x_BTD.shape[0] * x_BTD.shape[1]
    expert_R = torch.multinomial(weight_E, rows, replacement=True, generator=generator)
    toward_RD = F.normalize(sae.router.W_ED.detach(), dim=1)[expert_R].view(x_BTD.shape)
    return x_BTD + 8.0 / sae.activation_scale * toward_RD


class OurStep:
    """Our trainer on one case; takes the SAE over. The only place that knows how a trainer is asked for its backend, precision and regime.

    With `Backend.torch` it is the trainer's path for any device, in float32 whatever the case says.
    """

    def __init__(self, sae: TopKSAE, case: Case, backend: Backend, config: TrainerConfig | None = None, total_steps: int = 1_000_000_000) -> None:
        if backend is Backend.torch:
            case = replace(case, precision=Precision.float32, moments=Moments.float32, regime=None)
        self.case = case
        config = config or TrainerConfig(lr=LEARNING_RATE, warmup_steps=0, decay_fraction=0.0, clip=CLIP, dead_after_tokens=NEVER)
        sae.regime = case.regime
        execution = resolve(backend, case.precision, sae.W_enc_MD.device)
        self.trainer = Trainer(sae, replace(config, moments=case.moments), total_steps, case.shape.T, execution)
        self.plan = sae.plan(case.shape.T) if self.trainer.execution.is_triton else None
        self.steps = 0

    def __call__(self, x_TD: Tensor) -> StepResult:
        if self.case.dead and self.steps % REVIVAL == 0:  # as many at every reading, whatever AuxK has revived: a state that can be timed
            self.trainer.tokens_since_fired_M.view(self.case.shape.E, -1)[:, : self.case.dead] = NEVER
        self.steps += 1
        return self.trainer.step(Rows.of(x_TD))

    def loss(self, x_TD: Tensor) -> Tensor:
        """Takes a step and returns the loss before it, still on the device."""
        return torch.stack([term.detach().float() for term in self(x_TD).terms.values()]).sum()

    def tensors(self) -> dict[str, Tensor]:
        """Weights, moments and counters, by the names of a checkpoint."""
        return self.trainer.state_dict()[0]

    def moments(self) -> dict[str, Tensor]:
        """Adam's first moment of each parameter; after one step it is (1 - beta1) times the gradient that Adam saw."""
        return {name.split("/")[1]: tensor for name, tensor in self.tensors().items() if name.endswith("/exp_avg")}

    def regime(self) -> str:
        """Such as "dense, buffered"; "torch" where Triton does not compute."""
        return "torch" if self.plan is None else f"{self.plan.regime.value}, {self.plan.gradients.value}"


class Peer(ABC):
    """A training step in plain PyTorch, with no host synchronisation of its own: autograd, fused Adam, float32 master weights."""

    name: str

    def __init__(self, sae: TopKSAE, precision: str = "float32", optimizer: dict[str, Any] | None = None) -> None:
        self.config, self.E, self.S, self.d_in = sae.config, sae.num_experts, sae.experts_per_token, sae.d_in
        self.precision, self.F = precision, sae.num_latents // sae.num_experts
        dtype = torch.float64 if precision == "float64" else torch.float32
        self.operand_dtype = torch.bfloat16 if precision == "bf16" else dtype
        self.scale = sae.activation_scale.to(dtype)
        self.parameters = {name: p.detach().to(dtype, copy=True).requires_grad_() for name, p in sae.named_parameters()}
        options = {"fused": True} if optimizer is None else optimizer
        self.optimizer = torch.optim.Adam(self.parameters.values(), lr=LEARNING_RATE, betas=BETAS, **options)
        self.since_fired_M = torch.zeros(sae.num_latents, dtype=torch.int64, device=self.scale.device)

    def __call__(self, x_TD: Tensor) -> Tensor:
        """One step; the loss before it, still on the device."""
        loss, values_TK, indices_TK = self.losses(x_TD)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        with torch.no_grad():
            W_dec_MD = self.parameters["W_dec_MD"]
            grad_MD = W_dec_MD.grad
            assert grad_MD is not None
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), CLIP)
            grad_MD.addcmul_(W_dec_MD, (grad_MD * W_dec_MD).sum(dim=1, keepdim=True), value=-1)
            self.optimizer.step()
            W_dec_MD.div_(torch.linalg.vector_norm(W_dec_MD, dim=1, keepdim=True))
            fired_M = torch.zeros_like(self.since_fired_M).index_add_(0, indices_TK.flatten(), (values_TK > 0).flatten().long())
            self.since_fired_M.add_(x_TD.shape[0]).masked_fill_(fired_M > 0, 0)
        return loss.detach()

    loss = __call__

    def losses(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, values, indices)."""
        x_TD = x_TD.to(self.scale.dtype) * self.scale
        expert_TS, gate_TS, balance = self.route(x_TD)
        recon_TD, values_TK, indices_TK = self.reconstruct(x_TD, expert_TS, gate_TS)
        return reconstruction_loss(x_TD - recon_TD - self.parameters["b_pre_D"]) + balance, values_TK, indices_TK

    def route(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(experts, gates, weighted load-balance loss), in full precision."""
        if self.E == 1:
            expert_T1 = torch.zeros(x_TD.shape[0], 1, dtype=torch.int64, device=x_TD.device)
            return expert_T1, x_TD.new_ones(x_TD.shape[0], 1), x_TD.new_zeros(())
        probs_TE = torch.softmax((x_TD - self.parameters["router.b_D"]) @ self.parameters["router.W_ED"].T, dim=1)
        gate_TS, expert_TS = probs_TE.topk(self.S, dim=1)
        return expert_TS, gate_TS, self.config.router.load_balance * self.d_in * load_balance_loss(expert_TS, probs_TE)

    @abstractmethod
    def reconstruct(self, x_TD: Tensor, expert_TS: Tensor, gate_TS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(sum of gated decoder rows, gated values [T, K], global indices [T, K]) of scaled activations."""

    def moments(self) -> dict[str, Tensor]:
        return {name: self.optimizer.state[p]["exp_avg"] for name, p in self.parameters.items()}

    def centred(self, x_TD: Tensor) -> Tensor:
        return (x_TD - self.parameters["b_pre_D"]).to(self.operand_dtype)

    def operand(self, name: str) -> Tensor:
        return self.parameters[name].to(self.operand_dtype)


def gather_sum(indices_TK: Tensor, W_MD: Tensor, weights_TK: Tensor) -> Tensor:
    """[T, D]: the weighted sums of gathered rows, by `embedding_bag`, whose backward pass CUDA has for float32 weights only: bfloat16 gets ours."""
    if W_MD.dtype == torch.bfloat16 and W_MD.is_cuda:
        out_TD: Tensor = _GatherSum.apply(indices_TK, W_MD, weights_TK)
        return out_TD
    return F.embedding_bag(indices_TK, W_MD, mode="sum", per_sample_weights=weights_TK)


class _GatherSum(torch.autograd.Function):
    """`embedding_bag` with the two gradients as PyTorch would compute them: gathered products, and rows added where they were gathered."""

    @staticmethod
    def forward(ctx: Any, indices_TK: Tensor, W_MD: Tensor, weights_TK: Tensor) -> Tensor:
        ctx.save_for_backward(indices_TK, W_MD, weights_TK)
        return F.embedding_bag(indices_TK, W_MD, mode="sum", per_sample_weights=weights_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, Tensor]:
        (grad_TD,), (indices_TK, W_MD, weights_TK) = grads, ctx.saved_tensors
        rows_TKD = F.embedding(indices_TK, W_MD)
        grad_TK = torch.bmm(rows_TKD, grad_TD[:, :, None])[:, :, 0]
        grad_rows = (weights_TK[:, :, None] * grad_TD[:, None, :]).flatten(0, 1)
        return None, torch.zeros_like(W_MD).index_add_(0, indices_TK.flatten(), grad_rows), grad_TK


class MaskedDense(Peer):
    """As published: all M latents computed, all but the routed experts' masked, top-k over M; also our truth, in float64.

    `dense_decode` multiplies by the whole decoder; without it, decoding gathers rows by `embedding_bag`.
    """

    name = "masked-dense"

    def __init__(self, sae: TopKSAE, precision: str, dense_decode: bool = False, **options: Any) -> None:
        super().__init__(sae, precision, **options)
        self.dense_decode = dense_decode

    def reconstruct(self, x_TD: Tensor, expert_TS: Tensor, gate_TS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pre_TM = F.linear(self.centred(x_TD), self.operand("W_enc_MD"), self.operand("b_enc_M")).to(x_TD.dtype)
        gate_TE = x_TD.new_zeros(x_TD.shape[0], self.E).scatter(1, expert_TS, gate_TS)
        values_TK, indices_TK = (pre_TM.relu() * gate_TE.repeat_interleave(self.F, dim=1)).topk(self.config.k, dim=1, sorted=False)
        weights_TK = values_TK.to(self.operand_dtype)
        if self.dense_decode:
            recon_TD = torch.zeros_like(pre_TM, dtype=self.operand_dtype).scatter(1, indices_TK, weights_TK) @ self.operand("W_dec_MD")
        else:
            recon_TD = gather_sum(indices_TK, self.operand("W_dec_MD"), weights_TK)
        return recon_TD.to(x_TD.dtype), values_TK, indices_TK


class ExpertLoop(Peer):
    """A Python loop over experts (one expert per token): a product, torch.topk, and a dense product to decode."""

    name = "loop over experts"

    def reconstruct(self, x_TD: Tensor, expert_TS: Tensor, gate_TS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        centred_TD, k = self.centred(x_TD), self.config.k
        W_enc_EFD, W_dec_EFD = (self.operand(name).view(self.E, self.F, -1) for name in ("W_enc_MD", "W_dec_MD"))
        b_enc_EF = self.operand("b_enc_M").view(self.E, self.F)
        recon_TD, values_TK = torch.zeros_like(x_TD), x_TD.new_zeros(x_TD.shape[0], k)
        indices_TK = expert_TS.new_zeros(x_TD.shape[0], k)
        for e in range(self.E):
            rows = (expert_TS[:, 0] == e).nonzero()[:, 0]
            pre = F.linear(centred_TD[rows], W_enc_EFD[e], b_enc_EF[e])
            active, local = pre.relu().topk(k, dim=1, sorted=False)
            gated = active.to(x_TD.dtype) * gate_TS[rows]
            decoded = torch.zeros_like(pre).scatter(1, local, gated.to(pre.dtype)) @ W_dec_EFD[e]
            recon_TD = recon_TD.index_copy(0, rows, decoded.to(x_TD.dtype))
            values_TK.index_copy_(0, rows, gated.detach())
            indices_TK.index_copy_(0, rows, local + e * self.F)
        return recon_TD, values_TK, indices_TK


class Grouped(Peer):
    """One F.grouped_mm over tokens sorted by expert (one expert per token), torch.topk, embedding_bag."""

    name = "F.grouped_mm, embedding_bag"

    def reconstruct(self, x_TD: Tensor, expert_TS: Tensor, gate_TS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sorted_N, order_N = torch.sort(expert_TS[:, 0], stable=True)
        ends_E = torch.searchsorted(sorted_N, torch.arange(self.E, device=sorted_N.device), right=True).int()
        centred_ND = self.centred(x_TD).index_select(0, order_N)
        pre_NF = F.grouped_mm(centred_ND, self.operand("W_enc_MD").view(self.E, self.F, -1).transpose(1, 2), offs=ends_E)
        with torch.no_grad():  # selecting on pre + bias, then adding the bias to what was selected: autograd then sees K values a row, not F
            biased_NF = pre_NF + self.operand("b_enc_M").view(self.E, self.F).index_select(0, sorted_N)
            local_NK = biased_NF.topk(self.config.k, dim=1, sorted=False).indices
        global_NK = local_NK + (sorted_N * self.F)[:, None]
        bias_NK = self.parameters["b_enc_M"].index_select(0, global_NK.flatten()).view(global_NK.shape)
        active_NK = (pre_NF.gather(1, local_NK).to(x_TD.dtype) + bias_NK).relu()
        values_NK = active_NK * gate_TS.index_select(0, order_N)
        values_TK, indices_TK = (torch.empty_like(a).index_copy(0, order_N, a) for a in (values_NK, global_NK))
        return self.decode(values_TK, indices_TK).to(x_TD.dtype), values_TK, indices_TK

    def decode(self, values_TK: Tensor, indices_TK: Tensor) -> Tensor:
        return gather_sum(indices_TK, self.operand("W_dec_MD"), values_TK.to(self.operand_dtype))


class SparsifyDecode(Grouped):
    """The same encoder with eai-sparsify's Triton kernels for decoding and its gradients, on routed tokens."""

    def __init__(self, sae: TopKSAE, precision: str, kernels: ModuleType, low_precision_rows: bool) -> None:
        super().__init__(sae, precision)
        self.kernels, self.low_precision_rows = kernels, low_precision_rows
        self.name = self.title(low_precision_rows)

    @staticmethod
    def title(low_precision_rows: bool) -> str:
        return f"{SPARSIFY} decode, {'low-precision' if low_precision_rows else 'float32'} rows"

    def decode(self, values_TK: Tensor, indices_TK: Tensor) -> Tensor:
        W_dec_MD = self.operand("W_dec_MD") if self.low_precision_rows else self.parameters["W_dec_MD"]
        return self.kernels.xformers_embedding_bag(indices_TK, W_dec_MD, values_TK.to(W_dec_MD.dtype))


class SparsifyNative(Peer):
    """eai-sparsify as it ships, for one expert: its FusedEncoder under bfloat16 autocast, its Triton decoder on float32 rows."""

    name = f"{SPARSIFY}, whole"

    def __init__(self, sae: TopKSAE, kernels: ModuleType, encoder: ModuleType) -> None:
        super().__init__(sae, "float32")
        self.kernels, self.encoder = kernels, encoder

    def reconstruct(self, x_TD: Tensor, expert_TS: Tensor, gate_TS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(x_TD.device.type, dtype=torch.bfloat16):
            values_TK, indices_TK, _ = self.encoder.fused_encoder(
                self.centred(x_TD), self.parameters["W_enc_MD"], self.parameters["b_enc_M"], self.config.k, "topk"
            )
            recon_TD = self.kernels.xformers_embedding_bag(indices_TK, self.parameters["W_dec_MD"], values_TK.to(x_TD.dtype))
        return recon_TD, values_TK.detach(), indices_TK


def sparsify_modules() -> tuple[ModuleType, ModuleType] | None:
    """Its files `xformers.py` and `fused_encoder.py`, which need only torch and triton; None where it is neither importable nor fetched.

    They are loaded by themselves: importing the package would need transformers, datasets and more.
    """
    spec = importlib.util.find_spec("sparsify")
    folders = [*(Path(place) for place in (spec.submodule_search_locations or [] if spec else [])), SPARSIFY_FOLDER / "sparsify"]
    found = next((folder for folder in folders if (folder / "xformers.py").is_file()), None)
    return None if found is None else (_load(found / "xformers.py"), _load(found / "fused_encoder.py"))


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"sparsify_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # triton looks a kernel's module up by name
    spec.loader.exec_module(module)
    return module


def fetch_sparsify() -> str | None:
    """Puts eai-sparsify, without what it depends on, into `SPARSIFY_FOLDER`; what went wrong, or None."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(SPARSIFY_FOLDER), f"{SPARSIFY}=={SPARSIFY_VERSION}"]
    done = subprocess.run(command, capture_output=True, text=True)
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["pip failed"])[-1]
