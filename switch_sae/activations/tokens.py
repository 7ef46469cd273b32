"""Text to contexts: token ids cut to the language model's length, with each position's document and whether it becomes a row.

Shapes: C contexts, S positions in a context.
"""

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from switch_sae.activations.buffer import Position, seeded
from switch_sae.activations.document import Document

_DOCUMENTS_PER_CALL = 64
"""Tokenizers work on many documents at once; a stream reads at most so many ahead."""
_FEW = 0.03
"""A text with more special tokens than this loses something that one should know of."""


class Packing(Enum):
    packed = "packed"
    """Documents one after another, each preceded by the separator, cut into contexts: no position is wasted."""
    truncated = "truncated"
    """The first `context_length` tokens of every document, shorter ones padded: the Switch SAE paper's choice, one context per document."""


@dataclass(frozen=True)
class ContextRules:
    """How token ids become contexts and which positions become rows."""

    context_length: int
    packing: Packing
    bos: int | None
    """Put in front of every context; None puts nothing there."""
    separator: int | None
    """packed: put in front of every document, so that the model sees where one begins."""
    pad: int
    """truncated: fills short contexts on the right; padding never becomes a row."""
    special: frozenset[int]
    drop_special_tokens: bool
    drop_first_position: bool
    d_vocab: int | None = None
    """How many tokens the model has an embedding for; None checks no id."""

    def __post_init__(self) -> None:
        shortest = 2 if self.bos is not None or self.drop_first_position else 1
        if self.context_length < shortest:
            raise ValueError(f"context_length={self.context_length} leaves no position for text. Set it to at least {shortest}.")


@dataclass(frozen=True)
class Contexts:
    """Token ids with each position's document number, and which positions become rows."""

    tokens_CS: Tensor
    """int32."""
    document_CS: Tensor
    """int32."""
    keep_CS: Tensor
    """bool."""

    def __len__(self) -> int:
        return len(self.tokens_CS)

    def __getitem__(self, index: slice | Tensor) -> "Contexts":
        return Contexts(self.tokens_CS[index], self.document_CS[index], self.keep_CS[index])

    @property
    def rows(self) -> int:
        """How many positions become rows."""
        return int(self.keep_CS.sum())


@dataclass(frozen=True)
class _Cut:
    """One context before it is stacked with others."""

    tokens_S: np.ndarray
    document_S: np.ndarray
    length: int
    """Positions from here on are padding."""
    next_document: int
    next_token: int
    """Where the next context begins: a document number and a place in its tokens, the separator included."""


