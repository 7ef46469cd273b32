"""Activations of a language model at one hook point, through transformer_lens's `TransformerBridge`.

Shapes: C contexts, S positions, D activation size, V vocabulary.
"""

import difflib
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from switch_sae.activations.between import module_flops, why_no_function
from switch_sae.activations.loading import load
from switch_sae.checks import typed

_FINGERPRINT_ELEMENTS = 65_536


class Precision(Enum):
    """What the language model computes in; activations are float32 either way."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class _Reached(Exception):
    """Ends a forward pass at the hook."""


@dataclass(frozen=True)
class Given:
    """A replacement for the activations at the hook that does not depend on them: what comes before the hook need not be computed."""

    x_CSD: Tensor

    def __call__(self, x_CSD: Tensor) -> Tensor:
        return self.x_CSD


class LanguageModel:
    """A pretrained language model and one hook point in it, or two; gradients off, raw weights (no LayerNorm folding).

    With `target_hook`, what is read at `hook` is to be turned into what stands there, and `logits` replaces that: both must be one vector per
    position, the second a function of the first (`between.why_no_function`).

    `name` is `bundled`, a local folder in Hugging Face format, a GGUF file, or a hub name. Safe to share between threads: passes take turns, because
    hooks are state of the model. Raises as `loading.load`, and ValueError for an unknown hook or one without an activation per position.
    """

    def __init__(
        self, name: str, hook: str, device: str | None = None, precision: Precision = Precision.float32, target_hook: str | None = None
    ) -> None:
        self.name, self.hook, self.target_hook, precision = name, hook, target_hook, typed("precision", Precision, precision)
        self.replaced_hook = target_hook or hook
        """What a reconstruction stands in for."""
        if target_hook == hook:
            raise ValueError(f"target_hook={target_hook!r} is the hook itself, which is an autoencoder's way. Use target_hook=null, or another hook.")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if precision is Precision.bfloat16 and self.device.type == "cpu":
            raise ValueError("precision=bfloat16 is up to hundreds of times slower than float32 on a CPU. Use precision=float32 there.")
        self._lock = threading.RLock()
        loaded = load(name, self.device, getattr(torch, precision.value))
        self._bridge = loaded.bridge
        self._without_head = loaded.without_head
        self.tokenizer = loaded.tokenizer
        """As saved with the model."""
        config = self._bridge.cfg
        self.context_length_limit = int(config.n_ctx)
        self.num_layers = int(config.n_layers)
        self.d_vocab = loaded.d_vocab
        self.bos_token_id: int | None = loaded.special.get("bos")
        self.eos_token_id: int | None = loaded.special.get("eos")
        self.pad_token_id: int | None = loaded.special.get("pad")
        self.special_token_ids = frozenset(loaded.special.values())
        self.prepends_bos: bool = config.default_prepend_bos and self.bos_token_id is not None
        """The model's own convention, as transformer_lens knows it: GPT-2 and Llama start with BOS; Pythia, Qwen and Phi do not.
        False for a model whose saved tokenizer has none."""
        self.fingerprint = _fingerprint(self._bridge)
        for each in dict.fromkeys((self.hook, self.replaced_hook)):
            self._check_hook(each)
        self.d_in, self.causal = self._probe(self.hook)
        self.d_out = self.d_in if target_hook is None else self._probe(target_hook)[0]
        if target_hook is not None and (why := why_no_function(self, self._rounding)):
            raise ValueError(f"{self.name!r} has no transcoder there. {why}")
        self.module_flops = None if target_hook is None else module_flops(self)
        """Forward FLOPs per token of what lies between the hooks; None for one hook."""

    @torch.no_grad()
    def activations(self, tokens_CS: Tensor) -> Tensor:
        """x_CSD at the hook, float32 on the model's device. The pass ends at the hook, so later layers cost nothing."""
        return self._caught(tokens_CS, (self.hook,))[0]

    @torch.no_grad()
    def activations_and_targets(self, tokens_CS: Tensor) -> tuple[Tensor, Tensor]:
        """(x_CSD at the hook, target_CSD at the target hook) of one pass, float32; one tensor twice where there is no target hook."""
        caught = self._caught(tokens_CS, (self.hook,) if self.target_hook is None else (self.hook, self.target_hook))
        return caught[0], caught[-1]

    @torch.no_grad()
    def targets(self, tokens_CS: Tensor, x_CSD: Tensor) -> Tensor:
        """target_CSD, float32, when `x_CSD` stands at the hook."""

        def put(value: Tensor, hook: Any) -> Tensor:
            return x_CSD.to(value).reshape(value.shape)

        return self._caught(tokens_CS, (self.replaced_hook,), [(self.hook, put)])[0]

    def watch(self, tokens_CS: Tensor, see: Mapping[str, Callable[[Tensor, Any], None]]) -> None:
        """A pass in which each hook's value is shown, to the last of them."""
        waiting = set(see)

        def show(value: Tensor, hook: Any, name: str) -> None:
            see[name](value, hook)
            waiting.discard(name)
            if not waiting:
                raise _Reached

        with self._lock, suppress(_Reached):
            hooks = [(name, partial(show, name=name)) for name in see]
            self._bridge.run_with_hooks(self._on_device(tokens_CS), return_type=None, fwd_hooks=hooks)

    def modules(self) -> Iterator[nn.Module]:
        """Of the model as transformers made it."""
        return iter(self._bridge.original_model.modules())

    def _caught(self, tokens_CS: Tensor, hooks: tuple[str, ...], before: list[tuple[str, Any]] | None = None) -> list[Tensor]:
        """What passes through each hook, [C, S, D] float32 on the model's device; the pass ends at the last of them. `before` are hooks that change
        something."""
        caught: dict[str, Tensor] = {}

        def catch(value: Tensor, hook: Any, name: str) -> None:
            caught[name] = value
            if len(caught) == len(hooks):
                raise _Reached

        catching = [(name, partial(catch, name=name)) for name in hooks]
        with self._lock, suppress(_Reached):
            self._bridge.run_with_hooks(self._on_device(tokens_CS), return_type=None, fwd_hooks=[*(before or []), *catching])
        if missing := [name for name in hooks if name not in caught]:
            raise ValueError(f"hook {missing[0]!r} exists in {self.name!r} but no value passes through it. {self._advice()}")
        return [(caught[name].flatten(2) if caught[name].ndim > 3 else caught[name]).float() for name in hooks]

    @torch.no_grad()
    def logits(self, tokens_CS: Tensor, replace: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """logits_CSV, float32; with `replace`, those the model gives when x_CSD at the hook (the target hook, if there is one) is replaced by
        `replace(x_CSD)`.

        The blocks before the hook are left out for a replacement that is `Given`, where that is the same. Raises ValueError where the replacement
        has another shape.
        """
        tokens_CS = self._on_device(tokens_CS)
        with self._lock:
            if isinstance(replace, Given) and self._resume is not None:
                return self._resume(tokens_CS, replace.x_CSD)
            hooks = [] if replace is None else self._splice(replace)
            return self._bridge.run_with_hooks(tokens_CS, return_type="logits", fwd_hooks=hooks).float()

    @cached_property
    def _resume(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """(tokens_CS, x_CSD) -> logits_CSV without the blocks before the hook; None where the hook is not a block's input or output, or where a trial
        of both forms on a few tokens finds that the blocks cannot be left out."""
        place = re.fullmatch(r"blocks\.(\d+)\.hook_(?:(resid_pre|in)|resid_post|out)", self.replaced_hook)
        skipped = [] if place is None else list(self._bridge.blocks)[: int(place[1]) + (place[2] is None)]
        if not skipped:
            return None

        def resume(as_tuple: bool, tokens_CS: Tensor, x_CSD: Tensor) -> Tensor:
            x_CSD = x_CSD.to(self.device, dtype)
            for block in skipped:
                vars(block)["forward"] = lambda *_, **__: (x_CSD,) if as_tuple else x_CSD  # setattr would reach into the wrapped module
            try:
                return self._bridge(tokens_CS, return_type="logits").float()
            finally:
                for block in skipped:
                    vars(block).pop("forward", None)

        dtype = next(iter(self._bridge.parameters())).dtype
        tokens_CS = self._on_device(torch.arange(8).reshape(2, 4) % self.d_vocab)
        x_CSD = 1.5 * self._caught(tokens_CS, (self.replaced_hook,))[0]
        whole = self.logits(tokens_CS, lambda _: x_CSD)
        for as_tuple in (False, True):  # which of them a block gives depends on the architecture and the version of transformers
            with suppress(Exception):
                if torch.allclose(resume(as_tuple, tokens_CS, x_CSD), whole, rtol=1e-3, atol=1e-3):
                    return partial(resume, as_tuple)
        return None

    def why_no_predictions(self) -> str | None:
        """Why there is no next-token prediction to score (delta CE, KL), from one pass of a few tokens; None where there is one."""
        if not self.causal:
            return f"{self.name!r} is no causal model: every position sees the tokens after it, so predicting the next one has no meaning"
        if self._without_head is not None:
            return self._without_head
        tokens_CS = torch.arange(8).reshape(2, 4) % self.d_vocab
        try:
            logits_CSV = self.logits(tokens_CS)
        except Exception as error:  # as in `_probe`
            return f"{self.name!r} cannot be run to its end: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        if logits_CSV.ndim != 3 or logits_CSV.shape[:2] != (2, 4) or logits_CSV.shape[2] < 2:
            return f"{self.name!r} gives logits of shape {tuple(logits_CSV.shape)} for 2 contexts of 4 tokens, not one row of them per position"
        return None if torch.isfinite(logits_CSV).all() else f"{self.name!r} gives NaN or infinite logits"

    def _splice(self, replace: Callable[[Tensor], Tensor]) -> list[tuple[str, Callable[..., Tensor]]]:
        change: list[Tensor] = []

        def swap(value: Tensor, hook: Any) -> Tensor:
            x_CSD = (value.flatten(2) if value.ndim > 3 else value).float()
            new_CSD = replace(x_CSD)
            if new_CSD.shape != x_CSD.shape:
                raise ValueError(f"the replacement has shape {tuple(new_CSD.shape)}, the activation {tuple(x_CSD.shape)}. They must be equal.")
            new = new_CSD.to(value).reshape(value.shape)
            change.append(new - value)
            return new

        replaced = self.replaced_hook
        middle = re.fullmatch(r"(blocks\.\d+)\.hook_resid_mid", replaced)
        if middle is None or self._bridge.hook_dict[replaced].name == replaced:
            return [(replaced, swap)]
        # In a bridge this hook is the second LayerNorm's input, beside the residual stream: the stream itself changes where the block ends.
        return [(replaced, swap), (f"{middle[1]}.hook_resid_post", lambda value, hook: value + change.pop())]

    def _on_device(self, tokens_CS: Tensor) -> Tensor:
        if tokens_CS.shape[1] > self.context_length_limit:
            raise ValueError(
                f"contexts of {tokens_CS.shape[1]} tokens exceed the {self.context_length_limit} that {self.name!r} takes. Shorten them."
            )
        return tokens_CS.to(self.device, torch.int64)

    def _advice(self) -> str:
        last = self.num_layers - 1
        return (
            "Hooks are named blocks.LAYER.hook_resid_pre, .hook_resid_mid, .hook_resid_post, .hook_attn_out, .attn.hook_z, .mlp.hook_in, "
            f".mlp.hook_post or .hook_mlp_out, with LAYER from 0 to {last}."
        )

    def _check_hook(self, hook: str) -> None:
        hooks = self._bridge.hook_dict
        if hook not in hooks:
            close = difflib.get_close_matches(hook, hooks, n=5, cutoff=0.5)
            raise ValueError(f"model {self.name!r} has no hook {hook!r}. {f'Close: {close}. ' if close else ''}{self._advice()}")

    def _probe(self, hook: str) -> tuple[int, bool]:
        """(size at a hook, whether a later token leaves earlier activations alone), from two passes of a few tokens."""
        tokens_CS = torch.arange(8).reshape(2, 4) % self.d_vocab
        try:
            long, short = (self._caught(tokens, (hook,))[0] for tokens in (tokens_CS, tokens_CS[:, :3]))
        except Exception as error:  # a bridge that cannot run its model fails in as many ways as there are models
            reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            raise ValueError(f"hook {hook!r} of {self.name!r} gives no activations: {reason} {self._advice()}") from error
        if long.ndim != 3 or long.shape[:2] != (2, 4) or short.shape != (2, 3, long.shape[2]) or long.shape[2] < 2:
            raise ValueError(
                f"hook {hook!r} of {self.name!r} has shape {tuple(long.shape)} for 2 contexts of 4 tokens and {tuple(short.shape)} for 2 of 3, "
                f"but an SAE needs one vector per position. {self._advice()}"
            )
        if not torch.isfinite(long).all():
            raise FloatingPointError(
                f"language model {self.name!r} gives NaN or infinite activations at hook {hook!r} for its first tokens, though its weights are "
                "finite. With precision=bfloat16 try float32; else check how the weights were made."
            )
        return long.shape[2], torch.allclose(long[:, :3], short, rtol=self._rounding, atol=self._rounding * float(long.std()))

    @property
    def _rounding(self) -> float:
        """How far equal activations of two passes may differ, relative."""
        return 1e-2 if self._bridge.cfg.dtype is torch.bfloat16 else 1e-4


def _fingerprint(bridge: Any) -> str:
    """A hash of the sizes and of the distinct weights (65,536 spread elements of each), the same in every version of transformer_lens:
    names differ between them, and some add a bias of zeros."""
    digests = set()
    for parameter in bridge.original_model.parameters():
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // _FINGERPRINT_ELEMENTS)].float().cpu().numpy()
        if sample.any():
            digests.add(hashlib.sha256(str(sorted(parameter.shape)).encode() + sample.tobytes()).hexdigest())
    sizes = {key: getattr(bridge.cfg, key) for key in ("architecture", "n_layers", "d_model", "n_heads", "d_vocab", "n_ctx")}
    return hashlib.sha256(json.dumps([sizes, sorted(digests)]).encode()).hexdigest()[:16]
