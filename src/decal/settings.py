"""What every group of settings has in common: checks told in plain words, and how YAML and `key=value` are read.

Importing this file costs no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from decal.errors import ConfigError, DecalError, nearest
from decal.reading import because, one_line

AT = "{at}"  # in the texts of a SettingError: where the group lies, such as `train.`


class SettingError(ConfigError):
    """A setting is wrong. The texts name it as `{at}lr`, so that a group around this one can say `train.lr`."""

    def __init__(self, what: str, *, got: object = None, fix: str, at: str = "") -> None:
        self._texts = what, fix
        super().__init__(what.replace(AT, at), got=got, fix=fix.replace(AT, at))

    def under(self, group: str) -> SettingError:
        """Return the error as the group's owner sees it."""
        what, fix = (text.replace(AT, f"{AT}{group}.") for text in self._texts)
        return SettingError(what, got=self.got, fix=fix)


class Settings(BaseModel):
    """A frozen group of settings; a wrong one is a ConfigError that names the key and the nearest known one."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", arbitrary_types_allowed=False, validate_default=True, allow_inf_nan=False
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise config_error(error, type(self)) from None

    def __delattr__(self, name: str) -> None:
        raise ConfigError("a setting cannot be deleted", got=name, fix="Set it to its default.")

    def __setattr__(self, name: str, value: Any) -> None:
        kind = type(self).__name__
        raise ConfigError(
            f"a {kind} cannot be changed once it is made",
            got=f"a change of {name!r}",
            fix=f"Make a new one: {kind}(...) with {name} as it is to be.",
        )


# --- wrong settings in plain words -----------------------------------------------------------------------------

WANTED = {  # pydantic's kinds of faults, and what a setting must be
    "float_type": "a number",
    "float_parsing": "a number",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "string_sub_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a group of `name: value`",
    "finite_number": "a finite number",
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le}",
    "literal_error": "{expected}",
    "enum": "{expected}",
    "missing": "a longer list",
    "too_long": "a list of {max_length}",
}


SINGULAR = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
PLURAL = {int: "whole numbers", float: "numbers", str: "names"}


def config_error(error: ValidationError, model: type[BaseModel]) -> DecalError:
    """Return the first fault of a pydantic error as what, got and fix."""
    faults = error.errors()
    fault = faults[0]
    name, *rest = fault["loc"] or ("",)
    inner = fault.get("ctx", {}).get("error")
    if isinstance(inner, SettingError):
        return inner.under(str(name)) if name else inner
    if isinstance(inner, DecalError):
        return inner
    known = sorted(model.model_fields)
    if fault["type"] == "extra_forbidden":
        near = nearest(str(name), known).replace("'", f"'{AT}", 1)
        fix = "Correct the name." if near else f"Known here: {some(known)}."
        return SettingError(f"unknown setting '{AT}{one_line(str(name), 40)}'{near}", fix=fix)
    if fault["type"] == "missing" and not rest:
        return SettingError(f"the setting '{AT}{name}' is missing", fix=f"Give {AT}{name}.")
    field = model.model_fields[str(name)]
    group = group_of(field.annotation)
    if group is not None:
        return a_section(str(name), group, got=fault["input"])
    here, wanted = AT + str(name), takes(field.annotation)
    if not _is_choice(field.annotation):  # in a choice of types the rest only names the types that were tried
        rest = rest[:-1] if fault["type"] == "missing" else rest  # a tuple's missing part is a fault of the tuple
        here += "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in rest)
        wanted = _wanted(fault)
    return SettingError(f"'{here}' must be {wanted}{_near(fault)}", got=_shown(fault["input"]), fix=f"Correct {here}.")


def some(names: Sequence[str], room: int = 70) -> str:
    """Return as many of the names as a line has room for, and how many more there are."""
    shown = list(names)
    while len(", ".join(shown)) > room:
        shown.pop()
    left = len(names) - len(shown)
    return ", ".join(shown) + (f" and {left} more (docs/settings.md)" if left else "")


def a_section(name: str, group: type[BaseModel], *, got: object) -> SettingError:
    """Return the error for a value that was given to a whole group of settings."""
    known = list(group.model_fields)
    return SettingError(
        f"'{AT}{name}' is a section of settings, not one value",
        got=_shown(got),
        fix=f"Set what is in it, such as {AT}{name}.{known[0]}. Known there: {some(sorted(known))}.",
    )


def _wanted(fault: Any) -> str:
    text: str | None = WANTED.get(fault["type"])
    if text is None:
        message: str = fault["msg"].removeprefix("Value error, ")
        return message[:1].lower() + message[1:]
    return text.format_map(fault.get("ctx", {}))


def _near(fault: Any) -> str:
    if fault["type"] not in ("literal_error", "enum"):
        return ""
    return nearest(str(fault["input"]), re.findall(r"'([^']*)'", fault["ctx"]["expected"]))


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def takes(annotation: Any) -> str:
    """Return in words what a setting of this type takes."""
    return " or ".join(_kind(kind) for kind in _kinds(annotation) if kind is not NoneType)


def _kind(kind: Any) -> str:
    if isinstance(kind, type) and issubclass(kind, Enum):
        return _one_of([member.value for member in kind])
    if get_origin(kind) is Literal:
        return _one_of(get_args(kind))
    if group_of(kind) is not None:
        return "a section"
    if get_origin(kind) in (list, tuple):
        inner = get_args(kind)[0]
        return f"a list of {PLURAL.get(_kinds(inner)[0], takes(inner))}"
    if get_origin(kind) is dict:
        return f"a group of `name: {takes(get_args(kind)[1])}`"
    return SINGULAR[kind]


def _one_of(values: Sequence[object]) -> str:
    *first, last = (repr(value) for value in values)
    return f"{', '.join(first)} or {last}" if first else last


def _is_choice(annotation: Any) -> bool:
    return len([kind for kind in _kinds(annotation) if kind is not NoneType]) > 1


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """Return the types that a setting may have."""
    if hasattr(annotation, "__metadata__"):  # Annotated
        return _kinds(annotation.__origin__)
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def group_of(annotation: Any) -> type[Settings] | None:
    """Return the group of settings that a setting holds, None for a plain one."""
    return next((kind for kind in _kinds(annotation) if isinstance(kind, type) and issubclass(kind, Settings)), None)


# --- YAML and key=value ----------------------------------------------------------------------------------------


def layered(
    model: type[Settings],
    path: Path | None,
    overrides: Sequence[str],
    values: Mapping[str, Any],
    *,
    short: Mapping[str, str],
) -> dict[str, Any]:
    """Return the settings of a YAML file with `values` and then `key=value` words (dotted keys) laid over it.

    `short` names, for a group that may be given as one word, the setting which that word is.
    """
    merged = {} if path is None else read_yaml(path)
    for key, value in values.items():
        _lay(merged, key.split("."), value, short)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError("an override must be key=value", got=override, fix="Write it as train.lr=1e-4.")
        keys = key.split(".")
        _lay(merged, keys, read_word(text, kinds_of(model, keys)), short)
    return merged


def read_yaml(path: Path) -> dict[str, Any]:
    """Return what a settings file holds; a ConfigError says where it is broken."""
    if not path.is_file():
        raise ConfigError("no such settings file", got=path, fix="Give a YAML file, or --model and --data.")
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), Loader=_Once)
    except OSError as error:
        raise ConfigError(f"the settings cannot be read ({because(error)})", got=path, fix="Check the file.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or a date that is none
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        why = one_line(getattr(error, "problem", None) or str(error), 80)
        fix = "Correct the file; put texts that hold any of { [ : # in quotes."
        raise ConfigError(f"{path}{where} is not YAML: {why}", fix=fix) from None
    if not isinstance(loaded, dict):
        raise ConfigError(
            f"{path} must hold settings as `key: value`", got=type(loaded).__name__, fix="See docs/settings.md."
        )
    named: dict[str, Any] = _named(loaded)
    return named


class _Once(yaml.SafeLoader):
    """YAML in which a key that stands twice is a fault: which of its values was meant cannot be told."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and names.count(key.value) > 1:
                what = f"{one_line(key.value, 40)!r} stands twice"
                raise yaml.constructor.ConstructorError(None, None, what, key.start_mark)
        return super().construct_mapping(node, deep)


