"""What lies between two hooks of a language model: whether a transcoder could stand in its place, and what it costs.

Shapes: C contexts, S positions, D activation size, V vocabulary.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from switch_sae.activations.language_model import LanguageModel

_MLP = "For a transcoder take an MLP's two sides: source.hook=blocks.LAYER.mlp.hook_in source.target_hook=blocks.LAYER.hook_mlp_out."
_ATTENTION = (
    "Attention is such a thing: train an SAE on its output (source.hook=blocks.LAYER.hook_attn_out) or on its heads' "
    f"(source.hook=blocks.LAYER.attn.hook_z), with source.target_hook=null. {_MLP}"
)


@torch.no_grad()
def why_no_function(model: "LanguageModel", rounding: float) -> str | None:
    """Why the target hook's vector at a position does not follow from the input hook's vector there, in words; None where it does.

    Measured, on few tokens, and so for every architecture: vectors of another text are put at the input hook; then one of them is changed, and the
    text. Only the target at the changed position may move, and it must.
    """
    tokens_CS = torch.arange(8).reshape(2, 4) % model.d_vocab
    others_CS = (tokens_CS.flip(1) + 3) % model.d_vocab
    x_CSD = model.activations(others_CS)
    changed_CSD = x_CSD.clone()
    changed_CSD[:, 1] = x_CSD[:, 2]
    target_CSD = model.targets(tokens_CS, x_CSD)
    limit = rounding * float(target_CSD.std())

    def moved_CS(other_CSD: Tensor) -> Tensor:
        return (other_CSD - target_CSD).abs().amax(dim=2) > limit

    by_input_CS, by_text_CS = moved_CS(model.targets(tokens_CS, changed_CSD)), moved_CS(model.targets(others_CS, x_CSD))
    names = f"target_hook {model.target_hook!r} and hook {model.hook!r}"
    if bool(by_input_CS[:, [0, 2, 3]].any()):
        return f"{names}: what is written at a position depends on what is read at others, so no function of one position can learn it. {_ATTENTION}"
    if not bool(by_input_CS[:, 1].all()):
        return f"{names}: what is read does not reach what is written. {_MLP}"
    if bool(by_text_CS.any()):
        return f"{names}: what is written follows not from what is read alone, but from what goes around it too, such as the residual stream. {_MLP}"
    return None


@torch.no_grad()
def module_flops(model: "LanguageModel") -> int | None:
    """Forward FLOPs per token of what lies between the hooks, a multiply-add counted as two: of every matrix that is used there.

    None where there is none, and where weights of three dimensions are used, such as those of experts: not every token uses all of them.
    """
    used: dict[int, tuple[int, int]] = {}
    inside = False

    def begin(value: Tensor, hook: Any) -> None:
        nonlocal inside
        inside = True

    def end(value: Tensor, hook: Any) -> None:
        nonlocal inside
        inside = False

    def count(module: Any, *_: Any) -> None:
        if inside:
            used.update({id(weight): (weight.ndim, weight.numel()) for weight in module.parameters(recurse=False) if weight.ndim > 1})

    handles = [module.register_forward_hook(count) for module in model.modules()]
    try:
        model.watch(torch.arange(8).reshape(2, 4) % model.d_vocab, {model.hook: begin, str(model.target_hook): end})
    finally:
        for handle in handles:
            handle.remove()
    if any(dimensions > 2 for dimensions, _ in used.values()):
        return None
    return 2 * sum(size for _, size in used.values()) or None
