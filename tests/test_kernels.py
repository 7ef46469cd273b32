"""One battery over every `KernelSpec`: the fast form against its reference, forward and all gradients."""

import pytest
import torch
from torch import Tensor

from switch_kernels import KERNELS, Dispatch, KernelSpec, Shape, encode_topk
from switch_kernels import encode as encode_module
from switch_kernels.encode import _masked_sums, _sums_by_slot
from switch_kernels.latent_order import LatentOrder

SHAPES = [
    Shape(T=64, D=16, M=48, E=4, K=5),
    Shape(T=33, D=7, M=27, E=3, K=4, routing="skip"),
    Shape(T=19, D=5, M=32, E=4, K=3, routing="one"),
    Shape(T=1, D=6, M=20, E=2, K=2),
    Shape(T=23, D=9, M=21, E=1, K=6),
    Shape(T=12, D=8, M=16, E=4, K=4),  # K == F: nothing is left to select
    Shape(T=31, D=9, M=40, E=5, K=4, S=2),
    Shape(T=31, D=9, M=40, E=5, K=6, S=3, routing="zipf", joint=False),
    Shape(T=17, D=6, M=32, E=4, K=4, S=2, routing="one"),
]
SPECS = list(KERNELS.values())


def inputs_of(spec: KernelSpec, shape: Shape, dtype: torch.dtype = torch.float64) -> dict:
    return spec.make_inputs(shape, dtype, torch.Generator().manual_seed(0))


