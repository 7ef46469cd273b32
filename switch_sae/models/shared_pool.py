"""`SharedPoolSAE`: experts that are overlapping lists of latents of one dictionary; only the latents on a token's lists are encoded."""

import math
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from switch_kernels import Dispatch, LatentOrder
from switch_kernels.pursuit import gram_matrices, matching_pursuit
from switch_sae.checks import all_at_least, at_least
from switch_sae.models.base import Flops, SAEOutput
from switch_sae.models.candidates import Sample, known_products, sampled, tell_offered
from switch_sae.models.gram import local_products, precise, refresh_tokens
from switch_sae.models.inference import (
    Inference,
    equal_blocks,
    gram_flops,
    match_loss,
    pursue_in_lists,
    pursuit_flops,
    refit,
    refit_flops,
    ridge_of,
    searched_by,
)
from switch_sae.models.latents import Latents, SparseLatents
from switch_sae.models.lists import assigned, best_lists, credits, half_life_decay, membership, random_lists, repeated
from switch_sae.models.losses import competition_loss, geometric_median, normalized_auxk_loss
from switch_sae.models.routers import ROUTERS, Router, Routing
from switch_sae.models.topk import TopKSAE
from switch_sae.rows import Rows


class Lists(Enum):
    """Which latents are on which lists."""

    gain = "gain"
    """Those that lower the error most on the tokens that the router sends there: z_j^2 where a latent is active, and elsewhere the square of its
    decoder row's product with what is left, if that is above 0 and among the k largest of a token of the sample."""
    energy = "energy"
    """Those with most energy z_j^2 on the tokens that the router sends there if all latents were offered to the tokens of the sample. It did worst
    (experiments/LOG.md), perhaps since latents also fire on tokens for which they were never trained."""
    random = "random"
    """Random ones, which stay: the control that shows what chosen lists are worth."""


