"""Language models through transformer_lens, on tiny random ones built here; how they are loaded is in test_loading.py."""

import json
import sys
import time

import pytest
import torch

from switch_sae.activations import LanguageModelSource, build_source
from switch_sae.activations.language_model import LanguageModel
from switch_sae.activations.text import TextConfig

# A package that is there and broken fails here: skipping would hide it.
transformers = pytest.importorskip("transformers", exc_type=ModuleNotFoundError)
pytest.importorskip("transformer_lens", exc_type=ModuleNotFoundError)

WORDS = [f"w{i}" for i in range(56)]
VOCABULARY = {token: i for i, token in enumerate(["<|endoftext|>", "<pad>", "<unk>", *WORDS])}
LAYERS, WIDTH, LENGTH = 3, 16, 24


def save_tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<pad>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)


def save_model(folder, kind):
    torch.manual_seed(0)
    sizes = {"vocab_size": len(VOCABULARY), "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    if kind == "gpt2":
        config = transformers.GPT2Config(n_layer=LAYERS, n_embd=WIDTH, n_head=2, n_positions=LENGTH, initializer_range=0.3, **sizes)
        model = transformers.GPT2LMHeadModel(config)
    else:
        sizes |= {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 32, "initializer_range": 0.3}
        sizes |= {"max_position_embeddings": LENGTH}
        make = {
            "neox": (transformers.GPTNeoXConfig, transformers.GPTNeoXForCausalLM),
            "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
            "bert": (transformers.BertConfig, transformers.BertForMaskedLM),
        }[kind]
        model = make[1](make[0](**sizes))
    model.save_pretrained(folder)
    save_tokenizer(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for kind in ("gpt2", "neox", "llama", "bert"):
        save_model(root / kind, kind)
    generator = torch.Generator().manual_seed(0)
    (root / "text").mkdir()
    for i in range(40):
        words = torch.randint(len(WORDS), (10 + 7 * (i % 9),), generator=generator).tolist()
        (root / "text" / f"{i}.txt").write_text(" ".join(WORDS[word] for word in words))
    return root


@pytest.fixture(scope="module")
def model(folder):
    return LanguageModel(str(folder / "gpt2"), "blocks.1.hook_resid_pre", device="cpu")


@pytest.fixture(scope="module")
def tokens_CS():
    return torch.randint(3, len(VOCABULARY), (5, 12), generator=torch.Generator().manual_seed(1))


def config(folder, **fields):
    text = TextConfig(kind="files", paths=[str(folder / "text")])
    settings = {"model": str(folder / "gpt2"), "hook": "blocks.1.hook_resid_pre", "text": text, "context_length": 12, "buffer_rows": 200}
    return LanguageModelSource.Config(**{**settings, "contexts_per_forward": 4, "device": "cpu", **fields})


@pytest.fixture(scope="module")
def source(folder, model):
    return LanguageModelSource(config(folder), 32, model)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "neox"])
def test_activations_and_logits_equal_those_of_transformers(folder, tokens_CS, kind):
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder / kind, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        truth = plain(tokens_CS, output_hidden_states=True)
    for hook, layer in (("blocks.0.hook_resid_pre", 0), ("blocks.2.hook_resid_pre", 2), ("blocks.1.hook_resid_post", 2)):
        lm = LanguageModel(str(folder / kind), hook, device="cpu")
        x_CSD = lm.activations(tokens_CS)
        assert x_CSD.dtype == torch.float32 and not x_CSD.requires_grad and lm.d_in == WIDTH and lm.causal
        torch.testing.assert_close(x_CSD, truth.hidden_states[layer], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lm.logits(tokens_CS), truth.logits, rtol=1e-4, atol=1e-4)


def test_the_pass_ends_at_the_hook(model, tokens_CS):
    ran = []
    blocks = [(i, model._bridge.hook_dict[f"blocks.{i}.hook_in"]) for i in range(LAYERS)]
    handles = [point.register_forward_hook(lambda *_, layer=i: ran.append(layer)) for i, point in blocks]
    model.activations(tokens_CS)
    for handle in handles:
        handle.remove()
    assert ran == [0, 1]


