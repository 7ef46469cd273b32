"""A language model's activations, computed once and read from disk by every job that needs the same ones."""

import threading
from dataclasses import replace
from typing import Any

import torch

from switch_sae.activations.base import ActivationSource, EvaluationSet, check_same_stream
from switch_sae.activations.buffer import Block, Position, ShuffleBuffer, seeded
from switch_sae.activations.language_model import LanguageModel
from switch_sae.activations.language_model_source import CacheDtype, LanguageModelSource
from switch_sae.activations.shards import Chain, ShardStore
from switch_sae.activations.tokens import tokenizer_fingerprint
from switch_sae.files import Say, tell
from switch_sae.rows import Rows


class CachedSource(ActivationSource):
    """Batches x_TD of the rows that a `LanguageModelSource` gives, on the language model's device, through shards on disk.

    It holds the same rows as the live source in an order of its own. What is stored is the first epoch of the live source of seed 0, one shard
    per block of `buffer_rows` rows: the same for every job, whatever its seed, batch size or length. A job reads the first shards that cover
    its need; `seed` orders them, and the rows in each, anew for every epoch. Shards that are missing are built when the first batch is asked
    for, by one job, for which the others wait. The language model is loaded all the same: it is part of the key and of every evaluation.

    `rows` is how many rows the job will read, calibration included. A job that reads more meets the same rows again; with None it reads what is
    stored, or one shard where nothing is. The order depends on the number of shards read, so equal `rows` and `seed` give equal batches.

    Raises ValueError for a folder whose content is damaged or something else, RunError where it is full or cannot be written.
    """

    def __init__(
        self,
        config: LanguageModelSource.Config,
        batch_size: int,
        rows: int | None = None,
        language_model: LanguageModel | None = None,
        say: Say = tell,
    ) -> None:
        if config.cache is None:
            raise ValueError("CachedSource needs a folder, but cache=null. Set cache=FOLDER, or use LanguageModelSource.")
        if rows is not None and rows < 1:
            raise ValueError(f"rows={rows} must be at least 1, or None to read what is stored.")
        self.config, self._rows, self._say = config, rows, say
        canonical = replace(config, cache=None, cache_dtype=CacheDtype.float32, seed=0, prefetch=False)
        self._live = LanguageModelSource(canonical, batch_size, language_model)
        self.language_model: LanguageModel = self._live.language_model
        self.d_in = self._live.d_in
        self._store = ShardStore(config.cache, self._chain(), say)
        self._count: int | None = None
        """Shards in an epoch; None until the first batch is asked for."""
        self._closed = threading.Event()
        prefetch = self.language_model.device.type != "cpu" if config.prefetch is None else config.prefetch
        self._buffer = ShuffleBuffer(self._make_block, {"epoch": 0, "shard": 0}, batch_size, self._live.expected_documents, prefetch)
        self._announced = False

    def _chain(self) -> Chain:
        live, rules = self._live, self._live.rules
        made_of = {key: value for key, value in live.made_of().items() if key not in ("seed", "held_out_text")}  # neither changes a stored bit
        made_of["tokenizer"] = tokenizer_fingerprint(self.language_model.tokenizer)
        made_of["special_tokens"] = [rules.bos, rules.separator, rules.pad, *sorted(rules.special)]
        made_of["dtype"] = self.config.cache_dtype.value
        text = live.describe()["text"]
        rows_of_text: int | None = text.get("rows_per_epoch")
        block_rows = self.config.buffer_rows
        if rows_of_text is not None:  # a local text is cut into blocks of equal size
            block_rows = -(-rows_of_text // max(1, round(rows_of_text / block_rows)))
        about = {"model": self.language_model.name, "text": text}
        dtype: torch.dtype = getattr(torch, self.config.cache_dtype.value)
        d_target = 0 if self.config.target_hook is None else live.d_out
        return Chain(live.make_block, live.start, made_of, about, self.d_in, dtype, block_rows, rows_of_text, d_target)

    def __next__(self) -> Rows:
        if self._count is None:
            self._settle()
        batch = next(self._buffer)
        if (epoch := self._buffer.position["epoch"]) and not self._announced:
            self._announced = True
            self._say(f"activations: the cached rows have been read once and repeat: epoch {epoch + 1}, in a new order.")
        return batch

    def _settle(self, shards: int | None = None) -> None:
        """Decides how many shards this job reads, the first `shards` or those that cover its rows, and builds the ones that are missing."""
        store, count = self._store, self._count
        if shards is not None:
            self._count = store.ensure(0, shards, self._closed)
        elif self._rows is not None:
            self._count = store.ensure(self._rows, 1, self._closed)
        else:
            self._count = store.ensure(0, max(1, len(store.shards)), self._closed)
        if self._count != count:
            rows = sum(shard.rows for shard in store.shards[: self._count])
            self._say(
                f"activations: reading {rows:,} rows from {store.folder} ({self._count} shard{'s' * (self._count != 1)}, "
                f"{self.config.cache_dtype.value})"
            )

    def _make_block(self, position: Position, cancelled: threading.Event) -> Block:
        assert self._count is not None
        epoch, ordinal, seed = position["epoch"], position["shard"], self.config.seed
        index = int(torch.randperm(self._count, generator=seeded("cached shards", seed, epoch))[ordinal])
        place_T = torch.randperm(self._store.shards[index].rows, generator=seeded("cached rows", seed, epoch, index))
        rows, document_T = self._store.read(index, place_T, self.language_model.device, cancelled)
        over = ordinal + 1 == self._count
        return Block(rows, document_T, {"epoch": epoch + 1, "shard": 0} if over else {"epoch": epoch, "shard": ordinal + 1})

    def evaluation_set(self, rows: int) -> EvaluationSet:
        """That of the live source: computed, not stored."""
        return self._live.evaluation_set(rows)

    def state_dict(self) -> dict[str, Any]:
        """The next unseen row's shard and place in it, how many shards an epoch has, and what the stream is made of."""
        return {**self._buffer.state_dict(), "shards": self._count, "made_of": self._made_of()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError where the saved stream had another model, text or config."""
        check_same_stream(state["made_of"], self._made_of())
        if state["shards"] is None:
            self._count = None
        else:
            self._settle(state["shards"])
            if self._count != state["shards"]:
                raise ValueError(
                    f"{self._store.folder} has {self._count} shards, the saved stream read {state['shards']} of the same text. "
                    "The state was edited or damaged; go on from another checkpoint."
                )
        self._buffer.load_state_dict(state)

    def _made_of(self) -> dict[str, Any]:
        return {**self._live.made_of(), **self._store.chain.made_of, "seed": self.config.seed, "cached": True}

    def describe(self) -> dict[str, Any]:
        return {
            **self._live.describe(),
            "seed": self.config.seed,
            "prefetch": self._buffer.prefetches,
            "cache": {"folder": str(self._store.folder.parent), "key": self._store.chain.key, "dtype": self.config.cache_dtype.value},
        }

    def mixing(self) -> dict[str, float]:
        """How well batches mix documents so far: `ShuffleBuffer.mixing`."""
        return self._buffer.mixing()

    @property
    def rate(self) -> float | None:
        return self._buffer.rate

    def close(self) -> None:
        self._closed.set()
        self._buffer.close()
        self._live.close()
