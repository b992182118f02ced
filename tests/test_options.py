"""Options from mappings, and which options each layer gets."""

from typing import Any

import pytest

from vllm_scalesearch.formats import MXFP4, NVFP4
from vllm_scalesearch.options import LayerOptions, LayerSelection, Options, pattern_matches

LAYER_KEYS = ("format", "weights", "activations")
ALL_KEYS = (*LAYER_KEYS, "ignore", "overrides", "lm_head", "cpu_storage")
QKV = "model.layers.0.self_attn.qkv_proj"
QKV_PARTS = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
DOWN = "model.layers.0.mlp.down_proj"


def options(**mapping: Any) -> Options:
    return Options.from_mapping(mapping, "the test")


# --- from a mapping ------------------------------------------------------------------------------


def test_empty_mapping_gives_the_defaults() -> None:
    assert options() == Options()
    assert Options() == Options(LayerOptions("nvfp4", "paper", None), (), (), False, "dense")


def test_every_key_arrives() -> None:
    given = {
        "format": "mxfp4",
        "weights": "exact",
        "activations": "fast",
        "ignore": ["lm_head", r"re:.*\.gate$"],
        "overrides": {"down_proj": {"activations": None}, "layers.0": {"format": "nvfp4"}},
        "lm_head": True,
        "cpu_storage": "packed",
    }
    before = repr(given)
    assert Options.from_mapping(given, "the test") == Options(
        layer=LayerOptions("mxfp4", "exact", "fast"),
        ignore=("lm_head", r"re:.*\.gate$"),
        overrides=(("down_proj", {"activations": None}), ("layers.0", {"format": "nvfp4"})),
        lm_head=True,
        cpu_storage="packed",
    )
    assert repr(given) == before


def test_scheme_and_format_of_layer_options() -> None:
    weights_only, both = LayerOptions(), LayerOptions("mxfp4", "absmax", "fast")
    assert (weights_only.scheme, weights_only.block_format) == ("w4a16", NVFP4)
    assert (both.scheme, both.block_format) == ("w4a4", MXFP4)
    assert str(weights_only) == "nvfp4 w4a16, weights paper"
    assert str(both) == "mxfp4 w4a4, weights absmax, activations fast"


@pytest.mark.parametrize(
    ("mapping", "mentioned"),
    [
        # unknown keys: the key and what there is
        ({"fmt": "nvfp4"}, ["'fmt'", *ALL_KEYS]),
        ({"fmt": 1, "wts": 2}, ["'fmt'", "'wts'"]),
        ({"overrides": {"down_proj": {"fmt": 1}}}, ["overrides['down_proj']", "'fmt'", *LAYER_KEYS]),
        ({"overrides": {"down_proj": {"ignore": []}}}, ["overrides['down_proj']", "'ignore'", *LAYER_KEYS]),
        # unknown values
        ({"format": "int4"}, ["'int4'", "nvfp4", "mxfp4"]),
        ({"weights": "best"}, ["'weights'", "'best'", "absmax", "paper", "window:LO,HI"]),
        ({"activations": "best"}, ["'activations'", "'best'", "absmax", "paper", "window:LO,HI"]),
        ({"weights": "offsets:300"}, ["'weights'", "offsets:300", "255"]),
        ({"format": "mxfp4", "weights": "4over6"}, ["'weights'", "4over6", "mxfp4"]),
        ({"cpu_storage": "sparse"}, ["'cpu_storage'", "dense", "packed", "'sparse'"]),
        ({"overrides": {"down_proj": {"format": "int4"}}}, ["'int4'", "nvfp4", "mxfp4"]),
        ({"weights": "4over6", "overrides": {"down_proj": {"format": "mxfp4"}}}, ["4over6", "mxfp4"]),
        # wrong types
        ({"format": 4}, ["4", "nvfp4", "mxfp4"]),
        ({"weights": None}, ["'weights'", "None"]),
        ({"weights": 4}, ["'weights'", "4"]),
        ({"activations": False}, ["'activations'", "False"]),
        ({"lm_head": 1}, ["'lm_head'", "1"]),
        ({"lm_head": "true"}, ["'lm_head'", "'true'"]),
        ({"ignore": "lm_head"}, ["'ignore'", "list", "'lm_head'"]),
        ({"ignore": None}, ["'ignore'", "list", "None"]),
        ({"overrides": [{"down_proj": {}}]}, ["'overrides'"]),
        ({"overrides": {"down_proj": "fast"}}, ["overrides['down_proj']", "'fast'"]),
        ({"cpu_storage": ["dense"]}, ["'cpu_storage'", "['dense']"]),
        # patterns
        ({"ignore": [3]}, ["pattern", "3"]),
        ({"ignore": [""]}, ["pattern", "''"]),
        ({"overrides": {"": {}}}, ["pattern", "''"]),
        ({"ignore": ["re:(unclosed"]}, ["'re:(unclosed'", "no regular expression", "unterminated"]),
        ({"overrides": {"re:*": {"format": "mxfp4"}}}, ["'re:*'", "no regular expression"]),
    ],
    ids=repr,
)
def test_wrong_mapping_says_where_and_what(mapping: dict[str, Any], mentioned: list[str]) -> None:
    with pytest.raises(ValueError) as raised:
        Options.from_mapping(mapping, "config.json of the test")
    for text in ("config.json of the test", *mentioned):
        assert text in str(raised.value)


