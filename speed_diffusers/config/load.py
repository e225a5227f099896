"""Settings: a flat dataclass, filled from YAML files and the command line.

Sources, last wins: the dataclass; every `base.yaml` from `configs/` down to the config file's folder; the config
file; the command line. Text is taken as it stands (`mixed_precision=no` stays "no") and turned into the field's type.
`None`, `null` and nothing at all mean none, unless YAML quotes them, and for a list no items; lists are `a,b` or
`[a,b]`. A path may begin with `~`, the home folder, which shells leave as it is behind `key=`.
"""

import dataclasses
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

import yaml
from omegaconf import OmegaConf, ValidationError

from ..errors import InputError, unknown_name
from ..files import write_text
from .schema import Setting, settings_of

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")

_BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_PARSERS: dict[type, Callable[[str], object]] = {int: int, float: float, str: str, bool: lambda s: _BOOLS[s.lower()]}
_NONE_WORDS = ("", "None", "null")
# One list item and the comma behind it. A quote counts only at an item's start, so that jack-o'-lantern is a label.
_LIST_ITEM = re.compile(r"""\s*(?:"([^"]*)"|'([^']*)'|([^,]*?))\s*,""")


class _Bare(str):
    """Text as typed: on the command line, or unquoted in YAML. Text that YAML quotes is a plain `str`."""


def load_config(schema: type[T], argv: Sequence[str], script_dir: Path, *, default: str | None = None) -> T:
    """Reads the settings of a script.

    The command line takes `key=value`, `--key value`, `--key=value` and, for true, a bare `--key`; hyphens in keys
    count as underscores. `config=NAME` names a YAML file in `script_dir/configs`, `script_dir` or the working folder
    (in that order; `./NAME` only the last), with or without `.yaml`; `config=None` reads none. Without a file no
    `base.yaml` is read either; for a file outside `script_dir/configs` only the one beside it is.

    Args:
        schema: Flat dataclass whose fields all have defaults, of type int, float, str, bool, a list of the first
            three, or any of these `| None`; its fields are made by `option`, and it inherits `Options` for its ranges.
        argv: The command line without the program's name.
        script_dir: The folder that holds `configs/`.
        default: The config to read when the command line names none; None reads no file.

    Returns:
        An instance of `schema`.

    Raises:
        InputError: A key is unknown or given twice, a value has the wrong type or is not among the field's choices,
            or a config file is missing or broken. Checks in the dataclass's `__post_init__` come through unchanged.
    """
    settings = settings_of(schema)
    values = _read_command_line(argv, settings)
    name = values.pop("config", default)
    files = [] if name is None or name in _NONE_WORDS else _config_files(name, script_dir)
    sources: list[tuple[str, Mapping[str, str | list[str]]]] = [(f"{path}: ", _read_yaml(path)) for path in files]
    config = OmegaConf.structured(schema)
    OmegaConf.set_readonly(config, False)  # it is read-only where the dataclass is frozen
    for where, source in [*sources, ("", values)]:
        for key in _taken_back(source, settings, where):
            config[key] = None
        for key, raw in source.items():
            try:
                config[key] = _convert(_lookup(key, settings), raw)
            except InputError as error:
                raise InputError(f"{where}{error}") from error
            except ValidationError as error:
                words = settings[key].words
                raise InputError(f"{where}{key}: '{raw}' means no value, but {key} must be {words}") from error
        for key, setting in settings.items():
            other, needed = setting.only_with or (None, None)
            if other in source and key not in source and config[other] != needed:
                config[key] = setting.default
    return cast(T, OmegaConf.to_object(config))


def config_dict(config: "DataclassInstance") -> dict[str, object]:
    """The settings as a plain dictionary, in the dataclass's order."""
    return dataclasses.asdict(config)


def save_config(config: "DataclassInstance", path: Path) -> None:
    """Writes all settings as YAML that `load_config` reads back to an equal instance; whole or not at all.

    Args:
        config: The settings, as `load_config` returned them.
        path: The file to write or replace, in an existing folder.

    Raises:
        OSError: The file cannot be written.
    """
    text = yaml.dump(config_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=4096)
    write_text(path, text)


