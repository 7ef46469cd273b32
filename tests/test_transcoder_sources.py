"""Input and target hooks of language models: which pairs a transcoder can learn, their rows, live and cached, and delta CE at the target hook."""

import json
from dataclasses import replace

import pytest
import torch
from test_language_model import WIDTH, config, folder, tokens_CS, transformers  # noqa: F401 - fixtures

from switch_sae import load_sae
from switch_sae.activations import CachedSource, LanguageModelSource, build_source
from switch_sae.activations.language_model import LanguageModel
from switch_sae.config import EvaluationConfig, RunConfig
from switch_sae.evaluation import evaluate
from switch_sae.metrics import Downstream
from switch_sae.models import SAES, SparseLatents, SwitchTranscoderSAE, TopKSAE, TranscoderSAE
from switch_sae.models.base import Flops, SAEOutput
from switch_sae.models.transcoder import Skip
from switch_sae.orchestrator import run_training
from switch_sae.rows import Rows
from switch_sae.stream import Stream

MLP = {"hook": "blocks.1.mlp.hook_in", "target_hook": "blocks.1.hook_mlp_out"}


@pytest.fixture(scope="module")
def model(folder):  # noqa: F811
    return LanguageModel(str(folder / "gpt2"), MLP["hook"], "cpu", target_hook=MLP["target_hook"])


def mlp_of(folder, kind):  # noqa: F811
    """The MLP of layer 1 as transformers has it."""
    plain = transformers.AutoModel.from_pretrained(folder / kind, dtype=torch.float32).eval()
    return (plain.h if kind == "gpt2" else plain.layers)[1].mlp


@pytest.mark.parametrize(("kind", "flops"), [("gpt2", 2 * 2 * WIDTH * 4 * WIDTH), ("neox", 2 * 2 * WIDTH * 32), ("llama", 2 * 3 * WIDTH * 32)])
def test_targets_are_what_the_mlp_makes_of_the_inputs(folder, tokens_CS, kind, flops):  # noqa: F811
    lm = LanguageModel(str(folder / kind), MLP["hook"], "cpu", target_hook=MLP["target_hook"])
    x_CSD, target_CSD = lm.activations_and_targets(tokens_CS)
    assert (lm.d_in, lm.d_out, lm.module_flops) == (WIDTH, WIDTH, flops)
    with torch.no_grad():
        torch.testing.assert_close(target_CSD, mlp_of(folder, kind)(x_CSD), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lm.targets(tokens_CS, 2 * x_CSD), mlp_of(folder, kind)(2 * x_CSD), rtol=1e-4, atol=1e-5)
    assert torch.equal(lm.activations(tokens_CS), x_CSD), "the pass of both hooks gives the same inputs"
    seen = []
    before = lm.logits(tokens_CS)
    assert torch.equal(lm.logits(tokens_CS, lambda y_CSD: (seen.append(y_CSD), y_CSD)[1]), before)
    assert torch.equal(seen[0], target_CSD), "what is replaced is the target"
    assert not torch.allclose(lm.logits(tokens_CS, torch.zeros_like), before, atol=1e-3)


@pytest.mark.parametrize("name", ["hook_attn_out", "attn.hook_z"])
def test_attention_is_for_saes(folder, tokens_CS, name):  # noqa: F811
    lm = LanguageModel(str(folder / "gpt2"), f"blocks.1.{name}", "cpu")
    assert lm.activations(tokens_CS).shape == (5, 12, WIDTH) and lm.module_flops is None
    sae = SAES.build(TopKSAE.Config(num_latents=32, k=4), lm.d_in)
    assert sae(lm.activations(tokens_CS).flatten(0, 1)).recon_TD.shape == (60, WIDTH)


@pytest.mark.parametrize("kind", ["gpt2", "neox", "llama"])
def test_residual_to_attention_is_refused_with_the_reason(folder, kind):  # noqa: F811
    with pytest.raises(ValueError, match=r"depends on what is read at others.*train an SAE on its output .*hook_attn_out.*attn\.hook_z"):
        LanguageModel(str(folder / kind), "blocks.1.hook_resid_pre", "cpu", target_hook="blocks.1.hook_attn_out")


