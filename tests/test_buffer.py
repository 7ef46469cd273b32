"""The buffer, the feeds and the contexts, on integers instead of a language model: every row says which token of which document it is."""

import json
import threading
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch

from switch_sae import rows as rows_module
from switch_sae.activations import buffer as buffer_module
from switch_sae.activations.buffer import Block, Prefetcher, ShuffleBuffer, distinct, seeded
from switch_sae.activations.text import Document
from switch_sae.activations.tokens import ContextRules, LocalFeed, Packing, StreamFeed, cut, stack, tokenize
from switch_sae.rows import NormLimit, Rows
from switch_sae.stream import Batches

BOS, EOS, PAD = 1, 2, 3


def tokenizer(texts, **_):
    """Words are numbers, and are their own ids."""
    return {"input_ids": [[int(word) for word in text.split()] for text in texts]}


def rules(context_length=8, packing=Packing.packed, bos=BOS, separator=BOS, special=True, first=True):
    return ContextRules(context_length, packing, bos, separator, PAD, frozenset({BOS, EOS, PAD}), special, first)


def numbered(lengths):
    """Documents of consecutive ids from 100 on, each id once in the whole corpus."""
    start = 100
    for number, length in enumerate(lengths):
        yield Document(f"d{number}", " ".join(map(str, range(start, start + length))))
        start += length


LENGTHS = [3, 11, 1, 0, 25, 7, 40, 2, 16, 9, 30, 5] * 4
CORPUS = list(numbered(LENGTHS))


def contexts_of(documents, rule):
    return stack(list(cut(tokenize(documents, tokenizer), rule)), rule)


def make_buffer(feed, batch_size=10, block_rows=60, prefetch=False, seed=0):
    def make(position, cancelled):
        contexts, following = feed.block(position, block_rows)
        place_T = torch.randperm(contexts.rows, generator=seeded(seed, *(position[key] for key in sorted(position))))
        x_TD = torch.empty(contexts.rows, 1)
        document_T = torch.empty(contexts.rows, dtype=torch.int64)
        x_TD[place_T, 0] = contexts.tokens_CS[contexts.keep_CS].float()
        document_T[place_T] = contexts.document_CS[contexts.keep_CS].long()
        return Block(Rows.of(x_TD), document_T, following)

    return ShuffleBuffer(make, feed.start, batch_size, feed.expected_documents(batch_size), prefetch)


def local_feed(seed=0, rule=None):
    return LocalFeed(CORPUS, tokenizer, rule or rules(), seed)


def stream_feed():
    return StreamFeed(lambda: iter(CORPUS), tokenizer, rules(), "corpus")


def test_packed_contexts_keep_order_separate_documents_and_begin_with_bos_once():
    contexts = contexts_of([Document("a", "10 11 12"), Document("b", "20 21 22 23 24 25 26 27 28")], rules(context_length=4))
    assert contexts.tokens_CS.tolist() == [[1, 10, 11, 12], [1, 20, 21, 22], [1, 23, 24, 25], [1, 26, 27, 28]]
    assert contexts.document_CS.tolist() == [[0] * 4, [1] * 4, [1] * 4, [1] * 4]
    contexts = contexts_of([Document("a", "10 11"), Document("b", "20 21 22")], rules(context_length=5))
    assert contexts.tokens_CS.tolist() == [[1, 10, 11, 1, 20]]
    assert contexts.document_CS.tolist() == [[0, 0, 0, 1, 1]]
    assert contexts.keep_CS.tolist() == [[False, True, True, False, True]]


def test_packed_without_bos_separates_by_the_separator_only():
    rule = rules(context_length=4, bos=None, separator=EOS)
    contexts = contexts_of([Document("a", "10 11 12 13"), Document("b", "20 21 22 23")], rule)
    assert contexts.tokens_CS.tolist() == [[2, 10, 11, 12], [13, 2, 20, 21]]
    assert contexts.keep_CS.tolist() == [[False, True, True, True], [False, False, True, True]]


