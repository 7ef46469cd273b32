"""One threshold for a whole batch over all candidates, as masked latents, and the costs of what they decode to, against brute force."""

import pytest
import torch
from test_batch_select import experts_of, pre_activations, sorted_by
from torch import Tensor

from switch_kernels.gpu.batch_mask import batch_threshold, keep_reaching, row_losses
from switch_sae.models.pairs import largest

pytestmark = pytest.mark.usefixtures("poisoned_memory")
EXPERTS = 3


def problem(tokens: int, rivals: int, columns: int, kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(pre-activations of T + n tokens, their experts, the order of their rows, the same in that order with padding of NaN)."""
    pre_RC = pre_activations(tokens + rivals, columns, kind)
    expert_R = torch.cat([experts_of(tokens, EXPERTS), (experts_of(tokens, EXPERTS)[:rivals] + 2) % EXPERTS])
    order_N = sorted_by(expert_R, EXPERTS).order_N
    pre_NF = torch.full((len(order_N), -(-columns // 16) * 16), torch.nan)
    pre_NF[order_N >= 0, :columns] = pre_RC[order_N[order_N >= 0].long()]
    return pre_RC, expert_R, order_N, pre_NF


@pytest.mark.parametrize("kind", ["normal", "ties", "few", "zero", "wide"])
@pytest.mark.parametrize(("columns", "count", "rivals", "gates"), [(40, 60, 0, False), (33, 7, 5, False), (1100, 3000, 4, False), (20, 400, 0, True)])
def test_what_reaches_the_threshold_of_a_batch_is_kept(columns, count, rivals, gates, kind):
    tokens = 21
    pre_RC, expert_R, order_N, pre_NF = problem(tokens, rivals, columns, kind)
    gate_T = torch.rand(tokens, generator=torch.Generator().manual_seed(2)) if gates else None
    score_TC = pre_RC[:tokens] * (1 if gate_T is None else gate_T[:, None])
    chosen_P = largest(score_TC, count)
    for guess in (0.7, 0.0, 1e9, -1.0, torch.nan) if columns == 40 else (0.7,):  # near, or nowhere near
        theta = batch_threshold(pre_NF, columns, order_N, gate_T, tokens, count, torch.tensor(guess))
        assert torch.equal(theta, score_TC.flatten()[chosen_P].min()) if len(chosen_P) else theta.isnan()
    bound = torch.tensor(0.7)
    z_NF, fired_M1 = keep_reaching(pre_NF, columns, order_N, expert_R, gate_T, theta, bound, tokens, EXPERTS * columns, torch.float32)
    kept_TC = (score_TC >= theta) & (score_TC > 0)
    expected_RC = torch.where(torch.cat([kept_TC, pre_RC[tokens:] > bound]), pre_RC, 0.0)
    expected_NF = torch.zeros_like(z_NF)
    expected_NF[order_N >= 0, :columns] = expected_RC[order_N[order_N >= 0].long()]
    assert torch.equal(z_NF, expected_NF)
    fired_M = torch.zeros(EXPERTS, columns, dtype=torch.bool)
    for expert, kept in zip(expert_R[:tokens].long(), kept_TC, strict=True):
        fired_M[expert] |= kept
    assert torch.equal(fired_M1[:-1] > 0, fired_M.flatten()) and fired_M1[-1] == kept_TC.sum()
    assert kept_TC.sum() >= len(chosen_P) and (kind == "ties" or kept_TC.sum() == len(chosen_P))


@pytest.mark.parametrize(("D", "rivals", "gates"), [(20, 5, False), (137, 0, True), (16, 0, False)])
def test_costs_and_gradients_of_rows(D, rivals, gates):
    tokens, generator = 19, torch.Generator().manual_seed(D)
    order_N = problem(tokens, rivals, 8, "normal")[2]
    width = -(-D // 8) * 8
    y_ND, x_TD = torch.randn(len(order_N), width, generator=generator), torch.randn(tokens, D, generator=generator)
    b_D, scale = torch.randn(D, generator=generator), torch.tensor(0.3)
    gate_T = torch.rand(tokens, generator=generator) if gates else None
    loss = row_losses(y_ND, order_N, tokens + rivals, gate_T, x_TD, scale, b_D, 0.25, torch.float32)
    real_N = order_N >= 0
    pair_P = order_N[real_N].long()
    gate_P = torch.ones(len(pair_P)) if gate_T is None else gate_T[pair_P]
    error_PD = gate_P[:, None] * y_ND[real_N, :D] + b_D - scale * x_TD[pair_P % tokens]
    expected_R = torch.zeros(tokens + rivals).index_copy(0, pair_P, error_PD.square().sum(dim=1))
    torch.testing.assert_close(loss.square_parts, expected_R)
    own_PD = torch.where((pair_P < tokens)[:, None], 0.25 * error_PD, 0.0)
    expected_ND = torch.zeros_like(y_ND)
    expected_ND[real_N, :D] = own_PD * gate_P[:, None]
    torch.testing.assert_close(loss.grad_rows_ND, expected_ND)
    torch.testing.assert_close(loss.column_sums.sum(dim=0), own_PD.sum(dim=0))