SPLICED = ["hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "attn.hook_z", "mlp.hook_post"]


@pytest.mark.parametrize("name", SPLICED)
def test_splicing_the_activation_itself_changes_nothing_and_zeros_change_logits(folder, tokens_CS, name):
    lm = LanguageModel(str(folder / "gpt2"), f"blocks.1.{name}", device="cpu")
    seen = []
    before = lm.logits(tokens_CS)
    same = lm.logits(tokens_CS, lambda x_CSD: (seen.append(x_CSD), x_CSD)[1])
    assert torch.equal(same, before)
    assert torch.equal(seen[0], lm.activations(tokens_CS)) and seen[0].shape == (5, 12, lm.d_in)
    assert not torch.allclose(lm.logits(tokens_CS, torch.zeros_like), before, atol=1e-3)
    assert torch.equal(lm.logits(tokens_CS), before), "the splice is gone afterwards"


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("name", ["hook_resid_pre", "hook_resid_mid", "hook_resid_post"])
def test_splicing_the_residual_stream_replaces_it_whole(folder, tokens_CS, kind, name):
    """Logits after the last layer's stream is replaced by a constant cannot depend on the tokens or, without attention, on the position."""
    lm = LanguageModel(str(folder / kind), f"blocks.{LAYERS - 1}.{name}", device="cpu")
    constant_D = torch.linspace(-1, 1, WIDTH)
    logits_CSV = lm.logits(tokens_CS, lambda x_CSD: constant_D.expand_as(x_CSD))
    torch.testing.assert_close(logits_CSV, logits_CSV[:1, :1].expand_as(logits_CSV), rtol=1e-4, atol=1e-4)


def test_a_replacement_of_another_shape_is_refused_and_leaves_no_hook(model, tokens_CS):
    before = model.logits(tokens_CS)
    with pytest.raises(ValueError, match=r"shape \(5, 12, 8\), the activation \(5, 12, 16\)"):
        model.logits(tokens_CS, lambda x_CSD: x_CSD[..., :8])
    assert torch.equal(model.logits(tokens_CS), before)


def test_bos_conventions_and_special_tokens(folder, model):
    assert model.prepends_bos and model.bos_token_id == 0 and model.special_token_ids == {0, 1}
    assert model.context_length_limit == LENGTH
    neox = LanguageModel(str(folder / "neox"), "blocks.1.hook_resid_pre", device="cpu")
    assert not neox.prepends_bos
    fields = {"model": str(folder / "neox")}
    by_convention = LanguageModelSource(config(folder, **fields), 32, neox)
    assert by_convention.rules.bos is None and by_convention.rules.separator == 0
    asked = LanguageModelSource(config(folder, prepend_bos=True, **fields), 32, neox)
    assert asked.rules.bos == 0
    assert not by_convention.describe()["prepend_bos"] and asked.describe()["prepend_bos"]
    gpt2 = LanguageModelSource(config(folder), 32, model).evaluation_set(100)
    assert (gpt2.tokens_CS[:, 0] == 0).all() and not gpt2.keep_CS[:, 0].any()
    starts = by_convention.evaluation_set(100)
    assert not (starts.tokens_CS[:, 0] == 0).all() and not starts.keep_CS[:, 0].any()


def test_fingerprint_follows_the_weights_and_nothing_else(folder, model, tmp_path):
    assert LanguageModel(str(folder / "gpt2"), "blocks.0.hook_resid_pre", device="cpu").fingerprint == model.fingerprint
    changed = transformers.GPT2LMHeadModel.from_pretrained(folder / "gpt2")
    changed.transformer.h[2].mlp.c_fc.weight.data[3, 3] += 1
    changed.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    assert LanguageModel(str(tmp_path), "blocks.0.hook_resid_pre", device="cpu").fingerprint != model.fingerprint


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        ("blocks.1.resid_pre", r"no hook 'blocks.1.resid_pre'\. Close: \['blocks.1.hook_resid_pre'.*LAYER from 0 to 2"),
        ("blocks.7.hook_resid_pre", "no hook .*LAYER from 0 to 2"),
        ("blocks.1.attn.hook_pattern", "needs one vector per position"),
        ("embed.hook_in", "needs one vector per position"),
        ("blocks.1.ln1.hook_scale", "needs one vector per position"),
        ("blocks.1.hook_mlp_in", "gives no activations: .*use_hook_mlp_in"),
    ],
)
def test_hooks_that_cannot_be_used_say_which_can(folder, hook, message):
    with pytest.raises(ValueError, match=message):
        LanguageModel(str(folder / "gpt2"), hook, device="cpu")


