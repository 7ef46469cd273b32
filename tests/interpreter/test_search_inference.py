"""Evaluation of SAEs that search the dictionary of one expert per token, in kernels, against the PyTorch path in float64."""

from dataclasses import replace

import pytest
import torch

from switch_kernels import Backend, Execution, Precision
from switch_kernels.gpu import candidate_products
from switch_kernels.gpu.launch import launches_to
from switch_kernels.gpu.search import Dictionaries, select
from switch_kernels.held import on_meta
from switch_sae.models import SAES, BatchTopKSAE, PursuitSAE, SwitchPursuitSAE, SwitchRefitSAE, SwitchSAE
from switch_sae.models.inference import Inference, search_plan, why_not_searched_in_kernels, with_inference
from switch_sae.models.latents import SparseLatents
from switch_sae.rows import Rows
from switch_sae.training import prepare

pytestmark = [pytest.mark.usefixtures("poisoned_memory"), pytest.mark.whole_steps]

EXACT, LOW = (Execution(Backend.triton, precision, "test") for precision in (Precision.float32, Precision.bf16))
D, T, M, K, E, S = 13, 10, 42, 4, 3, 6
CONFIGS = {
    "pursuit": SwitchPursuitSAE.Config(num_latents=M, k=K, num_experts=E, blocks=2),
    "pursuit, shared, stop rule": SwitchPursuitSAE.Config(num_latents=M, k=K, num_experts=E, shared=S, stop=True),
    "pursuit, one dictionary": PursuitSAE.Config(num_latents=M, k=K),
    "refit": SwitchRefitSAE.Config(num_latents=M, k=K, num_experts=E, max_latents=5),
    "refit, shared": SwitchRefitSAE.Config(num_latents=M, k=K, num_experts=E, shared=S),
    "refit by its encoder": SwitchRefitSAE.Config(num_latents=M, k=K, num_experts=E, shared=S, inference="encoder"),
    "refit by pursuit": SwitchRefitSAE.Config(num_latents=M, k=K, num_experts=E, inference="pursuit"),
    "switch by refit": SwitchSAE.Config(num_latents=M, k=2 * K, num_experts=E, inference="refit"),
    "switch by pursuit": SwitchSAE.Config(num_latents=M, k=K, num_experts=E, inference="pursuit"),
}
WITH_THRESHOLD = [name for name, config in CONFIGS.items() if isinstance(config, SwitchRefitSAE.Config) or getattr(config, "stop", False)]


def activations(rows: int = T, seed: int = 0) -> torch.Tensor:
    """Near a space of few dimensions, so that least squares has negative values."""
    few_TD, basis_DD = (torch.randn(shape, generator=torch.Generator().manual_seed(seed + n)) for n, shape in enumerate(((rows, D), (D, D))))
    return few_TD @ (basis_DD * torch.linspace(0.1, 2, D)) + torch.linspace(-1, 1, D)


def built(config, search=EXACT):
    """Away from its start, and evaluating."""
    sae = SAES.build(config, D, torch.Generator().manual_seed(1))
    prepare(sae, Rows.of(activations(256, 7)), normalize_activations=True)
    with torch.no_grad():
        for n, parameter in enumerate(sae.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(n)), alpha=0.2)
        sae.W_dec_MD.div_(sae.W_dec_MD.norm(dim=1, keepdim=True))
        if sae.by_threshold:
            sae.threshold.fill_(0.3)
            if hasattr(sae, "theta"):
                sae.theta.fill_(0.5)
    sae.search = search
    return sae.eval()


