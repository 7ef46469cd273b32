"""Choices: what a table's entries are called in files and on the command line, in this version and in earlier ones."""

import json
from dataclasses import dataclass, field, fields

import pytest
from configs import CONTRACTS, ROUTED, switch

from switch_sae.activations import SOURCES, SyntheticSource
from switch_sae.analysis import ANALYSES
from switch_sae.choices import Choice
from switch_sae.interop import FORMATS
from switch_sae.models import ROUTERS, SAES, SwitchSAE, TopKSAE
from switch_sae.models.routers import Gate, SoftmaxRouter
from switch_sae.models.routers.sigmoid import SigmoidRouter
from switch_sae.models.topk import EncoderInit
from switch_sae.plain import from_plain, to_plain

USUAL = {"k": 16}


def test_every_entry_comes_back_from_json_by_its_key():
    configs = [(SAES, config) for config in CONTRACTS.values()] + [(ROUTERS, config) for config in ROUTED.values()]
    configs += [(SAES, cls.Config(num_latents=4096)) for cls in SAES.values()] + [(ROUTERS, cls.Config()) for cls in ROUTERS.values()]
    configs += [(SOURCES, cls.Config()) for cls in SOURCES.values()]
    assert {choice.key_of(config) for choice, config in configs} == SAES.keys() | ROUTERS.keys() | SOURCES.keys()
    for choice, config in configs:
        plain = choice.to_plain(config)
        assert plain[choice.tag] == choice.key_of(config) and json.loads(json.dumps(plain)) == plain
        again = choice.from_plain(json.loads(json.dumps(plain)))
        assert again == config and type(again) is type(config)


def test_tags_and_names_are_what_files_hold():
    assert [(choice.tag, choice.what) for choice in (SAES, SOURCES, ROUTERS)] == [
        ("architecture", "SAE architecture"),
        ("kind", "source of activations"),
        ("kind", "router"),
    ]
    assert (FORMATS.tag, ANALYSES.tag) == ("format", "name")
    assert SAES.to_plain(switch("sigmoid"))["router"] == {"kind": "sigmoid", "train": True, "load_balance": 0.1}


def test_a_key_is_of_an_exact_class_of_an_instance_or_of_its_config():
    for choice in (SAES, ROUTERS, SOURCES):
        for key, cls in choice.items():
            assert choice.key_of(cls) == choice.key_of(cls.Config) == choice.key_of(cls.Config()) == key
    assert SAES.key_of(SAES.build(CONTRACTS["topk"], 6)) == "topk" and ROUTERS.key_of(SAES.build(switch("sigmoid"), 6).router) == "sigmoid"

    class Renamed(TopKSAE):
        @dataclass
        class Config(TopKSAE.Config): ...

    for stranger in (Renamed, Renamed.Config(), Renamed(Renamed.Config(), 6), 3):
        with pytest.raises(
            ValueError, match=r"is no SAE architecture of the table \(switch, switch_refit, switch_pursuit, topk, .*\)\. Add a line for it"
        ):
            SAES.key_of(stranger)


@pytest.mark.parametrize(
    ("choice", "plain", "message"),
    [
        (SAES, {"architecture": "vae"}, r"unknown SAE architecture 'vae'; this version knows switch, switch_refit, switch_pursuit, topk, "),
        (SAES, {"num_latents": 48}, "unknown SAE architecture None"),
        (ROUTERS, {"kind": "hash"}, "unknown router 'hash'; this version knows softmax, sigmoid, bias_balanced, competition, cosine_kmeans"),
        (FORMATS, {"format": "tar"}, "unknown format 'tar'"),
        (SAES, {"architecture": "topk", "experts": 4}, r"unknown settings \['experts'\] for TopKSAE.Config; it has .*'num_latents'"),
        (SAES, {"architecture": "switch", "router": {"kind": "hash"}}, "unknown router 'hash'"),
        (SAES, {"architecture": "switch", "router": {"kind": "sigmoid", "gate": "hard"}}, r"unknown settings \['gate'\] for SigmoidRouter.Config"),
        (SAES, {"architecture": "topk", "k": "many"}, "k='many' is of the wrong type: it must be int"),
        (ROUTERS, {"kind": "softmax", "gate": "soft"}, "gate='soft' is not one of probability, hard, straight_through"),
    ],
)
def test_what_this_version_does_not_know_is_refused_by_name(choice, plain, message):
    with pytest.raises(ValueError, match=message):
        choice.from_plain(plain)


