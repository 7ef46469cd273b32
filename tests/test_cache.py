"""The cache on disk: built once, by one process, whole after anything; read in an order of its own, resumable to the bit.

The language model is a few lines of arithmetic that counts its passes, in a file that all processes share; one test uses the bundled one.
"""

import contextlib
import errno
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file

from switch_sae.activations import CachedSource, LanguageModelSource, build_source
from switch_sae.activations import text as text_module
from switch_sae.activations.base import check_same_stream
from switch_sae.activations.text import TextConfig
from switch_sae.files import RunError, try_lock
from switch_sae.plain import from_plain, to_plain

WIDTH, VOCABULARY = 8, 60
BATCH = 32


class Tokenizer:
    """Words are hashed into a small vocabulary."""

    def get_vocab(self):
        return {f"w{i}": i for i in range(VOCABULARY)}

    def __call__(self, texts, **_):
        return {"input_ids": [[3 + sum(map(ord, word)) * 7919 % (VOCABULARY - 3) for word in text.split()] for text in texts]}


class Model:
    """Running means of random vectors: causal, every row different."""

    name, hook, target_hook, fingerprint, d_in, d_out, causal = "tiny", "middle", None, "f1", WIDTH, WIDTH, True
    device, context_length_limit, prepends_bos = torch.device("cpu"), 64, True
    bos_token_id, eos_token_id, pad_token_id, special_token_ids = 0, 0, 1, frozenset({0, 1})
    d_vocab = VOCABULARY

    def __init__(self, passes=None, seconds=0.0, die_at=0):
        self.tokenizer, self.passes, self.seconds, self.die_at, self.own = Tokenizer(), passes, seconds, die_at, 0
        self.table_VD = torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(0))

    def activations(self, tokens_CS):
        self.own += 1
        if self.passes is not None:
            with self.passes.open("a") as file:
                file.write("x")
        if self.own == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.seconds)
        return self.table_VD[tokens_CS].cumsum(1) / torch.arange(1, tokens_CS.shape[1] + 1)[:, None]

    def activations_and_targets(self, tokens_CS):
        x_CSD = self.activations(tokens_CS)
        return x_CSD, x_CSD


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for i in range(60):
        (folder / f"{i}.txt").write_text(" ".join(f"word{(i * i + 31 * j * j + j) % 997}" for j in range(20 + 7 * (i % 9))))
    return folder


def config(text, cache, **fields):
    settings = {"model": "tiny", "hook": "middle", "context_length": 12, "buffer_rows": 400, "contexts_per_forward": 8, "device": "cpu"}
    settings["text"] = text if isinstance(text, TextConfig) else TextConfig(kind="files", paths=[str(text)])
    return LanguageModelSource.Config(**{**settings, "cache": None if cache is None else str(cache), **fields})


def cached(text, cache, rows=None, model=None, said=None, **fields):
    say = (lambda text: None) if said is None else said.append
    return CachedSource(config(text, cache, **fields), BATCH, rows, model or Model(), say)


def take(source, batches):
    return torch.cat([next(source).x_TD for _ in range(batches)])


def everything(source):
    """The rows of one epoch, sorted, so that only their order is lost."""
    rows = source.describe()["text"]["rows_per_epoch"]
    x_TD = take(source, -(-rows // BATCH))[:rows]
    return x_TD[ordering(x_TD)]


def ordering(x_TD):
    return torch.tensor(sorted(range(len(x_TD)), key=lambda i: x_TD[i].tolist()))


def shards_of(cache):
    return {path.name: load_file(path) for path in sorted(Path(cache).glob("*/shard-*.safetensors"))}


def equal_shards(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name][key], other[name][key]) for name in one for key in ("x_TD", "document_T"))


def manifest_of(cache):
    (path,) = Path(cache).glob("*/manifest.json")
    return json.loads(path.read_text())


def passes(path):
    return path.stat().st_size if path.exists() else 0


# Every process starts from a server that has imported the library, so that one costs milliseconds.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["switch_sae.activations"])


