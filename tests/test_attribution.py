"""Every architecture's output is taken apart exactly, or the refusal says in words why not."""

import pytest
import torch
from configs import CONTRACTS

from switch_sae.models import SAES
from switch_sae.models.attribution import attribute
from switch_sae.rows import Rows
from switch_sae.training import prepare

D = 8
REFUSED = {
    "batch_topk": "gives DenseLatents, which list no active latents",
    "kron": "has no one encoder row",
    "switch_pursuit": "needs a TopK SAE's encoder",
}


@pytest.mark.parametrize("name", [name for name in CONTRACTS if "transcoder" not in name])  # they have tests of their own
def test_the_parts_sum_to_the_whole_or_the_refusal_says_why(name):
    config = CONTRACTS[name]
    sae = SAES[SAES.key_of(config)](config, D, torch.Generator().manual_seed(0)).double()
    x_TD = torch.randn(64, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    prepare(sae, Rows.of(x_TD), True)
    direction_D = torch.linspace(-1, 1, D, dtype=torch.float64)
    try:
        found = attribute(sae.eval(), Rows.of(x_TD), direction_D)
    except ValueError as error:
        assert type(sae).__name__ in str(error)
        assert REFUSED.get(name, "") in str(error)
    else:
        assert name not in REFUSED
        torch.testing.assert_close(found.total_T, x_TD @ direction_D)