def tokenize(documents: Iterable[Document], tokenizer: Any, d_vocab: int | None = None) -> Iterator[np.ndarray]:
    """The token ids of each document, int32, without any special token added. Raises ValueError for one from `d_vocab` on."""
    iterator = iter(documents)
    while batch := list(islice(iterator, _DOCUMENTS_PER_CALL)):
        texts = [document.text for document in batch]
        all_ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        for document, ids in zip(batch, all_ids, strict=True):
            ids_N = np.asarray(ids, dtype=np.int32)
            if d_vocab is not None and len(ids_N) and (largest := int(ids_N.max())) >= d_vocab:
                raise ValueError(
                    f"the tokenizer has {len(tokenizer)} tokens, the model {d_vocab} embeddings; token {tokenizer.convert_ids_to_tokens(largest)!r} "
                    f"(id {largest}) stands in document {document.name!r}. Give the model a tokenizer of its own size (save the model after "
                    "resize_token_embeddings(len(tokenizer)) and training), or take the token out of the text."
                )
            yield ids_N


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of the vocabulary and of how a piece of text with capitals, spaces, digits, accents and brackets is cut by it."""
    probe = tokenizer(["Hello  World,\n\tdéjà-vu: 1234.5 {[(<x_i>)]} ..."], add_special_tokens=False, verbose=False)["input_ids"]
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(repr((vocabulary, [list(map(int, ids)) for ids in probe])).encode()).hexdigest()[:16]


def cut(tokens: Iterable[np.ndarray], rules: ContextRules, first_document: int = 0, first_token: int = 0) -> Iterator[_Cut]:
    """Cuts documents numbered from `first_document` into contexts, starting at its token `first_token` (packed only)."""
    yield from (_packed if rules.packing is Packing.packed else _truncated)(tokens, rules, first_document, first_token)


def _packed(tokens: Iterable[np.ndarray], rules: ContextRules, first_document: int, first_token: int) -> Iterator[_Cut]:
    """A context of BOS and S - 1 tokens, or of S tokens where they begin with BOS anyway or the model takes none; the last tokens stay over."""
    S = rules.context_length
    prefix = np.array([] if rules.separator is None else [rules.separator], dtype=np.int32)
    waiting_3N = np.empty((3, 0), dtype=np.int32)  # token, document, place in the document
    skip = first_token
    for number, ids in enumerate(tokens, first_document):
        ids_N = np.concatenate([prefix, ids])
        place_N = np.arange(len(ids_N), dtype=np.int32)
        waiting_3N = np.concatenate([waiting_3N, np.stack([ids_N, np.full_like(ids_N, number), place_N])[:, skip:]], axis=1)
        skip = start = 0
        while start < waiting_3N.shape[1]:
            add_bos = rules.bos is not None and waiting_3N[0, start] != rules.bos
            end = start + S - add_bos
            if end > waiting_3N.shape[1]:
                break
            tokens_S, document_S, _ = waiting_3N[:, start:end]
            if add_bos:
                tokens_S, document_S = np.concatenate([[rules.bos], tokens_S]), np.concatenate([document_S[:1], document_S])
            at_end = end == waiting_3N.shape[1]
            next_document, next_token = (number + 1, 0) if at_end else (int(waiting_3N[1, end]), int(waiting_3N[2, end]))
            yield _Cut(tokens_S, document_S, S, next_document, next_token)
            start = end
        waiting_3N = waiting_3N[:, start:]


def _truncated(tokens: Iterable[np.ndarray], rules: ContextRules, first_document: int, _first_token: int) -> Iterator[_Cut]:
    S = rules.context_length
    prefix = np.array([] if rules.bos is None else [rules.bos], dtype=np.int32)
    for number, ids in enumerate(tokens, first_document):
        if len(ids):
            ids = np.concatenate([prefix, ids])[:S]
            tokens_S = np.full(S, rules.pad, dtype=np.int32)
            tokens_S[: len(ids)] = ids
            yield _Cut(tokens_S, np.full(S, number, dtype=np.int32), len(ids), number + 1, 0)


def stack(cuts: list[_Cut], rules: ContextRules) -> Contexts:
    """Contexts with their keep mask: padding is never kept, special tokens and position 0 only where the rules say so."""
    tokens_CS = np.stack([c.tokens_S for c in cuts]).astype(np.int32)
    keep_CS = np.arange(rules.context_length)[None] < np.array([c.length for c in cuts])[:, None]
    if rules.drop_special_tokens:
        keep_CS &= ~np.isin(tokens_CS, np.array(sorted(rules.special), dtype=np.int32))
    if rules.drop_first_position:
        keep_CS[:, 0] = False
    document_CS = np.stack([c.document_S for c in cuts]).astype(np.int32)
    return Contexts(torch.from_numpy(tokens_CS), torch.from_numpy(document_CS), torch.from_numpy(keep_CS))


class SpecialCount:
    """How much of documents' own tokens is special and therefore dropped, counted as they pass."""

    def __init__(self, rules: ContextRules) -> None:
        self._special_N = np.array(sorted(rules.special if rules.drop_special_tokens else ()), dtype=np.int32)
        self._tokens, self._count = 0, Counter[int]()

    def watch(self, tokens: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """The same tokens."""
        for ids_N in tokens:
            self._tokens += len(ids_N)
            self._count.update(ids_N[np.isin(ids_N, self._special_N)].tolist())
            yield ids_N

    def note(self, tokenizer: Any) -> str:
        """A sentence where they are more than `_FEW` of the text; else empty."""
        share = {token: count / self._tokens for token, count in self._count.most_common()}
        if sum(share.values()) <= _FEW:
            return ""
        most = ", ".join(f"{tokenizer.convert_ids_to_tokens(token)!r} (id {token}) {part:.1%}" for token, part in list(share.items())[:3])
        return (
            f"note: special tokens are {sum(share.values()):.1%} of the training text's positions and give no rows: {most}. "
            "If the model's tokenizer means no padding or separator by them, set source.drop_special_tokens=false."
        )


class ContextFeed(ABC):
    """Contexts in training order, in blocks that are pure functions of their position."""

    start: Position

    @abstractmethod
    def block(self, position: Position, rows: int) -> tuple[Contexts, Position]:
        """Whole contexts holding about `rows` rows, at least one, never past the end of an epoch; and where the next block begins."""

    @abstractmethod
    def expected_documents(self, batch_size: int) -> float:
        """How many distinct documents a batch would hold if all rows of the text were shuffled perfectly."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Sizes and a fingerprint of the text, as plain JSON values."""


class LocalFeed(ContextFeed):
    """A corpus tokenised once and held in memory (9 bytes per token), its contexts visited in an order shuffled anew for every epoch."""

    def __init__(self, documents: Iterable[Document], tokenizer: Any, rules: ContextRules, seed: int, what: str = "text") -> None:
        self.start = {"epoch": 0, "context": 0}
        self.names: list[str] = []
        self.seed = seed
        self.special = SpecialCount(rules)
        cuts = cut(self.special.watch(tokenize(self._named(documents), tokenizer, rules.d_vocab)), rules)
        parts = [stack(part, rules) for part in iter(lambda: list(islice(cuts, 4096)), [])]
        if not sum(part.rows for part in parts):
            raise ValueError(
                f"the {what} ({len(self.names)} documents) gives no row at context_length={rules.context_length}, "
                f"packing={rules.packing.value}: it is shorter than one context, or every position is dropped. "
                "Give more text or shorten context_length."
            )
        self.contexts = Contexts(*(torch.cat([getattr(part, name) for part in parts]) for name in ("tokens_CS", "document_CS", "keep_CS")))
        self._rows_C = self.contexts.keep_CS.sum(1)
        self._epoch: tuple[int, Tensor, Tensor] | None = None

    def _named(self, documents: Iterable[Document]) -> Iterator[Document]:
        for document in documents:
            self.names.append(document.name)
            yield document

    def _order(self, epoch: int) -> tuple[Tensor, Tensor]:
        """The epoch's order of contexts and the running number of rows along it."""
        if self._epoch is None or self._epoch[0] != epoch:
            order_C = torch.randperm(len(self._rows_C), generator=seeded("contexts", self.seed, epoch))
            self._epoch = (epoch, order_C, self._rows_C[order_C].cumsum(0))
        return self._epoch[1:]

    def block(self, position: Position, rows: int) -> tuple[Contexts, Position]:
        epoch, first = position["epoch"], position["context"]
        order_C, total_C = self._order(epoch)
        done = int(total_C[first - 1]) if first else 0
        left = int(total_C[-1]) - done
        # The rest of the epoch in blocks of equal size: a short last one would mix few documents.
        share = -(-left // max(1, round(left / rows)))
        end = int(torch.searchsorted(total_C, done + share)) + 1
        over = end == len(order_C) or int(total_C[end - 1]) == int(total_C[-1])
        return self.contexts[order_C[first:end]], {"epoch": epoch + 1, "context": 0} if over else {"epoch": epoch, "context": end}

    def expected_documents(self, batch_size: int) -> float:
        """Sum over documents of 1 - (1 - p)^batch_size, p being the document's share of all rows (drawn with replacement)."""
        share = torch.bincount(self.contexts.document_CS[self.contexts.keep_CS]).double() / self.contexts.rows
        return float((1 - (1 - share) ** batch_size).sum())

    def describe(self) -> dict[str, Any]:
        tokens_CS = self.contexts.tokens_CS
        fingerprint = hashlib.sha256(tokens_CS.numpy().tobytes() + self.contexts.keep_CS.numpy().tobytes()).hexdigest()[:16]
        return {"documents": len(self.names), "contexts": len(tokens_CS), "rows_per_epoch": self.contexts.rows, "fingerprint": fingerprint}


class StreamFeed(ContextFeed):
    """A corpus too large to hold: contexts in the order of the stream, which resuming reads again up to its place without tokenising."""

    def __init__(self, documents: Callable[[], Iterator[Document]], tokenizer: Any, rules: ContextRules, name: str) -> None:
        self.start = {"epoch": 0, "document": 0, "token": 0}
        self._documents, self._tokenizer, self._rules, self._name = documents, tokenizer, rules, name
        self._cuts: Iterator[_Cut] = iter(())
        self._reached: Position | None = None

    def _open(self, position: Position) -> None:
        documents = self._documents()
        for _ in zip(range(position["document"]), documents, strict=False):
            pass
        tokens = tokenize(documents, self._tokenizer, self._rules.d_vocab)
        self._cuts = cut(tokens, self._rules, position["document"], position["token"])
        self._reached = position

    def block(self, position: Position, rows: int) -> tuple[Contexts, Position]:
        if position != self._reached:
            self._open(position)
        self._reached = None  # should reading fail half-way, the next call opens the stream again
        cuts: list[_Cut] = []
        kept = 0
        while kept < rows:
            one = next(self._cuts, None)
            if one is None:
                if not kept and not position["document"] and not position["token"]:
                    raise ValueError(
                        f"text {self._name!r} gives no row at context_length={self._rules.context_length}, "
                        f"packing={self._rules.packing.value}. Give more text or shorten context_length."
                    )
                again = {"epoch": position["epoch"] + 1, "document": 0, "token": 0}
                return (stack(cuts, self._rules), again) if kept else self.block(again, rows)
            cuts.append(one)
            kept += stack([one], self._rules).rows
        self._reached = {"epoch": position["epoch"], "document": cuts[-1].next_document, "token": cuts[-1].next_token}
        return stack(cuts, self._rules), self._reached

    def expected_documents(self, batch_size: int) -> float:
        """Every row of a shuffled endless text comes from a document of its own."""
        return float(batch_size)

    def describe(self) -> dict[str, Any]:
        return {"stream": self._name, "fingerprint": self._name}
