"""Who trains in Triton kernels: exactly what they know, by exact class, router and recipe; everything else by autograd, with the reason said."""

from dataclasses import replace

import pytest
import torch
from configs import CONTRACTS, ROUTED, switch
from torch.overrides import TorchFunctionMode

from switch_kernels import ALONE, Backend, Execution, Group, Precision
from switch_sae.engines import TorchEngine
from switch_sae.models import ROUTERS, SAES, Recipe, SwitchBatchTopKSAE, SwitchSAE, SwitchScaleSAE, SwitchSharedSAE, TopKSAE
from switch_sae.models.fused import why_not_fused
from switch_sae.models.routers import SoftmaxRouter
from switch_sae.rows import Rows
from switch_sae.training import Trainer, TrainerConfig, prepare

D = 8
GPU = torch.device("meta")  # what tensors on the stand-in for a GPU say that they are on
ON_A_GPU = Execution(Backend.triton, Precision.bf16, "a GPU")
SWITCH = SwitchSAE.Config(num_latents=32, k=3, num_experts=4)


class OtherLoss(SwitchSAE):
    def loss_terms(self, *args):
        terms = super().loss_terms(*args)
        return terms | {"extra": terms["mse"] * 0 + 1}


class OnlyRenamed(TopKSAE):
    pass


class OtherRecipe(SwitchSAE):
    recipe = Recipe(betas=(0.0, 0.999))


def built(cls, config):
    sae = cls(config, D, torch.Generator().manual_seed(0))
    prepare(sae, Rows.of(torch.randn(64, D, generator=torch.Generator().manual_seed(1))), True)
    return sae


def with_own_route():
    sae = built(SwitchSAE, SWITCH)
    sae._route = lambda x_TD: SwitchSAE._route(sae, x_TD)
    return sae


def with_hook():
    sae = built(TopKSAE, TopKSAE.Config(num_latents=16, k=2))
    sae.register_forward_hook(lambda *args: None)
    return sae


def with_recipe():
    sae = built(SwitchSAE, SWITCH)
    sae.recipe = Recipe(unit_decoder=False)
    return sae


def with_frozen_decoder():
    sae = built(TopKSAE, TopKSAE.Config(num_latents=16, k=2))
    sae.W_dec_MD.requires_grad_(False)
    return sae


def with_gradient_hook():
    sae = built(SwitchSAE, SWITCH)
    sae.W_enc_MD.register_hook(lambda gradient: gradient * 0)
    return sae


def with_router_frozen_by_hand():
    sae = built(SwitchSAE, SWITCH)
    sae.router.b_D.requires_grad_(False)
    return sae


def with_gates_after_selection():
    return built(SwitchSAE, replace(SWITCH, experts_per_token=2, gate_in_selection=False))


def threshold(**changes):
    return built(SwitchBatchTopKSAE, SwitchBatchTopKSAE.Config(**{"num_latents": 32, "k": 3, **changes}))


def with_another_part():
    sae = built(TopKSAE, TopKSAE.Config(num_latents=16, k=2))
    sae.adapter = torch.nn.Identity()
    return sae


def test_an_override_that_nothing_would_call_is_refused():
    with pytest.raises(TypeError, match=r"overrides route, which nothing computes with. Override _route"):
        type("Mine", (SwitchSAE,), {"route": lambda self, x_TD: None})