def job(text, cache, out, rows, seed, passes, seconds, die_at=0, die_in=None):
    """One process: reads `rows` rows and leaves them, and what it said, in files."""
    torch.set_num_threads(1)
    if die_in is not None:
        die_while_writing(*die_in)
    source = cached(text, cache, rows, Model(passes, seconds, die_at), said := [], seed=seed)
    x_TD = take(source, rows // BATCH)
    source.close()
    save_file({"x_TD": x_TD}, f"{out}.safetensors")
    Path(f"{out}.txt").write_text("\n".join(said))


def die_while_writing(name, moment):
    """SIGKILL with the file `name` half written, or renamed and not yet in the manifest."""
    replace_file = Path.replace

    def fatal_replace(part, target):
        if target.name == name and moment == "half written":
            os.truncate(part, part.stat().st_size // 2)
        else:
            replace_file(part, target)
        if target.name == name:
            os.kill(os.getpid(), signal.SIGKILL)

    patch.object(Path, "replace", fatal_replace).start()


def run_jobs(*arguments):
    processes = [CONTEXT.Process(target=job, args=one) for one in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def test_the_cached_rows_are_the_live_ones_exactly_in_another_order(text, tmp_path):
    live, source = LanguageModelSource(config(text, None), BATCH, Model()), cached(text, tmp_path, 10**6)
    rows = live.describe()["text"]["rows_per_epoch"]
    first_TD, cached_TD = take(live, 10), take(source, 10)
    assert not torch.equal(first_TD, cached_TD) and cached_TD.dtype == torch.float32
    live, source = LanguageModelSource(config(text, None), BATCH, Model()), cached(text, tmp_path, 10**6)
    assert torch.equal(everything(live), everything(source)) and rows > 2000
    shards = manifest_of(tmp_path)["shards"]
    assert sum(shard["rows"] for shard in shards) == rows and len(shards) > 4 and manifest_of(tmp_path)["complete"]


def test_it_offers_all_that_the_live_source_does(text, tmp_path):
    live, source = LanguageModelSource(config(text, None, seed=3), BATCH, Model()), cached(text, tmp_path, 800, seed=3)
    for rows in (50, 1000):
        one, other = live.evaluation_set(rows), source.evaluation_set(rows)
        assert torch.equal(one.x_TD, other.x_TD) and torch.equal(one.document_T, other.document_T) and one.document_names == other.document_names
        assert torch.equal(one.tokens_CS, other.tokens_CS) and torch.equal(one.keep_CS, other.keep_CS)
    assert not any(tmp_path.iterdir()), "evaluating alone stores nothing"
    about = json.loads(json.dumps(source.describe()))
    cache = about.pop("cache")
    assert about == live.describe() and source.d_in == WIDTH and source.language_model.name == "tiny"
    take(live, 20), take(source, 20)
    assert cache == {"folder": str(tmp_path), "key": next(tmp_path.iterdir()).name, "dtype": "float32"}
    assert source.mixing()["expected_documents_per_batch"] == live.mixing()["expected_documents_per_batch"]
    assert 0.7 < source.mixing()["mixing"] <= 1.1
    source.close()
    closed = cached(text, tmp_path / "other", 800)
    closed.close()
    with pytest.raises(InterruptedError):
        next(closed)


def test_build_source_caches_where_a_folder_is_named(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("switch_sae.activations.language_model_source.LanguageModel", lambda *_: Model())
    assert type(build_source(config(text, None), BATCH, 500)) is LanguageModelSource
    source = build_source(config(text, tmp_path), BATCH, 500)
    assert type(source) is CachedSource and next(source).x_TD.shape == (BATCH, WIDTH)
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == ["activations"] * 3
    assert said[0].startswith(f"activations: cached in {tmp_path}/") and "building 2 of 2 shards" in said[0]
    assert f"rows from {tmp_path}/" in said[2] and said[2].endswith("(2 shards, float32)")
    with pytest.raises(ValueError, match=r"would be ignored by LanguageModelSource\. Use build_source"):
        LanguageModelSource(config(text, tmp_path), BATCH, Model())
    with pytest.raises(ValueError, match="cache=null"):
        cached(text, None)
    with pytest.raises(ValueError, match="rows=0 must be at least 1"):
        cached(text, tmp_path, 0)


def test_equal_seeds_give_equal_batches_and_others_another_order_of_the_same_rows(text, tmp_path):
    sources = [cached(text, tmp_path, 10**6, seed=seed) for seed in (1, 1, 2)]
    epochs = [everything(source) for source in sources]
    assert torch.equal(epochs[0], epochs[1]) and torch.equal(epochs[0], epochs[2])
    one, same, other = (take(cached(text, tmp_path, 10**6, seed=seed, prefetch=ahead), 30) for seed, ahead in ((1, False), (1, True), (2, False)))
    assert torch.equal(one, same)
    assert not torch.isin(one[: 4 * BATCH, 0], other[: 4 * BATCH, 0]).all()
    assert (one == other).all(1).sum() < 5


def test_every_epoch_has_an_order_of_its_own(text, tmp_path):
    source = cached(text, tmp_path, 10**6, said=(said := []), buffer_rows=64, drop_first_position=False)
    rows = source.describe()["text"]["rows_per_epoch"]
    x_TD = take(source, 2 * rows // BATCH + 1)
    first_TD, second_TD = x_TD[:rows], x_TD[rows : 2 * rows]
    assert torch.equal(first_TD[ordering(first_TD)], second_TD[ordering(second_TD)]) and not torch.equal(first_TD[:BATCH], second_TD[:BATCH])
    assert sum("repeat: epoch 2" in line for line in said) == 1


@pytest.mark.parametrize("rows", [None, 900])
def test_a_state_goes_on_exactly_with_and_without_prefetch_after_the_cache_has_grown(text, tmp_path, rows):
    take(cached(text, tmp_path, 900), 1)
    straight = cached(text, tmp_path, rows, seed=5)
    states, batches = [], []
    for _ in range(80):
        states.append(json.loads(json.dumps(straight.state_dict())))
        batches.append(next(straight).x_TD)
    assert states[-1]["position"]["epoch"] >= 1 and states[-1]["shards"] == 3
    take(cached(text, tmp_path, 2000), 1)
    for number, prefetch in ((1, True), (29, False), (70, True)):
        resumed = cached(text, tmp_path, rows, seed=5, prefetch=prefetch)
        resumed.load_state_dict(states[number])
        assert all(torch.equal(next(resumed).x_TD, batch) for batch in batches[number : number + 9])
        assert resumed.state_dict() == states[number + 9]
        resumed.close()
    if rows is not None:
        resumed.load_state_dict(states[0])
        assert states[0]["shards"] is None
    shutil.rmtree(tmp_path)
    rebuilt = cached(text, tmp_path, seed=5)
    rebuilt.load_state_dict(states[40])
    assert torch.equal(next(rebuilt).x_TD, batches[40]) and len(shards_of(tmp_path)) == 3
    with pytest.raises(ValueError, match="seed: saved 5, now 6"):
        cached(text, tmp_path, rows, seed=6).load_state_dict(states[3])
    with pytest.raises(ValueError, match="has 7 shards, the saved stream read 99"):
        cached(text, tmp_path, seed=5).load_state_dict({**states[3], "shards": 99})
    live = LanguageModelSource(config(text, None, seed=5), BATCH, Model())
    with pytest.raises(ValueError, match="cached: saved None, now True"):
        cached(text, tmp_path, rows, seed=5).load_state_dict(live.state_dict())


def test_rows_keep_their_documents_and_one_shard_is_mixed_anew_in_every_epoch(text, tmp_path):
    source = cached(text, tmp_path, 10**6, buffer_rows=5000)
    next(source)
    ((_, stored),) = shards_of(tmp_path).items()
    blocks = [source._make_block({"epoch": epoch, "shard": 0}, threading.Event()) for epoch in range(2)]
    assert not torch.equal(blocks[0].rows.x_TD, blocks[1].rows.x_TD)
    expected = sorted(zip(stored["x_TD"].tolist(), stored["document_T"].tolist(), strict=True))
    for block in blocks:
        assert sorted(zip(block.rows.x_TD.tolist(), block.document_T.tolist(), strict=True)) == expected and block.document_T.dtype == torch.int64


def test_a_folder_that_cannot_be_read_says_so(text, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"cannot read .*manifest\.json: Not a directory\. .*source\.cache=FOLDER"):
        cached(text, tmp_path / "file", 500)


def test_growing_appends_and_leaves_earlier_shards_untouched(text, tmp_path):
    model = Model()
    take(cached(text, tmp_path, 700, model), 1)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.glob("*/shard-*")}
    count, shards = model.own, manifest_of(tmp_path)["shards"]
    take(cached(text, tmp_path, 500, model), 1)
    take(cached(text, tmp_path, None, model), 1)
    assert model.own == count and len(shards) == 2, "fewer rows need nothing new"
    said = []
    take(cached(text, tmp_path, 1500, model, said), 1)
    assert manifest_of(tmp_path)["shards"][:2] == shards and "building 2 of 4 shards" in said[0]
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in before} == before
    whole = tmp_path / "whole"
    take(cached(text, whole, 1500), 1)
    assert equal_shards(shards_of(whole), shards_of(tmp_path)) and manifest_of(whole) == manifest_of(tmp_path)


def test_batch_size_seed_and_reading_details_share_one_cache(text, tmp_path):
    variants = ((0, True, 8, 5), (7, False, 64, None))
    sources = [CachedSource(config(text, tmp_path, seed=seed, prefetch=ahead), batch, rows, Model()) for seed, ahead, batch, rows in variants]
    keys = {source.describe()["cache"]["key"] for source in sources}
    assert len(keys) == 1


@pytest.mark.parametrize(
    "fields",
    [{"context_length": 13}, {"packing": "truncated"}, {"prepend_bos": False}, {"drop_special_tokens": False}, {"drop_first_position": False},
     {"buffer_rows": 401}, {"contexts_per_forward": 9}, {"cache_dtype": "bfloat16"}, {"cache_dtype": "float16"}, {"precision": "bfloat16"}],
    ids=lambda fields: "-".join(f"{key}={value}" for key, value in fields.items()),
)  # fmt: skip
def test_the_key_follows_every_setting(text, tmp_path, fields):
    assert key(text, tmp_path, **fields) != key(text, tmp_path)


def key(text, cache, model=None, **fields):
    return cached(text, cache, model=model, **fields).describe()["cache"]["key"]


def test_the_key_follows_model_hook_text_and_tokenizer(text, tmp_path):
    plain = key(text, tmp_path)
    model = Model()
    model.fingerprint = "f2"
    assert key(text, tmp_path, model) != plain
    model = Model()
    model.hook = "end"
    assert key(text, tmp_path, model, hook="end") != plain
    assert key(TextConfig(kind="files", paths=[str(text)], max_documents=30), tmp_path) != plain
    model = Model()
    model.tokenizer.get_vocab = lambda: {f"v{i}": i for i in range(VOCABULARY)}
    assert key(text, tmp_path, model) != plain
    model = Model()
    model.special_token_ids = frozenset({0, 1, 2})
    assert key(text, tmp_path, model) != plain
    assert key(text, tmp_path) == plain == key(text, tmp_path / "elsewhere")


def test_jobs_that_start_together_build_once(text, tmp_path):
    """Every job needs its own share, and the one that builds does it for those that wait."""
    alone = tmp_path / "alone"
    count = tmp_path / "passes"
    assert run_jobs((text, alone, tmp_path / "peace", 1600, 0, count, 0.0)) == [0]
    once = passes(count)
    count.unlink()
    together = tmp_path / "together"
    jobs = [(text, together, tmp_path / f"job{i}", 1600, seed, count, 0.02) for i, seed in enumerate((0, 0, 1))]
    assert run_jobs(*jobs) == [0, 0, 0]
    assert passes(count) == once > 10
    said = [(tmp_path / f"job{i}.txt").read_text() for i in range(3)]
    assert sum("building" in text for text in said) == 1
    assert sum("waiting for process" in text and f"which holds {together}" in text for text in said) == 2, said
    x_TD = [load_file(tmp_path / f"{name}.safetensors")["x_TD"] for name in ("peace", "job0", "job1", "job2")]
    assert torch.equal(x_TD[0], x_TD[1]) and torch.equal(x_TD[0], x_TD[2]) and not torch.equal(x_TD[0], x_TD[3])
    assert equal_shards(shards_of(alone), shards_of(together))


def test_a_waiting_job_goes_on_as_soon_as_its_own_share_is_there(text, tmp_path):
    take(cached(text, tmp_path, 700), 1)
    (folder,) = tmp_path.iterdir()
    manifest = (folder / "manifest.json").read_text()
    (folder / "manifest.json").unlink()
    held = try_lock(folder / "lock")  # a job that builds much more
    timer = threading.Timer(0.3, lambda: (folder / "manifest.json").write_text(manifest))
    timer.start()
    said = []
    assert next(cached(text, tmp_path, 600, said=said)).x_TD.shape == (BATCH, WIDTH)
    assert "waiting for process" in said[0] and "reading" in said[1]
    held.release()


@pytest.mark.parametrize(
    ("die_at", "die_in"),
    [(8, None), (0, ("shard-00001.safetensors", "half written")), (0, ("shard-00001.safetensors", "renamed")), (0, ("manifest.json", "renamed"))],
)
def test_a_killed_builder_is_followed_up_with_identical_shards(text, tmp_path, die_at, die_in):
    whole, killed, count = tmp_path / "whole", tmp_path / "killed", tmp_path / "passes"
    take(cached(text, whole, 1600), 1)
    assert run_jobs((text, killed, tmp_path / "dead", 1600, 0, count, 0.0, die_at, die_in)) == [-signal.SIGKILL]
    had = len(manifest_of(killed)["shards"])
    assert had == 1 and not (tmp_path / "dead.txt").exists()
    left = [path.name for path in killed.glob("*/.*.part")]
    assert len(left) == (die_in is not None and die_in[1] == "half written")
    said = []
    x_TD = take(cached(text, killed, 1600, said=said), 40)
    assert "building 4 of 5 shards" in said[0] and torch.equal(x_TD, take(cached(text, whole, 1600), 40))
    assert equal_shards(shards_of(whole), shards_of(killed)) and manifest_of(whole) == manifest_of(killed)
    assert not list(killed.glob("*/.*.part"))


def test_an_interrupted_builder_lets_go_of_the_lock_and_is_followed_up(text, tmp_path):
    model = Model()
    source = cached(text, tmp_path, 1600, model)
    activations = model.activations

    def interrupted(tokens_CS):
        if model.own == 8:
            raise KeyboardInterrupt
        return activations(tokens_CS)

    model.activations = interrupted
    with pytest.raises(KeyboardInterrupt):
        next(source)
    held = try_lock(next(tmp_path.glob("*/lock")))
    assert held is not None and len(manifest_of(tmp_path)["shards"]) == 1
    held.release()
    model.activations = activations
    assert torch.equal(next(source).x_TD, next(cached(text, tmp_path / "whole", 1600)).x_TD)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty"])
def test_a_damaged_shard_is_named_and_deleting_it_mends_it(text, tmp_path, damage):
    expected = take(cached(text, tmp_path, 800), 30)
    file = next(tmp_path.glob("*/shard-00001.safetensors"))
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    file.write_bytes({"flipped": bytes(content), "truncated": bytes(content[:-100]), "empty": b""}[damage])
    with pytest.raises(
        ValueError, match=r"shard-00001\.safetensors \([\d,]+ bytes\) is damaged: its sha256 is .* the manifest says .*Delete this one file"
    ):
        take(cached(text, tmp_path, 800), 30)
    file.unlink()
    model, said = Model(), []
    assert torch.equal(take(cached(text, tmp_path, 800, model, said), 30), expected)
    assert sum("shard-00001.safetensors is missing and is made again" in line for line in said) == 1
    assert 0 < model.own < 10 and not any("differs in bits" in line for line in said)


def test_a_missing_shard_is_made_again_by_one_job_only(text, tmp_path):
    count = tmp_path / "passes"
    cache = tmp_path / "cache"
    take(cached(text, cache, 1600), 1)
    before = shards_of(cache)
    next(cache.glob("*/shard-00002.safetensors")).unlink()
    assert run_jobs(*((text, cache, tmp_path / f"job{i}", 1600, i, count, 0.02) for i in range(2))) == [0, 0]
    assert equal_shards(before, shards_of(cache)) and 0 < passes(count) < 8
    said = [(tmp_path / f"job{i}.txt").read_text() for i in range(2)]
    assert sum("is made again" in text for text in said) == 1


def test_a_rebuilt_shard_with_other_bits_is_announced_and_accepted(text, tmp_path):
    running = cached(text, tmp_path, 800)
    next(running)
    gone = [file.unlink() for file in tmp_path.glob("*/shard-*")]
    elsewhere, said = Model(), []
    elsewhere.table_VD *= 1 + 1e-6
    take(cached(text, tmp_path, 800, elsewhere, said), 30)
    assert sum("differs in bits from the one that is gone" in line for line in said) == len(gone) > 1
    take(running, 60)


def test_a_cache_that_is_deleted_under_a_running_job_is_made_again(text, tmp_path):
    expected = take(cached(text, tmp_path / "other", 1600), 60)
    source = cached(text, tmp_path / "mine", 1600)
    first = take(source, 3)
    shutil.rmtree(tmp_path / "mine")
    assert torch.equal(torch.cat([first, take(source, 57)]), expected)


def test_a_missing_shard_whose_text_changed_is_not_made_up(text, tmp_path):
    take(cached(text, tmp_path, 800), 1)
    (path,) = tmp_path.glob("*/manifest.json")
    manifest = json.loads(path.read_text())
    manifest["shards"][0]["rows"] += 1
    path.write_text(json.dumps(manifest))
    (path.parent / "shard-00000.safetensors").unlink()
    with pytest.raises(ValueError, match=r"cannot be made again: the block at .*The text changed: delete"):
        take(cached(text, tmp_path, 800), 30)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda manifest: manifest["made_of"].update(hook="end"), r"they differ in hook: stored 'end', needed 'middle'\. .*source\.cache=FOLDER"),
        (lambda manifest: manifest.pop("shards"), r"is not a manifest of stored activations \(KeyError.*Delete"),
    ],
)
def test_a_manifest_of_something_else_is_refused(text, tmp_path, edit, message):
    take(cached(text, tmp_path, 500), 1)
    (path,) = tmp_path.glob("*/manifest.json")
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=message):
        cached(text, tmp_path, 500)