class _Dumper(yaml.SafeDumper):
    """Quotes "None", which YAML leaves bare and `load_config` reads as none, and line ends, which YAML may fold."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        quoted = text in _NONE_WORDS or not text.isprintable()
        return self.represent_scalar("tag:yaml.org,2002:str", text, style='"' if quoted else None)


_Dumper.add_representer(str, _Dumper.represent_text)


def _taken_back(source: Mapping[str, str | list[str]], settings: Mapping[str, Setting], where: str) -> list[str]:
    """Options that a source takes back by giving another that says the same.

    Raises:
        InputError: It gives both.
    """
    given = {key for key, raw in source.items() if raw not in _NONE_WORDS}
    taken = []
    for setting in settings.values():
        if setting.instead_of not in given:
            continue
        if setting.key in given:
            other = setting.instead_of
            raise InputError(
                f"{where}{setting.key}={source[setting.key]} and {other}={source[other]} say the same in two ways: "
                "give one of them."
            )
        taken.append(setting.key)
    return taken


def _lookup(key: str, settings: Mapping[str, Setting]) -> Setting:
    if key not in settings:
        raise unknown_name("config key", key, settings)
    return settings[key]


def _read_command_line(argv: Sequence[str], settings: Mapping[str, Setting]) -> dict[str, str]:
    known = {**settings, "config": Setting("config", str)}
    values: dict[str, str] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        name, equals, text = word.removeprefix("--").partition("=")
        if not name or not (equals or word.startswith("--")):
            raise InputError(f"'{word}' is not a setting: write key=value (no spaces around =) or --key value")
        setting = _lookup(name.replace("-", "_"), known)
        given = text if equals else _following_value(setting, words, known)
        # `report_to=` and `--report_to ""` are an empty list; any other option needs a word for nothing.
        if given is None or not (given or setting.is_list):
            raise InputError(f"{setting.key}: a value is missing; write {setting.key}=VALUE")
        if setting.key in values:
            raise InputError(f"{setting.key}: given twice, as '{values[setting.key]}' and as '{given}'")
        values[setting.key] = _Bare(given)
    return values


def _following_value(setting: Setting, words: list[str], known: Mapping[str, Setting]) -> str | None:
    """Takes the value of `--key` off the words behind it; "true" or None where the next setting starts at once."""
    if words and not words[0].startswith("--"):
        name, equals, _ = words[0].partition("=")
        # `--output_dir seed=1` has forgotten the folder; `--trackers a=b` has not, as long as a is no setting.
        if not equals or (setting.item is not bool and not setting.is_share and name.replace("-", "_") not in known):
            return words.pop(0)
    return "true" if setting.item is bool or setting.is_share else None


def _config_files(name: str, script_dir: Path) -> list[Path]:
    """The named config file, behind the `base.yaml` files that apply to it."""
    roots = [Path.cwd()] if name.startswith(("./", "../")) else [script_dir / "configs", script_dir, Path.cwd()]
    name = os.path.expanduser(name)
    paths = [path for root in roots for path in (root / name, root / f"{name}.yaml") if path.is_file()]
    if not paths:
        raise _missing_config(name, roots)
    configs, folder = (script_dir / "configs").resolve(), paths[0].parent.resolve()
    depth = len(folder.relative_to(configs).parts) if folder.is_relative_to(configs) else 0
    bases = [parent / "base.yaml" for parent in [*reversed(folder.parents[:depth]), folder]]
    return [base for base in bases if base.is_file() and not base.samefile(paths[0])] + [paths[0]]


def _missing_config(name: str, roots: Sequence[Path]) -> InputError:
    """The error for a config that is in none of `roots`, with the nearest name there or in the folder it names."""
    wanted, folder = name.removesuffix(".yaml"), os.path.dirname(name)
    found = [str(path.relative_to(roots[0])) for path in roots[0].glob("*/*.yaml")]
    found += [os.path.join(folder, path.name) for root in roots for path in (root / folder).glob("*.yaml")]
    names = sorted({path.removesuffix(".yaml") for path in found})
    # The last part counts alone too: `dit_s2` is far from `imagenet_256/dit_s2` letter by letter.
    nearest = [near for near in names if os.path.basename(near) == os.path.basename(wanted)]
    nearest += get_close_matches(wanted, names, n=1)
    hint = f" Did you mean '{nearest[0]}'?" if nearest else ""
    searched = dict.fromkeys(str((root / folder).resolve()) for root in roots)
    return InputError(f"Config '{name}' not found.{hint} Looked in {', '.join(searched)}.")


def _read_yaml(path: Path) -> dict[str, str | list[str]]:
    """The keys of a YAML file with their values as text: types are the schema's business, not YAML's."""
    try:
        root = yaml.compose(path.read_bytes(), Loader=yaml.BaseLoader)
    except (OSError, yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    if root is not None and not isinstance(root, yaml.MappingNode):
        raise InputError(f"{path}: must hold lines of the form 'key: value'")
    values: dict[str, str | list[str]] = {}
    for key_node, node in root.value if root else ():
        key, line = str(key_node.value).replace("-", "_"), key_node.start_mark.line + 1
        items = node.value if isinstance(node, yaml.SequenceNode) else [node]
        if not all(isinstance(item, yaml.ScalarNode) for item in items):
            raise InputError(f"{path}: {key} on line {line} must be one value or a flat list")
        if key in values:
            raise InputError(f"{path}: {key} is given twice, the second time on line {line}")
        texts = [_Bare(item.value) if item.style is None else str(item.value) for item in items]
        values[key] = texts if isinstance(node, yaml.SequenceNode) else texts[0]
    return values


def _convert(setting: Setting, raw: str | list[str]) -> object:
    """A setting's value from text; None where the text means none, which OmegaConf then allows or not."""
    if isinstance(raw, _Bare) and raw in _NONE_WORDS:
        return [] if setting.is_list and not setting.optional else None
    if setting.is_list:
        items = _split(setting.key, raw) if isinstance(raw, _Bare) else raw
        return [_parse(setting, item) for item in ([items] if isinstance(items, str) else items)]
    if isinstance(raw, list):
        raise InputError(f"{setting.key}: takes one value, not a list; it must be {setting.words}")
    return _parse(setting, raw)