@pytest.mark.parametrize(
    ("hook", "target_hook", "message"),
    [
        ("hook_resid_pre", "hook_resid_post", "depends on what is read at others"),
        ("hook_resid_mid", "hook_resid_post", "goes around it too, such as the residual stream.*hook=blocks.LAYER.mlp.hook_in"),
        ("hook_mlp_out", "mlp.hook_in", "what is read does not reach what is written"),
        ("mlp.hook_in", "mlp.hook_in", "is the hook itself, which is an autoencoder's way"),
        ("mlp.hook_in", "mlp.hook_outt", r"no hook 'blocks.1.mlp.hook_outt'\. Close: \['blocks.1.mlp.hook_out'"),
        ("mlp.hook_in", "attn.hook_pattern", "needs one vector per position"),
    ],
)
def test_pairs_of_hooks_that_are_no_function_are_refused(folder, hook, target_hook, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        LanguageModel(str(folder / "gpt2"), f"blocks.1.{hook}", "cpu", target_hook=f"blocks.1.{target_hook}")


@pytest.mark.parametrize(("hook", "target_hook", "d_out"), [("hook_resid_mid", "hook_mlp_out", WIDTH), ("mlp.hook_in", "mlp.hook_post", 4 * WIDTH)])
def test_other_pairs_that_are_functions_are_taken(folder, hook, target_hook, d_out):  # noqa: F811
    assert LanguageModel(str(folder / "gpt2"), f"blocks.1.{hook}", "cpu", target_hook=f"blocks.1.{target_hook}").d_out == d_out


def test_a_source_gives_inputs_with_their_targets_shuffled_alike(folder, model):  # noqa: F811
    mlp = mlp_of(folder, "gpt2")
    source = LanguageModelSource(config(folder, **MLP), 32, model)
    with torch.no_grad():
        for batch in (next(source), next(source)):
            assert batch.target_TD is not batch.x_TD and batch.x_TD.shape == batch.target_TD.shape == (32, WIDTH)
            torch.testing.assert_close(batch.target_TD, mlp(batch.x_TD), rtol=1e-4, atol=1e-5)
        held_out = source.evaluation_set(60)
        torch.testing.assert_close(held_out.target_TD, mlp(held_out.x_TD), rtol=1e-4, atol=1e-5)
    x_CSD, target_CSD = model.activations_and_targets(held_out.tokens_CS)
    torch.testing.assert_close(held_out.at_hook(), target_CSD, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(held_out.inputs()[held_out.keep_CS], x_CSD[held_out.keep_CS], rtol=1e-5, atol=1e-6)
    about = source.describe()
    assert (about["target_hook"], about["d_out"], about["module_flops"]) == (MLP["target_hook"], WIDTH, 2 * 2 * WIDTH * 4 * WIDTH)
    assert json.loads(json.dumps(about)) == about
    plain = LanguageModelSource(config(folder, hook=MLP["hook"]), 32)
    assert "target_hook" not in plain.describe() and torch.equal(next(plain).x_TD, next(LanguageModelSource(config(folder, **MLP), 32, model)).x_TD)
    with pytest.raises(ValueError, match=r"they differ in target_hook: saved None, now 'blocks.1.hook_mlp_out'"):
        source.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match=r"given has name .* with target_hook 'blocks.1.hook_mlp_out', the config .*must agree"):
        LanguageModelSource(config(folder, hook=MLP["hook"]), 32, model)
    with pytest.raises(ValueError, match="transcoder writes to another hook"):
        config(folder, hook=MLP["hook"], target_hook=MLP["hook"])


def test_cached_rows_and_targets_are_the_live_ones(folder, model, tmp_path):  # noqa: F811
    settings = config(folder, **MLP)
    live, cached = LanguageModelSource(settings, 32, model), CachedSource(replace(settings, cache=str(tmp_path)), 32, 300, model, lambda line: None)

    batches = live.describe()["text"]["rows_per_epoch"] // 32
    ours, theirs = (Rows.cat([next(source) for _ in range(batches)]) for source in (cached, live))
    target_of = {x_D[0].item(): target_D for x_D, target_D in zip(theirs.x_TD, theirs.target_TD, strict=True)}
    shared = [(target_of[x_D[0].item()], target_D) for x_D, target_D in zip(ours.x_TD, ours.target_TD, strict=True) if x_D[0].item() in target_of]
    assert len(shared) > 100 and all(torch.equal(one_D, other_D) for one_D, other_D in shared)
    plain = CachedSource(replace(config(folder, hook=MLP["hook"]), cache=str(tmp_path)), 32, 300)
    assert plain.describe()["cache"]["key"] != cached.describe()["cache"]["key"]
    for source in (live, cached, plain):
        source.close()


class Module(torch.nn.Module):
    """A transcoder that is what it should replace, times a factor."""

    num_latents = num_experts = 1

    def __init__(self, mlp, factor=1.0):
        super().__init__()
        self.mlp, self.factor = mlp, factor
        self.register_buffer("nothing", torch.zeros(()))

    def forward(self, x_TD):
        latents = SparseLatents(torch.ones(len(x_TD), 1), torch.zeros(len(x_TD), 1, dtype=torch.int64), 1)
        return SAEOutput(self.factor * self.mlp(x_TD), latents)

    def flops(self):
        return Flops(0, 0, 0, 0)


def test_delta_ce_is_that_of_the_model_with_its_mlp_replaced(folder, model):  # noqa: F811
    source, mlp = LanguageModelSource(config(folder, **MLP), 32, model), mlp_of(folder, "gpt2")
    held_out = source.evaluation_set(120)
    downstream = Downstream(model, held_out)
    same = evaluate(Module(mlp), held_out, downstream, bootstrap=0)
    assert abs(same["delta_ce"].value) < 1e-5 and same["fvu"].value < 1e-8 and same["kl"].value < 1e-6
    half = evaluate(Module(mlp, 0.5), held_out, downstream, bootstrap=0)
    tokens, keep = held_out.text()
    clean, replaced = model.logits(tokens), model.logits(tokens, lambda y_CSD: torch.where(keep[:, :, None], y_CSD / 2, y_CSD))
    counted = keep[:, :-1] & keep[:, 1:]
    losses = [-logits.log_softmax(2)[:, :-1].gather(2, tokens[:, 1:, None])[..., 0][counted].double().mean() for logits in (clean, replaced)]
    assert half["ce_clean"].value == pytest.approx(losses[0].item(), rel=1e-5)
    assert half["ce_spliced"].value == pytest.approx(losses[1].item(), rel=1e-5)
    assert half["fvu"].value > 0.2 and abs(half["delta_ce"].value) > 1e-3
    with pytest.raises(ValueError, match="are not this model's activations there"):
        Downstream(model, replace(held_out, target_TD=held_out.x_TD))


RUNS = [TranscoderSAE.Config(num_latents=32, k=4), SwitchTranscoderSAE.Config(num_latents=32, k=4, num_experts=4, skip=Skip.full)]


@pytest.mark.parametrize("sae", RUNS)
def test_a_run_trains_scores_saves_and_loads(folder, sae, tmp_path):  # noqa: F811
    evaluation = EvaluationConfig(rows=60, downstream_contexts=8, bootstrap=20, probes=False)
    run = run_training(
        RunConfig(
            source=config(folder, **MLP), sae=sae, evaluation=evaluation, calibration_rows=128, tokens=2048, batch_size=64, device="cpu",
            runs=str(tmp_path), checkpoint_every=0,
        ),
        lambda line: None,
    )  # fmt: skip
    results = run.read_json("results.json")
    assert {"linear_4", f"linear_{WIDTH}", "untrained"} == results["controls"].keys()
    main = results["members"][SAES.key_of(sae)]
    assert main["metrics"]["fvu"]["value"] < results["controls"]["untrained"]["metrics"]["fvu"]["value"] and "delta_ce" in main["metrics"]
    expected = {"switch_transcoder", "flop_matched", "frozen_router"} if sae.slug().startswith("switch") else {"transcoder"}
    assert results["members"].keys() == expected
    loaded = load_sae(run.path)
    assert loaded.config == sae and loaded.activations["target_hook"] == MLP["target_hook"] and loaded.activations["module_flops"] > 0
    if "flop_matched" in expected:
        dense = load_sae(run.member("flop_matched").path)
        assert type(dense) is TranscoderSAE and dense.skip is not None


def test_saes_and_transcoders_say_which_source_they_need(folder):  # noqa: F811
    def trainer(source, sae):
        from switch_kernels import PYTORCH
        from switch_sae.training import TrainerConfig

        stream = Stream(source, 32, 64, 64, "cpu", PYTORCH, None)
        try:
            return stream.trainer(SAES.build(sae, WIDTH), TrainerConfig(), 2, True)
        finally:
            stream.close()

    with pytest.raises(ValueError, match=r"TranscoderSAE writes to another hook.*Set source\.target_hook, such as"):
        trainer(config(folder), TranscoderSAE.Config(num_latents=32, k=4))
    with pytest.raises(ValueError, match=r"TopKSAE reconstructs what it reads, but source\.target_hook is set\. Use sae=transcoder"):
        trainer(config(folder, **MLP), TopKSAE.Config(num_latents=32, k=4))
    with pytest.raises(ValueError, match=r"target hook has size 16, this TranscoderSAE writes 8\. Set sae\.d_out=16"):
        trainer(config(folder, **MLP), TranscoderSAE.Config(num_latents=32, k=4, d_out=8))
    assert trainer(config(folder, **MLP), TranscoderSAE.Config(num_latents=32, k=4)).sae.d_out == WIDTH
    build_source(config(folder, **MLP), 32).close()