def test_a_disk_that_is_too_small_is_seen_before_anything_is_computed(text, tmp_path, monkeypatch):
    model = Model()
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 20_000}))
    with pytest.raises(
        RunError, match=r"of 8 float32 values need 0\.1 MB in .*, where 0\.0 MB are free\. Free some space.*cache_dtype=bfloat16.*fewer tokens"
    ):
        next(cached(text, tmp_path, 1600, model))
    assert model.own == 0


def test_a_disk_that_fills_stops_clearly_and_the_same_command_goes_on(text, tmp_path, monkeypatch):
    from switch_sae.activations import shards

    written = []

    def full(tensors, part, header):
        if len(written) == 2:
            Path(part).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(part)
        save_file(tensors, part, header)

    with monkeypatch.context() as patched:
        patched.setattr(shards, "save_file", full)
        with pytest.raises(
            RunError, match=r"shard-00002\.safetensors: No space left on device\..*What is stored stays; the same command goes on"
        ) as error:
            next(cached(text, tmp_path, 1600))
    assert "RESUME" not in str(error.value)
    assert len(manifest_of(tmp_path)["shards"]) == 2 and not list(tmp_path.glob("*/.*.part"))
    model = Model()
    x_TD = take(cached(text, tmp_path, 1600, model, said := []), 20)
    assert "building 3 of 5 shards" in said[0] and torch.equal(x_TD, take(cached(text, tmp_path / "whole", 1600), 20))


