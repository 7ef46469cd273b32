"""From the name of a language model to its weights and its tokenizer, as they were saved; whatever is damaged or does not fit is found here."""

import copy
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from switch_sae.files import tell

BUNDLED = Path(__file__).resolve().parent.parent / "bundled"
_LFS = b"version https://git-lfs"
_SHOWN = 5
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Weight files in the order in which transformers looks for them."""
_COPY_AGAIN = "Copy or download it again."


class Refused(ValueError):
    """A model that this module refuses: the message says it all."""


@dataclass(frozen=True)
class Loaded:
    """A language model in evaluation mode, gradients off, with what was saved beside it."""

    bridge: Any
    """transformer_lens's `TransformerBridge`; its own tokenizer has special tokens that transformer_lens adds."""
    tokenizer: Any
    """As saved with the model: None stands for every special token that it has not."""
    special: dict[str, int]
    """Ids of the saved special tokens, by name (bos, eos, pad, cls, sep), as far as the model has embeddings for them."""
    d_vocab: int
    """Rows of the embedding."""
    without_head: str | None
    """Why the logits mean nothing, where the output head was not saved."""


def resolve(name: str) -> Path | None:
    """The local folder or GGUF file that a name stands for, absolute, so that nothing takes it for an alias; None for a hub name.

    Raises FileNotFoundError for what can only be a path and is not there, ValueError for a file that is no GGUF file.
    """
    if name == "bundled":
        return BUNDLED
    if not name.strip():
        raise ValueError(f"source.model={name!r} names no language model. Give a folder in Hugging Face format, a hub name, or `bundled`.")
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ValueError(f"language model {name!r} is a file. Give the folder that holds it with its config.json and tokenizer, or a .gguf file.")
        return path.resolve()
    if path.is_dir():
        return path.resolve()
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.lower().endswith(".gguf"):
        raise FileNotFoundError(f"language model folder {name!r} does not exist. Give a folder in Hugging Face format, a hub name, or `bundled`.")
    return None


def load(name: str, device: torch.device, dtype: torch.dtype) -> Loaded:
    """Raises FileNotFoundError, ValueError and ConnectionError, each with the folder or name, the file, the rule and what to do."""
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError as error:
        raise ImportError(
            f"activations of a language model need transformer_lens 3.9 or newer, and importing it failed: {error}. "
            "pip install 'transformer-lens>=3.9'"
        ) from error
    path = resolve(name)
    if path is None:
        _check_hub(name)
    with _one_message(name, path), _no_progress_bar(quiet=path is not None):
        if path is not None and path.is_file():
            model, tokenizer, info = read_gguf(path, dtype)
            model = model.to(device)
            given: dict[str, Any] = {"hf_model": model}
            parameters = dict(model.named_parameters())
        else:
            if path is not None:
                check_folder(path)
            source = name if path is None else str(path)
            tokenizer = _saved_tokenizer(source, path)
            given = {"model_class": (weights := _Weights(source))}
        # transformer_lens adds special tokens to the tokenizer it is given, and would read it again where this mark is missing.
        own = copy.deepcopy(tokenizer)
        own.init_kwargs["add_bos_token"] = True
        bridge = TransformerBridge.boot_transformers(str(path or name), device=str(device), dtype=dtype, tokenizer=own, **given)
        if "hf_model" not in given:
            info, parameters = weights.info, weights.parameters
    without_head = _check_weights(name, info, parameters, info["base"])
    bridge.eval()
    for parameter in bridge.parameters():
        parameter.requires_grad_(False)
    return Loaded(bridge, tokenizer, _special(tokenizer, path or name, info["rows"]), info["rows"], without_head)


class _Weights:
    """Given to transformer_lens as the class to load weights with: the right one of transformers', and what it says about the weights is kept."""

    def __init__(self, source: str) -> None:
        from transformer_lens.model_bridge.sources import transformers as lens
        from transformers import AutoConfig

        architecture = lens.determine_architecture_from_hf_config(AutoConfig.from_pretrained(source))
        self._class = lens.get_hf_model_class_for_architecture(architecture)

    def from_pretrained(self, source: str, **settings: Any) -> Any:
        model, info = self._class.from_pretrained(source, output_loading_info=True, ignore_mismatched_sizes=True, **settings)
        self.info, self.parameters = _described(model, info), dict(model.named_parameters())
        return model


