"""The custom operators: what `torch.compile` and `torch.export` need of them."""

import pytest
import torch

import switch_kernels.decode as decode
import switch_kernels.encode as encode
from switch_kernels import KERNELS, Shape
from switch_sae.models import SwitchSAE, TopKSAE
from switch_sae.rows import Rows

SHAPES = [Shape(T=12, D=5, M=16, E=4, K=3), Shape(T=12, D=5, M=16, E=1, K=3), Shape(T=9, D=5, M=16, E=4, K=2, S=2)]
SAES = {
    "topk": (TopKSAE, TopKSAE.Config(num_latents=24, k=3)),
    "switch": (SwitchSAE, SwitchSAE.Config(num_latents=24, k=3, num_experts=4)),
    "two experts per token": (SwitchSAE, SwitchSAE.Config(num_latents=24, k=4, num_experts=4, experts_per_token=2)),
}


@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_encoding_is_a_well_formed_operator(shape, order):
    inputs = KERNELS["encode_topk"].make_inputs(shape, torch.float64, torch.Generator().manual_seed(0))
    dispatch = inputs.pop("dispatch")
    arguments = (*list(inputs.values())[:5], dispatch.expert_TS, dispatch.order_N, dispatch.start_E1, shape.K, shape.joint, order, "torch")
    torch.library.opcheck(encode._encode_topk, arguments, test_utils=("test_schema", "test_faketensor"))
    if order:
        torch.library.opcheck(encode._encode_topk, arguments, test_utils=("test_autograd_registration", "test_aot_dispatch_static"))


def test_decoding_is_a_well_formed_operator():
    inputs = KERNELS["sparse_decode"].make_inputs(SHAPES[0], torch.float64, torch.Generator().manual_seed(0))
    torch.library.opcheck(decode._sparse_decode, (*inputs.values(), None, None, None, "torch"))


def build(name):
    owner, config = SAES[name]
    sae = owner(config, 6, torch.Generator().manual_seed(0))
    return sae, torch.randn(10, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", SAES)
def test_torch_compile_sees_through_an_sae_without_a_graph_break(name):
    sae, x_TD = build(name)

    def loss(x_TD):
        output = sae(x_TD)
        return torch.stack(list(sae.loss_terms(Rows.of(x_TD), output).values())).sum()

    eager = torch.autograd.grad(loss(x_TD), list(sae.parameters()))
    compiled = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(x_TD), list(sae.parameters()))
    for one, other in zip(eager, compiled, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", SAES)
def test_an_sae_can_be_exported(name):
    sae, x_TD = build(name)

    class Reconstruct(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.sae = sae

        def forward(self, x_TD):
            return self.sae(x_TD).recon_TD

    with torch.no_grad():
        program = torch.export.export(Reconstruct(), (x_TD,))
        assert torch.equal(program.module()(x_TD), sae(x_TD).recon_TD)
    assert any("switch_kernels" in str(node.target) for node in program.graph.nodes)