@pytest.mark.parametrize(
    "mapping",
    [{"format": ["nvfp4"]}, {"overrides": {"down_proj": {"format": {}}}}],
    ids=repr,
)
def test_format_of_an_unhashable_type_is_a_wrong_type_too(mapping: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"config\.json of the test.*nvfp4, mxfp4"):
        Options.from_mapping(mapping, "config.json of the test")


def test_ignore_may_be_any_iterable() -> None:
    assert options(ignore=("a", "b")).ignore == ("a", "b")
    assert options(ignore=iter(["a", "b"])).ignore == ("a", "b")


# --- patterns ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("down_proj", True),
        ("mlp", True),
        ("layers.0", True),
        ("layers.0.mlp", True),
        (DOWN, True),
        ("model", True),
        ("down", False),
        ("own_proj", False),
        ("layers.0.m", False),
        ("s.0", False),
        ("layers.mlp", False),
        ("layers..mlp", False),
        (".*", False),
        ("re:model", True),
        ("re:.*down", True),
        (r"re:.*\.layers\.[0-3]\..*", True),
        ("re:down_proj", False),
        (r"re:.*down$", False),
        ("re:layers", False),
    ],
)
def test_pattern_selects_whole_components_or_a_regex_from_the_start(pattern: str, matches: bool) -> None:
    assert pattern_matches(pattern, DOWN) is matches


def test_index_is_a_whole_component() -> None:
    assert pattern_matches("layers.1", "model.layers.1.mlp.down_proj")
    assert not pattern_matches("layers.1", "model.layers.10.mlp.down_proj")


# --- selection -----------------------------------------------------------------------------------


def test_without_patterns_every_layer_gets_the_same() -> None:
    selection = LayerSelection(options(format="mxfp4", weights="exact"))
    assert selection.select(DOWN, [DOWN]) == LayerOptions("mxfp4", "exact")
    assert selection.select(QKV, QKV_PARTS) == LayerOptions("mxfp4", "exact")
    assert selection.seen == [DOWN, *QKV_PARTS]


def test_later_overrides_win_key_by_key() -> None:
    selection = LayerSelection(
        options(
            activations="fast",
            overrides={
                "mlp": {"weights": "exact", "activations": "paper"},
                "down_proj": {"activations": None},
                "layers.0": {"format": "mxfp4"},
            },
        )
    )
    assert selection.select(DOWN, [DOWN]) == LayerOptions("mxfp4", "exact", None)
    other = "model.layers.1.mlp.down_proj"
    assert selection.select(other, [other]) == LayerOptions("nvfp4", "exact", None)
    other = "model.layers.1.mlp.up_proj"
    assert selection.select(other, [other]) == LayerOptions("nvfp4", "exact", "paper")
    other = "model.layers.1.self_attn.o_proj"
    assert selection.select(other, [other]) == LayerOptions("nvfp4", "paper", "fast")


def test_order_of_overrides_decides() -> None:
    first, second = {"mlp": {"weights": "exact"}}, {"down_proj": {"weights": "fast"}}
    assert LayerSelection(options(overrides={**first, **second})).select(DOWN, [DOWN]).weights == "fast"
    assert LayerSelection(options(overrides={**second, **first})).select(DOWN, [DOWN]).weights == "exact"


def test_ignored_layers_get_nothing() -> None:
    selection = LayerSelection(options(ignore=["down_proj"], overrides={"mlp": {"weights": "exact"}}))
    assert selection.select(DOWN, [DOWN]) is None
    up = "model.layers.0.mlp.up_proj"
    assert selection.select(up, [up]) == LayerOptions(weights="exact")


@pytest.mark.parametrize("pattern", ["qkv_proj", "self_attn", "re:.*[qkv]_proj", "layers.0"])
def test_pattern_may_name_the_fused_layer_or_all_of_its_parts(pattern: str) -> None:
    assert LayerSelection(options(ignore=[pattern])).select(QKV, QKV_PARTS) is None
    changed = LayerSelection(options(overrides={pattern: {"weights": "exact"}})).select(QKV, QKV_PARTS)
    assert changed == LayerOptions(weights="exact")


@pytest.mark.parametrize("key", ["ignore", "overrides"])
def test_pattern_for_some_fused_parts_names_both_sides(key: str) -> None:
    pattern = r"re:.*\.[qk]_proj"
    given = [pattern] if key == "ignore" else {pattern: {"weights": "exact"}}
    with pytest.raises(ValueError) as raised:
        LayerSelection(options(**{key: given})).select(QKV, QKV_PARTS)
    q, k, v = QKV_PARTS
    assert f"selects {q}, {k} but not {v}" in str(raised.value)
    assert repr(pattern) in str(raised.value)
    assert f"fuses into {QKV}" in str(raised.value)