def test_models_that_cannot_be_loaded_say_what_to_do(folder, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    started = time.perf_counter()
    with pytest.raises(
        ConnectionError, match=r"'nobody/nothing-here' is not on this machine.*\(.+\)\. Use the bundled model \(MODEL=bundled\).*folder"
    ):
        LanguageModel("nobody/nothing-here", "blocks.0.hook_resid_pre")
    assert time.perf_counter() - started < 10, "no retries"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        LanguageModel("./nowhere", "blocks.0.hook_resid_pre")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        LanguageModel(str(tmp_path), "blocks.0.hook_resid_pre")
    with pytest.raises(ValueError, match="float32 there"):
        build_source(config(folder, precision="bfloat16"), 32)
    monkeypatch.setitem(sys.modules, "transformer_lens.model_bridge", None)
    with pytest.raises(ImportError, match=r"pip install 'transformer-lens>=3\.9'"):
        LanguageModel(str(folder / "gpt2"), "blocks.0.hook_resid_pre")


def test_a_model_that_looks_ahead_is_not_padded(folder):
    bert = LanguageModel(str(folder / "bert"), "blocks.2.hook_resid_pre", device="cpu")
    assert not bert.causal
    fields = {"model": str(folder / "bert"), "hook": "blocks.2.hook_resid_pre"}
    with pytest.raises(ValueError, match=r"not causal\. Use packed"):
        LanguageModelSource(config(folder, packing="truncated", **fields), 32, bert)
    assert next(LanguageModelSource(config(folder, **fields), 32, bert)).x_TD.shape == (32, WIDTH)


@pytest.mark.parametrize("packing", ["packed", "truncated"])
def test_rows_are_the_kept_positions_of_the_training_text(folder, model, packing):
    rows = LanguageModelSource(config(folder, packing=packing), 32, model).describe()["text"]["rows_per_epoch"]
    made = LanguageModelSource(config(folder, packing=packing, buffer_rows=rows), rows, model)
    contexts = made._feed.contexts
    truth_TD = model.activations(contexts.tokens_CS)[contexts.keep_CS]
    epoch_TD = next(made).x_TD
    assert epoch_TD.shape == truth_TD.shape == (rows, WIDTH) and epoch_TD.dtype == torch.float32
    views_DP = torch.randn(WIDTH, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close((epoch_TD @ views_DP).sort(0).values, (truth_TD @ views_DP).sort(0).values, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(epoch_TD, truth_TD, atol=0.1), "shuffled"
    held_out = made.evaluation_set(100)
    assert torch.cdist(held_out.x_TD, truth_TD).min(1).values.median() > 0.1


def test_resume_is_bit_identical_with_and_without_prefetch(folder, model):
    straight = LanguageModelSource(config(folder), 32, model)
    states, batches = [], []
    for _ in range(60):
        states.append(json.loads(json.dumps(straight.state_dict())))
        batches.append(next(straight).x_TD)
    assert states[-1]["position"]["epoch"] >= 1
    for number, prefetch in ((0, True), (3, False), (29, True), (50, False)):
        resumed = LanguageModelSource(config(folder, prefetch=prefetch), 32, model)
        resumed.load_state_dict(states[number])
        assert all(torch.equal(next(resumed).x_TD, batch) for batch in batches[number : number + 9])
        assert resumed.state_dict() == states[number + 9]
        resumed.close()


def test_a_state_is_not_continued_with_something_else(folder, model, source):
    state = source.state_dict()
    with pytest.raises(ValueError, match="seed: saved 0, now 1"):
        LanguageModelSource(config(folder, seed=1), 32, model).load_state_dict(state)
    with pytest.raises(ValueError, match=r"text: saved '.*', now '.*'"):
        LanguageModelSource(config(folder, text=TextConfig(kind="files", paths=[str(folder / "text")], max_documents=20)), 32, model).load_state_dict(
            state
        )


def test_evaluation_set_is_whole_held_out_contexts_and_ignores_the_seed(folder, model, source):
    rows = source.evaluation_set(60)
    other = LanguageModelSource(config(folder, seed=9), 32, model).evaluation_set(60)
    assert 48 < len(rows.x_TD) <= 60 and torch.equal(rows.x_TD, other.x_TD) and torch.equal(rows.document_T, other.document_T)
    torch.testing.assert_close(model.activations(rows.tokens_CS)[rows.keep_CS], rows.x_TD, rtol=1e-5, atol=1e-5)
    held_out = {rows.document_names[number] for number in rows.document_T.tolist()}
    assert held_out.isdisjoint(source._feed.names) and len(held_out) > 1
    few = source.evaluation_set(5)
    assert len(few.x_TD) == 5 == int(few.keep_CS.sum())
    everything = source.evaluation_set(10**6)
    assert len(everything.x_TD) == everything.keep_CS.sum() and len(everything.document_T.unique()) > 1
    with pytest.raises(ValueError, match="at least 1"):
        source.evaluation_set(0)


def test_evaluating_while_a_block_is_being_prefetched_disturbs_neither(folder, model, tokens_CS):
    plain = LanguageModelSource(config(folder), 32, model)
    ahead = LanguageModelSource(config(folder, prefetch=True), 32, model)
    expected = model.logits(tokens_CS)
    for _ in range(25):
        assert torch.equal(next(plain).x_TD, next(ahead).x_TD)
        assert torch.equal(model.logits(tokens_CS, lambda x_CSD: x_CSD), expected)
    ahead.close()


def test_streamed_datasets_train_resume_and_evaluate(folder, model, monkeypatch):
    from switch_sae.activations import text as text_module

    def rows(*_):
        for i in range(200):
            yield text_module.Document(f"fake/train/{i}", " ".join(WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(5 + i % 30)))

    monkeypatch.setattr(text_module, "hugging_face_dataset", rows)
    streamed = config(folder, text=TextConfig(kind="dataset", dataset="fake"))
    straight = LanguageModelSource(streamed, 32, model)
    states, batches = [], []
    for _ in range(170):
        states.append(json.loads(json.dumps(straight.state_dict())))
        batches.append(next(straight).x_TD)
    assert states[-1]["position"]["epoch"] == 1
    for number in (0, 13, 100, 150):
        resumed = LanguageModelSource(streamed, 32, model)
        resumed.load_state_dict(states[number])
        assert all(torch.equal(next(resumed).x_TD, batch) for batch in batches[number : number + 5])
    held_out = straight.evaluation_set(90)
    assert all(text_module.is_held_out(held_out.document_names[n]) for n in held_out.document_T.tolist()) and len(held_out.x_TD) > 70
    assert straight.mixing()["expected_documents_per_batch"] == 32


@pytest.mark.parametrize("prefetch", [False, True])
def test_nan_activations_name_the_model_the_hook_and_the_place(folder, tmp_path, prefetch):
    broken = transformers.GPT2LMHeadModel.from_pretrained(folder / "gpt2")
    broken.transformer.wte.weight.data[20] = 3e38  # finite, but not the sums that it enters
    broken.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    made = build_source(config(folder, model=str(tmp_path), prefetch=prefetch), 32)
    with pytest.raises(FloatingPointError, match=r"NaN or infinite activations at hook 'blocks\.1\.hook_resid_pre', in contexts \d+ to \d+"):
        next(made)
    made.close()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"context_length": 25}, "Set context_length=24 or less"),
        ({"buffer_rows": 8}, "buffer_rows=8 is below batch_size=32"),
        ({"packing": "loose"}, "packing=.loose. is not one of packed, truncated"),
        ({"contexts_per_forward": 0}, "contexts_per_forward=0 must be at least 1"),
        ({"hook": "blocks.2.hook_resid_pre"}, "They must agree"),
    ],
)
def test_config_errors(folder, model, fields, message):
    with pytest.raises(ValueError, match=message):
        LanguageModelSource(config(folder, **fields), 32, model)


def test_describe_is_plain_json_and_repeating_is_announced_once(folder, model, capsys):
    made = LanguageModelSource(config(folder, buffer_rows=300), 256, model)
    plain = json.loads(json.dumps(made.describe()))
    assert plain["model_fingerprint"] == model.fingerprint and plain["text"]["kind"] == "files" and plain["d_in"] == WIDTH
    assert not plain["prefetch"] and plain["device"] == "cpu"
    for _ in range(20):
        next(made)
    assert capsys.readouterr().out.count("the text has been read once") == 1
    assert 0 < made.mixing()["mixing"] <= 1.1