def run(function, inputs: dict) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and the gradient of every differentiable input."""
    leaves = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.requires_grad}
    output = function(**inputs)
    cotangent = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(1))
    return output, dict(zip(leaves, torch.autograd.grad(output, list(leaves.values()), cotangent), strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_outputs_and_all_gradients_equal_the_reference_to_1e_9(spec, shape, poisoned_memory):
    inputs = inputs_of(spec, shape)
    fast, fast_grads = run(spec.fast, inputs)
    slow, slow_grads = run(spec.reference, inputs)
    torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-12)
    assert fast_grads.keys() == slow_grads.keys()
    for name in fast_grads:
        scale = slow_grads[name].abs().max().clamp_min(1e-300)
        assert ((fast_grads[name] - slow_grads[name]).abs().max() / scale).item() < 1e-9, name


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_gradients_are_those_of_the_function(spec):
    inputs = inputs_of(spec, Shape(T=5, D=3, M=8, E=2, K=2))
    names = [name for name, value in inputs.items() if isinstance(value, Tensor) and value.requires_grad]

    def function(*values: Tensor) -> Tensor:
        return spec.fast(**{**inputs, **dict(zip(names, values, strict=True))})

    assert torch.autograd.gradcheck(function, [inputs[name] for name in names], eps=1e-7, atol=1e-6)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_twice_the_same_result_and_a_second_backward_equals_the_first(spec):
    inputs = inputs_of(spec, SHAPES[0], torch.float32)
    leaves = [value for value in inputs.values() if isinstance(value, Tensor) and value.requires_grad]
    output = spec.fast(**inputs)
    assert torch.equal(output, spec.fast(**inputs))
    first = torch.autograd.grad(output.square().sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(output.square().sum(), leaves)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_float32_is_at_most_twice_as_far_from_float64_as_the_reference(spec):
    truth, true_grads = run(spec.reference, inputs_of(spec, SHAPES[0]))
    inputs = {}
    for name, value in inputs_of(spec, SHAPES[0]).items():
        float_leaf = isinstance(value, Tensor) and value.requires_grad
        inputs[name] = value.detach().float().requires_grad_() if float_leaf else value
    fast, fast_grads = run(lambda **kw: spec.fast(**kw).double(), inputs)
    slow, slow_grads = run(lambda **kw: spec.reference(**kw).double(), inputs)
    floor = 2e-7 * truth.norm()
    assert (fast - truth).norm() <= 2 * (slow - truth).norm() + floor
    for name, true in true_grads.items():
        assert (fast_grads[name] - true).norm() <= 2 * (slow_grads[name] - true).norm() + 2e-7 * true.norm(), name


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_non_contiguous_inputs(spec):
    inputs = inputs_of(spec, SHAPES[0])
    strided = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.requires_grad:
            wide = torch.zeros(*value.shape[:-1], value.shape[-1] * 2, dtype=value.dtype)
            wide[..., ::2] = value.detach()
            strided[name] = wide[..., ::2].requires_grad_()
            assert not strided[name].is_contiguous()
        else:
            strided[name] = value
    plain, plain_grads = run(spec.fast, inputs)
    other, other_grads = run(spec.fast, strided)
    torch.testing.assert_close(plain, other, rtol=1e-12, atol=1e-13)
    for name in plain_grads:
        torch.testing.assert_close(plain_grads[name], other_grads[name], rtol=1e-12, atol=1e-13)


def test_zipf_sends_expert_e_tokens_in_proportion_to_its_share():
    dispatch = inputs_of(KERNELS["encode_topk"], Shape(T=4096, D=2, M=8, E=4, K=1, routing="zipf"))["dispatch"]
    assert torch.tensor(dispatch.offsets).diff() / 4096 == pytest.approx(torch.tensor([12, 6, 4, 3]) / 25, abs=0.03)


def test_only_the_routed_expert_is_computed():
    """NaN weights in experts that receive nothing must not be seen, forward or backward."""
    inputs = inputs_of(KERNELS["encode_topk"], Shape(T=9, D=4, M=12, E=3, K=2, routing="one"))
    W_enc_MD = inputs["W_enc_MD"].detach().clone()
    W_enc_MD[:8] = float("nan")
    inputs["W_enc_MD"] = W_enc_MD.requires_grad_()
    selection = encode_topk(**inputs)
    assert selection.values_TK.isfinite().all() and (selection.indices_TK >= 8).all()
    selection.values_TK.sum().backward()
    assert W_enc_MD.grad[:8].eq(0).all() and W_enc_MD.grad[8:].abs().sum() > 0
    assert inputs["x_TD"].grad.isfinite().all()


def test_no_latent_order_is_made_where_no_gradient_is_wanted():
    inputs = inputs_of(KERNELS["encode_topk"], SHAPES[0])
    assert encode_topk(**inputs).by_latent is not None
    with torch.no_grad():
        assert encode_topk(**inputs).by_latent is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_that_are_the_same_every_time_are_those_of_adding_one_after_another(dtype):
    generator, (T, K, M, S) = torch.Generator().manual_seed(0), (300, 6, 40, 3)
    indices_TK, slot_TK = (torch.randint(0, most, (T, K), generator=generator) for most in (M - 1, S))  # the last latent is never selected
    weights_TK = torch.randn(T, K, generator=generator, dtype=dtype)
    sums_M = torch.zeros(M, dtype=dtype).index_add_(0, indices_TK.flatten(), weights_TK.flatten())
    assert torch.equal(LatentOrder.from_indices(indices_TK, M).weight_sums(weights_TK), sums_M) and sums_M[-1] == 0
    torch.testing.assert_close(_masked_sums(weights_TK, slot_TK, S), _sums_by_slot(weights_TK, slot_TK, S))
    assert torch.equal(_sums_by_slot(weights_TK, slot_TK, S), torch.zeros(T, S, dtype=dtype).scatter_add_(1, slot_TK, weights_TK))


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[6]], ids=str)
def test_no_gradient_is_added_up_in_an_order_that_a_gpu_leaves_open(shape, monkeypatch):
    for name in ("index_add_", "scatter_add_"):
        monkeypatch.setattr(Tensor, name, None)
    monkeypatch.setattr(encode_module, "_sums_by_slot", encode_module._masked_sums)  # as on a GPU
    _, grads = run(lambda **inputs: encode_topk(**inputs).values_TK, inputs_of(KERNELS["encode_topk"], shape))
    monkeypatch.undo()
    for name, expected in run(lambda **inputs: encode_topk(**inputs).values_TK, inputs_of(KERNELS["encode_topk"], shape))[1].items():
        torch.testing.assert_close(grads[name], expected, rtol=1e-12, atol=1e-13, msg=name)


def test_dispatch_gathers_and_scatters_back():
    expert_TS = torch.tensor([[2], [0], [2], [3]])
    dispatch = Dispatch.from_experts(expert_TS, 4)
    assert dispatch.order_N.tolist() == [1, 0, 2, 3] and dispatch.offsets == [0, 1, 1, 3, 4]
    x = torch.randn(4, 3)
    assert torch.equal(dispatch.scatter(dispatch.gather(x)), x)
    assert torch.equal(dispatch.gather(x)[1:3], x[expert_TS[:, 0] == 2])
    for wrong in (4, -1):
        with pytest.raises(ValueError, match=f"expert index {wrong} is out of range"):
            Dispatch.from_experts(torch.tensor([[0], [wrong]]), 4)


def test_dispatch_of_several_experts_per_token_sorts_pairs():
    expert_TS = torch.tensor([[1, 0], [1, 2]])
    dispatch = Dispatch.from_experts(expert_TS, 3)
    assert dispatch.order_N.tolist() == [1, 0, 2, 3] and dispatch.offsets == [0, 1, 3, 4]
    x = torch.randn(2, 3)
    assert torch.equal(dispatch.gather(x), x[[0, 0, 1, 1]])
    pairs = torch.randn(4, 3)
    assert torch.equal(dispatch.scatter(dispatch.gather_pairs(pairs)), pairs)