@pytest.mark.parametrize(("special", "first"), [(True, True), (True, False), (False, True), (False, False)])
def test_truncated_contexts_and_both_switches_of_the_keep_mask(special, first):
    documents = [Document("a", "10 11 12 13 14"), Document("empty", ""), Document("b", "20 2 21")]
    rule = rules(context_length=5, packing=Packing.truncated, special=special, first=first)
    contexts = contexts_of(documents, rule)
    assert contexts.tokens_CS.tolist() == [[1, 10, 11, 12, 13], [1, 20, 2, 21, 3]]
    assert contexts.document_CS.tolist() == [[0] * 5, [2] * 5]
    at_first = not (special or first)  # position 0 holds BOS here
    assert contexts.keep_CS.tolist() == [[at_first, True, True, True, True], [at_first, True, not special, True, False]]


def test_first_position_is_dropped_even_when_it_is_no_special_token():
    rule = rules(context_length=3, packing=Packing.truncated, bos=None, separator=None)
    assert contexts_of([Document("a", "10 11 12")], rule).keep_CS.tolist() == [[False, True, True]]


def test_a_packed_corpus_loses_only_its_tail():
    contexts = contexts_of(CORPUS, rules(special=True, first=False))
    kept = contexts.tokens_CS[contexts.keep_CS].tolist()
    assert kept == list(range(100, 100 + len(kept))) and sum(LENGTHS) - len(kept) < 8
    owner = [number for number, length in enumerate(LENGTHS) for _ in range(length)]
    assert contexts.document_CS[contexts.keep_CS].tolist() == owner[: len(kept)]


@pytest.mark.parametrize("make_feed", [local_feed, stream_feed])
def test_an_epoch_gives_every_row_exactly_once(make_feed):
    feed = make_feed()
    everything = Counter(contexts_of(CORPUS, rules()).tokens_CS[contexts_of(CORPUS, rules()).keep_CS].tolist())
    rows = sum(everything.values())
    buffer = make_buffer(feed, batch_size=rows)  # a batch spans many blocks
    epochs = [next(buffer).x_TD[:, 0].int().tolist() for _ in range(3)]
    assert all(Counter(epoch) == everything for epoch in epochs)
    assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0])
    odd = make_buffer(make_feed(), batch_size=7)
    seen = [row for _ in range(rows) for row in next(odd).x_TD[:, 0].int().tolist()]
    assert Counter(seen) == Counter({token: 7 for token in everything}), "7 epochs in batches that cross their edges"


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("make_feed", [local_feed, stream_feed])
def test_resume_anywhere_is_bit_identical(make_feed, prefetch):
    straight = make_buffer(make_feed())
    states, batches = [], []
    for _ in range(200):  # 60-row blocks, 10-row batches, about 430 rows in an epoch: block edges, middles and epoch edges
        states.append(json.loads(json.dumps(straight.state_dict(), sort_keys=True)))
        batches.append(next(straight).x_TD)
    assert {state["position"]["epoch"] for state in states} >= {0, 1, 2}
    assert any(state["offset"] == 0 for state in states[1:]) and any(state["offset"] % 10 for state in states)
    numbers = torch.randperm(190, generator=torch.Generator().manual_seed(0))[:12].tolist()
    edge = next(i for i in range(1, 190) if states[i]["position"] != states[i - 1]["position"])
    for number in [0, edge, *numbers]:
        resumed = make_buffer(make_feed(), prefetch=prefetch)
        next(resumed)
        resumed.load_state_dict(states[number])
        assert all(torch.equal(next(resumed).x_TD, batch) for batch in batches[number : number + 8])
        assert resumed.state_dict() == (states[number + 8])
        resumed.close()


def test_prefetch_changes_neither_the_stream_nor_its_state():
    plain, ahead = make_buffer(local_feed()), make_buffer(local_feed(), prefetch=True)
    for _ in range(100):
        assert plain.state_dict() == ahead.state_dict()
        assert torch.equal(next(plain).x_TD, next(ahead).x_TD)
    assert plain.mixing() == ahead.mixing()
    ahead.close()
    with pytest.raises(RuntimeError, match="closed"):
        for _ in range(10):
            next(ahead)


