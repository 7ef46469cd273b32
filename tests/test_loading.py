"""Which language model a name stands for, its special tokens as they were saved, and every damage told in one message before anything runs."""

import importlib.util
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from switch_sae.activations import LanguageModelSource
from switch_sae.activations.language_model import LanguageModel
from switch_sae.activations.loading import BUNDLED, resolve
from switch_sae.activations.text import TextConfig

transformers = pytest.importorskip("transformers", exc_type=ModuleNotFoundError)
pytest.importorskip("transformer_lens", exc_type=ModuleNotFoundError)

HOOK = "blocks.1.hook_resid_post"
WORDS = [f"w{i}" for i in range(40)]
LETTERS = [chr(i) for i in range(97, 123)]
SIZES = {"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 32}
KINDS = {
    "gpt2": lambda rows: transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=rows, n_layer=2, n_embd=8, n_head=2, n_positions=32)),
    "llama": lambda rows: transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=rows, **SIZES)),
    "llama_base": lambda rows: transformers.LlamaModel(transformers.LlamaConfig(vocab_size=rows, **SIZES)),
    "neox": lambda rows: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(vocab_size=rows, **SIZES)),
    "bert": lambda rows: transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=rows, **SIZES)),
    "opt_post": lambda rows: transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=rows, num_hidden_layers=2, hidden_size=8, num_attention_heads=2, ffn_dim=16, max_position_embeddings=32,
            word_embed_proj_dim=8, do_layer_norm_before=False,
        )
    ),
}  # fmt: skip


