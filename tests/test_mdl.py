"""Description lengths: claimed bits can be written and read, known entropies come out, and nothing is saved where there is nothing to save."""

import math
from itertools import combinations

import pytest
import torch
from bit_coder import Receiver, Sender, SupportLine, transmit_levels
from test_report import tiny_run

from switch_sae.activations import SyntheticSource
from switch_sae.analysis import analyze, build_analysis
from switch_sae.analysis.codes.comparison import WITH_CLASSES
from switch_sae.analysis.codes.exact_k import NEVER, about_log_elementary, expected_counts, fitted_log_odds, log_elementary
from switch_sae.analysis.codes.latent_classes import fit_classes
from switch_sae.analysis.codes.lengths import EXACT, UNIFORM
from switch_sae.analysis.codes.rate_distortion import Curve, ResidualLaw
from switch_sae.analysis.codes.supports import Supports, fit_law, independent_bits, routes_alone, supports_of, uniform_bits
from switch_sae.analysis.codes.values import Values, fit_values
from switch_sae.analysis.findings import chosen
from switch_sae.analysis.observed import Seen, observe
from switch_sae.models import BatchTopKSAE, ReLUSAE, SparseLatents, SwitchRefitSAE, SwitchSAE, TopKSAE
from switch_sae.results import collect
from switch_sae.results.source import source_of

LONG = 20_000


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def all_sets(size, k):
    return torch.tensor(list(combinations(range(size), k)))


def law_of_sets(odds_L, sets_NK):
    """[N] conditional Bernoulli probabilities, by enumeration."""
    weight_N = odds_L[sets_NK].prod(1)
    return weight_N / weight_N.sum()


def entropy(chance_N):
    return float(-(chance_N * chance_N.log2()).sum())


