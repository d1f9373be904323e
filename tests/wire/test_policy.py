"""Policy: which format a site gets, and why it gets none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rfcompile.codec.formats import QuantFormat
from rfcompile.errors import FormatError, PolicyError
from rfcompile.wire.policy import Decision, Policy, as_policy, exact

BIG = 10**6


def test_bits_are_shorthand_for_every_kind_and_named_kinds_keep_their_own() -> None:
    policy = Policy.of(bits=4, group_size=64, gradients="8b", weights=None)

    assert policy.activations == QuantFormat(4, 64, "mid-rise")
    assert policy.optimizer_state == QuantFormat(4, 64, "mid-tread")
    assert policy.gradients == QuantFormat(8, grid="mid-tread")
    assert policy.weights is None


def test_bits_none_is_exact_everywhere() -> None:
    policy = Policy.of(bits=None)
    decision = policy.decide("activations", "any", BIG)
    assert decision == exact("policy", "the policy sends activations exact")
    assert (decision.spec, decision.eligible) == (None, False)


def test_small_tensors_stay_exact_with_the_figures() -> None:
    policy = Policy.of(bits=4, min_bytes=100)
    small = policy.decide("gradients", "m", 99)
    assert small == exact("min_bytes", "99 bytes < min_bytes=100")
    assert small.eligible
    assert policy.decide("gradients", "m", 100) == Decision(QuantFormat(4, grid="mid-tread"))
    assert policy.decide("gradients", "m", None).spec == "4b:g128:tread", "symbolic, so large"


def test_what_no_policy_can_quantize() -> None:
    policy = Policy.of(bits=4, min_bytes=0, sites={"named": 8})
    for path in ("m", "named"):
        for why, facts in {
            "one rank": {"world": 1},
            "dtype": {"dtype": torch.int64},
            "empty": {"numel": 0},
        }.items():
            decision = policy.decide("gradients", path, 0, **facts)  # type: ignore[arg-type]
            assert (decision.format, decision.why, decision.eligible) == (None, why, False)
    known = policy.decide("gradients", "m", 4, dtype=torch.float16, numel=2, world=2)
    assert known.spec == "4b:g128:tread"


def test_the_first_matching_site_wins_and_lifts_min_bytes() -> None:
    policy = Policy.of(bits=4, sites={"blocks.0.*": None, "blocks.*": "8b", "*": 2})
    named = policy.decide("activations", "blocks.0.mlp", BIG)
    assert named == exact("site", "sites['blocks.0.*'] says exact")
    assert not named.eligible
    eight, two = QuantFormat(8, grid="mid-tread"), QuantFormat(2, grid="mid-rise")
    assert policy.decide("activations", "blocks.1.mlp", 1) == Decision(eight)
    assert policy.decide("activations", "head", 1) == Decision(two)


def test_a_pattern_matches_a_path_as_a_whole_or_from_a_dot_on() -> None:
    policy = Policy.of(bits=4, sites={"lm_head": None, "mlp.*": 8})
    for path in ("lm_head", "model.lm_head", "mlp.up", "blocks.0.mlp.up"):
        assert policy.override_for(path) is not None, path
    for path in ("my_lm_head", "lm_head.weight", "blocks.0.my_mlp.up", "mlp", ""):
        assert policy.override_for(path) is None, path


def test_a_site_has_the_grid_of_the_kind_that_passes_it() -> None:
    policy = Policy(sites={"named": "4b:rise", "*": 4})
    for kind in ("gradients", "weights", "optimizer_state"):
        assert policy.decide(kind, "m", 1).format == QuantFormat(4, grid="mid-tread")
        assert policy.decide(kind, "named", 1).format == QuantFormat(4, grid="mid-rise")
    assert policy.decide("activations", "m", 1).format == QuantFormat(4, grid="mid-rise")


def test_only_activations_are_rotated_unless_a_kind_is_named() -> None:
    policy = Policy.of(bits=4, rotate=32, weights="4b:h16")
    assert policy.activations == QuantFormat(4, grid="mid-rise", rotate=32)
    assert policy.gradients == policy.optimizer_state == QuantFormat(4, grid="mid-tread")
    assert policy.weights == QuantFormat(4, grid="mid-tread", rotate=16)
    for spelled in ("4b:h32", QuantFormat(4, rotate=32), {"bits": 4, "rotate": 32}):
        assert as_policy(spelled) == Policy.of(bits=4, rotate=32)
    assert Policy(gradients="4b:h32").gradients == QuantFormat(4, grid="mid-tread", rotate=32)


def test_equal_descriptions_mean_equal_bytes() -> None:
    assert Policy.of(bits=4).describe() == (
        "activations=4b:g128:rise gradients=4b:g128:tread weights=4b:g128:tread "
        "optimizer_state=4b:g128:tread min_bytes=16384"
    )
    assert Policy.of(bits=8).describe() == Policy.of(bits=8, grid="mid-tread").describe()
    texts = {
        Policy.of(**options).describe()  # type: ignore[arg-type]
        for options in (
            {"bits": 4},
            {"bits": 3},
            {"bits": 4, "group_size": 64},
            {"bits": 4, "gradients": 8},
            {"bits": 4, "min_bytes": 0},
            {"bits": 4, "segments": 1},
            {"bits": 4, "sites": {"a": None}},
            {"bits": 4, "nonfinite": "raise"},
            {"bits": 4, "seed": 1},
            {"bits": 4, "grid": "mid-rise"},
            {"bits": 4, "grid": "mid-tread"},
            {"bits": 4, "range": "full"},
            {"bits": 4, "sites": {"a": 4}},
            {"bits": 4, "sites": {"a": "4b:rise"}},
            {"bits": 4, "sites": {"a": "4b:tread"}},
        )
    }
    assert len(texts) == 15


@pytest.mark.parametrize(
    ("options", "message", "option"),
    [
        ({"bitz": 4}, r"bitz=4 is not supported: the options are activations, .*bits", "bitz"),
        ({"group_size": 64}, r"group_size=64 is not supported: give bits as well", "group_size"),
        ({"min_bytes": -1}, r"min_bytes=-1 .* 0 or more", "min_bytes"),
        ({"segments": 0}, r"segments=0 .* 1 or more, or None", "segments"),
        ({"segments": True}, r"segments=True .* 1 or more", "segments"),
        ({"min_bytes": "1k"}, r"min_bytes='1k' .* number of bytes", "min_bytes"),
        ({"sites": ["a"]}, r"sites=\['a'\] .* use \{module path pattern: format\}", "sites"),
        ({"sites": {3: None}}, r"sites=\{3: None\} .* \{module path pattern: format\}", "sites"),
    ],
)
def test_unknown_options_are_named_with_the_rule(
    options: dict[str, object], message: str, option: str
) -> None:
    with pytest.raises(PolicyError, match=message) as caught:
        Policy.of(**options)
    assert caught.value.option == option
    assert caught.value.value == options[option]


def test_a_bad_format_inside_a_policy_is_a_format_error() -> None:
    with pytest.raises(FormatError, match=r"bits=7 is not supported"):
        Policy(gradients=7)
    with pytest.raises(FormatError, match=r"'x9' is not understood"):
        Policy(sites={"a": "4b:x9"})


def test_auto_suits_each_kind() -> None:
    policy = Policy.auto(4, rotate=32, gradients=8, min_bytes=0)
    assert policy.activations == QuantFormat(4, grid="mid-rise", rotate=32)
    eight = QuantFormat(8, grid="mid-tread")
    assert policy.gradients == policy.weights == policy.optimizer_state == eight
    assert policy.min_bytes == 0
    stochastic = Policy.auto(2).gradients
    assert stochastic == QuantFormat(2, grid="mid-tread", rounding="stochastic")


def test_a_file_says_what_python_would(tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    file.write_text(
        """
        bits = 4
        group_size = 64
        gradients = "8b:g32"
        weights = "exact"
        min_bytes = 0
        activations = { bits = 4, rotate = 32 }

        [sites]
        "layers.0.*" = "exact"
        "head" = { bits = 8, group_size = 256 }
        """
    )
    assert Policy.from_file(file) == Policy.of(
        bits=4,
        group_size=64,
        gradients="8b:g32",
        weights=None,
        min_bytes=0,
        activations=QuantFormat(4, rotate=32),
        sites={"layers.0.*": None, "head": QuantFormat(8, 256)},
    )
    file.write_text("auto = 3\nweights = 4")
    assert Policy.from_file(str(file)) == Policy.auto(3, weights=4)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("bits = x", PolicyError, r"file='.*policy.toml' .* write TOML: .*line 1"),
        ("bitz = 4", PolicyError, "bitz=4 is not supported: the options are"),
        ("weights = { bit = 4 }", FormatError, r"format=\{'bit': 4\} .* its fields"),
        ("auto = 7", FormatError, "bits=7"),
    ],
)
def test_a_bad_file_is_refused(
    tmp_path: Path, text: str, error: type[Exception], message: str
) -> None:
    file = tmp_path / "policy.toml"
    file.write_text(text)
    with pytest.raises(error, match=message):
        Policy.from_file(file)