VARIANTS = {
    "a hook on a gradient": (with_gradient_hook, "W_enc_MD have hooks on their gradients"),
    "a router frozen in part": (with_router_frozen_by_hand, "its router is frozen in part"),
    "another part": (with_another_part, "know nothing of its part adapter, Identity"),
    "a subclass with another loss": (lambda: built(OtherLoss, SWITCH), "no Triton kernels train OtherLoss"),
    "a subclass that changes nothing": (lambda: built(OnlyRenamed, TopKSAE.Config(num_latents=16, k=2)), "no Triton kernels train OnlyRenamed"),
    "a subclass with another recipe": (lambda: built(OtherRecipe, SWITCH), "no Triton kernels train OtherRecipe"),
    "a method of its own": (with_own_route, "this SwitchSAE has _route of its own"),
    "gates after selection": (with_gates_after_selection, "select gated latents, not by gate_in_selection=False"),
    "shared latents": (lambda: built(SwitchSharedSAE, SwitchSharedSAE.Config(num_latents=32, k=3)), "no Triton kernels train SwitchSharedSAE"),
    "a threshold, shared latents": (lambda: threshold(shared=4, num_latents=36), "one threshold know no shared latents and no linear path"),
    "a threshold, a linear path": (lambda: threshold(path_rank=2), "one threshold know no shared latents and no linear path"),
    "a threshold, two experts": (lambda: threshold(experts_per_token=2), "one expert per token, whose gate is in the selection"),
    "a threshold, ungated": (lambda: threshold(gate_in_selection=False), "one expert per token, whose gate is in the selection"),
    "a threshold, large experts": (lambda: threshold(num_latents=904, k=1), "hold latents dense, which large experts do not pay for: 113 latents"),
    "two experts in competition": (lambda: built(SwitchSAE, replace(switch("competition"), experts_per_token=2)), "the competition of two experts"),
    "scaled features": (lambda: built(SwitchScaleSAE, SwitchScaleSAE.Config(num_latents=64, k=3)), "no Triton kernels train SwitchScaleSAE"),
    "a hook": (with_hook, "_forward_hooks of its own"),
    "another recipe": (with_recipe, "not by Recipe"),
    "a frozen decoder": (with_frozen_decoder, "W_dec_MD are frozen"),
}


@pytest.mark.parametrize("name", list(VARIANTS))
def test_a_variant_is_trained_by_autograd_and_says_why(name):
    make, reason = VARIANTS[name]
    sae = make()
    trainer = Trainer(sae, TrainerConfig(lr=1e-3), total_steps=10, batch_size=64, execution=ON_A_GPU)
    assert type(trainer.engine) is TorchEngine and not trainer.execution.is_triton
    assert reason in why_not_fused(sae) and why_not_fused(sae) in trainer.choice and "torch, float32" in trainer.choice
    result = trainer.step(Rows.of(torch.randn(64, D, generator=torch.Generator().manual_seed(2))))
    if isinstance(sae, OtherLoss):
        assert result.terms["extra"] == 1


def test_only_what_the_kernels_were_written_for_is_fused():
    fused = {name for name, config in CONTRACTS.items() if why_not_fused(built(SAES[SAES.key_of(config)], config)) is None}
    switches = {"switch, softmax", "switch, softmax, two experts per token", "switch, competition", "switch_batch_topk"}
    assert fused == {"topk", *switches, "switch_pursuit", "switch_refit"}


def test_rows_that_no_program_holds_are_not_fused():
    with torch.device("meta"):
        reasons = [why_not_fused(TopKSAE(TopKSAE.Config(num_latents=F, k=2), D)) for F in (2**20, 2**20 + 1)]
    assert reasons == [None, "the Triton kernels' registers cannot hold what top-k searches for k=2 of 1048577 latents"]


def test_a_gate_after_selection_is_fused_where_it_changes_nothing():
    assert why_not_fused(built(SwitchSAE, replace(SWITCH, gate_in_selection=False))) is None
    assert why_not_fused(built(SwitchSAE, replace(SWITCH, k=2, experts_per_token=2, joint_topk=False, gate_in_selection=False))) is None


@pytest.mark.parametrize("name", [name for name in ROUTED if name not in ("softmax", "competition")])
def test_the_reason_names_the_router_that_kernels_do_not_know(name):
    sae = built(SwitchSAE, switch(name))
    trainer = Trainer(sae, TrainerConfig(lr=1e-3), total_steps=10, batch_size=64, execution=ON_A_GPU)
    assert type(trainer.engine) is TorchEngine
    kind = ROUTERS[name.split()[0]].__name__
    assert f"no Triton kernels know its router, {kind}(" in trainer.choice
    assert not name.startswith("softmax ") or f"<Gate.{name.split()[1]}" in trainer.choice


class OtherShares(SoftmaxRouter):
    def route(self, x_TD):
        routing = super().route(x_TD)
        return replace(routing, gate_TS=routing.gate_TS * 2)


class OtherHook(SoftmaxRouter):
    """Overrides nothing that the kernels read, but is called after each step."""

    def end_step(self, x_TD, routing):
        self.steps = getattr(self, "steps", 0) + 1


