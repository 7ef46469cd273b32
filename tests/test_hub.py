"""Fetching from and sending to the Hugging Face hub, against a stand-in of its file API on this machine, and huggingface_hub's offline mode."""

import base64
import hashlib
import json
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
import huggingface_hub.constants
import pytest
import torch

import switch_sae.hub
from experiments.convert import convert
from switch_sae import load_sae, push_to_hub, save_sae
from switch_sae.hub import HubName, hub_name
from switch_sae.interop import FORMATS
from switch_sae.models import SAES

ROOT = Path(__file__).resolve().parents[1]
RUN = ROOT / "tests" / "data" / "version1" / "finished"
TOKEN = "hf_stand_in"


@dataclass
class StandIn:
    """Repositories as a hub serves them: commits are whole sets of files, `main` and tags point at them."""

    url: str = ""
    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    refs: dict[str, dict[str, str]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    gated: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)
    broken: int = 0
    """An HTTP status that answers everything."""

    def commit(self, repo: str, files: dict[str, bytes]) -> str:
        self.repos.setdefault(repo, {})
        before = self.repos[repo].get(self.refs.get(repo, {}).get("main", ""), {})
        commit = hashlib.sha1(repr((repo, len(self.repos[repo]), sorted(files))).encode()).hexdigest()
        self.repos[repo][commit] = before | files
        self.refs.setdefault(repo, {})["main"] = commit
        return commit

    def fetched(self) -> set[str]:
        return {request.split("/resolve/")[1].partition("/")[2] for request in self.requests if request.startswith("GET") and "/resolve/" in request}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: StandIn

    def log_message(self, *words):
        pass

    def answer(self, status, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def fail(self, status, code, **headers):
        self.answer(status, {"error": code}, X_Error_Code=code, X_Error_Message=code, **headers)

    @property
    def may_write(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def commit_of(self, repo, revision):
        """(commit, files); None after an answer that says why there are none."""
        if repo not in self.hub.repos or (repo in self.hub.private and not self.may_write):
            return self.fail(404 if self.may_write else 401, "RepoNotFound")
        if repo in self.hub.gated:
            return self.fail(403, "GatedRepo")
        commit = self.hub.refs[repo].get(revision, revision)
        return (commit, self.hub.repos[repo][commit]) if commit in self.hub.repos[repo] else self.fail(404, "RevisionNotFound")

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub.broken:
            return self.answer(self.hub.broken, {"error": "out of order"})
        words = path.strip("/").split("/")
        if words[:2] == ["api", "models"]:
            repo, rest = "/".join(words[2:4]), words[4:] or ["revision", "main"]
            if (found := self.commit_of(repo, rest[1])) is None:
                return None
            commit, files = found
            if rest[0] == "tree":
                return self.answer(200, [{"type": "file", "path": name, "size": len(b), "oid": git_oid(b)} for name, b in files.items()])
            siblings = [{"rfilename": name} for name in files]
            return self.answer(200, {"id": repo, "sha": commit, "siblings": siblings, "private": repo in self.hub.private, "tags": []})
        repo, revision, name = "/".join(words[:2]), words[3], "/".join(words[4:])
        if (found := self.commit_of(repo, revision)) is None:
            return None
        commit, files = found
        if name not in files:
            return self.fail(404, "EntryNotFound", X_Repo_Commit=commit)
        return self.answer(200, files[name], ETag=f'"{git_oid(files[name])}"', X_Repo_Commit=commit)

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = urlsplit(self.path).path
        self.hub.requests.append(f"POST {path}")
        if self.hub.broken:
            return self.answer(self.hub.broken, {"error": "out of order"})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if not self.may_write:
            return self.fail(401, "Unauthorized")
        words = path.strip("/").split("/")
        if path == "/api/repos/create":
            plain = json.loads(body)
            if plain["organization"] != "me":
                return self.fail(403, "Forbidden")
            repo = f"{plain['organization']}/{plain['name']}"
            if repo in self.hub.repos:
                return self.answer(409, {"error": "it exists", "url": f"{self.hub.url}/{repo}"})
            self.hub.commit(repo, {".gitattributes": b""})
            if plain.get("visibility") == "private" or plain.get("private"):
                self.hub.private.add(repo)
            return self.answer(200, {"url": f"{self.hub.url}/{repo}", "name": repo})
        repo = "/".join(words[2:4])
        if words[4] == "preupload":
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            return self.answer(200, {"files": files})
        lines = [json.loads(line) for line in body.splitlines()]
        sent = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"}
        commit = self.hub.commit(repo, sent)
        return self.answer(200, {"commitUrl": f"{self.hub.url}/{repo}/commit/{commit}", "commitOid": commit})


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def files_of(folder: Path, below: str = "") -> dict[str, bytes]:
    return {below + file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    stand_in = StandIn()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OfThis", (Handler,), {"hub": stand_in}))
    server.daemon_threads = True
    stand_in.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", stand_in.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", stand_in.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "*")
    huggingface_hub.close_session()
    monkeypatch.chdir(tmp_path)
    yield stand_in
    huggingface_hub.close_session()
    server.shutdown()
    server.server_close()


def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def unreachable(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")


def same(one, other) -> bool:
    state, again = one.state_dict(), other.state_dict()
    return state.keys() == again.keys() and all(torch.equal(tensor, again[name]) for name, tensor in state.items())


def test_what_is_pushed_is_loaded_again_and_the_commit_is_kept(hub, tmp_path):
    sent = push_to_hub(RUN, "me/saes/layer_1")
    here = load_sae(RUN)
    sae = load_sae("me/saes/layer_1")
    assert same(sae, here) and type(sae) is type(here)
    assert sae.activations == {**here.activations, "hub": sent} and sent["commit"] == hub.refs["me/saes"]["main"]
    assert sent == {"repo": "me/saes", "path": "layer_1", "revision": "main", "commit": sent["commit"]}
    assert convert(["me/saes/layer_1"], tmp_path / "copy", "switch_sae", {}) == 0
    assert load_sae(tmp_path / "copy").activations == sae.activations
    files = hub.repos["me/saes"][sent["commit"]]
    assert set(files) == {".gitattributes", *(f"layer_1/{name}" for name in ("model.safetensors", "config.json", "results.json", "README.md"))}
    assert files["layer_1/results.json"] == (RUN / "results.json").read_bytes()


def test_the_card_says_what_it_is_and_holds_the_scores_with_their_intervals(hub):
    push_to_hub(RUN, "me/saes")
    card = hub.repos["me/saes"][hub.refs["me/saes"]["main"]]["README.md"].decode()
    sae, entry = load_sae(RUN), json.loads((RUN / "results.json").read_text())["members"]["switch"]
    fvu = entry["metrics"]["fvu"]
    assert f"| {fvu['value']:.4g} [{fvu['low']:.4g}, {fvu['high']:.4g}] |" in card and f"| {entry['metrics']['dead_latents']['value']:.4g} |" in card
    assert f"On {entry['rows']:,} held-out rows of {entry['documents']:,} documents" in card
    assert f"| latents | {sae.num_latents:,} |" in card and f"| experts | {sae.num_experts} |" in card
    assert f"| parameters | {sum(p.numel() for p in sae.parameters()):,} |" in card
    assert 'load_sae("me/saes")' in card and "| source | synthetic |" in card and "Not stated yet" in card
    assert card.startswith("---\nlibrary_name: switch_sae\ntags:\n") and "\nlicense:" not in card and "base_model" not in card  # `bundled` is no name
    assert card.count("None") == 0 and str(Path.home()) not in card


def test_a_card_that_is_there_stays_unless_it_is_to_be_replaced(hub, capsys):
    hub.commit("me/saes", {"README.md": b"mine", "other.txt": b"stays"})
    push_to_hub(RUN, "me/saes")
    files = hub.repos["me/saes"][hub.refs["me/saes"]["main"]]
    assert files["README.md"] == b"mine" and files["other.txt"] == b"stays" and "README.md already: it stays" in capsys.readouterr().out
    push_to_hub(RUN, "me/saes", replace_card=True)
    assert b"sparse autoencoder" in hub.repos["me/saes"][hub.refs["me/saes"]["main"]]["README.md"]


def test_an_sae_in_memory_is_pushed_without_scores_and_links_to_its_model(hub):
    sae = SAES.build(SAES.from_plain({"architecture": "topk", "num_latents": 16, "k": 2}), 8)
    sae.activations = {"model": "org/model", "hook": "blocks.0.hook_resid_post"}
    push_to_hub(sae, "me/saes")
    card = hub.repos["me/saes"][hub.refs["me/saes"]["main"]]["README.md"].decode()
    assert same(load_sae("me/saes"), sae) and "No scores came with it." in card and '\nbase_model: "org/model"\n' in card
    sae.activations["model"] = "/home/somebody/models/secret"
    push_to_hub(sae, "me/saes", replace_card=True)
    card = hub.repos["me/saes"][hub.refs["me/saes"]["main"]]["README.md"].decode()
    assert "somebody" not in card and "`secret`" in card and "base_model" not in card


def test_a_revision_pins_what_is_loaded(hub):
    first = push_to_hub(RUN, "me/saes")["commit"]
    hub.refs["me/saes"]["v1"] = first
    second = push_to_hub(SAES.build(SAES.from_plain({"architecture": "topk", "num_latents": 16, "k": 2}), 8), "me/saes")["commit"]
    assert load_sae("me/saes").activations["hub"]["commit"] == second
    for revision in ("v1", first):
        sae = load_sae("me/saes", revision=revision)
        assert same(sae, load_sae(RUN)) and sae.activations["hub"] == {"repo": "me/saes", "path": "", "revision": revision, "commit": first}
    hub.refs["me/saes"]["moved"] = "f" * 40
    hub.repos["me/saes"]["f" * 40] = {"elsewhere/model.safetensors": hub.repos["me/saes"][first]["model.safetensors"]}
    assert same(load_sae("me/saes/elsewhere", revision="moved"), load_sae(RUN))  # its files are others than those of main
    with pytest.raises(ValueError, match=r"me/saes has no revision 'v9'\. Give a branch"):
        load_sae("me/saes", revision="v9")
    with pytest.raises(ValueError, match="is a path of this machine, which has no revision='v1'"):
        load_sae(RUN, revision="v1")


def test_the_cache_is_used_offline_and_for_pinned_commits_and_told_without_network(hub, monkeypatch, capsys):
    commit = push_to_hub(RUN, "me/saes/a")["commit"]
    here = load_sae("me/saes/a")
    hub.requests.clear()
    assert same(load_sae("me/saes/a", revision=commit), here) and hub.requests == []
    with monkeypatch.context() as patch:
        offline(patch)
        sae = load_sae("me/saes/a")
        assert same(sae, here) and sae.activations == here.activations and hub.requests == []
        with pytest.raises(FileNotFoundError, match=r"me/saes/b does not exist here, nor a copy from the hub in the cache .* HF_HUB_OFFLINE"):
            load_sae("me/saes/b")
        with pytest.raises(FileNotFoundError, match="nor a copy from the hub at revision 'v1' in the cache"):
            load_sae("me/saes/a", revision="v1")
        with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE is set"):
            push_to_hub(RUN, "me/saes")
    capsys.readouterr()
    unreachable(monkeypatch)
    assert same(load_sae("me/saes/a"), here)
    assert f"Going on with commit {commit[:12]} of me/saes, which is in the cache." in capsys.readouterr().out
    with pytest.raises(ConnectionError, match=r"me/saes/b does not exist here, and the hub cannot be reached \(ConnectError.*again with network\."):
        load_sae("me/saes/b")
    with pytest.raises(ConnectionError, match="nothing was sent, and the hub cannot be reached"):
        push_to_hub(RUN, "me/saes")


@pytest.mark.parametrize("format", ["sae_lens", "sparsify", "dictionary_learning"])
def test_folders_of_other_libraries_are_read_and_nothing_but_their_files_is_fetched(hub, format):
    sae = SAES.build(SAES.from_plain({"architecture": "topk", "num_latents": 16, "k": 2}), 8)
    FORMATS[format]().save(sae, Path("theirs"))
    theirs = files_of(Path("theirs"), "layer[1]/")
    noise = {"layer[1]/optimizer.pt": b"x", "layer[1]/deep/cfg.json": b"{}", "layer1/ae.pt": b"x", "big.bin": b"x", "layer[1]/README.md": b"x"}
    hub.commit("they/saes", theirs | noise)
    again = load_sae("they/saes/layer[1]")
    assert hub.fetched() == set(theirs)
    x_TD = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again(x_TD).recon_TD, load_sae("theirs")(x_TD).recon_TD) and again.activations["hub"]["path"] == "layer[1]"


def test_one_file_is_named_and_its_config_above_comes_along(hub):
    sae = SAES.build(SAES.from_plain({"architecture": "topk", "num_latents": 16, "k": 2}), 8)
    FORMATS["dictionary_learning"]().save(sae, Path("theirs"))
    weights = Path("theirs/ae.pt").read_bytes()
    steps = {f"t/checkpoints/ae_{step}.pt": weights for step in (1, 2)}
    hub.commit("they/saes", {**files_of(Path("theirs"), "t/"), **steps})
    assert same(load_sae("they/saes/t/checkpoints/ae_1.pt"), load_sae("theirs"))
    assert hub.fetched() == {"t/checkpoints/ae_1.pt", "t/config.json"}


def test_one_layer_of_a_set_is_named_and_its_config_comes_along(hub, tmp_path):
    saes = [SAES.build(SAES.from_plain({"architecture": "transcoder", "num_latents": 16, "k": 2}), 8) for _ in range(3)]
    for layer, sae in enumerate(saes):
        sae.activations = {"hook": f"blocks.{layer}.mlp.hook_in", "target_hook": f"blocks.{layer}.hook_mlp_out", "model": "gpt2"}
    FORMATS["circuit_tracer"]().save_all(saes, Path("set"))
    commit = hub.commit("they/saes", {**files_of(Path("set"), "a/"), "a/README.md": b"x"})
    again = load_sae("they/saes/a/layer_1.safetensors")
    assert hub.fetched() == {"a/layer_1.safetensors", "a/config.yaml"} and again.k == 2 and again.activations["hub"]["commit"] == commit
    x_TD = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(again(x_TD).recon_TD, saes[1](x_TD).recon_TD)
    with pytest.raises(FileNotFoundError, match="they/saes/a is on the hub no file and no folder that holds an SAE"):
        load_sae("they/saes/a", layer=1)
    assert convert(["they/saes/a/layer_1.safetensors"], tmp_path / "copy", "switch_sae", {}, commit) < 1e-6
    assert load_sae(tmp_path / "copy").activations["hub"]["revision"] == commit
    with pytest.raises(ValueError, match="has no revision 'other'"):
        convert(["they/saes/a/layer_1.safetensors"], tmp_path / "another", "switch_sae", {}, "other")


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_names_the_files_that_it_writes(format, tmp_path):
    """What is not named is not fetched from the hub."""
    sae = SAES.build(SAES.from_plain({"architecture": "topk", "num_latents": 16, "k": 2}), 8)
    try:
        FORMATS[format]().save(sae, tmp_path)
    except ValueError as error:
        assert "read, not written" in str(error) or format == "circuit_tracer"
    written = set(files_of(tmp_path))
    assert written <= set(FORMATS[format].files) and (written or format in ("openai", "original_switch", "circuit_tracer"))


ABSENT = {
    "me/nothing": (FileNotFoundError, r"me/nothing does not exist here, and the hub has no repository me/nothing that you may see"),
    "they/saes/layer_9": (FileNotFoundError, r"they/saes/layer_9 is on the hub no file .* Folders with one: .*they/saes/layer_1, they/saes/layer_2"),
    "they/saes": (FileNotFoundError, "Folders with one: they/saes/layer_1, they/saes/layer_2"),
    "they/model": (ValueError, "they/model is a language model on the hub"),
    "they/empty": (FileNotFoundError, "they/empty is on the hub no file .* Is the name what you meant"),
    "they/gated": (ValueError, r"they/gated is gated\. Accept its terms"),
    "they/secret": (FileNotFoundError, "no repository they/secret that you may see.* Log in"),
    "they/broken": (ValueError, "model.safetensors .* cannot be read as safetensors"),
}


@pytest.mark.parametrize("name", ABSENT)
def test_what_is_not_there_is_said_in_one_message(hub, monkeypatch, name):
    kind, text = ABSENT[name]
    monkeypatch.delenv("HF_TOKEN")
    hub.commit("they/saes", {"layer_1/ae.pt": b"x", "layer_2/sae.safetensors": b"x", "layer_3/cfg.json": b"{}"})
    hub.commit("they/model", {"model.safetensors": b"x" * 100, "config.json": b"{}", "tokenizer.json": b"{}"})
    hub.commit("they/broken", {"model.safetensors": b"x" * 100})
    for repo in ("they/empty", "they/gated", "they/secret"):
        hub.commit(repo, {"README.md": b""})
    hub.gated.add("they/gated")
    hub.private.add("they/secret")
    with pytest.raises(kind, match=text) as caught:
        load_sae(name)
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)
    assert name == "they/broken" or not hub.fetched()


def test_a_hub_out_of_order_and_rights_that_are_missing_are_said(hub, monkeypatch):
    with pytest.raises(ValueError, match=r"they/saes cannot be written: .* no right to do that \(HTTP 403\)"):
        push_to_hub(RUN, "they/saes")
    hub.commit("me/public", {"a": b""})
    with pytest.raises(ValueError, match="me/public exists and is public, so nothing was sent as private"):
        push_to_hub(RUN, "me/public", private=True)
    push_to_hub(RUN, "me/private", private=True)
    assert "me/private" in hub.private and same(load_sae("me/private"), load_sae(RUN))
    hub.broken = 500
    with pytest.raises(ConnectionError, match=r"me/new cannot be read: the hub answered HTTP 500 .* Try again later"):
        load_sae("me/new")
    hub.broken = 0
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ValueError, match=r"me/new cannot be written: your token is not valid \(HTTP 401\)"):
        push_to_hub(RUN, "me/new")
    monkeypatch.delenv("HF_TOKEN")
    hub.requests.clear()
    with pytest.raises(ValueError, match=r"nothing can be sent to me/saes without a token\. Log in with `hf auth login`, or set HF_TOKEN"):
        push_to_hub(RUN, "me/saes")
    assert hub.requests == []


