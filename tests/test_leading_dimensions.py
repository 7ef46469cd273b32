"""SAEs take [batch, position, d_in] or any other leading dimensions and keep them, and carry the names that other libraries use."""

import pytest
import torch
from configs import CONTRACTS

from switch_sae.models import SAES, DenseLatents, SparseLatents
from switch_sae.models.topk import TopKSAE
from switch_sae.rows import Rows
from switch_sae.runs import load_sae, save_sae
from switch_sae.training import prepare

D = 12


@pytest.fixture(params=list(CONTRACTS))
def sae(request):
    sae = SAES.build(CONTRACTS[request.param], D, torch.Generator().manual_seed(1))
    prepare(sae, Rows.of(torch.randn(256, D, generator=torch.Generator().manual_seed(2)) + 1), normalize_activations=True)
    return sae.eval()


@pytest.mark.parametrize("leading", [(3, 4, 5), (2, 7), (0, 4), (3, 0), ()], ids=str)
@torch.no_grad()
def test_leading_dimensions_are_kept(sae, leading):
    x = torch.randn(*leading, D, generator=torch.Generator().manual_seed(3))
    output, rows = sae(x), sae(x.reshape(-1, D))
    latents = sae.encode(x)
    assert output.recon_TD.shape == x.shape and torch.equal(output.recon_TD.reshape(-1, D), rows.recon_TD)
    assert latents.leading == output.latents.leading == leading and latents.to_dense().shape == (*leading, sae.num_latents)
    assert torch.equal(latents.to_dense(), rows.latents.to_dense().reshape(*leading, sae.num_latents))
    assert torch.equal(sae.decode(latents), output.recon_TD) and torch.equal(sae(x_TD=x).recon_TD, output.recon_TD)
    torch.testing.assert_close(sae.decode(latents.to_dense()), output.recon_TD)
    some = torch.tensor([5, 0, 17])
    assert torch.equal(latents.select(some), latents.to_dense()[..., some]) and torch.equal(latents.firing_counts(), rows.latents.firing_counts())
    if output.routing is not None:
        assert output.routing.expert_TS.shape[:-1] == output.routing.probs_TE.shape[:-1] == leading
        assert torch.equal(output.routing.gate_TS.reshape(rows.routing.gate_TS.shape), rows.routing.gate_TS)


def test_gradients_of_active_latents_flow_through_any_shape(sae):
    x = torch.randn(2, 3, D, generator=torch.Generator().manual_seed(4))
    dense = sae.encode(x).to_dense().detach().requires_grad_()
    sae.decode(dense).sum().backward()
    is_active = dense != 0
    expected = (sae.W_dec.sum(1) / sae.target_scale).expand_as(dense)
    assert is_active.any()
    torch.testing.assert_close(dense.grad[is_active], expected[is_active])


def test_it_has_the_names_that_other_libraries_use(sae):
    assert sae.W_dec.shape == (sae.num_latents, D) and sae.W_enc.shape == (D, sae.num_latents)
    assert sae.b_enc.shape == (sae.d_sae,) == (sae.num_latents,) and sae.b_dec.shape == (D,)
    assert sae.cfg is sae.config and (sae.device.type, sae.dtype) == ("cpu", torch.float32)
    assert sae.W_dec is sae.decoder_weight()


@torch.no_grad()
def test_the_names_make_a_dense_sae_by_hand():
    sae = TopKSAE(TopKSAE.Config(num_latents=32, k=4), D, torch.Generator().manual_seed(5))
    prepare(sae, Rows.of(torch.randn(256, D, generator=torch.Generator().manual_seed(6))), normalize_activations=True)
    sae.b_enc_M.copy_(torch.randn(32, generator=torch.Generator().manual_seed(7)) / 10)
    sae.fold_activation_scale()
    x = torch.randn(5, 2, D, generator=torch.Generator().manual_seed(8))
    top = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).relu().topk(4)
    by_hand = torch.zeros(5, 2, 32).scatter(-1, top.indices, top.values)
    torch.testing.assert_close(sae.encode(x).to_dense(), by_hand)
    torch.testing.assert_close(sae(x).recon_TD, by_hand @ sae.W_dec + sae.b_dec)


def test_it_is_loaded_where_and_as_what_is_asked_for(sae, tmp_path):
    save_sae(tmp_path / "model.safetensors", sae)
    loaded = load_sae(tmp_path / "model.safetensors", device="meta", dtype=torch.float64)
    assert loaded.device.type == "meta" and loaded.dtype == torch.float64 and loaded.W_dec.dtype == torch.float64
    double = load_sae(tmp_path / "model.safetensors", dtype=torch.float64, fold=True)
    assert float(double.activation_scale) == 1 and double(torch.zeros(2, 3, D)).recon_TD.dtype == torch.float64
    with pytest.raises(ValueError, match=r"dtype=torch\.int32 holds no fractions"):
        load_sae(tmp_path / "model.safetensors", dtype=torch.int32)


def test_what_does_not_fit_is_refused_in_any_shape(sae):
    with pytest.raises(ValueError, match=r"takes \[\.\.\., d_in=12\]"):
        sae(torch.zeros(2, 3, D + 1))
    with pytest.raises(ValueError, match=r"shape \(\); this SAE takes rows \[T, d_in=12\] here"):
        sae.encode(torch.tensor(1.0))
    with pytest.raises(ValueError, match="latents of an SAE that has 13"):
        sae.decode(torch.zeros(2, 3, 13))
    with pytest.raises(ValueError, match="an SAE that has 96"):
        sae.decode(SparseLatents(torch.zeros(2, 3, 2), torch.zeros(2, 3, 2, dtype=torch.int64), 96))
    with pytest.raises(ValueError, match="not a list"):
        sae.decode([1.0])
    assert DenseLatents(torch.zeros(2, 3, 4)).leading == (2, 3)
