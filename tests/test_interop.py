"""`load_sae` asks the formats of other libraries for what is not ours, and says which it knows."""

import json

import pytest
import torch

from switch_sae import load_sae
from switch_sae.interop import FORMATS, Format
from switch_sae.models import TopKSAE
from switch_sae.runs import save_sae


class Text(Format):
    """Weights as JSON, in a folder."""

    def recognises(self, path):
        return (path / "sae.txt").is_file()

    def load(self, path, **settings):
        self.check_settings(path, settings)
        saved = json.loads((path / "sae.txt").read_text())
        sae = TopKSAE(TopKSAE.Config(num_latents=saved["latents"], k=saved["k"]), saved["d_in"])
        sae.W_dec_MD.data = torch.tensor(saved["decoder"])
        return sae

    def save(self, sae, path):
        plain = {"latents": sae.num_latents, "k": sae.k, "d_in": sae.d_in, "decoder": sae.decoder_weight().tolist()}
        path.mkdir()
        (path / "sae.txt").write_text(json.dumps(plain))


@pytest.fixture
def sae():
    return TopKSAE(TopKSAE.Config(num_latents=12, k=3), 4, torch.Generator().manual_seed(0))


def test_a_format_of_the_table_is_read_and_what_is_ours_stays_ours(sae, tmp_path, monkeypatch):
    monkeypatch.setitem(FORMATS, "text", Text)
    Text().save(sae, tmp_path / "theirs")
    loaded = load_sae(tmp_path / "theirs")
    assert torch.equal(loaded.decoder_weight(), sae.decoder_weight()) and not loaded.training
    save_sae(tmp_path / "theirs" / "model.safetensors", sae, {"source": "ours"})
    assert load_sae(tmp_path / "theirs").activations == {"source": "ours"}


def test_settings_are_refused_where_files_hold_everything(sae, tmp_path, monkeypatch):
    monkeypatch.setitem(FORMATS, "text", Text)
    Text().save(sae, tmp_path / "theirs")
    with pytest.raises(ValueError, match="k is no setting of the format Text; it needs no settings"):
        load_sae(tmp_path / "theirs", k=3)
    save_sae(tmp_path / "model.safetensors", sae)
    with pytest.raises(ValueError, match=r"so k, heaviside cannot be set: files of switch_sae describe themselves"):
        load_sae(tmp_path, k=3, heaviside=True)


def test_errors_name_the_formats_that_are_known(tmp_path, monkeypatch):
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"12")
    with pytest.raises(FileNotFoundError) as unknown:
        load_sae(tmp_path / "nowhere")
    monkeypatch.setitem(FORMATS, "text", Text)
    with pytest.raises(FileNotFoundError, match=r"does not exist\. Give a run folder .* Other formats that can be read: .*sae_lens, .*text\."):
        load_sae(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        load_sae(tmp_path / "damaged")
    assert "text" not in str(unknown.value)