def test_what_is_here_comes_first_and_a_path_with_a_mistake_asks_nobody(hub):
    sae = SAES.build(SAES.from_plain({"architecture": "topk", "num_latents": 16, "k": 2}), 8)
    push_to_hub(RUN, "me/saes")
    save_sae("me/saes/model.safetensors", sae)
    hub.requests.clear()
    assert same(load_sae("me/saes"), sae) and "hub" not in load_sae("me/saes").activations
    for path in (
        "me/sae",
        Path("you/saes"),
        "./you/saes",
        "/you/saes",
        "you/model.safetensors",
        "you",
        "you//saes",
        "you/../saes",
        "you/sa--es",
        "you/saes.git",
    ):
        with pytest.raises(FileNotFoundError, match=r"does not exist\. Give a run folder .* or a name on the hub \(hf://user/repo\)"):
            load_sae(path)
    assert hub.requests == []
    assert same(load_sae("hf://me/saes"), load_sae(RUN))


def test_names_are_taken_apart():
    assert HubName.parse("hf://a/b/c/d/") == HubName.parse("a/b/c/d") == HubName("a/b", "c/d") and str(HubName("a/b", "c")) == "a/b/c"
    assert hub_name("some-user.x/an_sae") == HubName("some-user.x/an_sae") and HubName.parse(f"a/{'b' * 94}").path == ""
    for wrong in (
        "hf://a",
        "hf://a/../b",
        "hf://a/b/../c",
        "hf:///a/b",
        "hf://a/b c",
        "hf://a/-b",
        "hf://a/b..c",
        f"hf://a/{'b' * 95}",
        "hf://a/b/c\\d",
    ):
        with pytest.raises(ValueError, match="names nothing on the hub"):
            hub_name(wrong)


def test_without_huggingface_hub_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"the hub needs huggingface_hub.*pip install huggingface_hub"):
        switch_sae.hub.fetch(HubName("a/b"), None, ["model.safetensors"])


def test_the_command_pushes_by_the_librarys_own_settings(hub, tmp_path):
    environment = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN, "NO_PROXY": "*"}
    python_path = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-m", "experiments.push", str(RUN), "me/saes"]
    done = subprocess.run(command, cwd=tmp_path, env=environment | python_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f'load_sae("me/saes", revision="{hub.refs["me/saes"]["main"]}")' in done.stdout and same(load_sae("me/saes"), load_sae(RUN))