def _described(model: Any, info: dict[str, Any]) -> dict[str, Any]:
    """What transformers says about loading, with the number of embeddings and the name of the model below the head."""
    return {**info, "base": model.base_model_prefix, "rows": model.get_input_embeddings().weight.shape[0]}


def read_gguf(file: Path, dtype: torch.dtype) -> tuple[Any, Any, dict[str, Any]]:
    """(model, tokenizer, what loading says) of a GGUF file, its weights de-quantised; the model can be saved like any other."""
    import importlib.util

    import transformers

    with file.open("rb") as opened:
        start = opened.read(len(_LFS))
    if start == _LFS:
        raise Refused(f"{file} is a pointer of git-lfs, not the file itself. Run `git lfs pull` in its clone, or download it.")
    if not start.startswith(b"GGUF"):
        raise Refused(f"{file} is no GGUF file: it begins with {start[:4]!r}. {_COPY_AGAIN}")
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"{file} needs the gguf package: pip install gguf.")
    # Newer releases of transformers may else leave the weights packed.
    unpack = {"quantization_config": transformers.GgufConfig(dequantize=True)} if hasattr(transformers, "GgufConfig") else {}
    settings: dict[str, Any] = {"dtype": dtype, "attn_implementation": "eager", "output_loading_info": True, **unpack}
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, **settings)
    model, info = loaded
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name), _described(model, info)


