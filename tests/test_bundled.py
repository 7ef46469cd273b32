"""The bundled language model is what its card says: small, complete, better than counting pairs, and rich where SAEs hook it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from switch_sae.activations import LanguageModelSource, build_source
from switch_sae.activations.loading import BUNDLED
from switch_sae.analysis.pca import PCABaseline, participation_ratio

HOOK = "blocks.2.hook_resid_post"


@pytest.fixture(scope="module")
def rows():
    config = LanguageModelSource.Config(hook=HOOK, prefetch=False, buffer_rows=1024)
    source = build_source(config, 512)
    yield source, source.evaluation_set(4000)
    source.close()


def test_it_fits_and_is_bfloat16():
    files = [path for path in BUNDLED.iterdir() if path.suffix in (".json", ".safetensors")]
    assert sum(path.stat().st_size for path in files) <= 16e6
    with safe_open(BUNDLED / "model.safetensors", framework="pt") as opened:
        assert {opened.get_slice(key).get_dtype() for key in opened.keys()} == {"BF16"}  # noqa: SIM118


def test_its_record_says_how_it_was_made():
    record = json.loads((BUNDLED / "training.json").read_text())
    bits = record["held_out_bits_per_byte"]
    assert record["tokens_seen"] >= 50e6 and bits["model"] < 0.75 * bits["bigram"] < bits["unigram"]
    assert "/" not in record["command"] and not any(str(Path.home()) in str(value) for value in record.values())


def test_it_predicts_held_out_text_as_well_as_recorded(rows):
    source, evaluation = rows
    with torch.no_grad():
        logits = source.language_model.logits(evaluation.tokens_CS)
    nats = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), evaluation.tokens_CS[:, 1:].flatten()).item()
    record = json.loads((BUNDLED / "training.json").read_text())
    assert nats < 1.1 * record["held_out_nats_standard_library"]


def test_its_activations_are_not_solved_by_pca(rows):
    x_TD = rows[1].x_TD
    left = (PCABaseline.fit(x_TD, 16)(x_TD).recon_TD - x_TD).square().sum() / (x_TD - x_TD.mean(0)).square().sum()
    assert participation_ratio(x_TD) > 25 and left > 0.35
