"""The stream of activations that SAEs train on: text through a language model's hook, shuffled, endless, exactly resumable."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from switch_sae.activations.base import ActivationSource, EvaluationSet, check_same_stream
from switch_sae.activations.buffer import Block, Position, ShuffleBuffer, seeded
from switch_sae.activations.document import HELD_OUT_ONE_IN, Document
from switch_sae.activations.language_model import LanguageModel, Precision
from switch_sae.activations.text import TextConfig, documents, first_documents, local_split, text_hash, without_ignored
from switch_sae.activations.text_dataset import dataset_version
from switch_sae.activations.tokens import ContextFeed, ContextRules, Contexts, LocalFeed, Packing, SpecialCount, StreamFeed, tokenize
from switch_sae.checks import Settings, all_at_least
from switch_sae.countdown import Countdown
from switch_sae.files import tell
from switch_sae.rows import Rows

_EVALUATION_POOL = 4


class CacheDtype(Enum):
    """What a cache on disk stores activations in. They train as float32 either way."""

    float32 = "float32"
    """Exact."""
    bfloat16 = "bfloat16"
    """Half the size, 8 significant bits: exact for a residual stream computed with precision=bfloat16, else off by up to 0.4 % per value."""
    float16 = "float16"
    """Half the size, 11 significant bits; values beyond 65,504 are refused."""


class LanguageModelSource(ActivationSource):
    """Batches x_TD of a language model's activations, on the language model's device.

    Local text is tokenised once at the start and its contexts are visited in an order shuffled anew for every epoch; a streamed dataset is
    read in order. `language_model` may be given to share one that is loaded already; it must have the config's model and hook.
    """

    @dataclass
    class Config(Settings):
        model: str = "bundled"
        """`bundled`, a local folder in Hugging Face format, a GGUF file, or a hub name; a folder that is there comes before the hub."""
        hook: str = "blocks.2.hook_resid_pre"
        target_hook: str | None = None
        """Where transcoders write: what stands there is their rows' target, and what their output replaces. null is an autoencoder's source."""
        text: TextConfig = field(default_factory=TextConfig)
        context_length: int = 128
        packing: Packing = Packing.packed
        prepend_bos: bool | None = None
        """Whether every context begins with BOS; null follows the model's own convention, which is no BOS where none was saved with it."""
        drop_special_tokens: bool = True
        """BOS, EOS and padding, wherever they stand, give no rows: their norms are far outside the rest and distort every metric."""
        drop_first_position: bool = True
        """Position 0 gives no row, whichever token it holds: it is an attention sink."""
        buffer_rows: int = 131_072
        """Rows shuffled together; memory is two to three times buffer_rows * d_in * 4 bytes."""
        contexts_per_forward: int = 32
        """Contexts in one pass of the language model; on a CPU larger passes are slower, they leave the cache."""
        device: str | None = None
        """Of the language model; null takes CUDA where there is one."""
        precision: Precision = Precision.float32
        prefetch: bool | None = None
        """Makes the next block in a thread while the current one is used; null does so where the model runs on a GPU. Measured on 2 CPU cores:
        0 to 25 % slower, since both sides want all cores."""
        seed: int = 0
        cache: str | None = None
        """Folder that keeps activations on disk for every job that needs the same ones (`CachedSource`); null computes them as they are needed."""
        cache_dtype: CacheDtype = CacheDtype.float32

        def __post_init__(self) -> None:
            all_at_least(self, context_length=1, buffer_rows=1, contexts_per_forward=1, seed=0)
            if self.target_hook is not None and self.target_hook in ("", self.hook):
                raise ValueError(
                    f"target_hook={self.target_hook!r} with hook={self.hook!r}: a transcoder writes to another hook. Use null for an SAE."
                )
            if self.cache == "":
                raise ValueError("cache='' names no folder. Set cache=FOLDER, or cache=null to compute activations as they are needed.")
            if self.cache is None and self.cache_dtype is not CacheDtype.float32:
                raise ValueError(f"cache_dtype={self.cache_dtype.value} would be ignored without a cache. Set cache=FOLDER.")

    @staticmethod
    def upgrade(fields: dict[str, Any]) -> dict[str, Any]:
        """Saved settings of any version as today's: earlier ones took settings of the text that its kind ignores."""
        return {**fields, "text": without_ignored(fields["text"])} if "text" in fields else dict(fields)

    def __init__(self, config: Config, batch_size: int, language_model: LanguageModel | None = None) -> None:
        if config.cache is not None:
            raise ValueError(f"cache={config.cache} would be ignored by LanguageModelSource. Use build_source(config, batch_size), or cache=null.")
        if config.buffer_rows < batch_size:
            raise ValueError(f"buffer_rows={config.buffer_rows} is below batch_size={batch_size}, so nothing is mixed. Use several batches' worth.")
        self.config = config
        self.batch_size = batch_size
        self.language_model = language_model or LanguageModel(config.model, config.hook, config.device, config.precision, config.target_hook)
        given, asked = ((one, h.hook, h.target_hook) for one, h in ((self.language_model.name, self.language_model), (config.model, config)))
        if given != asked:
            hooks = [f"{name!r} and hook {hook!r}" + (f" with target_hook {to!r}" if to else "") for name, hook, to in (given, asked)]
            raise ValueError(f"the language model given has name {hooks[0]}, the config {hooks[1]}. They must agree.")
        self.d_in, self.d_out = self.language_model.d_in, self.language_model.d_out
        self.rules = self._rules()
        self._feed: ContextFeed
        self._identity: dict[str, str | None]
        """What tells the text from another of the same settings, beside the fingerprint of local training text; None is not known."""
        tokenizer = self.language_model.tokenizer
        if config.text.streamed:
            name = f"{config.text.dataset}:{config.text.dataset_config}:{config.text.split}:{config.text.text_column}:{config.text.max_documents}"
            self._feed = StreamFeed(lambda: documents(config.text, held_out=False), tokenizer, self.rules, name)
            self._identity, special = self._look_at_stream()
        else:
            train, held_out = local_split(config.text)
            self._feed = LocalFeed(train, tokenizer, self.rules, config.seed, "training text")
            self._held_out = LocalFeed(held_out, tokenizer, self.rules, 0, "held-out text")
            self._identity, special = {"held_out_text": self._held_out.describe()["fingerprint"]}, self._feed.special
        if note := special.note(tokenizer):
            tell(note)
        self._text = self._feed.describe()
        self.start = self._feed.start
        """The position of the first block."""
        self.expected_documents = self._feed.expected_documents(batch_size)
        """Distinct documents in a batch under a perfect shuffle of the whole text."""
        prefetch = self.language_model.device.type != "cpu" if config.prefetch is None else config.prefetch
        self._buffer = ShuffleBuffer(self.make_block, self.start, batch_size, self.expected_documents, prefetch)
        self._announced = False

    def _rules(self) -> ContextRules:
        config, model = self.config, self.language_model
        if config.context_length > model.context_length_limit:
            raise ValueError(
                f"context_length={config.context_length} exceeds the {model.context_length_limit} tokens that {model.name!r} takes. "
                f"Set context_length={model.context_length_limit} or less."
            )
        if config.packing is Packing.truncated and not model.causal:
            raise ValueError(
                f"packing=truncated pads short contexts, which changes every activation of {model.name!r}: it is not causal. Use packed."
            )
        prepend_bos = model.prepends_bos if config.prepend_bos is None else config.prepend_bos
        if prepend_bos and model.bos_token_id is None:
            raise ValueError(f"prepend_bos=true, but {model.name!r} has no BOS token. Set prepend_bos=false.")
        first_choice, second_choice = (model.bos_token_id, model.eos_token_id) if prepend_bos else (model.eos_token_id, model.bos_token_id)
        return ContextRules(
            context_length=config.context_length,
            packing=config.packing,
            bos=model.bos_token_id if prepend_bos else None,
            separator=first_choice if first_choice is not None else second_choice,
            pad=next((i for i in (model.pad_token_id, model.eos_token_id) if i is not None), 0),
            special=model.special_token_ids,
            drop_special_tokens=config.drop_special_tokens,
            drop_first_position=config.drop_first_position,
            d_vocab=model.d_vocab,
        )

    def _look_at_stream(self) -> tuple[dict[str, str | None], SpecialCount]:
        """What a stream is now: its name stays when its content changes. The first documents of both sides are tokenised, so that what cannot be is
        found before anything is trained.
        """
        text, tokenizer, special = self.config.text, self.language_model.tokenizer, SpecialCount(self.rules)
        assert text.dataset is not None
        version = dataset_version(text.dataset, text.dataset_config, text.dataset_revision)
        train, held_out = first_documents(text)
        for tokens in (special.watch(tokenize(train, tokenizer, self.rules.d_vocab)), tokenize(held_out, tokenizer, self.rules.d_vocab)):
            for _ in tokens:
                pass
        return {"training_text": text_hash(train), "held_out_text": text_hash(held_out), "dataset": version}, special

    def __next__(self) -> Rows:
        batch = next(self._buffer)
        epoch = self._buffer.position["epoch"]
        if epoch and not self._announced:
            self._announced = True
            size = f" of {self._text['rows_per_epoch']:,} rows" if "rows_per_epoch" in self._text else ""
            tell(f"activations: the text has been read once and repeats: epoch {epoch + 1}{size}.")
        return batch

    def make_block(self, position: Position, cancelled: threading.Event) -> Block:
        """The shuffled block of about `buffer_rows` rows at a position of the text: the same bits on every call.

        Raises InterruptedError once `cancelled` is set, FloatingPointError for activations that are NaN or infinite.
        """
        contexts, next_position = self._feed.block(position, self.config.buffer_rows)
        rows = contexts.rows
        place_T = torch.randperm(rows, generator=seeded("rows", self.config.seed, *(position[key] for key in sorted(position))))
        device, has_target = self.language_model.device, self.config.target_hook is not None
        block = Rows.of(torch.empty(rows, self.d_in, device=device), torch.empty(rows, self.d_out, device=device) if has_target else None)
        done, progress = 0, Countdown("activations", rows, "rows of the first block")
        for kept, _ in self._rows(contexts, f"the block at {position}"):
            if cancelled.is_set():
                raise InterruptedError(f"making the block at {position} was called off.")
            place = place_T[done : done + len(kept)].to(device)
            block.x_TD[place] = kept.x_TD
            if has_target:
                block.target_TD[place] = kept.target_TD
            done += len(kept)
            if position == self.start:  # later ones are counted in training steps
                progress(done)
        document_T = torch.empty(rows, dtype=torch.int64)
        document_T[place_T] = contexts.document_CS[contexts.keep_CS].long()
        return Block(block, document_T, next_position)

    def _rows(self, contexts: Contexts, where: str) -> Iterator[tuple[Rows, Tensor]]:
        """(kept rows, targets of dropped rows) of one pass after another, in reading order. Passes depend on the contexts alone, so rows come out
        bit-identical again."""
        for start in range(0, len(contexts), self.config.contexts_per_forward):
            part = contexts[start : start + self.config.contexts_per_forward]
            x_CSD, target_CSD = self.language_model.activations_and_targets(part.tokens_CS)
            keep_CS = part.keep_CS.to(x_CSD.device)
            kept = Rows.of(x_CSD[keep_CS], None if target_CSD is x_CSD else target_CSD[keep_CS])
            for hook, rows_TD in ((self.config.hook, kept.x_TD), (self.config.target_hook, kept.target_TD)):
                if not torch.isfinite(rows_TD).all():
                    raise FloatingPointError(
                        f"language model {self.language_model.name!r} gives NaN or infinite activations at hook {hook!r}, in contexts "
                        f"{start} to {start + len(part) - 1} of {where}. Check the model's weights; with precision=bfloat16 try float32."
                    )
            yield kept, target_CSD[~keep_CS]

    def evaluation_set(self, rows: int) -> EvaluationSet:
        """Whole held-out contexts drawn from all held-out documents by a fixed seed, in reading order; on the CPU.

        Of a streamed dataset, drawn from the first held-out documents that hold `_EVALUATION_POOL` times as many rows.
        """
        if rows < 1:
            raise ValueError(f"an evaluation set of {rows} rows cannot be made. Ask for at least 1.")
        text, tokenizer = self.config.text, self.language_model.tokenizer
        if text.streamed:
            names: list[str] = []
            feed = StreamFeed(lambda: _named(documents(text, held_out=True), names), tokenizer, self.rules, self._text["stream"])
            contexts = feed.block(feed.start, _EVALUATION_POOL * rows)[0]
        else:
            contexts, names = self._held_out.contexts, self._held_out.names
        chosen = _whole_contexts(contexts, rows)
        parts, dropped, progress = [], [], Countdown("held-out activations", chosen.rows, "rows")
        for kept, dropped_TD in self._rows(chosen, "the held-out text"):
            parts.append(kept.to("cpu"))
            dropped.append(dropped_TD.cpu())
            progress(sum(map(len, parts)))
        rows_kept = Rows.cat(parts)
        target_TD = None if rows_kept.target_TD is rows_kept.x_TD else rows_kept.target_TD
        document_T, tokens_CS = chosen.document_CS[chosen.keep_CS].long(), chosen.tokens_CS.long()
        return EvaluationSet(rows_kept.x_TD, document_T, tokens_CS, chosen.keep_CS, tuple(names), target_TD, torch.cat(dropped))

    def state_dict(self) -> dict[str, Any]:
        """The next unseen row's place in the text, and what the stream is made of, so that it is not continued with something else."""
        return {**self._buffer.state_dict(), "made_of": self.made_of()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError where the saved stream had another model, text or config: its place means nothing in this one."""
        check_same_stream(state["made_of"], self.made_of())
        self._buffer.load_state_dict(state)

    def made_of(self) -> dict[str, Any]:
        """Everything that the rows and their order follow from, as plain JSON values."""
        config = self.config
        return {
            "model": self.language_model.fingerprint,
            "hook": config.hook,
            **({} if config.target_hook is None else {"target_hook": config.target_hook}),  # absent, as in what autoencoders have saved so far
            "precision": config.precision.value,
            "text": self._text["fingerprint"],
            **self._identity,
            "context_length": config.context_length,
            "packing": config.packing.value,
            "prepend_bos": self.rules.bos is not None,
            "drop_special_tokens": config.drop_special_tokens,
            "drop_first_position": config.drop_first_position,
            "buffer_rows": config.buffer_rows,
            "contexts_per_forward": config.contexts_per_forward,
            "seed": config.seed,
        }

    def describe(self) -> dict[str, Any]:
        return {
            **self.made_of(),
            "source": "language_model",
            "model": self.language_model.name,
            "model_fingerprint": self.language_model.fingerprint,
            "d_in": self.d_in,
            **({} if self.config.target_hook is None else {"d_out": self.d_out, "module_flops": self.language_model.module_flops}),
            "device": str(self.language_model.device),
            "prefetch": self._buffer.prefetches,
            "text": {"kind": self.config.text.kind.value, "held_out": f"one document in {HELD_OUT_ONE_IN}", **self._text},
        }

    def mixing(self) -> dict[str, float]:
        """How well batches mix documents so far: `ShuffleBuffer.mixing`."""
        return self._buffer.mixing()

    @property
    def rate(self) -> float | None:
        return self._buffer.rate

    def close(self) -> None:
        self._buffer.close()


def _named(source: Iterator[Document], names: list[str]) -> Iterator[Document]:
    """Passes documents on and notes their names, by number."""
    for document in source:
        names.append(document.name)
        yield document


def _whole_contexts(contexts: Contexts, rows: int) -> Contexts:
    """As many contexts in a fixed random order as fit into `rows` rows, sorted by reading order; the first one cut short if even it does not fit."""
    order_C = torch.randperm(len(contexts), generator=seeded("evaluation"))
    order_C = order_C[contexts.keep_CS[order_C].any(1)]
    fits = int((contexts.keep_CS[order_C].sum(1).cumsum(0) <= rows).sum())
    chosen = contexts[order_C[: max(fits, 1)].sort().values]
    return Contexts(chosen.tokens_CS, chosen.document_CS, chosen.keep_CS & (chosen.keep_CS.flatten().cumsum(0).reshape(chosen.keep_CS.shape) <= rows))