@pytest.mark.parametrize(("dtype", "relative"), [("bfloat16", 2**-8), ("float16", 2**-10)])
def test_smaller_types_take_half_and_give_float32_rows(text, tmp_path, dtype, relative):
    exact, small = cached(text, tmp_path, 800), cached(text, tmp_path, 800, cache_dtype=dtype)
    exact_TD, small_TD = take(exact, 40), take(small, 40)
    assert small_TD.dtype == torch.float32 and not torch.equal(small_TD, exact_TD)
    torch.testing.assert_close(small_TD, exact_TD, rtol=relative, atol=1e-4)
    sizes = sorted(path.stat().st_size for path in tmp_path.glob("*/shard-00000.safetensors"))
    assert sizes[0] < 0.6 * sizes[1]
    assert small.describe()["cache"]["dtype"] == dtype


def test_values_that_float16_cannot_hold_are_refused(text, tmp_path):
    model = Model()
    model.table_VD *= 1e6
    with pytest.raises(ValueError, match=r"beyond what torch\.float16 holds \(65,504\)\. Set source\.cache_dtype=bfloat16 or float32"):
        next(cached(text, tmp_path, 500, model, cache_dtype="float16"))


@pytest.mark.parametrize("documents", [200, 40])
def test_streamed_text_is_stored_once_and_then_read_again(tmp_path, monkeypatch, documents):
    def rows(*_):
        for i in range(documents):
            yield text_module.Document(f"fake/train/{i}", " ".join(f"word{(i * 7 + j * j) % 997}" for j in range(5 + i % 30)))

    monkeypatch.setattr(text_module, "hugging_face_dataset", rows)
    streamed = TextConfig(kind="dataset", dataset="fake")
    live = LanguageModelSource(config(streamed, None), BATCH, Model())
    live_TD, position = [], live.start
    while not position["epoch"]:
        block = live.make_block(position, threading.Event())
        live_TD.append(block.rows.x_TD)
        position = block.next_position
    live_TD = torch.cat(live_TD)
    take(cached(streamed, tmp_path, 300), 1)
    assert not manifest_of(tmp_path)["complete"]
    source = cached(streamed, tmp_path, 10**6)
    x_TD = take(source, -(-len(live_TD) // BATCH))[: len(live_TD)]
    assert manifest_of(tmp_path)["complete"] and torch.equal(x_TD[ordering(x_TD)], live_TD[ordering(live_TD)])
    model = Model()
    again = cached(streamed, tmp_path, 10**6, model)
    again.load_state_dict(source.state_dict())
    assert torch.equal(next(again).x_TD, next(source).x_TD) and model.own == 0
    assert torch.equal(live.evaluation_set(60).x_TD, source.evaluation_set(60).x_TD)


def test_a_stream_that_ends_with_a_block_is_not_stored_twice(tmp_path, monkeypatch):
    """12 words a document and blocks of whole documents: the last block ends where the text does, which only the next one tells."""

    def rows(*_):
        for i in range(60):
            yield text_module.Document(f"fake/train/{i}", " ".join(f"word{i * 40 + j}" for j in range(12)))

    monkeypatch.setattr(text_module, "hugging_face_dataset", rows)
    whole = 12 * sum(not document.held_out for document in rows())
    fields = {"packing": "truncated", "context_length": 13, "buffer_rows": whole // 3}
    next(cached(TextConfig(kind="dataset", dataset="fake"), tmp_path, 10**6, **fields))
    manifest = manifest_of(tmp_path)
    assert manifest["complete"] and manifest["rows"] == whole
    assert [shard["next_position"]["epoch"] for shard in manifest["shards"]] == [0, 0, 0], "no shard tells that the text has ended"


def dataset(folder, first=0, count=3000):
    folder.mkdir(exist_ok=True)
    rows = ({"text": " ".join(f"word{(i * 7 + j * j) % 997}" for j in range(5 + i % 30))} for i in range(first, first + count))
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return TextConfig(kind="dataset", dataset=str(folder))


def test_a_dataset_of_another_content_is_another_one_for_cache_resume_and_description(tmp_path):
    pytest.importorskip("datasets")
    corpus, cache = dataset(tmp_path / "corpus"), tmp_path / "cache"
    live, stored = LanguageModelSource(config(corpus, None), BATCH, Model()), cached(corpus, cache, 600)
    first_TD, states = take(stored, 4), (live.state_dict(), stored.state_dict())
    assert key(corpus, cache) == stored.describe()["cache"]["key"]
    for name, change in (("elsewhere", {"first": 900}), ("longer", {"count": 3001})):  # the second begins with the same documents
        dataset(tmp_path / "corpus", **change)
        other = cached(corpus, cache, 600)
        assert other.describe()["cache"]["key"] != stored.describe()["cache"]["key"]
        changed = {part for part, value in other.describe().items() if value != stored.describe()[part]} - {"cache"}
        assert changed == ({"dataset"} if name == "longer" else {"dataset", "training_text", "held_out_text"})
        assert name == "longer" or not torch.isin(take(other, 4)[:, 0], first_TD[:, 0]).all()
        for source, state in zip((LanguageModelSource(config(corpus, None), BATCH, Model()), other), states, strict=True):
            with pytest.raises(ValueError, match=r"they differ in dataset: saved 'files .*', now 'files .*Restore these, or start a new run\.$"):
                source.load_state_dict(state)
    dataset(tmp_path / "corpus")
    again = cached(corpus, cache, 600)
    again.load_state_dict(states[1])
    assert key(corpus, cache) == stored.describe()["cache"]["key"] and torch.equal(next(again).x_TD, next(stored).x_TD)


def test_one_relative_name_in_two_working_directories_is_two_datasets(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    keys = []
    for place, first in (("one", 0), ("two", 50), ("three", 0)):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        dataset(Path("corpus"), first)
        keys.append(key(TextConfig(kind="dataset", dataset="corpus"), tmp_path / "cache"))
    assert keys[0] == keys[2] != keys[1]


def test_local_text_is_told_apart_by_what_is_held_out_and_its_stored_rows_are_not(text, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(text, other)
    name = next(path.name for path in sorted(text.iterdir()) if text_module.is_held_out(path.name))
    live, stored = LanguageModelSource(config(text, None), BATCH, Model()), cached(text, tmp_path / "cache", 600)
    (other / name).write_text("quite other words " * 20)
    changed, reading = LanguageModelSource(config(other, None), BATCH, Model()), cached(other, tmp_path / "cache", 600)
    assert changed.made_of()["text"] == live.made_of()["text"] and changed.made_of()["held_out_text"] != live.made_of()["held_out_text"]
    assert reading.describe()["cache"]["key"] == stored.describe()["cache"]["key"]
    assert {part for part, value in changed.describe().items() if value != live.describe()[part]} == {"held_out_text"}
    for source, saved in ((changed, live), (reading, stored)):
        with pytest.raises(ValueError, match=r"they differ in held_out_text: saved '\w+', now '\w+'\."):
            source.load_state_dict(saved.state_dict())


def test_a_state_that_does_not_know_its_text_goes_on_but_no_other_part_may_be_missing(text, tmp_path):
    for source in (LanguageModelSource(config(text, None), BATCH, Model()), cached(text, tmp_path, 600)):
        state = source.state_dict()
        state["made_of"] = {part: value for part, value in state["made_of"].items() if part != "held_out_text"}  # as earlier versions saved it
        source.load_state_dict(state)
        next(source)
        del state["made_of"]["hook"]
        with pytest.raises(ValueError, match="hook: saved None, now 'middle'"):
            source.load_state_dict(state)
    unknown = {"dataset": None, "seed": 0}
    check_same_stream({"dataset": "revision 1", "seed": 0}, unknown), check_same_stream(unknown, {"dataset": "revision 1", "seed": 0})
    with pytest.raises(ValueError, match=r"dataset: saved 'revision 1', now 'revision 2'\. .*text\.dataset_revision=REVISION"):
        check_same_stream({"dataset": "revision 1"}, {"dataset": "revision 2"})


def test_a_stream_is_looked_at_before_anything_is_trained(tmp_path, monkeypatch, capsys):
    def rows(special):
        return lambda *_: (text_module.Document(f"fake/train/{i}", special + " a few words that are kept" * 3) for i in range(100))

    class Named(Tokenizer):
        def __len__(self):
            return VOCABULARY

        def convert_ids_to_tokens(self, token):
            return f"<{token}>"

        def __call__(self, texts, **_):
            return {"input_ids": [[{"pad": 1, "late": VOCABULARY - 1}.get(word, 5) for word in text.split()] for text in texts]}

    model, streamed = Model(), config(TextConfig(kind="dataset", dataset="fake"), None)
    model.tokenizer = Named()
    monkeypatch.setattr(text_module, "hugging_face_dataset", rows("pad pad"))
    assert LanguageModelSource(streamed, BATCH, model)
    assert "special tokens are 10.0% of the training text's positions and give no rows: '<1>' (id 1) 10.0%" in capsys.readouterr().out
    monkeypatch.setattr(text_module, "hugging_face_dataset", rows("late"))
    model.d_vocab = VOCABULARY - 1
    with pytest.raises(ValueError, match=r"the model 59 embeddings; token '<59>' \(id 59\) stands in document 'fake/train/0'"):
        LanguageModelSource(streamed, BATCH, model)
    monkeypatch.setattr(text_module, "hugging_face_dataset", lambda *_: iter([text_module.Document("fake/train/3", "one document")]))
    with pytest.raises(ValueError, match=r"no (held-out|training) documents among 1 rows"):
        LanguageModelSource(streamed, BATCH, model)


def test_saved_configs_of_older_versions_load_and_new_ones_come_back(text, tmp_path):
    plain = to_plain(config(text, tmp_path, cache_dtype="bfloat16"))
    assert json.loads(json.dumps(plain))["cache_dtype"] == "bfloat16"
    assert from_plain(LanguageModelSource.Config, plain) == config(text, tmp_path, cache_dtype="bfloat16")
    for name in ("cache", "cache_dtype"):
        del plain[name]
    assert from_plain(LanguageModelSource.Config, plain) == config(text, None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cache": ""}, r"cache='' names no folder\. Set cache=FOLDER, or cache=null"),
        ({"cache_dtype": "bfloat16"}, r"cache_dtype=bfloat16 would be ignored without a cache\. Set cache=FOLDER"),
        ({"cache_dtype": "int8"}, "cache_dtype=.int8. is not one of float32, bfloat16, float16"),
    ],
)
def test_config_errors(text, fields, message):
    with pytest.raises(ValueError, match=message):
        config(text, **{"cache": None, **fields})


def test_the_bundled_language_model_is_cached_exactly(tmp_path):
    pytest.importorskip("transformer_lens", exc_type=ModuleNotFoundError)
    small = TextConfig(kind="stdlib", max_documents=4)
    live_config = LanguageModelSource.Config(text=small, context_length=64, buffer_rows=1024, device="cpu")
    live = build_source(live_config, BATCH)
    rows = live.describe()["text"]["rows_per_epoch"]
    model, said = live.language_model, []
    source = CachedSource(replace(live_config, cache=str(tmp_path)), BATCH, rows, model, said.append)
    assert torch.equal(everything(live), everything(source))
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(model, "activations", side_effect=AssertionError("no pass is needed")))
        again = CachedSource(replace(live_config, cache=str(tmp_path), seed=4), BATCH, rows, model, said.append)
        assert next(again).x_TD.shape == (BATCH, source.d_in)