# --- patterns that match nothing -----------------------------------------------------------------


def select_model(selection: LayerSelection, layers: int = 30) -> None:
    for i in range(layers):
        qkv = f"model.layers.{i}.self_attn.qkv_proj"
        selection.select(qkv, [qkv.replace("qkv", part) for part in "qkv"])
        down = f"model.layers.{i}.mlp.down_proj"
        selection.select(down, [down])
    selection.select("lm_head", ["lm_head"])


def test_patterns_that_matched_pass() -> None:
    selection = LayerSelection(
        options(ignore=["lm_head", "layers.0"], overrides={"qkv_proj": {}, "re:.*down": {"weights": "exact"}})
    )
    select_model(selection)
    selection.check_all_matched(selection.matched, selection.seen)


def test_patterns_that_select_the_same_layer_all_matched() -> None:
    selection = LayerSelection(
        options(ignore=["mlp", "down_proj"], overrides={"qkv_proj": {}, "self_attn": {"weights": "exact"}})
    )
    select_model(selection)
    selection.check_all_matched(selection.matched, selection.seen)


def test_dead_patterns_are_found_among_those_that_match() -> None:
    selection = LayerSelection(
        options(ignore=["lm_head", "up_proj"], overrides={"down_proj": {}, "re:q_proj": {}, "layers.30": {}})
    )
    select_model(selection)
    with pytest.raises(ValueError) as raised:
        selection.check_all_matched(selection.matched, selection.seen)
    assert "'up_proj', 're:q_proj', 'layers.30' matches no layer" in str(raised.value)
    assert "'lm_head'" not in str(raised.value)
    assert "'down_proj'" not in str(raised.value)


def test_names_are_listed_with_their_indices_summarised() -> None:
    selection = LayerSelection(options(ignore=["up_proj"]))
    select_model(selection)
    with pytest.raises(ValueError) as raised:
        selection.check_all_matched(selection.matched, selection.seen)
    attention = ", ".join(f"model.layers.{{0..29}}.self_attn.{part}_proj" for part in "qkv")
    listed = f"Layers: {attention}, model.layers.{{0..29}}.mlp.down_proj, lm_head"
    assert str(raised.value).endswith(listed)


def test_a_single_layer_keeps_its_index() -> None:
    selection = LayerSelection(options(ignore=["up_proj"]))
    select_model(selection, layers=1)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.down_proj, lm_head$"):
        selection.check_all_matched(selection.matched, selection.seen)


def test_patterns_may_match_on_another_rank() -> None:
    selection = LayerSelection(options(ignore=["lm_head", "embed_out"]))
    selection.select(DOWN, [DOWN])
    selection.check_all_matched({"lm_head", "embed_out"}, ["lm_head", *selection.seen])
    with pytest.raises(ValueError, match=r"'embed_out' matches no layer.*lm_head"):
        selection.check_all_matched({"lm_head"}, ["lm_head", *selection.seen])


@pytest.mark.parametrize("mapping", [None, ["format"], "paper"])
def test_options_are_a_mapping(mapping) -> None:
    with pytest.raises(ValueError, match="SRC: expected a mapping"):
        Options.from_mapping(mapping, "SRC")


def test_override_of_ignored_layers_is_not_dead() -> None:
    options = Options.from_mapping({"ignore": ["mlp"], "overrides": {"down_proj": {"weights": "full"}}}, "SRC")
    selection = LayerSelection(options)
    assert selection.select("layers.0.mlp.down_proj", ["layers.0.mlp.down_proj"]) is None
    selection.check_all_matched(selection.matched, selection.seen)


def test_overrides_that_contradict_each_other_name_the_layer() -> None:
    changes = {"mlp": {"weights": "4over6"}, "down_proj": {"format": "mxfp4"}}
    selection = LayerSelection(Options.from_mapping({"overrides": changes}, "SRC"))
    with pytest.raises(ValueError, match=r"'down_proj'.* on layers\.0\.mlp\.down_proj.*4over6"):
        selection.select("layers.0.mlp.down_proj", ["layers.0.mlp.down_proj"])


def test_every_number_of_a_name_is_summarized_and_none_twice() -> None:
    selection = LayerSelection(Options.from_mapping({"ignore": ["nothing"]}, "SRC"))
    names = [f"layers.{i}.experts.{j}.w1" for i in (2, 3) for j in (0, 1, 5)] + ["layers.3.o", "layers.3.o"]
    with pytest.raises(ValueError, match=r"layers\.\{2\.\.3\}\.experts\.\{0\.\.5\}\.w1, layers\.3\.o$"):
        selection.check_all_matched(set(), names)
