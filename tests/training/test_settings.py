"""Flags over a DeepSpeed config file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lcab_plugin.errors import LcabError
from lcab_plugin.training.gpt import PRESETS, RATES
from lcab_plugin.training.settings import Settings

FILE: dict[str, Any] = {
    "train_batch_size": 8,
    "gradient_accumulation_steps": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "torch_adam": True}},
    "lcab": {"kernel": "sdpa_flash", "strategy": "usp", "ulysses": 2, "ring": 2},
}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(FILE))
    return Settings(path)


def test_without_flags_the_file_stands(settings: Settings) -> None:
    settings.apply({"kernel": None, "lr": None, "unrelated": 3})
    assert {key: settings.config[key] for key in FILE} == FILE
    assert (settings.overrides, settings.dtype) == ([], "fp32")


def test_deepspeed_measures_no_speed_that_it_does_not_show(settings: Settings) -> None:
    settings.apply({})
    assert settings.config["timers"] == {"throughput": {"enabled": False}}
    for shown in ({"steps_per_print": 5}, {"timers": {"throughput": {"synchronized": False}}}):
        settings.config = {**FILE, **shown}
        settings.apply({})
        assert settings.config.get("timers") == shown.get("timers"), "the file's"


def test_flags_replace_and_say_so(settings: Settings) -> None:
    settings.apply({"kernel": "naive", "global_batch": 16, "micro_batch": 2, "lr": 0.5, "clip": 1.0})
    config = settings.config
    assert config["lcab"] == {"kernel": "naive", "strategy": "usp", "ulysses": 2, "ring": 2}
    assert (config["train_batch_size"], config["train_micro_batch_size_per_gpu"]) == (16, 2)
    assert "gradient_accumulation_steps" not in config
    assert config["optimizer"]["params"] == {"lr": 0.5, "betas": [0.9, 0.95], "torch_adam": True}
    assert config["gradient_clipping"] == 1.0
    replaced = [line.split(" (")[0] for line in settings.overrides]
    assert replaced == ["kernel naive", "train_batch_size 16", "lr 0.5"]


def test_a_strategy_takes_the_old_degrees_with_it(settings: Settings) -> None:
    settings.apply({"strategy": "ring_p2p", "ring": 4})
    assert settings.config["lcab"] == {"kernel": "sdpa_flash", "strategy": "ring_p2p", "ring": 4}


def test_the_same_strategy_keeps_its_degrees(settings: Settings) -> None:
    settings.apply({"strategy": "usp", "ulysses": 4})
    assert settings.config["lcab"] == {"kernel": "sdpa_flash", "strategy": "usp", "ulysses": 4, "ring": 2}


def test_a_learning_rate_that_nobody_gives_is_the_presets(settings: Settings) -> None:
    settings.apply({"preset": "1b"})
    assert settings.config["optimizer"]["params"]["lr"] == 1e-3, "the file's"
    del settings.config["optimizer"]["params"]["lr"]
    settings.apply({"preset": "1b"})
    assert settings.config["optimizer"]["params"]["lr"] == RATES["1b"]
    assert RATES.keys() == PRESETS.keys()


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_dtype(settings: Settings, dtype: str) -> None:
    settings.apply({"dtype": "bf16"})
    settings.apply({"dtype": dtype})
    assert settings.dtype == dtype


def test_another_optimizer(settings: Settings) -> None:
    settings.apply({"optimizer": "sgd", "lr": 0.1, "weight_decay": 0.0})
    assert settings.config["optimizer"] == {"type": "SGD", "params": {"lr": 0.1, "weight_decay": 0.0}}
    assert settings.config["zero_allow_untested_optimizer"]


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_what_is_no_config_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(LcabError, match=r"config\.json"):
        Settings(path)
    path.write_text(text)
    with pytest.raises(LcabError, match=r"config\.json"):
        Settings(path)