def test_an_error_in_the_prefetch_thread_reaches_the_consumer():
    calls = []

    def make(position, cancelled):
        calls.append(position["n"])
        if position["n"] == 2:
            raise FloatingPointError("NaN in block 2")
        return Block(Rows.of(torch.full((4, 1), float(position["n"]))), torch.zeros(4, dtype=torch.int64), {"n": position["n"] + 1})

    buffer = ShuffleBuffer(make, {"n": 0}, 4, 1.0, prefetch=True)
    assert [int(next(buffer).x_TD[0]) for _ in range(2)] == [0, 1]
    before = buffer.state_dict()
    for _ in range(2):
        with pytest.raises(FloatingPointError, match="NaN in block 2"):
            next(buffer)
    assert buffer.state_dict() == before and calls == [0, 1, 2]
    buffer.close()


def test_close_stops_the_thread_and_resuming_calls_off_what_it_was_making():
    started, stopped = threading.Event(), []

    def make(position, cancelled):
        if position["n"] == 1:
            started.set()
            while not cancelled.is_set():
                time.sleep(0.001)
            stopped.append(position["n"])
            raise InterruptedError("called off")
        return Block(Rows.of(torch.full((4, 1), float(position["n"]))), torch.zeros(4, dtype=torch.int64), {"n": position["n"] + 1})

    threads = threading.active_count()
    prefetcher = Prefetcher(make)
    prefetcher.get({"n": 0})
    assert started.wait(5)
    assert prefetcher.get({"n": 7}).rows.x_TD[0] == 7
    assert stopped == [1]
    prefetcher.close()
    assert threading.active_count() == threads


def test_mixing_is_one_for_a_perfect_shuffle_and_low_without():
    documents = list(numbered([70] * 30))
    rule = rules(context_length=8)
    whole, small = (LocalFeed(documents, tokenizer, rule, seed=0) for _ in range(2))
    perfect, poor = make_buffer(whole, 60, 10_000), make_buffer(small, 60, 60)
    for _ in range(30):
        next(perfect), next(poor)
    assert abs(perfect.mixing()["mixing"] - 1) < 0.05
    assert poor.mixing()["mixing"] < 0.5
    assert perfect.mixing()["expected_documents_per_batch"] == pytest.approx(30 * (1 - (29 / 30) ** 60), rel=1e-3)
    with pytest.raises(ValueError, match="none was taken"):
        make_buffer(whole).mixing()


@pytest.mark.parametrize("numbers", [[7], [3, 3, 9, 3], [0, 1 << 40, 5, 1 << 40, -2]])
def test_documents_are_counted_whether_their_numbers_lie_close_or_far_apart(numbers):
    assert distinct(torch.tensor(numbers)) == len(set(numbers))


def test_rows_of_a_gpu_are_views_until_their_block_ends_and_nobody_waits_to_find_outliers(monkeypatch):
    """A CPU that is taken for a GPU: the stream, its state and what is left out are the same."""
    plain = make_buffer(local_feed())
    limit = NormLimit.of(next(plain), 1.2)
    batches = Batches(plain, limit)
    expected = [(next(batches).x_TD, batches.state_dict()) for _ in range(60)]
    monkeypatch.setattr(buffer_module, "on_gpu", lambda rows: True)
    buffer = make_buffer(local_feed())
    next(buffer)
    batches = Batches(buffer, limit)
    for x_TD, state in expected:
        with monkeypatch.context() as context:
            if buffer._block is not None and len(buffer._block.rows) - buffer._offset >= 30:  # else a new block may come, whose norms are read
                context.setattr(rows_module, "norms", None)
            assert torch.equal(next(batches).x_TD, x_TD) and batches.state_dict() == state
    assert batches.left_out > 0
    sizes = set()
    rows = make_buffer(local_feed(), batch_size=10, block_rows=60)
    for _ in range(40):
        block, left = rows._current().rows, len(rows._current().rows) - rows._offset
        batch = next(rows)
        is_view = batch.x_TD.untyped_storage().data_ptr() == block.x_TD.untyped_storage().data_ptr()
        assert is_view == (left >= 20) and torch.equal(batch.norms_CT[0], rows_module.norms(batch.x_TD))
        sizes.add(is_view)
    assert sizes == {True, False}


def test_rows_of_a_cpu_never_hold_their_block():
    rows = make_buffer(local_feed())
    assert all(next(rows).x_TD.untyped_storage().nbytes() == 10 * 4 for _ in range(10))