class KernelOfItsOwn(SoftmaxRouter):
    """Says in its own body that the kernels compute it, as `has_kernels` does for SAEs."""

    def kernel(self):
        return super().kernel()


def with_router(cls):
    sae = built(SwitchSAE, SWITCH)
    sae.router = cls(SWITCH.router, D, 4, 1)
    return sae


@pytest.mark.parametrize("cls", [OtherShares, OtherHook])
def test_a_subclass_of_a_router_is_not_fused_and_keeps_its_hooks(cls):
    sae = with_router(cls)
    assert f"its router, {cls.__name__}(" in why_not_fused(sae) and why_not_fused(with_router(KernelOfItsOwn)) is None
    Trainer(sae, TrainerConfig(lr=1e-3), 10, 64, ON_A_GPU).step(Rows.of(torch.randn(64, D, generator=torch.Generator().manual_seed(2))))
    assert cls is OtherShares or sae.router.steps == 1


def test_what_a_router_has_of_its_own_is_not_fused():
    def own_route():
        sae = with_router(SoftmaxRouter)
        sae.router.route = lambda x_TD: SoftmaxRouter.route(sae.router, x_TD)
        return sae

    def hooked():
        sae = with_router(SoftmaxRouter)
        sae.router.register_full_backward_pre_hook(lambda *args: None)
        return sae

    for make in (own_route, hooked):
        assert "know its router, SoftmaxRouter(" in why_not_fused(make())


def test_a_batch_that_processes_share_is_trained_by_autograd():
    class Two(Group):
        size = 2

    sae = built(SwitchSAE, SWITCH)
    assert "2 processes share a batch" in Trainer(sae, TrainerConfig(), total_steps=10, batch_size=64, execution=ON_A_GPU, group=Two()).choice
    assert sae.group.size == sae.router.group.size == 2 and SwitchSAE.group is ALONE


def test_without_a_choice_nothing_is_said():
    sae = built(TopKSAE, TopKSAE.Config(num_latents=16, k=2))
    assert Trainer(sae, TrainerConfig(), total_steps=10, batch_size=64).choice == ""


class OtherDevice(TorchFunctionMode):
    """A stand-in for a GPU: tensors that were moved to it, and what is made there or computed from them, refuse to meet CPU tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.there: dict[int, torch.UntypedStorage] = {}

    def move(self, tensor: torch.Tensor) -> torch.Tensor:
        with torch._C.DisableTorchFunction():
            storage = tensor.untyped_storage()
        self.there[storage.data_ptr()] = storage  # kept alive, so that no other storage takes its address
        return tensor

    def is_there(self, tensor: torch.Tensor) -> bool:
        with torch._C.DisableTorchFunction():
            return tensor.untyped_storage().data_ptr() in self.there

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        there = [t for t in tensors if self.is_there(t)]
        if function == torch.Tensor.device.__get__:
            return GPU if there else function(*args)
        if function == torch.Tensor.to and args[1:] == (GPU,):
            return self.move(args[0].clone())
        if kwargs.get("device") == GPU:
            return self.move(function(*args, **kwargs | {"device": "cpu"}))
        here = [t for t in tensors if t.ndim > 0 and not self.is_there(t)]
        if there and here and function != torch.Tensor.copy_:
            raise RuntimeError(f"{function.__name__}: a tensor on the GPU meets one of shape {tuple(here[0].shape)} on the CPU")
        result = function(*args, **kwargs)
        if there:
            for t in torch.utils._pytree.tree_leaves(result):
                if isinstance(t, torch.Tensor):
                    self.move(t)
        return result


@pytest.mark.parametrize("name", list(CONTRACTS))
def test_every_architecture_and_router_can_start_on_another_device_than_the_activations(name):
    sae = SAES.build(CONTRACTS[name], D, torch.Generator().manual_seed(0))
    calibration = torch.randn(64, D, generator=torch.Generator().manual_seed(1))
    device = OtherDevice()
    for tensor in (*sae.parameters(), *sae.buffers()):
        device.move(tensor)
    with device:
        prepare(sae, Rows.of(calibration), True)
        output = sae(calibration.to(GPU))
        assert device.is_there(output.recon_TD) and all(device.is_there(tensor) for tensor in sae.buffers())
        with pytest.raises(RuntimeError, match="on the CPU"):
            sae(calibration)
