"""Which layers a configuration names: PEFT's choice, PEFT's defaults, and errors that name the nearest word."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFTS_TABLE
from torch import nn

from decal.api import get_peft_model
from decal.errors import ConfigError, DecalError, TargetError, Unsupported
from decal.layers.adapted import Adapted
from decal.model import saved
from decal.model.default_targets import DEFAULT_TARGETS
from decal.model.wrapper import PeftModel
from decal.spec import LoraConfig, TaskType
from tests import models, oracle

# PEFT has these, too; decal adapts no models with vision or audio towers, nor rwkv7 and blip-2.
LEFT_OUT = {"blip-2", "gemma4", "rwkv7"}


def names(model: Any) -> list[str]:
    """Return the adapted layers by name."""
    return [name for name, m in model.get_base_model().named_modules() if isinstance(m, Adapted)]


def test_default_targets_are_pefts() -> None:
    theirs = {kind: targets for kind, targets in PEFTS_TABLE.items() if kind not in LEFT_OUT}
    assert {kind: list(targets) for kind, targets in DEFAULT_TARGETS.items()} == theirs


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2", "qwen2", "mistral", "gemma", "gemma2", "mixtral"])
def test_the_default_says_what_it_chose(kind: str) -> None:
    model = get_peft_model(models.make(kind, torch.float32), LoraConfig())
    assert len(names(model)) == (2 if kind == "gpt2" else 4)
    assert "PEFT's choice" in model.notes[0]


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2", "gemma", "qwen2", "classifier"])
def test_all_linear_is_every_linear_but_the_head(kind: str) -> None:
    plain = models.make(kind)
    head = {id(plain.score)} if kind == "classifier" else {id(plain.get_output_embeddings())}
    expected = [n for n, m in plain.named_modules() if _linear(m) and id(m) not in head]
    task = "SEQ_CLS" if kind == "classifier" else "CAUSAL_LM"
    assert names(get_peft_model(plain, LoraConfig(target_modules="all-linear", task_type=TaskType(task)))) == expected


def _linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


@pytest.mark.parametrize(
    ("kind", "ends"),
    [("llama", {"q_proj", "k_proj", "v_proj", "o_proj"}), ("gpt2", {"c_attn", "c_proj"}), ("gemma2", {"q_proj"})],
)
def test_attention_is_the_projections_of_attention(kind: str, ends: set[str]) -> None:
    found = names(get_peft_model(models.make(kind), LoraConfig(target_modules="attention")))
    assert ends <= {name.rpartition(".")[2] for name in found}
    assert all("attn" in name for name in found)


def test_all_linear_says_which_expert_weights_it_leaves_out() -> None:
    model = get_peft_model(models.make("mixtral", torch.float32), LoraConfig(target_modules="all-linear"))
    assert {name.rpartition(".")[2] for name in names(model)} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    (note,) = model.notes
    assert "experts.gate_up_proj" in note
    assert "experts.down_proj" in note
    oracle.logits(model, models.tokens())


BAD: dict[str, tuple[str, dict[str, Any], type[Exception], str]] = {
    "one of three misspelt": ("llama", {"target_modules": ["q_proj", "vproj"]}, TargetError, "nearest is 'v_proj'"),
    "nothing matches": ("llama", {"target_modules": ["c_attn"]}, TargetError, "This model has .*q_proj"),
    "a pattern that matches nothing": ("llama", {"target_modules": r"model\.layer\..*"}, TargetError, "no layer"),
    "an empty list": ("llama", {"target_modules": []}, TargetError, "no layer"),
    "all excluded": ("llama", {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, TargetError, "no layer"),
    "no such layer number": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": 7}, TargetError, "no la"),
    "a layer of another kind": ("llama", {"target_modules": ["norm"]}, TargetError, "cannot adapt"),
    "a module of layers": ("llama", {"target_modules": ["mlp"]}, TargetError, "cannot adapt"),
    "exclude_modules misspelt": (
        "llama",
        {"target_modules": "all-linear", "exclude_modules": ["k_proj", "vproj"]},
        TargetError,
        "'vproj' matched no module.*nearest is 'v_proj'",
    ),
    "an exclude_modules pattern that matches nothing": (
        "llama",
        {"target_modules": "all-linear", "exclude_modules": r"model\.layer\..*"},
        TargetError,
        "regular expression for whole names",
    ),
    "a name in exclude_modules that is taken as a pattern": (
        "llama",
        {"target_modules": "all-linear", "exclude_modules": "v_proj"},
        TargetError,
        r"Use a list of names, exclude_modules=\['v_proj'\]",
    ),
    "a key of rank_pattern misspelt": (
        "llama",
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 4, "vproj": 2}},
        TargetError,
        "rank_pattern 'vproj' matched no adapted layer; nearest is 'v_proj'",
    ),
    "a key of rank_pattern that is no pattern": (
        "llama",
        {"target_modules": ["q_proj"], "rank_pattern": {"(q_proj": 4}},
        TargetError,
        "is no pattern",
    ),
    "a key of alpha_pattern for a layer that is not adapted": (
        "llama",
        {"target_modules": ["q_proj"], "alpha_pattern": {"down_proj": 2.0}},
        TargetError,
        "alpha_pattern 'down_proj' matched no adapted layer.*Adapted are q_proj",
    ),
    "one layer number of two": (
        "llama",
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 99]},
        TargetError,
        "layers_to_transform names 99, .*There are layers 0, 1",
    ),
    "a layers_pattern misspelt": (
        "llama",
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layer"},
        TargetError,
        "layers_pattern='layer'.*numbered under layers",
    ),
    "modules_to_save misspelt": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["lmhead"]},
        TargetError,
        "nearest is 'lm_head'",
    ),
    "expert weights": (
        "mixtral",
        {"target_parameters": ["mlp.experts.gate_up_proj"]},
        DecalError,
        "target_parameters",
    ),
    "experts as modules": ("mixtral", {"target_modules": ["experts"]}, TargetError, "cannot adapt"),
    "token ids outside the vocabulary": (
        "llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": [5, 48]},
        DecalError,
        "0 to 47",
    ),
    "negative token ids": (
        "llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": [-1]},
        DecalError,
        "vocabulary",
    ),
    "token rows of no embedding": (
        "llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"wte": [1]}},
        TargetError,
        "wte",
    ),
    "an embedding twice": (
        "llama",
        {"target_modules": ["embed_tokens"], "trainable_token_indices": [1]},
        Unsupported,
        "embed_tokens",
    ),
    "DoRA on a tied pair": (
        "llama-tied",
        {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True, "use_dora": True},
        Unsupported,
        "tied",
    ),
    "a task that decal has not": (
        "llama",
        {"target_modules": ["q_proj"], "task_type": TaskType.TOKEN_CLS},
        Unsupported,
        "TOKEN_CLS",
    ),
}


@pytest.mark.parametrize(("kind", "options", "error", "text"), BAD.values(), ids=BAD)
def test_a_wrong_target_is_named_and_the_model_untouched(
    kind: str, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    plain = models.make(kind, torch.float32)
    modules = dict(plain.named_modules())
    with pytest.raises(error, match=text) as raised:
        get_peft_model(plain, LoraConfig(**options))
    assert isinstance(raised.value, DecalError)
    assert raised.value.fix
    assert dict(plain.named_modules()) == modules
    assert all(p.requires_grad for p in plain.parameters())
    good = get_peft_model(plain, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(error, match=text):  # beside another adapter, too
        good.add_adapter("b", LoraConfig(**options))
    assert list(good.peft_config) == ["default"]
    assert not [name for name in good.state_dict() if ".b." in name or name[-2:] == ".b"]
    oracle.logits(good, models.tokens())


FINE: dict[str, dict[str, Any]] = {
    "an exclude_modules of a layer that is no target": {"exclude_modules": ["lm_head"]},
    "an exclude_modules pattern": {"exclude_modules": r".*\.1\..*"},
    "patterns in a pattern": {"rank_pattern": {r"layers\.[01]\.self_attn\.(q|k)_proj": 4}},
    "a key behind another that matches the same layers": {"rank_pattern": {"q_proj": 4, r"0\.self_attn\.q_proj": 2}},
    "a full name": {"alpha_pattern": {"model.layers.0.self_attn.q_proj": 2.0}},
    "a layer number": {"layers_to_transform": 1, "layers_pattern": "layers"},
}


@pytest.mark.parametrize("options", FINE.values(), ids=FINE)
def test_what_peft_matches_is_matched(options: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], **options}
    model = get_peft_model(models.make("llama"), LoraConfig(**settings))
    theirs = oracle.theirs_of(models.make("llama"), settings)
    shapes = {name: tuple(p.shape) for name, p in oracle.trained(model).items()}
    assert shapes == {name: tuple(p.shape) for name, p in oracle.trained(theirs).items()}


def test_a_file_of_pefts_may_hold_settings_that_name_nothing(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "target_modules": ["q_proj"],
        "exclude_modules": ["vproj"],
        "rank_pattern": {"vproj": 2},
        "layers_to_transform": [0, 99],
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of the exclude_modules
        theirs = oracle.theirs_of(models.make("llama"), settings)
    theirs.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(models.make("llama"), tmp_path)
    model.load_adapter(tmp_path, "second")
    assert names(model) == ["model.layers.0.self_attn.q_proj"]


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"r": 0}, "r"),
        ({"r": -1}, "r"),
        ({"r": 2.5}, "r"),
        ({"lora_alpha": 0}, "lora_alpha"),
        ({"lora_alpha": -8}, "lora_alpha"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": -1}}, "alpha_pattern"),
        ({"bias": "some"}, "bias"),
        ({"target_modules": "(unclosed"}, "target_modules"),
        ({"target_modules": ".*", "layers_to_transform": [1]}, "layers_to_transform"),
        ({"target_modules": ["q_proj"], "layers_pattern": "layers"}, "layers_pattern"),
    ],
)
def test_a_wrong_value_is_a_config_error(options: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        LoraConfig(**options)


@pytest.mark.parametrize(
    "option",
    [
        {"use_qalora": True},
        {"lora_bias": True},
        {"layer_replication": [[0, 2], [1, 2]]},
        {"eva_config": {"rho": 2}},
        {"megatron_config": {"a": 1}},
        {"use_bdlora": True},
        {"init_lora_weights": "eva"},
        {"init_lora_weights": "pissa_niter_4"},
    ],
)
def test_an_option_that_only_peft_has_is_refused_by_name(option: dict[str, Any]) -> None:
    with pytest.raises(Unsupported, match=next(iter(option))):
        LoraConfig(**option)


def test_an_unknown_option_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="nearest is 'lora_alpha'"):
        LoraConfig(lora_alfa=3)  # type: ignore[call-arg]  # on purpose


@pytest.mark.parametrize("name", ["", "a.b", "__base__", "default", "keys", "training"])
def test_a_name_that_cannot_be_an_adapters_is_refused(name: str) -> None:
    model = get_peft_model(models.make("llama"), LoraConfig(target_modules=["q_proj", "embed_tokens"]))
    with pytest.raises(DecalError):
        model.add_adapter(name, LoraConfig(target_modules=["v_proj"]))
    assert list(model.peft_config) == ["default"]
    oracle.logits(model, models.tokens())


@pytest.mark.parametrize(
    "name",
    ["/elsewhere/x", "a/b", "a\\b", "..", ".", "../x", " ", "\t", " a", "a ", "a\nb", "a\x00b", "\u200b"],
)
def test_a_name_that_is_no_folder_of_its_own_is_refused(name: str, tmp_path: Path) -> None:
    """An adapter is saved in a folder of its name: "/elsewhere/x" would be written there, whatever was asked for."""
    config = LoraConfig(target_modules=["q_proj"])
    with pytest.raises(DecalError, match="name") as raised:
        get_peft_model(models.make("llama"), config, adapter_name=name)
    assert raised.value.fix
    model = get_peft_model(models.make("llama"), config)
    model.save_pretrained(tmp_path)
    for add in (lambda: model.add_adapter(name, config), lambda: model.load_adapter(tmp_path, name)):
        with pytest.raises(DecalError, match="name"):
            add()
    assert list(model.peft_config) == ["default"]


def test_names_of_one_plain_word_or_more_are_fine(tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["q_proj"])
    model = get_peft_model(models.make("llama"), config)
    for name in ("french", "größe-2", "two words"):
        model.add_adapter(name, config)
        model.save_pretrained(tmp_path)
        assert (tmp_path / name / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("chosen", "text"),
    [
        ([], "one or more"),
        ((), "one or more"),
        ("french", "must be a list"),
        (["french", "frenhc"], "nearest is 'french'"),
    ],
)
def test_a_selection_to_save_must_name_loaded_adapters(chosen: Any, text: str) -> None:
    with pytest.raises(DecalError, match=text):
        saved.selected(chosen, ["default", "french"])


def test_a_selection_to_save_is_taken_as_it_is() -> None:
    assert saved.selected(None, ["default", "french"]) == ["default", "french"]
    assert saved.selected(("french",), ["default", "french"]) == ["french"]


@pytest.mark.parametrize("act", ["set_adapter", "delete_adapter", "merge_adapter", "save_pretrained"])
def test_an_unknown_adapter_is_named_with_the_nearest(act: str, tmp_path: Any) -> None:
    model = get_peft_model(models.make("llama"), LoraConfig(target_modules=["q_proj"]), adapter_name="french")
    calls: dict[str, Any] = {
        "set_adapter": lambda: model.set_adapter("frenhc"),
        "delete_adapter": lambda: model.delete_adapter("frenhc"),
        "merge_adapter": lambda: model.merge_adapter(["frenhc"]),
        "save_pretrained": lambda: model.save_pretrained(tmp_path, selected_adapters=["frenhc"]),
    }
    with pytest.raises(DecalError, match="nearest is 'french'"):
        calls[act]()
    assert model.active_adapters == ["french"]


@pytest.mark.parametrize("names", [[], ["default", "default"]])
def test_no_adapter_and_one_twice_are_not_a_choice(names: list[str]) -> None:
    model = get_peft_model(models.make("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(DecalError):
        model.set_adapter(names)
    assert model.active_adapters == ["default"]


def test_offloaded_weights_are_refused_by_name() -> None:
    plain = models.make("llama")
    plain.model.layers[1].self_attn.q_proj.to("meta")
    with pytest.raises(TargetError, match=r"model\.layers\.1\.self_attn\.q_proj.*offloaded"):
        get_peft_model(plain, LoraConfig(target_modules=["q_proj"]))


class ForeignLinear(nn.Linear):
    """A layer that a quantisation library would own: it is a Linear by class and not by what it does."""


def test_a_librarys_own_layer_is_refused_by_name() -> None:
    plain = models.make("llama")
    plain.model.layers[0].self_attn.q_proj = ForeignLinear(32, 32)
    with pytest.raises(TargetError, match="ForeignLinear"):
        get_peft_model(plain, LoraConfig(target_modules=["q_proj"]))


def test_a_model_that_is_adapted_already_is_refused() -> None:
    model = get_peft_model(models.make("llama"), LoraConfig(target_modules=["q_proj"]))
    for again in (model, model.get_base_model()):
        with pytest.raises(DecalError, match="already has adapters"):
            get_peft_model(again, LoraConfig(target_modules=["v_proj"]))
