"""Settings: what words and YAML mean, what is refused in plain words, and which may be changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from decal import LoraConfig, PeftConfig, QuantConfig, TrainConfig, get_peft_model
from decal.errors import ConfigError
from decal.spec import DataConfig, RunConfig, read_run_config
from tests import models


def read(*words: str, **values: Any) -> RunConfig:
    return read_run_config(overrides=words, values={"model": "m", "data.path": "d", **values})


@pytest.mark.parametrize(
    ("word", "wanted"),
    [
        ("data.template={{text}} -> {{label}}", "{{text}} -> {{label}}"),
        ("data.template={{text}}", "{{text}}"),
        ("data.template=Question: {{q}} # {{a}}", "Question: {{q}} # {{a}}"),
        ("data.template='{{a}} {{b}}'", "{{a}} {{b}}"),
        ("data.template=null", None),
        ("data.path=2024", "2024"),
        ("output=2024-13-01", "2024-13-01"),
        ("train.lr=1e-4", 1e-4),
        ("train.log_to=wandb", ["wandb"]),
        ("train.log_to=[wandb, mlflow]", ["wandb", "mlflow"]),
        ("lora.target_modules=[q_proj, v_proj]", ["q_proj", "v_proj"]),
    ],
)
def test_a_word_means_what_it_says_without_quotes(word: str, wanted: Any) -> None:
    key = word.partition("=")[0]
    value: Any = read(word)
    for name in key.split("."):
        value = getattr(value, name)
    assert value == wanted


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train.lr=fast"], r"'train\.lr' must be a number \(got: 'fast'\)\. Correct train\.lr"),
        (["train.lr=0"], r"'train\.lr' must be above 0"),
        (["lora.r=2.5"], r"'lora\.r' must be a whole number \(got: 2\.5\)"),
        (["lora.lora_dropout=1"], r"'lora\.lora_dropout' must be below 1"),
        (["data.packing=maybe"], r"'data\.packing' must be true or false"),
        (["train.schedule=cosin"], r"'cosine', 'linear' or 'constant'; nearest is 'cosine' \(got: 'cosin'\)"),
        (["lora.target_modules=[q_proj"], r"'lora\.target_modules' is not a regular expression.*got: '\[q_proj'"),
        (["train.betas=[0.9]"], r"'train\.betas' must be a longer list"),
        (["train.betas=[0.9, x]"], r"'train\.betas\[1\]' must be a number"),
        (["train.betas=[0.9, 1]"], r"'train\.betas\[1\]' must be below 1"),
        (["lora.layers_to_transform=[a]"], r"must be a list of whole numbers or a whole number"),
        (["lora.rank_pattern={q: x}"], r"'lora\.rank_pattern\.q' must be a whole number"),
        (["train=5"], r"'train' is a section of settings, not one value \(got: 5\)\. .*such as train\.method"),
        (["train.lrr=5"], r"unknown setting 'train\.lrr'; nearest is 'train\.lr'"),
        (["train.lr=inf"], "must be a finite number"),
        (["train.weight_decay=nan"], "must be a finite number"),
        (["lora.lora_alpha=inf"], "must be a finite number"),
        (["lora.alpha_pattern={q_proj: .inf}"], r"'lora\.alpha_pattern\.q_proj' must be a finite number"),
        (["lora.layers_to_transform=[0]"], r"'lora\.layers_to_transform' needs 'lora\.target_modules' as a list"),
        (["lora.layers_pattern=h"], r"'lora\.layers_pattern' has no effect without .*layers_to_transform=\[0, 1\]"),
        (["train.method=full", "quantize=nf4"], r"got: train\.method=full with quantize=nf4.*Leave quantize out"),
        (["lora.task_type=SEQ_CLS"], r"got: lora\.task_type=SEQ_CLS.*get_peft_model with a loop of your own"),
    ],
)
def test_a_wrong_setting_is_named_in_plain_words_with_a_fix(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as raised:
        read(*words)
    assert len(str(raised.value.got)) < 100


def test_a_settings_file_that_is_no_yaml_says_where(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ndata:\n  template: {{text}} -> {{label}}\n")
    with pytest.raises(ConfigError, match=r"run\.yaml, line 3, column \d+ is not YAML.*in quotes"):
        read_run_config(file)


def test_a_format_alone_may_be_followed_by_other_settings_of_its_section(tmp_path: Path) -> None:
    assert read(quantize="nf4").quantize == QuantConfig(format="nf4", head="wide")
    wanted = QuantConfig(format="fp4", head="int8")
    assert read("quantize.head=int8", quantize="fp4").quantize == wanted
    assert read("quantize=fp4", "quantize.head=int8").quantize == wanted
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ndata: {path: d}\nquantize: fp4\n")
    assert read_run_config(file, ["quantize.head=int8"]).quantize == wanted


def test_a_key_that_is_a_number_is_an_unknown_setting(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ndata: {path: d}\ntrain:\n  1: 2\n")
    with pytest.raises(ConfigError, match=r"unknown setting 'train\.1'"):
        read_run_config(file)


def test_a_wrong_value_in_an_adapter_names_its_file(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": float("inf")}))
    with pytest.raises(ConfigError, match=r"adapter_config\.json: 'lora_alpha' must be a finite number"):
        PeftConfig.from_pretrained(tmp_path)


def test_an_adapters_settings_may_be_changed_and_are_checked() -> None:
    config = LoraConfig(r=4)
    config.r, config.lora_alpha, config.inference_mode, config.target_modules = 16, 32.0, True, ["q_proj", "v_proj"]
    config.loftq_config = {}  # PEFT's, at the value under which it does nothing
    assert config == LoraConfig(r=16, lora_alpha=32, inference_mode=True, target_modules=["q_proj", "v_proj"])
    assert config.to_dict()["lora_alpha"] == 32
    wrong: list[tuple[str, Any, str]] = [
        ("r", 0, "'r' must be at least 1"),
        ("lora_alpha", float("nan"), "'lora_alpha' must be a finite number"),
        ("rnk", 3, "unknown setting 'rnk'"),
        ("target_modules", "((", "not a regular expression"),
        ("layers_pattern", "h", "no effect without 'layers_to_transform'"),
    ]
    before = config.model_copy(deep=True)
    for name, value, said in wrong:
        with pytest.raises(ConfigError, match=said):
            setattr(config, name, value)
    assert config == before


def test_a_model_and_a_run_keep_what_they_were_made_with() -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"])
    model = get_peft_model(models.make("llama"), config)
    run = RunConfig(model="m", data={"path": "d"}, lora=config)
    config.r, config.target_modules = 32, ["v_proj"]
    assert model.peft_config["default"].r == run.lora.r == 4
    assert model.peft_config["default"].target_modules == run.lora.target_modules == ["q_proj"]


@pytest.mark.parametrize("make", [lambda: read(), lambda: DataConfig(path="d"), TrainConfig, QuantConfig])
def test_other_settings_stay_as_they_are_made(make: Callable[[], Any]) -> None:
    settings = make()
    with pytest.raises(ConfigError, match=r"cannot be changed once it is made .*Make a new one"):
        setattr(settings, next(iter(type(settings).model_fields)), "x")