@torch.no_grad()
def check(sae, x_TD):
    """The sae against its copy in float64, which PyTorch computes."""
    exact = SAES.build(sae.config, D).double().eval()
    exact.load_state_dict(sae.double().state_dict())
    sae.float()
    assert why_not_searched_in_kernels(sae) is None and why_not_searched_in_kernels(exact) is not None
    found, expected = sae(x_TD), exact(x_TD.double())
    found_TM, expected_TM = found.latents.to_dense(), expected.latents.to_dense()
    assert torch.equal(found_TM != 0, expected_TM != 0), "another support"
    torch.testing.assert_close(found_TM.double(), expected_TM, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.recon_TD.double(), expected.recon_TD, rtol=1e-4, atol=1e-5)
    assert found.latents.values.dtype == found.recon_TD.dtype == torch.float32
    if isinstance(found.latents, SparseLatents):
        values_TK, indices_TK = found.latents.values_TK, found.latents.indices_TK
        assert indices_TK.dtype == torch.int64 and values_TK.shape == indices_TK.shape == expected.latents.values_TK.shape
        assert (values_TK >= 0).all() and ((indices_TK >= 0) & (indices_TK < M)).all()
    return expected_TM


@pytest.mark.parametrize("name", list(CONFIGS))
def test_what_is_found_equals_pytorch(name):
    sae = built(CONFIGS[name])
    active_TM = check(sae, activations())
    counts_T = (active_TM > 0).sum(dim=1)
    assert counts_T.sum() > T, "hardly anything was found"
    if name in WITH_THRESHOLD:
        assert len(counts_T.unique()) > 2, "the threshold decides nothing"
    if sae.num_shared:
        assert (active_TM[:, :S] > 0).any() and (active_TM[:, S:] > 0).any()
    check(sae, activations(1))
    check(sae, activations(0))


@torch.no_grad()
def test_parts_and_other_layouts_give_the_same():
    sae, x_DD = built(CONFIGS["refit"]), activations(D)
    output, latents = sae(x_DD), sae.encode(x_DD)
    assert torch.equal(latents.values, output.latents.values) and torch.equal(sae.decode(latents), output.recon_TD)
    assert torch.equal(sae(x_DD.T.contiguous().T).recon_TD, output.recon_TD)


@pytest.mark.parametrize("name", [name for name in CONFIGS if "one dictionary" not in name])
def test_experts_may_have_no_tokens(name):
    sae = built(CONFIGS[name])
    with torch.no_grad():
        sae.router.W_ED.zero_()
        sae.router.W_ED[1, 0] = 5.0
        sae.router.b_D.zero_()
    experts = sae.route(activations())[0].expert_TS.unique()
    assert len(experts) < E
    check(sae, activations())


@pytest.mark.parametrize("name", WITH_THRESHOLD)
def test_a_threshold_may_take_nothing_or_all(name):
    sae = built(CONFIGS[name])
    sae.threshold.fill_(1e6)
    assert (check(sae, activations()) == 0).all()
    sae.threshold.fill_(0.0)
    assert (check(sae, activations()) > 0).sum() > 2 * T
    sae.train()  # where theta decides, and not the threshold
    with torch.no_grad():
        sae.threshold.fill_(1e6)
        assert (sae.encode(activations()).values > 0).any()