def dense(local_TK, size, chain=100):
    tokens = len(local_TK)
    return Supports(local_TK, torch.zeros(tokens, dtype=torch.int64), torch.arange(tokens) // chain, size, 1, local_TK.shape[1])


def length(bits):
    return float(bits[0].mean() + bits[1].mean())


def halves(supports):
    middle = len(supports) // 2
    return supports[torch.arange(middle)], supports[torch.arange(middle, len(supports))]


def test_elementary_polynomials_and_expected_counts_equal_sums_over_all_sets():
    log_odds_CL = torch.randn(2, 7, generator=seeded(), dtype=torch.float64)
    log_e_CJ = log_elementary(log_odds_CL, 8)
    for k in range(8):
        sets_NK = all_sets(7, k)
        weight_CN = log_odds_CL[:, sets_NK].sum(2).exp() if k else torch.ones(2, 1, dtype=torch.float64)
        assert torch.allclose(log_e_CJ[:, k], weight_CN.sum(1).log())
        number_CJ = torch.zeros(2, 9, dtype=torch.float64)
        number_CJ[:, k] = 3.0
        inside_NL = torch.zeros(len(sets_NK), 7, dtype=torch.float64).scatter_(1, sets_NK.long().reshape(len(sets_NK), k), 1.0)
        wanted_CL = 3 * (weight_CN / weight_CN.sum(1, keepdim=True)) @ inside_NL
        assert torch.allclose(expected_counts(log_odds_CL, number_CJ)[0], wanted_CL)
    assert bool((log_e_CJ[:, 8] <= NEVER / 2).all())
    many_CL = torch.full((1, 400), -3.0, dtype=torch.float64)
    assert torch.allclose(about_log_elementary(many_CL, 20)[:, 20], log_elementary(many_CL, 20)[:, 20], atol=0.05)


def test_fitted_odds_expect_what_was_counted_for_one_k_and_for_several():
    share_L = torch.tensor([0.9, 0.6, 0.5, 0.3, 0.2, 0.2, 0.15, 0.1, 0.05], dtype=torch.float64)[None]
    for number_J in ([0, 0, 0, 100.0, 0], [5.0, 20, 30, 25, 40]):
        number_CJ = torch.tensor([number_J], dtype=torch.float64)
        active = float((number_CJ * torch.arange(5)).sum())
        fired_CL = share_L / share_L.sum() * active
        expected_CL, _ = expected_counts(fitted_log_odds(fired_CL, number_CJ, steps=30), number_CJ)
        assert torch.allclose(expected_CL, fired_CL, rtol=1e-4)


def test_independent_latents_cost_their_entropy():
    chance_L = torch.rand(24, generator=seeded()) ** 2 * 0.6
    on_TL = torch.rand(LONG, 24, generator=seeded(1)) < chance_L
    local_TK = torch.where(on_TL, torch.arange(24), 24).sort(1).values
    fitted, paid = halves(dense(local_TK, 24))
    known = sum(entropy(torch.stack([p, 1 - p])) for p in chance_L)
    assert length(independent_bits(fitted, paid)) == pytest.approx(known, rel=0.01)
    assert length(fit_law(fitted, routes_alone(fitted)).bits(paid)) == pytest.approx(known, rel=0.01)


def test_exactly_k_latents_cost_their_entropy_which_independent_codes_overpay():
    odds_L, sets_NK = torch.randn(12, generator=seeded(), dtype=torch.float64).exp(), all_sets(12, 4)
    chance_N = law_of_sets(odds_L, sets_NK)
    drawn = sets_NK[chance_N.multinomial(LONG, replacement=True, generator=seeded(1))]
    fitted, paid = halves(dense(drawn, 12))
    law = fit_law(fitted, routes_alone(fitted))
    assert length(law.bits(paid)) == pytest.approx(entropy(chance_N), rel=0.01)
    assert length(independent_bits(fitted, paid)) > entropy(chance_N) + 1
    assert length(uniform_bits(fitted, paid)) == pytest.approx(math.log2(math.comb(12, 4)), abs=0.01)


def planted_classes(steps=None):
    """Sets of 3 of 12 latents from 3 classes; the class of a token follows that of the one before by `steps`, or nothing."""
    generator, sets_NK = seeded(3), all_sets(12, 3)
    chance_CN = torch.stack([law_of_sets((2 * torch.randn(12, generator=generator, dtype=torch.float64)).exp(), sets_NK) for _ in range(3)])
    share_C = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    class_T = share_C.multinomial(LONG, replacement=True, generator=generator)
    if steps is not None:
        chosen_TC = torch.stack([row.multinomial(LONG, replacement=True, generator=generator) for row in steps], 1)
        now, path = int(class_T[0]), []
        for row in chosen_TC.tolist():
            path.append(now)
            now = row[now]
        class_T = torch.tensor(path)
    drawn_TC = torch.stack([row.multinomial(LONG, replacement=True, generator=generator) for row in chance_CN], 1)
    return share_C, chance_CN, class_T, sets_NK[drawn_TC.gather(1, class_T[:, None])[:, 0]]


def test_latent_classes_cost_the_entropy_of_the_mixture_and_not_of_the_class_too():
    share_C, chance_CN, _, drawn = planted_classes()
    known = entropy(share_C @ chance_CN)
    fitted, paid = halves(dense(drawn, 12))
    start_TC = torch.rand(len(fitted), 3, generator=seeded()) + 0.1
    law = fit_law(fitted, start_TC, 3, rounds=60, prior=1.0)
    assert length(law.bits(paid)) == pytest.approx(known, rel=0.01)
    assert torch.allclose(law.log_share_C.exp().sort(descending=True).values, share_C, atol=0.05)
    assert length(fit_law(fitted, routes_alone(fitted)).bits(paid)) > 1.05 * known


def test_a_law_that_looks_back_pays_the_entropy_rate_of_routes():
    steps_CC = torch.tensor([[0.9, 0.05, 0.05], [0.1, 0.8, 0.1], [0.02, 0.08, 0.9]], dtype=torch.float64)
    _, _, class_T, drawn = planted_classes(steps_CC)
    supports = dense(drawn, 12, chain=80)
    supports = Supports(supports.local_TK, class_T, supports.context_T, 12, 4, 3)
    fitted, paid = halves(supports)
    law = fit_law(fitted, routes_alone(fitted), looks_back=True)
    values, vectors = torch.linalg.eig(steps_CC.T)
    stay_C = vectors[:, values.real.argmax()].real
    stay_C = stay_C / stay_C.sum()
    rate = sum(float(share) * entropy(row) for share, row in zip(stay_C, steps_CC, strict=True))
    rate += (entropy(stay_C) - rate) / 80  # a chain's first token follows none
    route_T, support_T = law.bits(paid)
    assert float(route_T.mean()) == pytest.approx(rate, rel=0.03)
    alone = fit_law(fitted, routes_alone(fitted)).bits(paid)
    assert torch.equal(alone[1], support_T) or torch.allclose(alone[1], support_T)
    assert float(alone[0].mean()) > rate + 0.5
    hidden = halves(dense(drawn, 12, chain=80))
    mixture = fit_law(hidden[0], torch.eye(3)[class_T[: len(fitted)]], 3, rounds=10, prior=1.0)
    back = fit_law(hidden[0], mixture.posterior(hidden[0])[0], 3, looks_back=True, rounds=8, prior=1.0)
    assert length(back.bits(hidden[1])) < length(mixture.bits(hidden[1])) - 0.2


def test_forward_filtering_and_smoothing_equal_sums_over_all_paths():
    _, _, _, drawn = planted_classes()
    supports = dense(drawn[:8], 12, chain=4)
    law = fit_law(supports, torch.rand(8, 3, generator=seeded()), 3, looks_back=True, rounds=3, prior=1.0)
    log_TC, steps = law.log_likelihood(supports), law.log_step_CC
    bits_T = sum(law.bits(supports))
    smooth_TC, _ = law.posterior(supports)
    for start in (0, 4):
        paths = torch.cartesian_prod(*[torch.arange(3)] * 4)
        log_P = law.log_share_C[paths[:, 0]] + sum(log_TC[start + t, paths[:, t]] for t in range(4))
        log_P = log_P + sum(steps[paths[:, t - 1], paths[:, t]] for t in range(1, 4))
        assert float(bits_T[start : start + 4].sum()) == pytest.approx(-float(log_P.logsumexp(0)) / math.log(2))
        for t in range(4):
            wanted_C = torch.stack([log_P[paths[:, t] == c].logsumexp(0) for c in range(3)]).softmax(0)
            assert torch.allclose(smooth_TC[start + t], wanted_C)


def test_classes_save_nothing_where_there_are_none():
    chance_N = law_of_sets(torch.randn(12, generator=seeded(), dtype=torch.float64).exp(), all_sets(12, 4))
    drawn = all_sets(12, 4)[chance_N.multinomial(LONG, replacement=True, generator=seeded(1))]
    fitted, paid = halves(dense(drawn, 12))
    alone = length(fit_law(fitted, routes_alone(fitted)).bits(paid))
    assert alone == pytest.approx(entropy(chance_N), rel=0.01)
    random_TC = torch.eye(4)[torch.randint(4, (len(fitted),), generator=seeded(2))]
    assert length(fit_law(fitted, random_TC, 4, rounds=0).bits(paid)) >= alone - 1e-3
    x_TD = torch.randn(len(fitted), 5, generator=seeded(3))
    for law in fit_classes(fitted, x_TD, torch.arange(len(fitted)) // 500, 4, looks_back=True):
        assert length(law.bits(paid)) >= alone - 0.01


def routed_supports(tokens=400):
    """Of 3 experts with 6 latents each and 2 shared ones: from 0 to 4 active, and tokens with none but shared ones."""
    generator = seeded(5)
    group_T = torch.randint(3, (tokens,), generator=generator)
    on_TL = torch.rand(tokens, 8, generator=generator) < torch.tensor([0.5, 0.2, 0.4, 0.1, 0.05, 0.3, 0.1, 0.1])
    on_TL &= on_TL.cumsum(1) <= 4
    group_T = torch.where(on_TL[:, 2:].any(1), group_T, 3)
    return Supports(torch.where(on_TL, torch.arange(8), 8).sort(1).values[:, :4], group_T, torch.arange(tokens) // 20, 8, 4, 4, 2)


def written(fitted, paid, law, value_law, values):
    """(bits written, bits claimed): everything of `paid` is sent, received, and compared."""
    levels_TK = value_law.quantizer.levels(values)
    first_T = torch.diff(paid.context_T, prepend=torch.tensor([-1])) != 0
    sender, line = Sender(), SupportLine(law, paid.num_groups)
    tokens = [
        (int(paid.group_T[t]), [latent for latent in paid.local_TK[t].tolist() if latent < paid.num_latents], bool(first_T[t]))
        for t in range(len(paid))
    ]
    for t, (group, latents, first) in enumerate(tokens):
        line.transmit(sender, first, (group, latents))
        transmit_levels(sender, value_law, values.latent_TK[t, : len(latents)].tolist(), values.num_latents, levels_TK[t].tolist())
    message = sender.message()
    receiver, line = Receiver(message), SupportLine(law, paid.num_groups)
    for t, (group, latents, first) in enumerate(tokens):
        got = line.transmit(receiver, first)
        assert got == (group, latents), t
        numbers = [group * 8 + latent for latent in got[1]]  # a receiver knows which latents these are
        assert transmit_levels(receiver, value_law, numbers, values.num_latents) == levels_TK[t, : len(latents)].tolist(), t
    return len(message), float(sum(bits.sum() for bits in law.bits(paid)) + value_law.bits(values).sum())


def values_for(supports):
    value_TK = -torch.rand(supports.local_TK.shape, generator=seeded(7)).log() * (1 + supports.local_TK)
    active_TK = supports.local_TK < supports.num_latents
    latent_TK = (supports.group_T[:, None] * 8 + supports.local_TK).masked_fill(~active_TK, 0)
    return Values(value_TK.masked_fill(~active_TK, 0.0), latent_TK, torch.ones_like(value_TK), torch.zeros_like(active_TK), 32)


@pytest.mark.parametrize(
    ("per_group", "looks_back", "way"), [(1, False, "after the gate"), (1, True, "running"), (2, False, "running"), (2, True, "after the gate")]
)
def test_claimed_bits_can_be_written_and_are_read_exactly(per_group, looks_back, way):
    fitted, paid = halves(routed_supports())
    start_TC = torch.rand(len(fitted), 4 * per_group, generator=seeded())
    law = fit_law(fitted, start_TC, per_group, looks_back=looks_back, rounds=3)
    values = values_for(paid)
    got, claimed = written(fitted, paid, law, fit_values(values_for(fitted), 1.0, (way,)), values)
    assert got == pytest.approx(claimed, rel=0.01) and claimed > 1500


def test_constriction_writes_them_too():
    constriction = pytest.importorskip("constriction")
    np = pytest.importorskip("numpy")
    fitted, paid = halves(routed_supports())
    law = fit_law(fitted, routes_alone(fitted))
    tokens = [(int(group), [m for m in row.tolist() if m < 8]) for group, row in zip(paid.group_T, paid.local_TK, strict=True)]
    model = constriction.stream.model.Bernoulli()

    class Coder:
        def __init__(self, words=None):
            stream = constriction.stream.queue
            self.stream = stream.RangeEncoder() if words is None else stream.RangeDecoder(words)

        def decide(self, chance, happens=None):
            chance_1 = np.array([min(max(float(chance), 1e-9), 1 - 1e-9)])
            if happens is None:
                return bool(self.stream.decode(model, chance_1)[0])
            self.stream.encode(np.array([int(happens)], dtype=np.int32), model, chance_1)
            return happens

    sender, line = Coder(), SupportLine(law, 4)
    for token in tokens:
        line.transmit(sender, True, token)
    words = sender.stream.get_compressed()
    receiver, line = Coder(words), SupportLine(law, 4)
    assert [line.transmit(receiver, True) for _ in tokens] == tokens
    assert 32 * len(words) == pytest.approx(length(law.bits(paid)) * len(paid), rel=0.01, abs=64)


def test_quantised_values_cost_their_entropy_and_read_back_within_the_step():
    mean_M = 2.0 ** torch.linspace(-2, 3, 32)
    latent_TK = torch.randint(32, (LONG, 4), generator=seeded())
    value_TK = -torch.rand(LONG, 4, generator=seeded(1)).log() * mean_M[latent_TK]
    values = Values(value_TK, latent_TK, torch.ones_like(value_TK), torch.zeros_like(value_TK) > 1, 32)
    fitted, paid = values[torch.arange(LONG // 2)], values[torch.arange(LONG // 2, LONG)]
    for step in (0.25, 1.0):
        stay_M = (-step / mean_M.double()).exp()
        known = 4 * float((-((1 - stay_M).log2() + stay_M / (1 - stay_M) * stay_M.log2())).mean())
        law = fit_values(fitted, step)
        assert law.way == "after the gate"
        assert float(law.bits(paid).mean()) == pytest.approx(known, rel=0.01)
        read_TK = law.quantizer.read(law.quantizer.levels(paid), paid.active_TK)
        error_TK = read_TK - paid.value_TK
        assert float(error_TK.abs().max()) < step and float(error_TK.square().mean()) < 1.02 * step**2 / 12
    chance_Q = law.levels.probability(torch.arange(5000), torch.zeros(5000, dtype=torch.int64))
    assert float(chance_Q.sum()) == pytest.approx(1, abs=1e-5) and float(chance_Q.min()) > 0
    one = Values(torch.full((1, 1), 1e6), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1), torch.ones(1, 1) > 1, 32)
    assert 20 < float(law.bits(one)) < 80


def test_a_gate_that_multiplies_all_values_is_coded_once():
    gate_T = 2.0 ** torch.randint(-4, 1, (LONG, 1), generator=seeded()).float() * 0.9
    latent_TK = torch.randint(16, (LONG, 6), generator=seeded(2))
    before_TK = 4 + torch.rand(LONG, 6, generator=seeded(1))
    values = Values(gate_T * before_TK, latent_TK, gate_T.expand(-1, 6), torch.ones(LONG, 6) > 0, 16)
    law = fit_values(values, 0.25)
    assert law.way == "gate once"
    ungated = fit_values(values, 0.25, ("after the gate",))
    assert float(law.bits(values).mean()) < float(ungated.bits(values).mean()) - 5
    assert float(law.gate_bits(values).mean()) == pytest.approx(2, abs=0.1)


def test_water_filling_equals_the_formula_and_charges_for_other_variances():
    generator = seeded()
    x_TD = (torch.randn(4000, 5, generator=generator) * torch.tensor([3.0, 2.0, 1.0, 0.5, 0.1])) @ torch.linalg.qr(
        torch.randn(5, 5, generator=generator)
    )[0]
    law, document_T, level_H = ResidualLaw.fit(x_TD), torch.arange(4000) // 2000, torch.tensor([0.05, 0.5, 2.0, 20.0], dtype=torch.float64)
    tokens_N = torch.full((2,), 2000.0, dtype=torch.float64)
    energy_ND = law.energies(x_TD, document_T, 2)
    bits_NH, error_NH = law.curve(energy_ND, tokens_N, level_H)
    variance_D = law.variance_D
    for place, level in enumerate(level_H.tolist()):
        assert float(bits_NH[:, place].sum()) / 4000 == pytest.approx(float((0.5 * (variance_D / level).log2()).clamp(min=0).sum()), abs=1e-4)
        assert float(error_NH[:, place].sum()) / 4000 == pytest.approx(float(variance_D.clamp(max=level).sum()), rel=1e-4)
    wider, _ = law.curve(4 * energy_ND, tokens_N, level_H)
    level, own = float(level_H[0]), 4 * variance_D
    a, out = 1 - level / variance_D, variance_D - level
    kept = a > 0
    cost = 0.5 * ((out / (a * level)).log2() + ((a**2 * own + a * level) / out - 1) / math.log(2))
    assert float(wider[:, 0].sum()) / 4000 == pytest.approx(float(cost[kept].sum()), rel=1e-4)


def test_a_curve_is_read_between_its_levels_and_asks_no_residual_of_what_is_exact_enough():
    curve = Curve(torch.tensor([[90.0, 40, 10], [10, 0, 0]]).double(), torch.tensor([[0.1, 0.4, 1.6], [0.1, 0.4, 1.6]]).double())
    (bits_P,) = curve.at(
        torch.tensor([0.01, 0.02 + 1e-9, 0.04, 0.16, 0.5]).double(), torch.ones(1, 2).double(), torch.tensor([5.0, 5.0]).double(), 1.0
    )
    assert bits_P.tolist() == [math.inf, pytest.approx(10.0, abs=1e-4), pytest.approx(7.0), pytest.approx(2.5), pytest.approx(1.0)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two seeds of a dense and of a Switch SAE on the same activations."""
    folder = tmp_path_factory.mktemp("lengths")
    source = SyntheticSource.Config(d_in=16, common=4, topics=4, per_topic=6, common_active=1.0, topic_active=2.0)
    saes = [TopKSAE.Config(num_latents=32, k=4), SwitchSAE.Config(num_latents=32, k=4, num_experts=4)]
    runs = [tiny_run(folder, sae, seed, source=source, baselines=[]) for sae in saes for seed in (0, 1)]
    return collect([run.path for run in runs])


SMALL = {"rows": 400, "distortions": [0.1, 0.3], "shown": 0.3}


def test_every_total_is_the_sum_of_its_parts_and_every_saving_a_difference(runs):
    table = analyze("mdl", runs, SMALL)
    assert all(list(record) == list(table[0]) for record in table)
    assert not [record for record in table if record["value"] is None]
    totals = {(r["sae"], r["measure"], r["at"]): r["value"] for r in chosen(table, part="total")}
    supports = {(r["sae"], r["measure"]): r for r in chosen(table, part="support", against="support")}
    assert {code for _, code, _ in totals} == {UNIFORM, "independent", EXACT, "4 classes", "8 classes"}
    for row in runs:
        for at in SMALL["distortions"]:
            parts = {r["measure"]: r for r in chosen(table, part="parts", sae=row.name, at=at)}
            code = parts["route"]["against"]
            assert sum(parts[part]["value"] for part in ("route", "support", "values", "residual")) == pytest.approx(totals[row.name, code, at])
            assert parts["route"]["value"] + parts["support"]["value"] == pytest.approx(supports[row.name, code]["value"])
            assert parts["residual"]["value"] >= 0 and (parts["route"]["value"] > 0) == (row.num_experts > 1)
        record = supports[row.name, EXACT]
        assert record["low"] <= record["value"] <= record["high"] and record["n"] == 200
    saved = chosen(table, part="saved", at=0.3, measure=WITH_CLASSES)
    assert [(r["seed"], r["note"]) for r in saved] == [(0, "exact k; dense: 4 classes"), (1, "exact k; dense: 4 classes")]
    for record in saved:
        assert record["value"] == pytest.approx(totals[record["against"], "4 classes", 0.3] - totals[record["sae"], EXACT, 0.3])
    (both,) = chosen(table, part="saved over seeds", at=0.3, measure=WITH_CLASSES)
    assert both["value"] == pytest.approx(sum(r["value"] for r in saved) / 2) and both["n"] == 2
    assert both["high"] - both["value"] == pytest.approx(12.7062 * abs(saved[0]["value"] - saved[1]["value"]) / 2, rel=1e-4)
    analysis = build_analysis("mdl", SMALL)
    assert analysis.compute(runs, source_of(runs[0])) == table
    assert len(analysis.draw(table).axes) == 3 and {r["part"] for r in analysis.shown(table)} == {"total", "saved", "saved over seeds"}
    null = chosen(table, part="total", at=0.3)[0]
    assert null["null"] > 0 and null["null_low"] <= null["null"] <= null["null_high"]


def test_the_supports_of_a_switch_sae_are_those_of_its_expert_whatever_the_order_of_slots(runs):
    sample, (one,) = observe(runs[-1:] if runs[-1].num_experts > 1 else runs[:1], source_of(runs[0]), 100)
    supports = supports_of(sample, one)
    order_TK = torch.rand(one.latents.values_TK.shape, generator=seeded()).argsort(1)
    shuffled = SparseLatents(one.latents.values_TK.gather(1, order_TK), one.latents.indices_TK.gather(1, order_TK), 32)
    other = supports_of(sample, Seen(one.row, one.sae, shuffled, one.recon_TD, one.routing))
    assert torch.equal(supports.local_TK, other.local_TK) and torch.equal(supports.group_T, other.group_T)
    for t in range(100):
        active = one.latents.to_dense()[t].nonzero()[:, 0].tolist()
        assert [int(supports.group_T[t]) * 8 + m for m in supports.local_TK[t].tolist() if m < 8] == active
        assert not active or int(supports.group_T[t]) == int(one.expert_T()[t])


def test_codes_of_any_number_of_latents_and_shared_ones_have_lengths(tmp_path):
    source = SyntheticSource.Config(d_in=16, common=4, topics=4, per_topic=6, common_active=1.0, topic_active=2.0)
    saes = [
        *(BatchTopKSAE.Config(num_latents=32, k=4), ReLUSAE.Config(num_latents=32)),
        SwitchRefitSAE.Config(num_latents=36, k=4, num_experts=4, shared=4),
    ]
    rows = collect([tiny_run(tmp_path / str(n), sae, source=source, baselines=[]).path for n, sae in enumerate(saes)])
    table = analyze("mdl", rows, SMALL)
    assert len(chosen(table, part="saved", measure=EXACT, at=0.3)) == 2
    for record in chosen(table, part="total", measure=EXACT):
        assert 0 < record["value"] < 1000


def test_what_has_no_length_is_refused_or_said(runs, tmp_path):
    alone = analyze("mdl", runs[:1], SMALL)
    (missing,) = chosen(alone, part="saved")
    assert missing["value"] is None and missing["note"] == "needs a dense SAE and one with experts among the runs"
    assert len(build_analysis("mdl", SMALL).draw(alone).axes) == 3
    two = SwitchSAE.Config(num_latents=32, k=4, num_experts=4, experts_per_token=2)
    with pytest.raises(ValueError, match="takes 2 experts per token; description lengths are known for one"):
        analyze("mdl", collect([tiny_run(tmp_path, two, baselines=[]).path]), SMALL)
    with pytest.raises(ValueError, match=r"distortions=\[0.0\] must be shares of the variance between 0 and 1"):
        build_analysis("mdl", {"distortions": [0], "shown": 0})
    with pytest.raises(ValueError, match=r"shown=0.5 must be one of distortions"):
        build_analysis("mdl", {"shown": 0.5})
    with pytest.raises(ValueError, match="classes=1 must be at least 2"):
        build_analysis("mdl", {"classes": 1})
