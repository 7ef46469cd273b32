"""What people write around SAEs: docs/extending.md as it stands, their prompts, steering and ablation, results as a data frame."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_report import tiny_run

from switch_sae.activations.language_model_source import LanguageModelSource
from switch_sae.activations.text import TextConfig
from switch_sae.analysis import prompt
from switch_sae.analysis.prompt import inspect, language_model
from switch_sae.models import SwitchSAE, TopKSAE, TranscoderSAE
from switch_sae.results import collect, frame
from switch_sae.results.source import source_of
from switch_sae.runs import load_sae

ROOT = Path(__file__).resolve().parents[1]


def test_the_blocks_of_extending_are_one_file_that_runs(tmp_path):
    code = "\n\n".join(re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/extending.md").read_text(), re.MULTILINE | re.DOTALL))
    (tmp_path / "mine.py").write_text(code + "\n\nassert sae.config.router.sharpness == 3.0 and len(table) == 2\nprint('done', table)\n")
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": "", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    done = subprocess.run([sys.executable, "mine.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "done" in done.stdout, done.stderr
    said = [line.split() for line in done.stdout.splitlines() if "largest" not in line and re.search(r"^\S*(softplus|switch)\S* \d", line)]
    assert len(said) == 2 and all(0 < float(value) < 2 for line in said for value in line[1:])


@pytest.fixture(scope="module")
def text_runs(tmp_path_factory):
    """A Switch SAE and a dense one on the bundled language model; short, so that they know little."""
    folder, texts = tmp_path_factory.mktemp("text"), tmp_path_factory.mktemp("texts")
    for n in range(60):
        (texts / f"{n}.py").write_text(f"def f{n}(x):\n    return x + {n}\n" * 60)
    text = TextConfig(kind="files", paths=[str(texts)])
    source = LanguageModelSource.Config(model="bundled", hook="blocks.1.hook_resid_post", text=text, context_length=16, buffer_rows=2048)
    saes = (SwitchSAE.Config(num_latents=64, k=4, num_experts=4), TopKSAE.Config(num_latents=64, k=4))
    return [tiny_run(folder, sae, source=source, baselines=[]) for sae in saes]


def test_a_prompt_is_seen_token_by_token(text_runs):
    rows = collect([text_runs[0].path])
    sae, model = load_sae(text_runs[0].path), language_model(load_sae(text_runs[0].path))
    assert model is language_model(sae) and model.fingerprint == sae.activations["model_fingerprint"]
    seen = inspect(sae, "def add(a):", top=3, evaluation_set=source_of(rows[0]).evaluation_set(2000), examples=2)
    assert "".join(token.text for token in seen.tokens[1:]) == "def add(a):" and seen.tokens[0].token_id == model.bos_token_id
    assert [token.was_trained_on for token in seen.tokens] == [False] + [True] * (len(seen.tokens) - 1)
    ids = [token.token_id for token in seen.tokens]
    with torch.no_grad():
        x = model.activations(torch.tensor([ids]))
        output = sae(x)
    dense = output.latents.to_dense()[0]
    for place, token in enumerate(seen.tokens):
        assert token.experts == (int(output.routing.expert_TS[0, place, 0]),)
        assert [active.latent for active in token.latents] == [m for m in dense[place].argsort(descending=True).tolist() if dense[place, m] > 0][:3]
        for active in token.latents:
            assert active.value == pytest.approx(float(dense[place, active.latent])) and active.expert == active.latent // 16 == token.experts[0]
        error = (x[0, place] - output.recon_TD[0, place]).square().sum() / x[0, place].square().sum()
        assert token.error == pytest.approx(float(error), rel=1e-4)
    assert seen.examples.keys() == {active.latent for token in seen.tokens for active in token.latents}
    said = str(seen)
    assert "expert" in said and "[[" in said and "such places were not trained on" in said


def test_a_dense_sae_has_no_experts_to_show(text_runs):
    seen = inspect(load_sae(text_runs[1].path), "x = 1", top=2)
    assert all(token.experts == () and all(active.expert is None for active in token.latents) for token in seen.tokens)
    assert seen.examples == {} and "expert" not in str(seen)


def test_a_transcoder_is_seen_by_its_error_on_the_target():
    sae = TranscoderSAE(TranscoderSAE.Config(num_latents=32, k=4), 128, torch.Generator().manual_seed(0)).eval()
    sae.activations = {"source": "language_model", "model": "bundled", "hook": "blocks.2.mlp.hook_in", "target_hook": "blocks.2.hook_mlp_out"}
    seen, model = inspect(sae, "x = 1", top=2), language_model(sae)
    x, target = model.activations_and_targets(torch.tensor([[token.token_id for token in seen.tokens]]))
    with torch.no_grad():
        error = (target - sae(x).recon_TD).square().sum(-1) / target.square().sum(-1)
    assert [token.error for token in seen.tokens] == pytest.approx(error[0].tolist(), rel=1e-4) and not torch.equal(x, target)
    tokens = torch.tensor([[0, 5, 9]])
    _, own = model.activations_and_targets(tokens)
    assert torch.allclose(model.logits(tokens, lambda x: own), model.logits(tokens), atol=1e-4)  # what is replaced is the MLP's output


def test_what_cannot_be_inspected_is_said(text_runs, tmp_path, monkeypatch):
    synthetic = load_sae(tiny_run(tmp_path, TopKSAE.Config(num_latents=32, k=4)).path)
    with pytest.raises(ValueError, match="trained on synthetic, not on a language model's"):
        inspect(synthetic, "x")
    sae = load_sae(text_runs[0].path)
    with pytest.raises(ValueError, match="the text '' has no tokens"):
        inspect(sae, "")
    with pytest.raises(ValueError, match=r"contexts of \d+ tokens exceed"):
        inspect(sae, "x = 1\n" * 2000)
    sae.activations = sae.activations | {"model_fingerprint": "another"}
    with pytest.raises(ValueError, match=r"has other weights .* than the one that this SAE was trained on \(another\)"):
        language_model(sae)
    assert prompt._loaded.cache_info().currsize >= 1


def test_steering_and_ablation_are_in_raw_units_once_the_scale_is_folded(text_runs):
    """Adding c * W_dec[i] to x adds c to what latent i explains; taking a latent out takes its value times its row out of the reconstruction."""
    folded, plain = load_sae(text_runs[0].path, fold=True), load_sae(text_runs[0].path)
    x = language_model(plain).activations(torch.tensor([[0, 5, 9, 17]]))
    with torch.no_grad():
        latents = folded.encode(x).to_dense()
        token, latent = (latents > 0).nonzero()[-1][1:].tolist()
        ablated = latents.clone()
        ablated[..., latent] = 0
        change = folded.decode(latents) - folded.decode(ablated)
        assert torch.allclose(change, latents[..., latent, None] * folded.W_dec[latent], atol=1e-4)
        assert float(change[0, token].norm()) == pytest.approx(float(latents[0, token, latent]), rel=1e-3)  # unit rows: values are norms
        assert torch.allclose(plain.encode(x).to_dense() / plain.activation_scale, latents, rtol=1e-4, atol=1e-5)
    steered = language_model(plain).logits(torch.tensor([[0, 5, 9, 17]]), lambda x: x + 8.0 * folded.W_dec[latent])
    assert not torch.allclose(steered, language_model(plain).logits(torch.tensor([[0, 5, 9, 17]])))


def test_results_are_a_data_frame(text_runs, monkeypatch):
    pandas = pytest.importorskip("pandas")
    rows = collect([run.path for run in text_runs])
    table = frame(rows)
    assert isinstance(table, pandas.DataFrame) and list(table["architecture"]) == [row.architecture for row in rows]
    assert list(table["fvu"]) == [row.value("fvu") for row in rows] and "config.sae.k" in table
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"needs pandas\. Type pip install pandas"):
        frame(rows)