def _split(key: str, raw: str) -> list[str]:
    """The items of `a,b`, `[a,b]` or `["a, b",c]`."""
    text = raw.strip()
    if text.startswith("[") != text.endswith("]"):
        raise InputError(f"{key}: '{raw}' lacks one of its brackets")
    text = text[1:-1].strip() if text.startswith("[") else text
    groups = _LIST_ITEM.findall(f"{text},") if text else []
    return [double or single or _Bare(bare) for double, single, bare in groups]


def _parse(setting: Setting, text: str) -> object:
    """One value of a setting, or one item of its list."""
    if isinstance(text, _Bare) and not text:
        raise InputError(f"{setting.key}: one of its items is empty")
    if "${" in text or text == "???":
        raise InputError(f"{setting.key}: '{text}' refers to another value, which is not supported; write the value")
    try:
        given = str(float(_BOOLS[text.lower()])) if setting.is_share and text.lower() in _BOOLS else text
        value = _PARSERS[setting.item](given)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(text)
    except (KeyError, ValueError) as error:
        words = setting.item_words if setting.is_list else setting.words
        raise InputError(f"{setting.key}: '{text}' is not {words}") from error
    if "\0" in text:
        raise InputError(f"{setting.key}: {text!r} holds a NUL, which no path, name or label can")
    if setting.is_path:
        value = _expand_home(setting.key, str(text))
    if setting.interval is not None:
        setting.interval.require(setting.key, value)
    if setting.choices and value not in setting.choices:
        raise unknown_name(setting.key, str(value), map(str, setting.choices))
    return value


def _expand_home(key: str, text: str) -> str:
    """A path with the home folder in place of a leading `~` or `~user`."""
    if not text.startswith("~"):
        return text
    if text == "~":  # in YAML a word for none
        raise InputError(f"{key}: '~' is the home folder itself; write None for no value, or a path such as ~/runs")
    expanded = os.path.expanduser(text)
    if expanded == text:
        raise InputError(f"{key}: no home folder is known for '{text}'; for a file of this name write './{text}'")
    return expanded
