"""The battery of tests/test_kernels.py over every `KernelSpec`, with the Triton kernels as the fast form."""

from functools import partial

import pytest
import torch
from test_kernels import SHAPES, inputs_of, run
from torch import Tensor

from switch_kernels import KERNELS, Backend, Execution, KernelSpec, Precision, Shape
from switch_kernels.gpu.launch import launches_to

SPECS = list(KERNELS.values())
EXACT = Execution(Backend.triton, Precision.float32, "test")
LOW = Execution(Backend.triton, Precision.bf16, "test")


def in_float32(spec: KernelSpec, shape: Shape) -> dict:
    inputs = inputs_of(spec, shape)
    return {name: value.detach().float().requires_grad_() if _is_leaf(value) else value for name, value in inputs.items()}


def _is_leaf(value) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_outputs_and_all_gradients_equal_the_reference(spec, shape, poisoned_memory):
    launched = []

    def fast(**inputs):
        with launches_to(lambda request: (launched.append(request.kernel), request.run())):
            return spec.fast(**inputs, execution=EXACT).double()

    found, found_grads = run(fast, in_float32(spec, shape))
    true, true_grads = run(spec.reference, inputs_of(spec, shape))
    assert launched, "no Triton kernel ran"
    torch.testing.assert_close(found, true, rtol=1e-5, atol=1e-5)
    for name, gradient in true_grads.items():
        assert (found_grads[name] - gradient).norm() <= 2e-5 * gradient.norm().clamp_min(1e-12), name


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_bfloat16_errs_at_most_twice_as_much_as_pytorch_in_bfloat16(spec):
    shape = Shape(T=64, D=24, M=64, E=4, K=4)

    def measured(output: Tensor) -> Tensor:
        """Selected values in descending order: which of two nearly equal latents is selected is not an error."""
        return output.double().topk(shape.K, dim=1).values if spec.name == "encode_topk" else output.double()

    true = measured(spec.reference(**inputs_of(spec, shape)))
    low = {name: value.detach().bfloat16() if _is_leaf(value) else value for name, value in inputs_of(spec, shape).items()}
    theirs = (measured(spec.reference(**low)) - true).norm()
    mine = (measured(spec.fast(**in_float32(spec, shape), execution=LOW)) - true).norm()
    assert mine <= 2 * theirs


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_twice_the_same_bits_and_a_second_backward_equals_the_first(spec):
    inputs = in_float32(spec, SHAPES[0])
    leaves = [value for value in inputs.values() if _is_leaf(value)]
    fast = partial(spec.fast, **inputs, execution=LOW)
    output = fast()
    assert torch.equal(output, fast())
    first = torch.autograd.grad(output.square().sum(), leaves, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(output.square().sum(), leaves), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_non_contiguous_inputs(spec):
    inputs = in_float32(spec, SHAPES[1])
    strided = {}
    for name, value in inputs.items():
        strided[name] = torch.stack([value.detach(), value.detach()], dim=-1)[..., 0].requires_grad_() if _is_leaf(value) else value
    plain, other = spec.fast(**inputs, execution=EXACT), spec.fast(**strided, execution=EXACT)
    assert torch.equal(plain, other)


def test_float64_is_refused_with_what_to_do():
    with pytest.raises(ValueError, match=r"activations have dtype torch.float64; the Triton backend takes float32.*Use backend=torch"):
        KERNELS["encode_topk"].fast(**inputs_of(KERNELS["encode_topk"], SHAPES[0]), execution=EXACT)