def test_local_blocks_share_an_epoch_evenly_and_orders_differ_by_epoch_and_seed():
    feed = local_feed()
    position, sizes, tokens = feed.start, [], []
    while position["epoch"] == 0:
        contexts, position = feed.block(position, 60)
        sizes.append(contexts.rows)
        tokens.append(contexts.tokens_CS)
    assert sum(sizes) == feed.describe()["rows_per_epoch"] and min(sizes) > 0.7 * max(sizes)
    assert not torch.equal(feed.block({"epoch": 1, "context": 0}, 60)[0].tokens_CS, tokens[0])
    assert not torch.equal(local_feed(seed=1).block(feed.start, 60)[0].tokens_CS, tokens[0])
    assert feed.describe() == local_feed(seed=1).describe()
    other = LocalFeed(CORPUS[1:], tokenizer, rules(), 0)
    assert other.describe()["fingerprint"] != feed.describe()["fingerprint"]


def test_a_stream_goes_on_within_a_long_document():
    feed = StreamFeed(lambda: numbered([500, 500]), tokenizer, rules(context_length=10), "long")
    first, position = feed.block(feed.start, 50)
    assert position["document"] == 0 and position["token"] > 0
    second, _ = feed.block(position, 50)
    fresh, _ = StreamFeed(lambda: numbered([500, 500]), tokenizer, rules(context_length=10), "long").block(position, 50)
    assert torch.equal(second.tokens_CS, fresh.tokens_CS) and torch.equal(second.document_CS, fresh.document_CS)
    rows = torch.cat([first.tokens_CS[first.keep_CS], second.tokens_CS[second.keep_CS]])
    assert torch.equal(rows, torch.arange(100, 100 + len(rows), dtype=torch.int32))


class Words:
    """A tokenizer with names for ids, of 140 tokens."""

    def __call__(self, texts, **_):
        return tokenizer(texts)

    def __len__(self):
        return 140

    def convert_ids_to_tokens(self, token):
        return f"<{token}>"


@pytest.mark.parametrize("make_feed", [lambda d, r: LocalFeed(d, Words(), r, 0), lambda d, r: StreamFeed(lambda: iter(d), Words(), r, "x")])
@pytest.mark.parametrize("packing", Packing)
def test_a_token_that_the_model_has_no_embedding_for_is_named_with_its_document(make_feed, packing):
    corpus = [*numbered([20, 19]), Document("chat", "100 101 138 102 139")]
    fits = make_feed(corpus, replace(rules(packing=packing), d_vocab=140))
    assert fits.block(fits.start, 10)[0].rows, "a tokenizer larger than the text needs is no reason to refuse"
    with pytest.raises(ValueError, match=r"has 140 tokens, the model 139 embeddings; token '<139>' \(id 139\) stands in document 'chat'\. Give"):
        feed = make_feed(corpus, replace(rules(packing=packing), d_vocab=139))
        feed.block(feed.start, 1000)


def test_a_text_of_many_special_tokens_is_noted_unless_they_are_kept():
    def note(words, **fields):
        return LocalFeed([Document("a", words), *numbered([90])], Words(), rules(**fields), 0).special.note(Words())

    assert note("2 " * 2) == note("2 " * 50, special=False) == "", "few of them, and kept ones"
    found = note("2 " * 20 + "3 " * 10)
    assert found.startswith(
        "note: special tokens are 25.0% of the training text's positions and give no rows: '<2>' (id 2) 16.7%, '<3>' (id 3) 8.3%. "
    )
    assert "source.drop_special_tokens=false" in found


@pytest.mark.parametrize(
    "make_feed", [lambda d: LocalFeed(d, tokenizer, rules(100), 0), lambda d: StreamFeed(lambda: iter(d), tokenizer, rules(100), "x")]
)
def test_text_shorter_than_a_context_says_so(make_feed):
    with pytest.raises(ValueError, match=r"no row at context_length=100.*Give more text or shorten"):
        feed = make_feed([Document("a", "10 11")])
        feed.block(feed.start, 10)
    with pytest.raises(ValueError, match="Set it to at least 2"):
        rules(context_length=1)
