"""Settings are read strictly, and a mistake is answered with the nearest thing that exists."""

from __future__ import annotations

import json

import pytest

import lcab_plugin as lcab
from lcab_plugin import masks, planner


def test_the_section_of_a_deepspeed_config():
    section = {"kernel": "sdpa_flash", "strategy": "usp", "ulysses": 2, "ring": 2, "mask": "causal_document"}
    config = lcab.AttentionConfig.from_dict(section)
    assert config.cp_size == 4
    assert config.degrees(4) == {"ulysses": 2, "ring": 2}
    assert lcab.AttentionConfig.from_dict(config.to_dict()) == config


def test_degrees_that_follow_from_the_world():
    config = lcab.AttentionConfig.from_dict({"strategy": "ring_p2p"})
    assert config.cp_size is None
    assert config.degrees(8) == {"ring": 8}
    assert lcab.AttentionConfig.from_dict({}).cp_size == 1


def test_a_ring_of_rings():
    section = {
        "strategy": "loongtrain",
        "ulysses": 2,
        "ring": 4,
        "inner_ring": 2,
        "placement": "context_first",
    }
    config = lcab.AttentionConfig.from_dict(section)
    assert config.cp_size == 8
    assert config.degrees(8) == {"ulysses": 2, "inner_ring": 2, "ring": 4}
    assert lcab.AttentionConfig.from_dict(config.to_dict()) == config
    config = lcab.AttentionConfig.from_dict({"strategy": "loongtrain", "ulysses": 2, "inner_ring": 3})
    assert config.cp_size is None
    assert config.degrees(12) == {"ulysses": 2, "inner_ring": 3, "ring": 6}
    with pytest.raises(
        lcab.LcabError, match="ring=4: inner_ring = 3 does not divide it; give one of: 1, 2, 4"
    ):
        config.degrees(8)


def test_auto_is_decided_once_ranks_and_shapes_are_known():
    section = {"kernel": "auto", "strategy": "auto", "mask": "full"}
    config = lcab.AttentionConfig.from_dict(section)
    assert (config.undecided, config.cp_size, config.chosen) == (("kernel", "strategy"), None, None)
    with pytest.raises(lcab.LcabError, match=r"kernel 'auto' and strategy 'auto' are not decided yet; call"):
        config.degrees(4)
    with pytest.raises(lcab.LcabError, match=r"kernel 'auto' is not decided yet"):
        lcab.AttentionConfig.from_dict({"kernel": "auto"}).degrees(1)
    workload = planner.Workload(masks.full(4096), 8, 8, 64, "fp32")
    decided = config.decided(workload, 4, planner.HARDWARE["cpu"])
    assert decided.undecided == ()
    assert decided.cp_size == 4
    assert (decided.kernel, decided.layout, decided.mask) == ("sdpa_flash", "zigzag", "full")
    assert decided.chosen.settings == decided.to_dict()
    assert decided.degrees(4) == decided.chosen.record["degrees"]
    assert decided.decided(workload, 4, planner.HARDWARE["cpu"]) is decided
    spelled_out = lcab.AttentionConfig.from_dict(decided.to_dict())
    assert spelled_out.chosen is None
    assert spelled_out.to_dict() == decided.to_dict()


def test_megatrons_names():
    assert lcab.AttentionConfig.from_dict({"strategy": "a2a+p2p"}).strategy == "usp"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"kernal": "naive"}, "unknown setting 'kernal'; did you mean 'kernel'"),
        ({"kernel": "sdpa-flash"}, "did you mean 'sdpa_flash'"),
        ({"strategy": "ulises"}, "did you mean 'ulysses'"),
        ({"layout": "zig-zag"}, "did you mean 'zigzag'"),
        ({"placement": "context-first"}, "did you mean 'context_first'"),
        ({"inner_ring": 0}, "'inner_ring' = 0.*greater"),
        ({"mask": "causal_documents"}, "did you mean 'causal_document'"),
        ({"ulysses": "2"}, "'ulysses' = '2'.*integer"),
        ({"ring": 0}, "'ring' = 0.*greater"),
        ({"softcap": -1.0}, "'softcap' = -1.0.*greater"),
        ({"deterministic": "yes"}, "'deterministic' = 'yes'.*bool"),
    ],
)
def test_mistakes(section, message):
    with pytest.raises(lcab.LcabError, match=message):
        lcab.AttentionConfig.from_dict(section)


def test_a_config_cannot_change():
    config = lcab.AttentionConfig.from_dict({})
    with pytest.raises(ValueError, match="frozen"):
        config.kernel = "naive"


def test_from_json(tmp_path):
    path = tmp_path / "lcab.json"
    path.write_text(json.dumps({"kernel": "naive"}))
    assert lcab.AttentionConfig.from_json(path).kernel == "naive"
    path.write_text("{")
    with pytest.raises(lcab.LcabError, match="cannot read the settings"):
        lcab.AttentionConfig.from_json(path)
    path.write_text("[]")
    with pytest.raises(lcab.LcabError, match="one JSON object"):
        lcab.AttentionConfig.from_json(path)
    with pytest.raises(lcab.LcabError, match="cannot read the settings"):
        lcab.AttentionConfig.from_json(tmp_path / "absent.json")
