"""Activations of a language model at one hook point, through transformer_lens's `TransformerBridge`.

Shapes: C contexts, S positions, D activation size, V vocabulary.
"""

import difflib
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BUNDLED = Path(__file__).resolve().parent.parent / "bundled"
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
    """A pretrained language model and one hook point in it; gradients off, raw weights (no LayerNorm folding).

    `name` is `bundled`, a local folder in Hugging Face format, or a hub name. Safe to share between threads: passes take turns, because
    hooks are state of the model. Raises ConnectionError for a hub that cannot be reached, FileNotFoundError for a folder that is not there,
    ValueError for an unknown hook or one without an activation per position.
    """

    def __init__(self, name: str, hook: str, device: str | None = None, precision: Precision = Precision.float32) -> None:
        self.name, self.hook = name, hook
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if precision is Precision.bfloat16 and self.device.type == "cpu":
            raise ValueError("precision=bfloat16 is up to hundreds of times slower than float32 on a CPU. Use precision=float32 there.")
        self._lock = threading.RLock()
        self._bridge = _boot(name, self.device, getattr(torch, precision.value))
        self.tokenizer = self._bridge.tokenizer
        if self.tokenizer is None:
            raise ValueError(f"model {name!r} comes without a tokenizer. Save its tokenizer files into the same folder.")
        config = self._bridge.cfg
        self.context_length_limit = int(config.n_ctx)
        self.num_layers = int(config.n_layers)
        self.d_vocab = int(config.d_vocab)
        self.prepends_bos: bool = config.default_prepend_bos
        """The model's own convention, as transformer_lens knows it: GPT-2 and Llama start with BOS; Pythia, Qwen and Phi do not."""
        self.bos_token_id: int | None = self._valid_id(self.tokenizer.bos_token_id)
        self.eos_token_id: int | None = self._valid_id(self.tokenizer.eos_token_id)
        self.pad_token_id: int | None = self._valid_id(self.tokenizer.pad_token_id)
        others = (self.tokenizer.cls_token_id, self.tokenizer.sep_token_id)
        special = (self.bos_token_id, self.eos_token_id, self.pad_token_id, *map(self._valid_id, others))
        self.special_token_ids = frozenset(i for i in special if i is not None)
        self.fingerprint = _fingerprint(self._bridge)
        self._check_hook()
        self.d_in, self.causal = self._probe()

    def _valid_id(self, token: int | None) -> int | None:
        """None for a token that transformer_lens added to the tokenizer but the model has no embedding for."""
        return token if token is not None and 0 <= token < self.d_vocab else None

    @torch.no_grad()
    def activations(self, tokens_CS: Tensor) -> Tensor:
        """x_CSD at the hook, float32 on the model's device. The pass ends at the hook, so later layers cost nothing."""
        caught: list[Tensor] = []

        def catch(value: Tensor, hook: Any) -> None:
            caught.append(value)
            raise _Reached

        with self._lock, suppress(_Reached):
            self._bridge.run_with_hooks(self._on_device(tokens_CS), return_type=None, fwd_hooks=[(self.hook, catch)])
        if not caught:
            raise ValueError(f"hook {self.hook!r} exists in {self.name!r} but no value passes through it. {self._advice()}")
        value = caught[0]
        return (value.flatten(2) if value.ndim > 3 else value).float()

    @torch.no_grad()
    def logits(self, tokens_CS: Tensor, replace: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """logits_CSV, float32; with `replace`, those the model gives when x_CSD at the hook is replaced by `replace(x_CSD)`.

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
        place = re.fullmatch(r"blocks\.(\d+)\.hook_(?:(resid_pre|in)|resid_post|out)", self.hook)
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
        x_CSD = 1.5 * self.activations(tokens_CS)
        whole = self.logits(tokens_CS, lambda _: x_CSD)
        for as_tuple in (False, True):  # which of them a block gives depends on the architecture and the version of transformers
            with suppress(Exception):
                if torch.allclose(resume(as_tuple, tokens_CS, x_CSD), whole, rtol=1e-3, atol=1e-3):
                    return partial(resume, as_tuple)
        return None

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

        middle = re.fullmatch(r"(blocks\.\d+)\.hook_resid_mid", self.hook)
        if middle is None or self._bridge.hook_dict[self.hook].name == self.hook:
            return [(self.hook, swap)]
        # In a bridge this hook is the second LayerNorm's input, beside the residual stream: the stream itself changes where the block ends.
        return [(self.hook, swap), (f"{middle[1]}.hook_resid_post", lambda value, hook: value + change.pop())]

    def why_no_predictions(self) -> str | None:
        """Why next-token predictions mean nothing here; None where they do."""
        return None if self.causal else f"{self.name!r} is not causal: a position sees the token that it would predict."

    def _on_device(self, tokens_CS: Tensor) -> Tensor:
        if tokens_CS.shape[1] > self.context_length_limit:
            raise ValueError(
                f"contexts of {tokens_CS.shape[1]} tokens exceed the {self.context_length_limit} that {self.name!r} takes. Shorten them."
            )
        return tokens_CS.to(self.device, torch.int64)

    def _advice(self) -> str:
        last = self.num_layers - 1
        return (
            "Hooks are named blocks.LAYER.hook_resid_pre, .hook_resid_mid, .hook_resid_post, .hook_attn_out, .hook_mlp_out, .attn.hook_z or "
            f".mlp.hook_post, with LAYER from 0 to {last}."
        )

    def _check_hook(self) -> None:
        hooks = self._bridge.hook_dict
        if self.hook not in hooks:
            close = difflib.get_close_matches(self.hook, hooks, n=5, cutoff=0.5)
            raise ValueError(f"model {self.name!r} has no hook {self.hook!r}. {f'Close: {close}. ' if close else ''}{self._advice()}")

    def _probe(self) -> tuple[int, bool]:
        """(d_in, whether a later token leaves earlier activations alone), from two passes of a few tokens."""
        tokens_CS = torch.arange(8).reshape(2, 4) % self.d_vocab
        try:
            long, short = self.activations(tokens_CS), self.activations(tokens_CS[:, :3])
        except (ValueError, IndexError) as error:
            raise ValueError(f"hook {self.hook!r} of {self.name!r} gives no activations: {error} {self._advice()}") from error
        if long.ndim != 3 or long.shape[:2] != (2, 4) or short.shape != (2, 3, long.shape[2]) or long.shape[2] < 2:
            raise ValueError(
                f"hook {self.hook!r} of {self.name!r} has shape {tuple(long.shape)} for 2 contexts of 4 tokens and {tuple(short.shape)} for 2 of 3, "
                f"but an SAE needs one vector per position. {self._advice()}"
            )
        return long.shape[2], torch.allclose(long[:, :3], short, rtol=1e-2, atol=1e-2 * float(long.std()))


def _boot(name: str, device: torch.device, dtype: torch.dtype) -> Any:
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError as error:
        raise ImportError(
            f"activations of a language model need transformer_lens 3.9 or newer, and importing it failed: {error}. "
            "pip install 'transformer-lens>=3.9'"
        ) from error
    folder = BUNDLED if name == "bundled" else Path(name).expanduser()
    local = name == "bundled" or folder.is_dir()
    if local and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json, so it is no language model. Give a folder in Hugging Face format, or a hub name.")
    if not local and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise FileNotFoundError(f"language model folder {name!r} does not exist. Give a folder in Hugging Face format, a hub name, or `bundled`.")
    if not local:
        _check_hub(name)
    with _no_progress_bar(local):
        bridge = TransformerBridge.boot_transformers(str(folder) if local else name, device=str(device), dtype=dtype)
    bridge.eval()
    for parameter in bridge.parameters():
        parameter.requires_grad_(False)
    return bridge


def _check_hub(name: str) -> None:
    """One quick request: transformers itself retries for half a minute before it gives up, and then does not say what to do instead."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    way_out = "Use the bundled model (MODEL=bundled), or MODEL=FOLDER with a local folder in Hugging Face format."
    try:
        HfApi().model_info(name, timeout=15)
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403, 404):
            raise ValueError(
                f"the hub has no model {name!r} that you may read (HTTP {status}). Check the name, log in for gated models. {way_out}"
            ) from error
        raise ConnectionError(f"language model {name!r}: the hub answered HTTP {status}. Try again later. {way_out}") from error
    except Exception as error:  # which class says "unreachable" depends on the HTTP library that huggingface_hub was built on
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        raise ConnectionError(f"language model {name!r} is not on this machine and the hub cannot be reached ({reason}). {way_out}") from error


@contextmanager
def _no_progress_bar(quiet: bool) -> Iterator[None]:
    """Reading local weights takes a moment; a progress bar for it is noise. Downloads keep theirs."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    if quiet and was_on:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if quiet and was_on:
            logging.enable_progress_bar()


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