class SharedPoolSAE(TopKSAE):
    """R = the S best lists of router(x); C = the union of their latents; z = g * TopK(ReLU(W_enc[C] (x - b_pre) + b_enc[C]));
    recon = W_dec z + b_pre.

    E lists of F latents each into one dictionary of M: a latent is on mu = E F / M lists on average. With mu = 1 this is a Switch SAE, with mu = E a
    TopK SAE. The gate g of a latent is that of the best of a token's lists that hold it. Every `list_tokens` tokens each latent first gets a place on
    the list where its energy sum_{x -> e} z_j^2 is largest (as long as there is room), and the rest of each list goes to those with most energy
    there; what is on a list already counts `1 + hysteresis` times. The energy (`Lists` says of what) is a running sum, over a sample of the tokens
    where latents were not offered. With S > 1 a list earns nothing by latents that a better list of the same token holds. Lists that are learned to
    screen a softmax over a vocabulary are its relatives (Chen et al., arXiv 1810.12406).

    It has one dictionary and so, for all who ask, one expert: which lists a token had does not follow from its latents.
    """

    @dataclass
    class Config(TopKSAE.Config):
        num_lists: int = 64
        """E."""
        multiplicity: float = 3.0
        """mu = E F / M, the lists that a latent is on, on average; F is rounded up."""
        lists_per_token: int = 1
        """S: the lists whose latents compute each token."""
        lists: Lists = Lists.gain
        router: Any = ROUTERS.field("competition")
        """The `Config` of one of `ROUTERS`; its experts are lists."""
        distill: float = 0.0
        """Coefficient of the cross-entropy between the router's probabilities and the lists that would hold most of the energy of all M latents, on
        the sample: distill * D * H. 0 switches it off."""
        sample: float = 1 / 128
        """Share of a batch's tokens that all M latents are compared with in training: it costs M * sample products with a row per token."""
        list_tokens: int = 131_072
        """Lists change after so many tokens of training."""
        memory_tokens: int = 524_288
        """Half of the measured energy is forgotten after so many tokens."""
        hysteresis: float = 3.0
        """A latent must have 1 + hysteresis times the energy of one on a list to take its place: few tokens say what those that are not listed are
        worth, and of many such estimates the largest are too large."""
        settle: float = 0.2
        """The last part of training, in which lists stay."""

        def __post_init__(self) -> None:
            super().__post_init__()
            all_at_least(self, num_lists=1, lists_per_token=1, distill=0, sample=0, list_tokens=1, memory_tokens=1, hysteresis=0, settle=0)
            if not 1 <= self.multiplicity <= self.num_lists:
                raise ValueError(
                    f"multiplicity={self.multiplicity} must lie between 1 (every latent on one list) and num_lists={self.num_lists} (on all of them)."
                )
            at_least("num_latents", self.num_latents, self.num_lists, "Every list needs a latent of its own.")
            if self.lists_per_token > self.num_lists:
                raise ValueError(f"lists_per_token={self.lists_per_token} is more than num_lists={self.num_lists}. Use at most {self.num_lists}.")
            if self.k > self.list_latents:
                raise ValueError(
                    f"k={self.k} is more than the {self.list_latents} latents of a list (num_latents={self.num_latents} * multiplicity / num_lists). "
                    f"Use k <= {self.list_latents}, or num_latents >= {self.least_latents}."
                )
            if self.sample > 1 or self.settle > 1:
                raise ValueError(f"sample={self.sample} and settle={self.settle} are shares: at most 1.")
            if self.sample == 0 and (self.lists is not Lists.random or self.distill):
                raise ValueError("sample=0 leaves nothing by which lists could change or the router be taught. Use lists=random with distill=0.")
            if self.distill and not getattr(self.router, "train", False):
                raise ValueError(f"distill={self.distill} teaches a router that is not trained. Use distill=0, or a router with train=true.")

        @property
        def list_latents(self) -> int:
            """F."""
            return min(self.num_latents, math.ceil(self.multiplicity * self.num_latents / self.num_lists))

        @property
        def encodes_all(self) -> bool:
            """Whether training encodes all latents of the sample."""
            return self.lists is Lists.energy or self.distill > 0

        @property
        def least_latents(self) -> int:
            return max(self.num_lists, math.floor((self.k - 1) * self.num_lists / self.multiplicity) + 1, self.k)

    config: "SharedPoolSAE.Config"
    label, colour, marker = "Shared pool", "#6A3D9A", "h"
    list_EF: Tensor
    """The lists, latents in rising order; a buffer."""
    energy_EM: Tensor
    """The running sums of energy; a buffer."""
    tokens_since_offered_M: Tensor
    """Tokens of training since a latent was last on a list of one of them; a buffer."""
    step, total_steps = 0, 1

    def __init__(self, config: "SharedPoolSAE.Config", d_in: int, generator: torch.Generator | None = None) -> None:
        super().__init__(config, d_in, generator)
        self.experts_per_token = config.lists_per_token
        self.router = ROUTERS.build(config.router, d_in, config.num_lists, config.lists_per_token, generator)
        self.register_buffer("list_EF", torch.empty(config.num_lists, config.list_latents, dtype=torch.int64))
        if self.list_EF.device.type != "meta":  # where nobody asks which latents they hold
            with torch.device("cpu"):  # where the generator is
                is_random = config.lists is Lists.random
                self.list_EF.copy_(random_lists(config.num_latents, config.num_lists, config.list_latents, generator, shuffle=is_random))
        self.register_buffer("energy_EM", torch.zeros(config.num_lists, config.num_latents))
        self.register_buffer("tokens_since_offered_M", torch.zeros(config.num_latents, dtype=torch.int64))

    def share_batches(self, group: Any) -> None:
        super().share_batches(group)
        self.router.group = group

    def initialize(self, rows: Rows) -> None:
        x_TD = self._scaled(rows.x_TD)
        median_D = geometric_median(x_TD)
        self.b_pre_D.data.copy_(median_D)
        self.router.initialize(x_TD, median_D)

    @property
    def latents_per_expert(self) -> int:
        """Those of one list."""
        return self.config.list_latents

    def choose(self, x_TD: Tensor) -> Routing:
        """The lists of raw activations: experts of the routing are rows of `list_EF`. Raises ValueError as `encode`."""
        return self.router.route(self._scaled(x_TD))

    @torch.no_grad()
    def offered_counts(self, x_TD: Tensor) -> Tensor:
        """[M]: on the lists of how many of these raw activations each latent is. A latent that is on none cannot win, however good it is."""
        counts_E = torch.zeros(len(self.list_EF), device=self.list_EF.device)
        member_EM, expert_TS = membership(self.list_EF, self.num_latents), self.choose(x_TD).expert_TS
        twice_M = counts_E.new_zeros(self.num_latents)
        for slot in range(1, self.experts_per_token):  # what a better list of the token offers too
            for expert_tS in expert_TS.split(1024):
                earlier_tM = member_EM[expert_tS[:, :slot]].any(dim=1)
                twice_M += (earlier_tM & member_EM[expert_tS[:, slot]]).sum(dim=0)
        counts_E += torch.bincount(expert_TS.flatten(), minlength=len(counts_E))
        return (counts_E[:, None] * member_EM).sum(dim=0) - twice_M

    def forward(self, x_TD: Tensor) -> SAEOutput:
        x_TD = self._scaled(x_TD)
        latents, routing, by_latent, match = self._infer(x_TD)
        sample = None
        if self.training and torch.is_grad_enabled() and self.config.encodes_all:
            centred_nD = x_TD[: math.ceil(self.config.sample * len(x_TD))] - self.b_in_D
            sample = sampled(centred_nD, self.W_enc_MD, self.b_enc_M, self.config.k)
        return PoolOutput(self._decode(latents, by_latent), latents, match=match, lists=routing, sample=sample)

    def loss_terms(self, rows: Rows, output: SAEOutput, dead_M: Tensor | None = None) -> dict[str, Tensor]:
        assert isinstance(output, PoolOutput)
        terms = super().loss_terms(rows, replace(output, routing=output.lists), dead_M)
        terms |= self.router.loss_terms(output.lists, self.d_out)
        if self.config.distill and output.sample is not None:
            terms["distill"] = self.config.distill * self.d_out * self._distilled(output.lists, output.sample)
        if (rivals := self.router.rivals(output.lists)) is not None:
            first = rows[: len(rivals.expert_nS)]
            with torch.no_grad():
                theirs = self._select(self._scaled(first.x_TD), rivals.expert_nS, None)[0]
            target_nD, recon_TD = self._target(first) * self.target_scale, output.recon_TD * self.target_scale
            terms["competition"] = competition_loss(rivals, target_nD, recon_TD, output.latents, theirs, self._rival(theirs))
        return terms

    def begin_step(self, step: int, total_steps: int) -> None:
        self.step, self.total_steps = step, total_steps
        self.router.begin_step(step, total_steps)

    def end_step(self, rows: Rows, output: SAEOutput) -> None:
        assert isinstance(output, PoolOutput)
        if type(self.router).end_step is not Router.end_step:
            self.router.end_step(self._scaled(rows.x_TD), output.lists)
        member_EM = membership(self.list_EF, self.num_latents)
        used_E = torch.zeros(len(member_EM), dtype=torch.bool, device=member_EM.device).index_fill_(0, output.lists.expert_TS.flatten(), True)
        tell_offered(self.tokens_since_offered_M, (member_EM & used_E[:, None]).any(dim=0), len(rows), self.group)
        if self.config.lists is Lists.gain or (output.sample is not None and self.config.lists is Lists.energy):
            measured = self._gains(rows, output, member_EM) if self.config.lists is Lists.gain else self._energies(output, member_EM)
            self._change(measured, member_EM, len(rows) * self.group.size)

    def flops(self) -> Flops:
        """In training all M latents for `sample` of the tokens come on top, and the rivals of a router that learns by competition."""
        config, row, k, (router, learned) = self.config, 2 * self.d_in, self.config.k, self.router.flops()
        encode, latents, by_encoder = row * config.lists_per_token * config.list_latents, config.list_latents, self.inference is Inference.encoder
        backward = (1 + by_encoder + config.train_decoder) * row * k + learned
        backward += round(config.sample * row * self.num_latents) * (config.encodes_all + (config.lists is Lists.gain))
        backward += round(self.router.rival_share * (encode + row * k))
        if self.inference is Inference.pursuit:
            grams = (1, self.num_latents) if self.searches_lists else (config.num_lists, latents)
            backward += encode + gram_flops(self.d_in, *grams, refresh_tokens(config))
            encode = pursuit_flops(self.d_in, config.lists_per_token * latents, k, equal_blocks(k))
        elif self.inference is Inference.refit:
            encode += refit_flops(self.d_in, k, from_gram=False)
        return Flops(router=router, encode=encode, decode=row * k, backward=backward)

    @torch.no_grad()
    def fold_activation_scale(self) -> None:
        self.router.fold_scale(self.activation_scale)
        self.energy_EM.div_(self.activation_scale.square())
        super().fold_activation_scale()

    def __repr__(self) -> str:
        on_M = torch.bincount(self.list_EF.flatten(), minlength=self.num_latents)
        shape = f"lists_of={self.list_EF.shape[1]}, lists_of_a_latent={int(on_M.min())} to {int(on_M.max())}"
        return f"{super().__repr__()[:-1]}, {shape})"

    def _infer(self, x_TD: Tensor) -> tuple[SparseLatents, Routing, Any, Tensor | None]:
        routing = self.router.route(x_TD)
        learns = self.training and torch.is_grad_enabled()
        if self.inference is Inference.pursuit and not learns:
            return self._pursue(x_TD, self._dispatch(routing, len(x_TD))), routing, None, None
        proposed, by_latent = self._select(x_TD, routing.expert_TS, routing.gate_TS)
        if self.inference is Inference.encoder:
            return proposed, routing, by_latent, None
        found: Latents
        if self.inference is Inference.refit:
            found = refit(self, x_TD, proposed, None)
        else:
            found, by_latent = self._pursue(x_TD, self._dispatch(routing, len(x_TD))), None
        assert isinstance(found, SparseLatents)
        return found, routing, by_latent, match_loss(proposed, found) if learns else None

    def _dispatch(self, routing: Routing | None, tokens: int) -> Dispatch:
        assert routing is not None
        return Dispatch.from_experts(routing.expert_TS, self.config.num_lists)

    def _select(self, x_TD: Tensor, expert_TS: Tensor, gate_TS: Tensor | None) -> tuple[SparseLatents, LatentOrder | None]:
        """The k largest gated latents of the union of each token's lists, and their order where a gradient will be asked for."""
        (tokens, slots), k = expert_TS.shape, self.config.k
        with torch.no_grad():
            dispatch = Dispatch.from_experts(expert_TS, self.config.num_lists)
            pre_RF = dispatch.scatter(self._listed_products(dispatch.gather(x_TD - self.b_in_D), self.W_enc_MD, dispatch, self.b_enc_M))
            if slots > 1:
                pre_RF.view(tokens, slots, pre_RF.shape[1]).masked_fill_(repeated(self.list_EF, expert_TS), -torch.inf)
            pre_RK, local_RK = pre_RF.topk(k, dim=1, sorted=False)
            indices_RK = self.list_EF[expert_TS.flatten()[:, None], local_RK]
            pre_TC, indices_TC = pre_RK.view(tokens, slots * k), indices_RK.view(tokens, slots * k)
            slot_TC = (torch.arange(slots * k, device=x_TD.device) // k).expand_as(indices_TC)
            if slots > 1:
                gated_TC = pre_TC.clamp(min=0) if gate_TS is None else pre_TC.clamp(min=0) * gate_TS.gather(1, slot_TC)
                chosen_TK = gated_TC.topk(k, dim=1, sorted=False).indices
                pre_TC, indices_TC, slot_TC = (each.gather(1, chosen_TK) for each in (pre_TC, indices_TC, slot_TC))
        if not torch.is_grad_enabled():
            values_TK, order = pre_TC.clamp(min=0), None
        else:
            order = LatentOrder.from_indices(indices_TC, self.num_latents)
            values_TK = known_products(pre_TC, x_TD, self.b_in_D, self.W_enc_MD, self.b_enc_M, indices_TC, order).relu()
        if gate_TS is not None:
            values_TK = values_TK * (gate_TS if slots == 1 else gate_TS.gather(1, slot_TC))
        return SparseLatents(values_TK, indices_TC, self.num_latents), order

    def _listed_products(self, x_ND: Tensor, W_MD: Tensor, dispatch: Dispatch, b_M: Tensor | None = None) -> Tensor:
        """[N, F] in the order of lists: products with the rows on each one's list."""
        all_L = self.list_EF.flatten()
        return local_products(x_ND, W_MD.detach().index_select(0, all_L), dispatch, 0, None if b_M is None else b_M.detach().index_select(0, all_L))

    def _distilled(self, routing: Routing, sample: Sample) -> Tensor:
        """-mean_t sum_e q_e log p_e over the sample, q the shares of energy that the best lists add."""
        lists_nS, gain_nS = best_lists(membership(self.list_EF, self.num_latents), sample.indices_nK, sample.shares(), self.experts_per_token)
        wanted_nS = gain_nS / gain_nS.sum(dim=1, keepdim=True).clamp_min(torch.finfo(gain_nS.dtype).tiny)
        log_nS = routing.probs_TE[: len(lists_nS)].gather(1, lists_nS).clamp_min(torch.finfo(gain_nS.dtype).tiny).log()
        return -(wanted_nS * log_nS).sum(dim=1).mean()

    def _energies(self, output: "PoolOutput", member_EM: Tensor) -> Tensor:
        """[E, M] of the sample, whose latents were all encoded."""
        assert output.sample is not None
        expert_nS = output.lists.expert_TS[: len(output.sample.values_nK)]
        return self._credited(member_EM, expert_nS, output.sample.indices_nK, output.sample.values_nK.square())

    def _gains(self, rows: Rows, output: "PoolOutput", member_EM: Tensor) -> Tensor:
        """[E, M]: by how much latents lowered the squared error of all tokens, counted as often as the sample, and would lower that of the sample."""
        latents, expert_TS, count = output.latents, output.lists.expert_TS, math.ceil(self.config.sample * len(rows))
        assert isinstance(latents, SparseLatents)
        lowered_EM = self._credited(member_EM, expert_TS, latents.indices_TK, latents.values_TK.square())
        left_nD = (self._target(rows[:count]) - output.recon_TD[:count]) * self.target_scale
        product_nK, indices_nK = (left_nD @ self.W_dec_MD.T).topk(self.config.k, dim=1, sorted=False)
        return lowered_EM * (count / len(rows)) + self._credited(member_EM, expert_TS[:count], indices_nK, product_nK.relu().square())

    def _credited(self, member_EM: Tensor, expert_nS: Tensor, indices_nK: Tensor, worth_nK: Tensor) -> Tensor:
        """[E, M]: what pairs of a token and a latent are worth, to the lists that deserve it (`credits`)."""
        worth_nSK = (credits(member_EM, expert_nS, indices_nK) * worth_nK[:, None, :]).to(self.energy_EM.dtype)
        places = expert_nS[:, :, None].expand_as(worth_nSK), indices_nK[:, None, :].expand_as(worth_nSK)
        return torch.zeros_like(self.energy_EM).index_put_(places, worth_nSK, accumulate=True)

    def _change(self, measured_EM: Tensor, member_EM: Tensor, tokens: int) -> None:
        """Adds what was measured, and changes the lists where it is time."""
        (measured_EM,) = self.group.mean([measured_EM])
        self.energy_EM.mul_(half_life_decay(tokens, self.config.memory_tokens)).add_(measured_EM * self.group.size)
        every = math.ceil(self.config.list_tokens / tokens)
        if (self.step + 1) % every == 0 and self.step < (1 - self.config.settle) * self.total_steps:
            # The smallest of differences keeps a latent without energy where it is.
            score_EM = self.energy_EM * (1 + self.config.hysteresis * member_EM) + member_EM * torch.finfo(self.energy_EM.dtype).tiny
            self.list_EF.copy_(assigned(score_EM, self.list_EF.shape[1]))
            self.grams.forget()

    def _pursue(self, x_TD: Tensor, dispatch: Dispatch) -> SparseLatents:
        """Over the one list of each token, or the union of several."""
        k, expert_N = self.config.k, dispatch.expert_N
        if self.experts_per_token > 1:
            repeated_TC = repeated(self.list_EF, dispatch.expert_TS).flatten(1)

            def list_by_list(residual_TD: Tensor, W_MD: Tensor) -> Tensor:
                products_RF = dispatch.scatter(self._listed_products(dispatch.gather(residual_TD), W_MD, dispatch))
                return products_RF.view(repeated_TC.shape).masked_fill_(repeated_TC, -torch.inf)

            return pursue_in_lists(self, x_TD, self.list_EF[dispatch.expert_TS].flatten(1), k, equal_blocks(k), products=list_by_list)
        with torch.no_grad():
            products_NF = self._listed_products(dispatch.gather(precise(x_TD - self.b_out_D)), precise(self.W_dec_MD), dispatch)
            gram_EFP = self._gram(len(x_TD))
            found = matching_pursuit(products_NF, gram_EFP, expert_N, k, equal_blocks(k), ridge_of(self), execution=searched_by(self))
            indices_NK = self.list_EF[expert_N[:, None], found.indices_NK]
            return SparseLatents(dispatch.scatter(found.values_NK.to(x_TD.dtype)), dispatch.scatter(indices_NK), self.num_latents)

    def _gram(self, tokens: int) -> Tensor:
        """[E, F, P] of the lists' decoder rows; in a training step perhaps slightly older ones, never those of other lists."""
        listed_LD = self.W_dec_MD.detach().index_select(0, self.list_EF.flatten())
        if self.training and torch.is_grad_enabled():
            return self.grams.for_step(listed_LD, len(self.list_EF), 0, tokens * self.group.size, refresh_tokens(self.config))
        if listed_LD.is_inference():  # has no version
            return gram_matrices(listed_LD.view(*self.list_EF.shape, -1))
        version = tuple((each._version, each.data_ptr(), each.dtype) for each in (self.W_dec_MD, self.list_EF))
        known: dict[Any, Tensor] = self.__dict__.setdefault("_of_version", {})
        if version not in known:
            known.clear()
            known[version] = gram_matrices(precise(listed_LD).view(*self.list_EF.shape, -1))
        return known[version]

    def _auxk(self, x_TD: Tensor, residual_TD: Tensor, routing: Routing | None, dead_M: Tensor) -> Tensor:
        """Reconstructs each token's residual from the dead latents on its lists, each once. What no token's list holds cannot be revived before lists
        change; `tokens_since_offered_M` tells it from what is offered and never wins.
        """
        assert routing is not None
        dispatch = self._dispatch(routing, len(x_TD))
        dead_EF = dead_M[self.list_EF]
        counts, columns = dead_EF.sum(dim=1).tolist(), [row.nonzero()[:, 0] for row in dead_EF]
        latent_B = self.list_EF[dead_EF]
        W_enc, W_dec = (W.index_select(0, latent_B).split(counts) for W in (self.W_enc_MD, self.W_dec_MD))
        b_enc = None if self.b_enc_M is None else self.b_enc_M.index_select(0, latent_B).split(counts)
        repeated_NF = None
        if self.experts_per_token > 1:
            repeated_NF = dispatch.gather_pairs(repeated(self.list_EF, routing.expert_TS).flatten(0, 1))
        x_ND, gate_N = dispatch.gather(x_TD - self.b_in_D.detach()), dispatch.gather_pairs(routing.gate_TS.detach().flatten())
        recon = []
        for e, dead in enumerate(counts):
            rows = slice(dispatch.offsets[e], dispatch.offsets[e + 1])
            if dead == 0:
                recon.append(x_ND.new_zeros(rows.stop - rows.start, self.d_out))
                continue
            pre = torch.nn.functional.linear(x_ND[rows], W_enc[e], None if b_enc is None else b_enc[e])
            if repeated_NF is not None:
                pre = pre.masked_fill(repeated_NF[rows][:, columns[e]], 0.0)
            values, indices = pre.topk(min(self.auxk_latents(), dead), dim=1, sorted=False)
            recon.append((torch.zeros_like(pre).scatter(1, indices, values.relu()) @ W_dec[e]) * gate_N[rows, None])
        recon_TSD = dispatch.scatter(torch.cat(recon)).view(x_TD.shape[0], self.experts_per_token, self.d_out)
        return normalized_auxk_loss(residual_TD, recon_TSD.sum(dim=1), self.group)


@dataclass(frozen=True, repr=False)
class PoolOutput(SAEOutput):
    """With the lists of each token, and what a sample of them would use."""

    lists: Routing = field(kw_only=True)
    sample: Sample | None = field(default=None, kw_only=True, repr=False)