def save(folder, kind="gpt2", tokens=("<e>", *WORDS), rows=None, seed=0, **special):
    """A tiny random model with one embedding row per token (or `rows`), and a tokenizer with the special tokens given and no others."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(seed)
    KINDS[kind](rows or len(tokens)).save_pretrained(folder)
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=special.get("unk_token", tokens[0])))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    return folder


END = {"bos_token": "<e>", "eos_token": "<e>", "unk_token": "<e>"}


@pytest.fixture(scope="module")
def fine(tmp_path_factory):
    return save(tmp_path_factory.mktemp("models") / "fine", **END)


@pytest.fixture
def words(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for i in range(30):
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / "text" / f"{i}.txt").write_text(" ".join(WORDS[n] for n in torch.randint(len(WORDS), (40,), generator=generator).tolist()))
    return TextConfig(kind="files", paths=[str(tmp_path / "text")])


# What a name stands for


@pytest.mark.parametrize("name", ["pythia-70m", "./pythia-70m", "opt", "gpt2-small", "EleutherAI/pythia-70m", "a b/ü", "~/mine", "bundled/"])
def test_a_local_folder_comes_before_every_other_meaning_of_its_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / name.replace("~/", "")
    folder.mkdir(parents=True)
    assert resolve(name) == folder.resolve() and resolve(name).is_absolute()
    assert resolve("bundled") == BUNDLED, "the project's own name, whatever folders there are"


@pytest.mark.parametrize("name", ["gpt2", "EleutherAI/pythia-70m"])
def test_other_names_are_the_hubs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve(name) is None


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("./nowhere", FileNotFoundError, "folder './nowhere' does not exist"),
        ("a/b/c", FileNotFoundError, "does not exist"),
        ("nowhere.gguf", FileNotFoundError, "does not exist"),
        ("model.safetensors", ValueError, "is a file. Give the folder that holds it"),
        (" ", ValueError, "names no language model"),
    ],
)
def test_paths_that_are_no_models_say_what_to_give(name, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(error, match=message):
        resolve(name)


@pytest.mark.parametrize("alias", ["pythia-70m", "gpt2-small"])
def test_an_alias_of_transformer_lens_does_not_replace_a_folder(alias, fine, tmp_path, monkeypatch):
    from transformer_lens.model_bridge import TransformerBridge  # noqa: F401

    monkeypatch.chdir(tmp_path)
    save(tmp_path / alias, seed=1, **END)
    for other in ("EleutherAI/pythia-70m", "gpt2"):  # what stands behind the aliases
        shutil.copytree(fine, tmp_path / other)
    mine = LanguageModel(alias, HOOK, "cpu").fingerprint
    assert mine == LanguageModel(str(tmp_path / alias), HOOK, "cpu").fingerprint != LanguageModel(str(fine), HOOK, "cpu").fingerprint


# Special tokens


def rules(folder, words, **fields):
    config = LanguageModelSource.Config(
        model=str(folder), hook=HOOK, text=words, context_length=16, buffer_rows=256, contexts_per_forward=8, device="cpu", **fields
    )
    return LanguageModelSource(config, 32)


@pytest.mark.parametrize(
    ("kind", "tokens", "special", "expected"),
    [
        # As GPT-2, Llama and Pythia are saved: what held before this was tested holds still.
        ("gpt2", ["<e>", *WORDS], END, (0, 0, 0, {0})),
        ("llama", ["<unk>", "<s>", "</s>", *WORDS], {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, (1, 1, 2, {1, 2})),
        ("neox", ["<e>", "<pad>", *WORDS], END, (None, 0, 0, {0})),
        # Nothing is made up where little was saved.
        ("gpt2", ["?", *WORDS[:20]], {"unk_token": "?"}, (None, None, 0, set())),
        ("llama", ["?", *WORDS], {"unk_token": "?"}, (None, None, 0, set())),
        ("gpt2", ["?", *WORDS], {}, (None, None, 0, set())),
        ("gpt2", ["?", *WORDS, "<p>"], {"pad_token": "<p>"}, (None, None, 41, {41})),
        ("llama", ["?", *WORDS, "</s>"], {"eos_token": "</s>"}, (None, 41, 41, {41})),
    ],
)
@pytest.mark.parametrize("spare_rows", [0, 7])
def test_special_tokens_are_those_that_were_saved(kind, tokens, special, expected, spare_rows, tmp_path, words):
    folder = save(tmp_path / "model", kind, tokens, rows=len(tokens) + spare_rows, **special)
    source = rules(folder, words)
    bos, separator, pad, ids = expected
    assert (source.rules.bos, source.rules.separator, source.rules.pad, source.rules.special) == (bos, separator, pad, ids)
    contexts = source._feed.contexts
    assert int(contexts.tokens_CS.max()) < len(tokens) and contexts.keep_CS[:, 1:].float().mean() > (0.9 if ids else 0.999)
    if bos is None and not ids & {0}:
        with pytest.raises(ValueError, match=r"has no BOS token\. Set prepend_bos=false"):
            rules(folder, words, prepend_bos=True)


def test_a_special_token_that_the_tokenizers_class_adds_is_none_of_the_models(tmp_path, words):
    folder = save(tmp_path / "model", tokens=["?", "w", *"0123456789", *LETTERS[:22]], rows=64, unk_token="?")
    (folder / "tokenizer_config.json").unlink()  # transformers then takes GPT-2's own class, which adds <|endoftext|>
    assert transformers.AutoTokenizer.from_pretrained(folder).bos_token_id == 34
    assert rules(folder, words).rules.bos is None and rules(folder, words).language_model.special_token_ids == set()


def test_the_tokenizer_is_the_saved_one_and_decodes_to_the_text(fine):
    model = LanguageModel(str(fine), HOOK, "cpu")
    assert model.tokenizer.pad_token is None and model.tokenizer.decode(model.tokenizer("w3 w1", add_special_tokens=False)["input_ids"]) == "w3 w1"


# Damage


def change(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def weights(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def value(key, number):
    return lambda folder: weights(folder, lambda tensors: tensors[key].view(-1)[:1].fill_(number))


def lose(*names):
    return lambda folder: [(folder / name).unlink(missing_ok=True) for name in names]


def shorten(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def lfs(name):
    return lambda folder: (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123456\n")


def sharded(folder):
    transformers.GPT2LMHeadModel.from_pretrained(folder).save_pretrained(folder, max_shard_size="2KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def adapter(folder):
    (folder / "config.json").rename(folder / "adapter_config.json")


DAMAGE = [
    ("no weights", lose("model.safetensors"), "holds no weights: none of model.safetensors"),
    ("cut weights", shorten("model.safetensors", 3000), r"model\.safetensors is cut or damaged \(.*Copy or download it again"),
    ("empty weights", shorten("model.safetensors", 0), r"model\.safetensors is cut or damaged"),
    ("weights a pointer", lfs("model.safetensors"), r"model\.safetensors is a pointer of git-lfs.*git lfs pull"),
    ("tokenizer a pointer", lfs("tokenizer.json"), r"tokenizer\.json is a pointer of git-lfs"),
    ("cut config", shorten("config.json", 100), r"config\.json is no whole JSON file"),
    ("cut tokenizer", shorten("tokenizer.json", 200), r"tokenizer\.json is no whole JSON file"),
    ("config of another kind", lambda f: (f / "config.json").write_text("{}"), "cannot be loaded: .*transformer_lens knows its architecture"),
    ("unknown architecture", lambda f: change(f, architectures=["Novel"], model_type="novel"), "cannot be loaded: .*novel"),
    ("no tokenizer", lose("tokenizer.json", "tokenizer_config.json"), r"comes without a tokenizer\. Save its tokenizer files"),
    (
        "a tensor missing",
        lambda f: weights(f, lambda t: t.pop("transformer.h.1.mlp.c_fc.weight")),
        r"lack 1 .*h\.1\.mlp\.c_fc\.weight; they would be",
    ),
    ("a layer missing", lambda f: change(f, n_layer=3), r"lack 12 that its config\.json asks for: transformer\.h\.2.* and 7 more"),
    ("a layer too many", lambda f: change(f, n_layer=1), r"hold 11 of layers that its config\.json leaves out: .*h\.1\."),
    ("another width", lambda f: change(f, n_embd=12), r"do not fit its config\.json: saved transformer.* for "),
    ("a NaN", value("transformer.h.0.mlp.c_fc.weight", float("nan")), r"weight transformer\.h\.0\.mlp\.c_fc\.weight of .* holds NaN or infinite"),
    ("an infinite bias", value("transformer.ln_f.bias", float("inf")), r"weight transformer\.ln_f\.bias of .* holds NaN or infinite"),
    ("a missing shard", sharded, r"lacks model-00002-of-\d+\.safetensors, 1 of the \d+ weight files that model\.safetensors\.index\.json names"),
    ("an adapter", adapter, "holds an adapter, no language model. Merge it"),
    ("no config", lose("config.json"), r"holds no config\.json"),
]


@pytest.mark.parametrize(("harm", "message"), [case[1:] for case in DAMAGE], ids=[case[0] for case in DAMAGE])
def test_damage_is_found_at_the_start_and_told_in_one_message_that_names_the_folder(harm, message, fine, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(fine, folder)
    harm(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        LanguageModel(str(folder), HOOK, "cpu")
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 700


def test_weights_of_an_older_format_that_are_cut_are_refused_as_well(fine, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(fine, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert LanguageModel(str(folder), HOOK, "cpu").fingerprint == LanguageModel(str(fine), HOOK, "cpu").fingerprint
    shorten("pytorch_model.bin", 2000)(folder)
    with pytest.raises(ValueError, match="cannot be loaded"):
        LanguageModel(str(folder), HOOK, "cpu")


def test_weights_that_have_no_place_in_the_model_are_named(fine, tmp_path, capsys):
    folder = tmp_path / "more"
    shutil.copytree(fine, folder)
    weights(folder, lambda tensors: tensors.update({"score.weight": torch.ones(2, 8)}))
    assert LanguageModel(str(folder), HOOK, "cpu").fingerprint == LanguageModel(str(fine), HOOK, "cpu").fingerprint
    assert "1 saved weights have no place in the model and are left out: score.weight." in capsys.readouterr().out


# Predictions


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("gpt2", None),
        ("llama", None),
        ("bert", "is no causal model"),
        ("llama_base", r"the output head of .* was not saved with it \(lm_head\.weight\)"),
        ("opt_post", "cannot be run to its end"),
    ],
)
def test_a_model_without_next_token_predictions_says_why_and_gives_activations(kind, reason, tmp_path):
    model = LanguageModel(str(save(tmp_path / kind, kind, **END)), HOOK, "cpu")
    assert torch.isfinite(model.activations(torch.zeros(2, 5))).all()
    found = model.why_no_predictions()
    assert found is None if reason is None else re.search(reason, found)


def test_logits_that_are_not_finite_are_no_predictions(fine, monkeypatch):
    model = LanguageModel(str(fine), HOOK, "cpu")
    monkeypatch.setattr(model, "logits", lambda tokens_CS: torch.full((*tokens_CS.shape, 9), float("nan")))
    assert "NaN or infinite logits" in model.why_no_predictions()
    monkeypatch.setattr(model, "logits", lambda tokens_CS: torch.zeros(2, 2))
    assert "logits of shape (2, 2)" in model.why_no_predictions()


# GGUF


def gguf_of(folder, file):
    """The Llama model of a folder as a GGUF file, as llama.cpp's converter lays it out: rows of queries and keys are interleaved."""
    import gguf
    import numpy as np

    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    config, tokenizer = model.config, transformers.AutoTokenizer.from_pretrained(folder)
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if token.startswith("<") else gguf.TokenType.NORMAL for token in tokens])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    for key, tensor in model.state_dict().items():
        array = tensor.numpy()
        if "q_proj" in key or "k_proj" in key:
            array = np.ascontiguousarray(array.reshape(config.num_attention_heads, 2, -1, config.hidden_size).swapaxes(1, 2).reshape(array.shape))
        key = key.removeprefix("model.").removesuffix(".weight")
        key = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}.get(key, key.replace("layers.", "blk."))
        for name, short in names.items():
            key = key.replace(name, short)
        writer.add_tensor(f"{key}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_gives_the_activations_and_tokens_of_its_folder(tmp_path):
    pytest.importorskip("gguf")
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    folder = save(tmp_path / "llama", "llama", ["<unk>", "<s>", "</s>", *LETTERS, "ab"], **special)
    gguf_of(folder, tmp_path / "model.gguf")
    one, other = LanguageModel(str(folder), HOOK, "cpu"), LanguageModel(str(tmp_path / "model.gguf"), HOOK, "cpu")
    tokens_CS = torch.randint(30, (3, 20), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(other.activations(tokens_CS), one.activations(tokens_CS), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(other.logits(tokens_CS), one.logits(tokens_CS), rtol=1e-4, atol=1e-5)
    assert other.tokenizer("cab", add_special_tokens=False)["input_ids"] == [5, 29]
    assert (other.bos_token_id, other.eos_token_id, other.d_vocab, other.why_no_predictions()) == (1, 2, 30, None)


def test_gguf_files_that_cannot_be_read_say_why(tmp_path, monkeypatch):
    file = tmp_path / "model.gguf"
    for content, error, message in (
        (b"version https://git-lfs.github.com/spec/v1\n", ValueError, "is a pointer of git-lfs"),
        (b"PK\x03\x04 a zip file", ValueError, "is no GGUF file: it begins with b'PK"),
        (b"", ValueError, "is no GGUF file"),
        (b"GGUF\x03\x00\x00\x00", (ValueError, ImportError), r"cannot be loaded|pip install gguf"),
    ):
        file.write_bytes(content)
        with pytest.raises(error, match=message) as caught:
            LanguageModel(str(file), HOOK, "cpu")
        assert str(file) in str(caught.value)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else found(name, *rest))
    with pytest.raises(ImportError, match=r"needs the gguf package: pip install gguf"):
        LanguageModel(str(file), HOOK, "cpu")