def _named(value: Any) -> Any:
    """Return the value with texts as keys: YAML makes a number of `1:`, and `on:` is true to it."""
    return {str(key): _named(inner) for key, inner in value.items()} if isinstance(value, dict) else value


def kinds_of(model: type[Settings], keys: Sequence[str]) -> tuple[Any, ...]:
    """Return the types that a setting may have, by its dotted name; nothing for an unknown one."""
    group: type[Settings] | None = model
    annotation: Any = None
    for key in keys:
        if group is None or key not in group.model_fields:
            return ()
        annotation = group.model_fields[key].annotation
        group = group_of(annotation)
    return _kinds(annotation)


def read_word(text: str, kinds: Sequence[Any] = ()) -> Any:
    """Return the value that a word means for a setting of those types. What is no YAML is the text that it is.

    Numbers are tried first, for YAML 1.1 reads 1e-4 as a text. A setting that takes text alone gets the word as it
    stands, so `data.template={{text}} -> {{label}}` needs no quotes, and a folder may be called 2024.
    """
    texts_only = str in kinds and all(kind in (str, NoneType) for kind in kinds)
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if texts_only and not quoted:
        return None if NoneType in kinds and text in ("null", "~", "") else text
    for number in () if quoted else (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # ValueError: what looks like a date and is none
        return text


def _lay(target: dict[str, Any], keys: Sequence[str], value: Any, short: Mapping[str, str]) -> None:
    for key in keys[:-1]:
        inner = target.setdefault(key, {})
        if isinstance(inner, str) and key in short:
            inner = target[key] = {short[key]: inner}
        if not isinstance(inner, dict):
            raise ConfigError(
                f"{'.'.join(keys)!r} has no place, for {key!r} already holds one value",
                got=_shown(inner),
                fix=f"Write {key} as a group: its settings as `name: value`.",
            )
        target = inner
    target[keys[-1]] = value