def check_folder(folder: Path) -> None:
    """Refuses a model folder in which a file is missing, cut or only a pointer. Reads the ends of files, not the weights."""
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise Refused(f"{folder} holds an adapter, no language model. Merge it into its base model, save that, and give the saved folder.")
        raise FileNotFoundError(f"{folder} holds no config.json, so it is no language model. Give a folder in Hugging Face format, or a hub name.")
    for entry in sorted(folder.iterdir()):
        if entry.is_file() and entry.stat().st_size < 1024 and entry.read_bytes().startswith(_LFS):
            raise Refused(f"{entry} is a pointer of git-lfs, not the file itself. Run `git lfs pull` in {folder}, or download it.")
    _json(folder / "config.json")
    found = next((name for name in _WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        there = ", ".join(sorted(entry.name for entry in folder.iterdir())[:10])
        raise FileNotFoundError(f"{folder} holds no weights: none of {', '.join(_WEIGHTS)} is there, only {there}. Copy the weights into it.")
    files = [found]
    if found.endswith(".index.json"):
        try:
            files = sorted(set(_json(folder / found)["weight_map"].values()))
        except (KeyError, TypeError, AttributeError) as error:
            raise Refused(f"{folder / found} has no weight_map that names the weight files. {_COPY_AGAIN}") from error
        if missing := [file for file in files if not (folder / file).is_file()]:
            raise FileNotFoundError(
                f"{folder} lacks {_some(missing)}, {len(missing)} of the {len(files)} weight files that {found} names. Copy them."
            )
    for file in files:
        if file.endswith(".safetensors"):
            try:
                with safe_open(folder / file, framework="pt"):
                    pass
            except (SafetensorError, OSError) as error:
                raise Refused(f"{folder / file} is cut or damaged ({error}). {_COPY_AGAIN}") from error


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise Refused(f"{file} is no whole JSON file ({error}). {_COPY_AGAIN}") from error


def _saved_tokenizer(source: str, folder: Path | None) -> Any:
    """transformers makes an empty tokenizer, which finds no token in any text, where none was saved."""
    from transformers import AutoTokenizer

    missing = f"model {source!r} comes without a tokenizer{{}}. Save its tokenizer files (tokenizer.json, or those of its kind) into the same folder."
    if folder is not None:
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            if (folder / name).is_file():
                _json(folder / name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:
        raise Refused(missing.format(f" that can be read ({_first_line(error)})")) from error
    names = {"tokenizer.json", "tekken.json", "tokenizer.model", *getattr(tokenizer, "vocab_files_names", {}).values()}
    empty = set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens)
    if empty or (folder is not None and not any((folder / name).is_file() for name in names)):
        raise Refused(missing.format(""))
    return tokenizer


def _special(tokenizer: Any, source: Path | str, rows: int) -> dict[str, int]:
    """Ids of special tokens that are among the saved tokens: a tokenizer's class may add those of its kind."""
    from huggingface_hub import try_to_load_from_cache

    saved: set[int] | None = None
    cached = source / "tokenizer.json" if isinstance(source, Path) else try_to_load_from_cache(source, "tokenizer.json")
    if isinstance(cached, str | Path) and (file := Path(cached)).is_file():
        content = _json(file)
        vocabulary = content.get("model", {}).get("vocab", {})
        saved = set(vocabulary.values()) if isinstance(vocabulary, dict) else set(range(len(vocabulary)))
        saved |= {token["id"] for token in content.get("added_tokens", [])}
        config = file.with_name("tokenizer_config.json")
        saved |= set(map(int, _json(config).get("added_tokens_decoder", {}))) if config.is_file() else set()
    ids = {kind: getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad", "cls", "sep")}
    return {kind: i for kind, i in ids.items() if i is not None and 0 <= i < rows and (saved is None or i in saved)}


def _check_weights(name: str, info: dict[str, Any], parameters: dict[str, Tensor], base: str) -> str | None:
    """Why the output head means nothing, where only that was not saved. Raises ValueError for weights that do not make up the model."""
    own = set(parameters)
    if info["mismatched_keys"]:
        shown = (f"{key} {tuple(saved)} for {tuple(wanted)}" for key, saved, wanted in sorted(info["mismatched_keys"]))
        raise Refused(f"weights of {name!r} do not fit its config.json: saved {_some(shown)}. Give the config.json that was saved with them.")
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    has_body = any(key.startswith(f"{base}.") for key in own)
    if body := [key for key in missing if not has_body or key.startswith(f"{base}.")]:
        raise Refused(
            f"the saved weights of {name!r} lack {len(body)} that its config.json asks for: {_some(body)}; they would be random numbers. "
            "Save the whole model, or give the config.json that fits the weights."
        )
    kinds = {_without_numbers(key) for key in own}
    if layers := [key for key in unexpected if _without_numbers(key) in kinds or _without_numbers(f"{base}.{key}") in kinds]:
        raise Refused(
            f"the saved weights of {name!r} hold {len(layers)} of layers that its config.json leaves out: {_some(layers)}. "
            "Give the config.json that was saved with them."
        )
    if unexpected:
        tell(f"language model {name!r}: {len(unexpected)} saved weights have no place in the model and are left out: {_some(unexpected)}.")
    for key, parameter in parameters.items():
        if parameter.is_floating_point() and parameter.numel() and not torch.isfinite(torch.stack(torch.aminmax(parameter.detach()))).all():
            raise Refused(f"weight {key} of {name!r} holds NaN or infinite values, so nothing it computes has a meaning. {_COPY_AGAIN}")
    return f"the output head of {name!r} was not saved with it ({_some(missing)})" if missing else None


def _without_numbers(key: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", key)


def _some(items: Iterable[str]) -> str:
    """The first few, and how many more."""
    listed = list(items)
    return ", ".join(listed[:_SHOWN]) + (f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else "")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {(lines or [''])[0][:300]}"


@contextmanager
def _one_message(name: str, path: Path | None) -> Iterator[None]:
    """Whatever transformers and transformer_lens raise while they load, as one message that names the model."""
    try:
        yield
    except (Refused, ConnectionError, ImportError):
        raise
    except Exception as error:
        if isinstance(error, FileNotFoundError) and error.strerror is None:
            raise  # of this module
        if path is None and isinstance(error, OSError):
            raise ConnectionError(f"language model {name!r} could not be fetched from the hub ({_first_line(error)}). Try again later.") from error
        where = f"{name!r}" if path is None or str(path) == name else f"{name!r} ({path})"
        raise ValueError(
            f"language model {where} cannot be loaded: {_first_line(error)}. Check that its files are whole and that transformer_lens knows its "
            "architecture."
        ) from error


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