def test_no_import_path_is_in_a_file_and_none_is_imported_from_one():
    text = json.dumps([SAES.to_plain(config) for config in CONTRACTS.values()])
    assert "switch_sae" not in text and "Config" not in text


def test_settings_of_version_1_get_their_place_at_any_depth():
    former = {"architecture": "switch", "num_latents": 48, "k": 4, "num_experts": 4, "gate": "hard", "load_balance": 0.5, "train_router": True}
    expected = {"architecture": "switch", "num_latents": 48, "k": 4, "num_experts": 4}
    expected["router"] = {"kind": "softmax", "gate": "hard", "load_balance": 0.5, "train": True}
    assert SAES.upgrade(former) == expected == SAES.upgrade(expected) and former["gate"] == "hard", "what was given stays as it was"
    config = SAES.from_plain(former)
    assert config.router == SoftmaxRouter.Config(gate=Gate.hard, load_balance=0.5)
    for name in ("gate", "load_balance", "train_router"):  # none of them need be there
        part = {key: value for key, value in former.items() if key not in ("gate", "load_balance", "train_router") or key == name}
        assert SAES.from_plain(part).num_latents == 48

    @dataclass
    class Whole:
        sae: SwitchSAE.Config = SAES.field("switch")

    assert from_plain(Whole, {"sae": former}).sae == config and to_plain(Whole(config))["sae"] == SAES.to_plain(config)


class Fast:
    @dataclass
    class Config:
        speed: int = 3
        colour: str = "red"

    def __init__(self, config, *more):
        self.config, self.more = config, more

    @staticmethod
    def upgrade(fields):
        """Version 0 called it pace, and in tens."""
        return {("speed" if key == "pace" else key): value * 10 if key == "pace" else value for key, value in fields.items()}


class Slow:
    @dataclass
    class Config:
        colour: str = "blue"

    def __init__(self, config):
        self.config = config


WAYS: Choice[object] = Choice("way", "kind", {"fast": Fast, "slow": Slow})


class Trip:
    @dataclass
    class Config:
        way: object = WAYS.field("fast")
        days: int = 1
        others: list[int] = field(default_factory=list)


TRIPS: Choice[object] = Choice("trip", "to", {"sea": Trip})


def test_choices_inside_choices_are_tagged_and_upgraded_too():
    plain = {"to": "sea", "way": {"kind": "fast", "pace": 2}, "days": 4}
    config = TRIPS.from_plain(plain)
    assert config == Trip.Config(Fast.Config(20), 4) and TRIPS.to_plain(config)["way"] == {"kind": "fast", "speed": 20, "colour": "red"}
    assert Trip.Config().way == Fast.Config() and Trip.Config().way is not Trip.Config().way
    built = WAYS.build(config.way, 1, 2)
    assert type(built) is Fast and built.more == (1, 2)
    assert next(f for f in fields(Trip.Config) if f.name == "way").metadata["choice"] is WAYS


