"""Weight gradients latent by latent, and the update that forms them again, against sums over pairs in float64."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from switch_kernels.gpu import pairs as pairs_module
from switch_kernels.gpu.extra import Extra
from switch_kernels.gpu.launch import round_up
from switch_kernels.gpu.pairs import LatentGradients, Terms, division, latent_gradients, pairs_by_latent, update_from_pairs_
from switch_kernels.gpu.sparse import TokenLoss
from switch_kernels.gpu.update import MatrixState, update_rows_

pytestmark = pytest.mark.usefixtures("poisoned_memory")

HALF_ULP = torch.finfo(torch.bfloat16).eps / 2
HYPER = torch.tensor([1e-2, 0.9, 0.999, 1 / 0.1, 1 / 0.001, 0.5])


@dataclass
class Problem:
    indices_TK: Tensor
    loss: TokenLoss
    rows_ND: Tensor
    row_R: Tensor
    slot_TK: Tensor | None
    M: int
    D: int
    S: int

    def run(self, out: torch.dtype | None, extra_dec: Extra | None = None, extra_enc: Extra | None = None) -> LatentGradients:
        order = pairs_by_latent(self.indices_TK, self.M)
        decoder = Terms(self.loss.weights_TK, self.loss.grad_TD, self.D, extra=extra_dec)
        slot_TK = self.slot_TK if self.S > 1 else None
        encoder = Terms(self.loss.grad_pre_TK, self.rows_ND, self.D, self.row_R, slot_TK, self.S, extra_enc)
        return latent_gradients(order, decoder, encoder, out)

    def truth(self) -> tuple[Tensor, Tensor, Tensor]:
        """dW_dec, dW_enc, db_enc in float64."""
        T, K = self.indices_TK.shape
        slot_TK = self.slot_TK.long() if self.slot_TK is not None else (torch.arange(K) // (K // self.S)).expand(T, K)
        token_TK = torch.arange(T)[:, None].expand(T, K)
        row_TK = self.row_R.long()[token_TK * self.S + slot_TK]
        grads = []
        for weights_TK, table in ((self.loss.weights_TK, self.loss.grad_TD[token_TK]), (self.loss.grad_pre_TK, self.rows_ND[row_TK])):
            terms_TKD = weights_TK.double()[:, :, None] * table[:, :, : self.D].double()
            grads.append(torch.zeros(self.M, self.D, dtype=torch.float64).index_add_(0, self.indices_TK.flatten().long(), terms_TKD.flatten(0, 1)))
        bias_M = torch.zeros(self.M, dtype=torch.float64)
        return grads[0], grads[1], bias_M.index_add_(0, self.indices_TK.flatten().long(), self.loss.grad_pre_TK.double().flatten())


def make_problem(
    T: int, D: int, M: int, K: int, S: int = 1, slot: str = "neighbours", dtype: torch.dtype = torch.float32, hot: int = 0, seed: int = 0
) -> Problem:
    """Latents below M / 4 are silent; the last `hot` are active on every token. Pad columns and rows of no pair are NaN."""
    generator = torch.Generator().manual_seed(seed)
    chance_TM = torch.rand(T, M, generator=generator)
    chance_TM[:, : M // 4] = -1
    chance_TM[:, M - hot :] += 1
    R, DP = T * S, round_up(D, 8)

    def padded(rows: int) -> Tensor:
        out = torch.full((rows, DP), float("nan"))
        out[:, :D] = torch.randn(rows, D, generator=generator)
        return out.to(dtype)

    row_R = torch.randperm(R + 5, generator=generator)[:R].int()
    rows_ND = padded(R + 5)
    unused = torch.ones(R + 5, dtype=torch.bool)
    unused[row_R.long()] = False
    rows_ND[unused] = float("nan")
    loss = TokenLoss(padded(T), torch.rand(T, K, generator=generator), torch.randn(T, K, generator=generator), None, torch.zeros(T))
    slot_TK = torch.randint(0, S, (T, K), generator=generator, dtype=torch.int32) if slot == "given" else None
    return Problem(chance_TM.topk(K).indices.int(), loss, rows_ND, row_R, slot_TK, M, D, S)


def make_extra(M: int, D: int, seed: int) -> Extra:
    generator = torch.Generator().manual_seed(seed)
    slot_M = torch.full((M,), -1, dtype=torch.int32)
    slot_M[torch.randperm(M, generator=generator)[:3]] = torch.tensor([2, 0, 1], dtype=torch.int32)
    return Extra(slot_M, torch.randn(3, D, generator=generator))


def added(extra: Extra, rows: Tensor) -> Tensor:
    """`rows` of the extra at each latent, zero where it has none."""
    taken = rows.double()[extra.slot_M.clamp(min=0).long()]
    return torch.where((extra.slot_M >= 0).reshape(-1, *[1] * (rows.dim() - 1)), taken, 0.0)


def check(problem: Problem, out: torch.dtype | None, extra_dec: Extra | None = None, extra_enc: Extra | None = None) -> LatentGradients:
    found = problem.run(out, extra_dec, extra_enc)
    decoder_MD, encoder_MD, bias_M = problem.truth()
    if extra_dec is not None:
        decoder_MD = decoder_MD + added(extra_dec, extra_dec.rows_AD)
    if extra_enc is not None:
        encoder_MD = encoder_MD + added(extra_enc, extra_enc.rows_AD)
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(found.bias_M.double(), bias_M, **close)
    squares = torch.stack([decoder_MD, encoder_MD]).square().sum(2)
    torch.testing.assert_close(found.square_parts.double(), squares, **close)
    for actual, expected in ((found.decoder_MD, decoder_MD), (found.encoder_MD, encoder_MD)):
        if out is None:
            assert actual is None
        else:
            assert actual is not None and actual.dtype == out
            torch.testing.assert_close(actual.double(), expected, atol=2e-5, rtol=1.01 * HALF_ULP if out == torch.bfloat16 else 1e-5)
    return found


def test_pairs_are_sorted_by_latent_in_token_order() -> None:
    for M, key in ((6, torch.int16), (2**15, torch.int16), (2**15 + 1, torch.int32)):
        indices_TK = torch.tensor([[3, M - 1], [0, 3], [M - 1, 3]], dtype=torch.int32)
        order = pairs_by_latent(indices_TK, M)
        assert order.pair_P.tolist() == [2, 0, 3, 5, 1, 4] and order.pair_P.dtype == torch.int32
        assert order.latent_P.tolist() == [0, 3, 3, 3, M - 1, M - 1] and order.latent_P.dtype == key
        assert order.start_M1[[0, 1, 2, 3, 4, M - 1, M]].tolist() == [0, 1, 1, 1, 4, 4, 6] and order.start_M1.dtype == torch.int32


def test_pairs_are_divided_exactly() -> None:
    for divisor in (*range(1, 300), 1023, 1024, 65537, 2**31 - 1):
        multiplier, shift = division(divisor)
        quotients = {0, 1, 2, 77, (2**31 - 1) // divisor}
        pairs = [p for q in quotients for p in (q * divisor - 1, q * divisor, q * divisor + divisor - 1) if 0 <= p < 2**31] + [2**31 - 1]
        assert [p * multiplier >> shift for p in pairs] == [p // divisor for p in pairs]
        assert max(pairs) * multiplier < 2**63


@pytest.mark.parametrize(
    ("T", "D", "M", "K", "S", "slot", "dtype"),
    [
        (1, 7, 4, 1, 1, "neighbours", torch.float32),
        (9, 33, 12, 5, 1, "neighbours", torch.float32),
        (9, 200, 12, 5, 1, "neighbours", torch.bfloat16),
        (7, 40, 10, 6, 3, "neighbours", torch.float32),
        (7, 33, 10, 5, 2, "given", torch.bfloat16),
    ],
)
def test_gradients_are_sums_over_pairs(T: int, D: int, M: int, K: int, S: int, slot: str, dtype: torch.dtype) -> None:
    problem = make_problem(T, D, M, K, S, slot, dtype)
    check(problem, dtype)
    check(problem, None)


@pytest.mark.parametrize("chunk", [4, 16])
def test_long_segments_are_split(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs_module, "CHUNK", chunk)
    check(make_problem(35, 12, 6, 3, hot=2), torch.float32)


def test_one_latent_owns_every_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs_module, "CHUNK", 8)
    for T in (1, 8, 16, 17):
        problem = make_problem(T, 12, 3, 1, hot=1)
        assert (problem.indices_TK == 2).all()
        check(problem, torch.float32)


def test_extra_rows_are_added_before_squares_are_taken() -> None:
    problem = make_problem(9, 33, 8, 2)
    check(problem, torch.float32, make_extra(8, 33, 1), make_extra(8, 33, 2))
    check(problem, None, None, make_extra(8, 33, 3))


def states(M: int, D: int, moments: torch.dtype) -> list[MatrixState]:
    """Decoder and encoder."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for unit_norm in (True, False):
        weight_MD = torch.nn.functional.normalize(torch.randn(M, D, generator=generator), dim=1)
        exp_avg = torch.randn(M, D, generator=generator).mul_(0.1).to(moments)
        exp_avg_sq = torch.rand(M, D, generator=generator).to(moments)
        found.append(MatrixState(weight_MD, exp_avg, exp_avg_sq, torch.zeros(M, round_up(D, 8), dtype=torch.bfloat16), unit_norm))
    return found


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("D", "S", "extra"), [(33, 1, True), (200, 2, False)])
def test_the_second_pass_updates_as_from_stored_gradients(D: int, S: int, extra: bool, moments: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are formed by the same additions, and rounding draws the same random bits."""
    monkeypatch.setattr(pairs_module, "CHUNK", 8)
    M = 8
    problem = make_problem(18, D, M, 2, S, hot=1)
    extras = (make_extra(M, D, 1), make_extra(M, D, 2)) if extra else (None, None)
    seed = torch.tensor([7], dtype=torch.int32)
    stored, recomputed = problem.run(torch.float32, *extras), problem.run(None, *extras)
    assert torch.equal(stored.square_parts, recomputed.square_parts) and torch.equal(stored.bias_M, recomputed.bias_M)
    total = stored.square_parts.sum()
    from_memory, from_pairs = states(M, D, moments), states(M, D, moments)
    before_MD = from_pairs[0].weight_MD.clone()
    update_from_pairs_(recomputed, *from_pairs, HYPER, total, seed)
    for state, grad_MD in zip(from_memory, (stored.decoder_MD, stored.encoder_MD), strict=True):
        assert grad_MD is not None
        update_rows_(state, grad_MD, HYPER, total, seed)
    assert not torch.equal(from_pairs[0].weight_MD, before_MD)
    for one, other in zip(from_memory, from_pairs, strict=True):
        assert torch.equal(one.exp_avg_sq, other.exp_avg_sq)
        torch.testing.assert_close(one.exp_avg, other.exp_avg, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(one.weight_MD, other.weight_MD, atol=1e-6, rtol=1e-6)
        assert other.operand_MD is not None and torch.equal(other.operand_MD[:, :D], other.weight_MD.bfloat16())


def test_a_norm_that_is_not_finite_changes_nothing() -> None:
    problem = make_problem(5, 12, 6, 2)
    updated, before = states(6, 12, torch.float32), states(6, 12, torch.float32)
    update_from_pairs_(problem.run(None), *updated, HYPER, torch.tensor(float("nan")))
    for one, other in zip(updated, before, strict=True):
        assert torch.equal(one.weight_MD, other.weight_MD) and torch.equal(one.exp_avg, other.exp_avg)


def test_twice_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs_module, "CHUNK", 8)
    problem = make_problem(18, 33, 8, 2, dtype=torch.bfloat16, hot=1)
    first, second = problem.run(torch.bfloat16), problem.run(torch.bfloat16)
    for name in ("decoder_MD", "encoder_MD", "bias_M", "square_parts"):
        assert torch.equal(getattr(first, name), getattr(second, name))


@pytest.mark.parametrize("M", [7, 2**15, 40_000, 70_000])
def test_pairs_without_a_mark_belong_to_no_latent(M):
    """Keys of 16 bits up to M = 2^16 - 1, which hold one more number than latents."""
    generator = torch.Generator().manual_seed(0)
    indices_TK = torch.randint(M, (300, 4), generator=generator, dtype=torch.int32)
    indices_TK[::9] = M - 1
    marks_TK = (torch.rand(300, 4, generator=generator) - 0.5).clamp_min(0)
    found = pairs_by_latent(indices_TK, M, marks_TK)
    marked_P = (marks_TK > 0).flatten().nonzero()[:, 0]
    of_latents = indices_TK.flatten()[marked_P].sort(stable=True)
    assert torch.equal(found.pair_P[: len(marked_P)].long(), marked_P[of_latents.indices])
    assert torch.equal(found.start_M1.long(), torch.searchsorted(of_latents.values, torch.arange(M + 1, dtype=torch.int32)))
    assert found.start_M1[-1] == len(marked_P) and (found.latent_P[len(marked_P) :] == found.nobody).all()


def test_chunks_of_nobodys_pairs_are_not_summed():
    """Their rows are not even read: here they would be NaN."""
    indices_TK, marks_TK = torch.zeros(600, 1, dtype=torch.int32), torch.zeros(600, 1)
    indices_TK[:5], marks_TK[:5] = 2, 1.0
    table = torch.full((600, 16), torch.nan)
    table[:5] = 1.0
    grads = latent_gradients(pairs_by_latent(indices_TK, 4, marks_TK), Terms(marks_TK, table, 16), None, torch.float32)
    expected_MD = torch.zeros(4, 16)
    expected_MD[2] = 5.0
    assert torch.equal(grads.decoder_MD, expected_MD) and grads.encoder_MD is None and grads.bias_M is None
    assert torch.equal(grads.square_parts, expected_MD.square().sum(1)[None])