def test_what_equals_the_threshold_is_not_taken():
    """Of one expert with W_enc = I: pre-activations are the activations themselves."""
    x_TD = torch.tensor([[1.0, 2.0, 3.0, 2.0], [2.0, 0.5, -1.0, torch.nan]])
    eye_MD, zeros = torch.eye(4), torch.zeros(4)
    values_TL, latents_TL = select(x_TD, zeros, torch.zeros(2, 1, dtype=torch.int64), eye_MD, zeros, 1, 0, 3, torch.tensor(1.0), "ieee")
    # the second token holds a NaN, which the product with I spreads over all of its pre-activations
    assert values_TL.tolist() == [[2, 3, 2], [0, 0, 0]] and latents_TL.tolist() == [[1, 2, 3], [0, 0, 0]]
    given = Dictionaries(eye_MD, eye_MD[None], 0, 1.0)  # whose values are halved: z = p / (1 + ridge)
    at_two = select(x_TD, zeros, torch.zeros(2, 1, dtype=torch.int64), eye_MD, zeros, 1, 0, 3, torch.tensor(2.0), "ieee", given)
    torch.testing.assert_close(at_two[0], torch.tensor([[1.5, 0, 0], [0, 0, 0]]))
    assert at_two[1].tolist() == [[2, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("name", ["pursuit", "pursuit, shared, stop rule", "refit", "refit by its encoder", "switch by refit"])
def test_bfloat16_operands_change_products_a_little(name):
    low, exact = built(CONFIGS[name], LOW), built(CONFIGS[name])
    with torch.no_grad():
        found, expected = low(activations()), exact(activations())
    error = (found.recon_TD - expected.recon_TD).norm() / expected.recon_TD.norm()
    with torch.no_grad():
        assert torch.equal(low(activations()).recon_TD, found.recon_TD), "other bits, the second time"
    assert error < 0.4 and (error > 0 or low.inference is Inference.refit)  # whose values are those of float32 on the same support


@pytest.mark.parametrize("execution", ["search", "execution"])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_host_reads_nothing(name, execution):
    """On meta tensors, which hold nothing that could be read: from raw activations to reconstructions."""
    sae, launched = built(CONFIGS[name], Execution()), []
    x_TD = activations().to("meta")
    if sae.by_threshold or sae.inference is not Inference.encoder:
        with pytest.raises((NotImplementedError, RuntimeError)), torch.no_grad():
            on_meta(sae)(x_TD)  # if PyTorch's path can be computed so, this test sees nothing
    sae = on_meta(sae)
    setattr(sae, execution, LOW)
    with torch.no_grad(), launches_to(lambda launch: launched.append(launch.kernel)):
        output = sae(x_TD)
        sae.decode(sae.encode(x_TD))
    assert output.recon_TD.shape == (T, D) and output.recon_TD.device.type == "meta" and launched


def only_products(launch):
    """The products of rows with their dictionaries may be in a kernel, whoever searches."""
    assert launch.kernel is candidate_products._local_products
    launch.run()


def test_what_kernels_do_not_know_pytorch_computes_and_the_plan_says_why(monkeypatch):
    def reason(config, **more):
        sae = built(replace(config, **more))
        with launches_to(only_products), torch.no_grad():
            sae(activations())
        return search_plan(sae)

    monkeypatch.setenv("SWITCH_KERNELS_NUMBA", "0")
    two = SwitchSAE.Config(num_latents=M, k=K, num_experts=E, experts_per_token=2, inference="refit")
    assert "a token's one expert" in reason(two)
    monkeypatch.setattr("switch_kernels.pursuit.MOST_LATENTS", 3)
    assert "may take 5 latents, and the kernels hold 3" in reason(CONFIGS["refit"])
    monkeypatch.setattr("switch_kernels.pursuit.MOST_LATENTS", 64)
    monkeypatch.setattr("switch_kernels.pursuit.MOST_COLUMNS", 8)
    assert "may choose from 32 latents, and the kernels hold 8" in reason(CONFIGS["refit"])
    monkeypatch.undo()
    double = built(CONFIGS["refit"]).double()
    with launches_to(only_products), torch.no_grad():
        double(activations())
    assert "the kernels take float32, not float64" in search_plan(double)
    batch_topk = built(BatchTopKSAE.Config(num_latents=M, k=K, inference="pursuit"))
    check(batch_topk, activations())


def test_values_below_zero_are_decoded_as_they_are():
    """As somebody may set them, who changes what an SAE found."""
    sae, plain = built(CONFIGS["refit"]), built(CONFIGS["refit"], Execution())
    with torch.no_grad():
        latents = sae.encode(activations())
        changed = replace(latents, values_TK=latents.values_TK * torch.where(torch.arange(5) % 2 == 0, -1.0, 1.0))
        torch.testing.assert_close(sae.decode(changed), plain.decode(changed))
        torch.testing.assert_close(sae.decode(changed), sae.decode(changed.to_dense()))


def test_another_inference_shares_the_weights():
    sae = built(CONFIGS["refit, shared"])
    for way in Inference:
        check(with_inference(sae, way), activations())