def test_what_is_chosen_goes_before_the_base_and_the_base_before_the_usual():
    base = SwitchSAE.Config(num_latents=96, k=3, num_experts=4, auxk=0.5, router=SoftmaxRouter.Config(load_balance=0.7, train=False))
    assert SAES.derive(base, {}, USUAL) == base
    assert SAES.derive(base, {"k": 2}, USUAL).k == 2
    topk = SAES.derive(base, {"architecture": "topk", "encoder_init": "linear"}, USUAL)
    assert topk == TopKSAE.Config(num_latents=96, k=3, auxk=0.5, encoder_init=EncoderInit.linear), "what both have is shared"
    relu = SAES.derive(base, {"architecture": "relu"}, USUAL)
    assert relu.num_latents == 96 and not hasattr(relu, "k")
    assert SAES.derive(relu, {"architecture": "batch_topk"}, USUAL).k == 16, "the base has none: the usual one"
    back = SAES.derive(topk, {"architecture": "switch", "num_experts": 8}, USUAL)
    assert (back.num_experts, back.k, back.router) == (8, 3, SoftmaxRouter.Config())


def test_inside_too_what_is_not_chosen_stays_and_another_router_shares_what_both_have():
    base = switch("softmax straight_through")
    base.router.load_balance = 0.7
    assert SAES.derive(base, {"router": {"load_balance": 0.2}}, {}).router == SoftmaxRouter.Config(gate=Gate.straight_through, load_balance=0.2)
    assert SAES.derive(base, {"router": {"kind": "sigmoid"}}, {}).router == SigmoidRouter.Config(load_balance=0.7)
    assert SAES.derive(base, {"num_latents": 96}, {}).router == base.router
    with pytest.raises(ValueError, match=r"unknown settings \['gate'\] for SigmoidRouter.Config"):
        SAES.derive(base, {"router": {"kind": "sigmoid", "gate": "hard"}}, {})
    with pytest.raises(ValueError, match="unknown router 'hash'"):
        SAES.derive(base, {"router": {"kind": "hash"}}, {})
    with pytest.raises(ValueError, match=r"k=400 is more than num_latents=48"):
        SAES.derive(base, {"k": 400}, {})


def test_a_derived_config_shares_no_object_with_its_base():
    base = switch("softmax")
    derived = SAES.derive(base, {}, {})
    derived.router.load_balance = 9.0
    assert base.router.load_balance == 0.1 and SyntheticSource.Config() == SOURCES.derive(SyntheticSource.Config(), {}, {})


def test_an_entry_without_a_config_of_its_own_is_refused_not_built_as_its_parent(monkeypatch):
    class Mine(TopKSAE):
        pass

    monkeypatch.setitem(SAES, "mine", Mine)
    with pytest.raises(ValueError, match=r"Mine has no Config of its own. Nest one in it"):
        SAES.from_plain({"architecture": "mine"})


def test_a_bare_key_is_short_for_defaults_and_what_is_no_choice_is_refused():
    switch = SAES.from_plain({"architecture": "switch", "router": "sigmoid"})
    assert switch.router == ROUTERS["sigmoid"].Config()
    for nothing in (None, 3, ["softmax"]):
        with pytest.raises(ValueError, match=r"says no router. Write \{kind: KEY, ...\} with KEY one of softmax, sigmoid"):
            SAES.from_plain({"architecture": "switch", "router": nothing})


def test_what_is_usual_reaches_choices_inside_that_the_base_does_not_have():
    usual = {"load_balance": 3.0, "auxk": 0.5, "k": 5}
    derived = SAES.derive(TopKSAE.Config(k=7), {"architecture": "switch"}, usual)
    assert (derived.router.load_balance, derived.k, derived.auxk) == (3.0, 7, TopKSAE.Config().auxk)
    assert SAES.derive(TopKSAE.Config(), {"architecture": "switch", "router": {"kind": "sigmoid"}}, usual).router.load_balance == 3.0
    with pytest.raises(ValueError, match=r"unknown settings \['gate'\] for SwitchSAE.Config"):  # a key of format version 1 is none of today's
        SAES.derive(TopKSAE.Config(), {"architecture": "switch", "gate": "hard"}, usual)


def test_version_1_settings_beside_those_of_today_lose_nothing():
    mixed = {"architecture": "switch", "gate": "hard", "router": {"kind": "softmax", "load_balance": 3.0}}
    router = SAES.from_plain(mixed).router
    assert (router.gate.value, router.load_balance) == ("hard", 3.0)
