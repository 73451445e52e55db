"""From a YAML file and `--set` overrides to a RunConfig, and one clear line for what is wrong with them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from sisa_dist.config.errors import UserError
from sisa_dist.config.schema import RunConfig
from sisa_dist.config.section import Section

_S = TypeVar("_S", bound=Section)


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 3e-4 as a number (YAML 1.1 wants 3.0e-4), and refuses keys given twice or no words."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key, line = self.construct_object(key_node, deep=deep), key_node.start_mark.line + 1
            if not isinstance(key, str):  # a list would not even hash
                raise UserError(f"line {line}: a key is a word, not a {type(key).__name__}: write KEY: VALUE")
            if key in seen:
                raise UserError(f"line {line}: {key} is given twice: remove one")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run described by the YAML file `path`, with `overrides` like "training.steps=200" laid over it.

    Raises UserError, one line that names the key and the remedy; of a run of stages too, which load_run reads.
    """
    tree = read_tree(path, overrides)
    if "stages" in tree:
        raise UserError(f"{path}: a run of stages, and one config is wanted here: give that of one stage")
    return parse_config(tree, source=str(path))


def read_tree(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The YAML file `path` with `overrides`, unchecked.

    A file may say `extends: other.yaml` (relative to itself); that file may not extend another. An entry of a list is
    named by its `name`: stages.NAME.training.seq_len=8192.
    """
    path = Path(path)
    tree = _read_yaml(path)
    if (base := tree.pop("extends", None)) is not None:
        if not isinstance(base, str):
            raise UserError(f"{path}: extends: must name one YAML file")
        parent = _read_yaml(path.parent / base)
        if "extends" in parent:
            raise UserError(f"{path}: extends: {base} itself extends {parent['extends']}: only one level is allowed")
        tree = merge(parent, tree)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"--set {override}: write KEY=VALUE, for example training.steps=200")
        try:
            value = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            raise UserError(f"--set {override}: the value is not YAML ({_first_line(error)}): quote it") from None
        except UserError as error:
            raise UserError(f"--set {override}: {error}") from None
        _set_dotted(tree, key, value)
    return tree


def parse_config(tree: dict[str, Any], *, source: str) -> RunConfig:
    """`tree` as a RunConfig; errors are one line that starts with `source`."""
    return parse_section(RunConfig, tree, source=source)


def parse_section(kind: type[_S], tree: dict[str, Any], *, source: str) -> _S:
    """`tree` as a `kind`; errors as of `parse_config`."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{source}: {_explain(error, kind)}") from None


def dump_config(config: RunConfig) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal config."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {_first_line(error)}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {_first_line(error)}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a config is a mapping of keys, this file holds {type(tree).__name__}")
    return tree


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`, key by key; lists are replaced whole."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = merge(base[key], value) if both else value
    return merged


def _set_dotted(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, leaf = dotted.split(".")
    here: Any = tree
    for parent in parents:
        if isinstance(here, list):
            here = _entry(here, parent, dotted)
        else:
            if here.get(parent) is None:  # a section that was left out
                here[parent] = {}
            here = here[parent]
        if not isinstance(here, dict | list):
            raise UserError(f"--set {dotted}: {parent} is a value, it has no keys below it")
    if isinstance(here, list):
        raise UserError(
            f"--set {dotted}: {parents[-1]} is a list: set the whole of it, or a key of an entry by its name"
        )
    here[leaf] = value


def _entry(entries: list[Any], name: str, dotted: str) -> Any:
    """The one of a list of mappings that is called `name`."""
    named = {str(entry["name"]): entry for entry in entries if isinstance(entry, dict) and "name" in entry}
    if name not in named:
        known = f"it has {', '.join(named)}" if named else "its entries have none"
        raise UserError(f"--set {dotted}: no entry has the name {name}: {known}")
    return named[name]


def _explain(error: ValidationError, root: type[BaseModel]) -> str:
    """The first problem as `key: what is wrong and what to do`."""
    problem = error.errors()[0]
    where = tuple(part for part in problem["loc"] if isinstance(part, int) or not _is_union_tag(str(part)))
    key = ".".join(str(part) for part in where)
    if problem["type"] == "extra_forbidden":
        known = _known_keys(where[:-1], root)
        near = difflib.get_close_matches(str(where[-1]), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known keys here: {', '.join(known)}"
        return f"{key}: unknown key; {hint}"
    if problem["type"] == "missing":
        return f"{key}: missing; set it"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}: {message} (got {problem['input']!r})"


def _is_union_tag(part: str) -> bool:
    return "[" in part or part in {"int", "str", "float", "literal", "constrained-int", "list", "learned_d_s"}


def _known_keys(where: tuple[Any, ...], root: type[BaseModel]) -> list[str]:
    section = root
    for part in where:
        if str(part) not in section.model_fields:
            continue  # the name or the number of an entry: a mixture's source
        found = [
            kind
            for kind in _kinds(section.model_fields[str(part)].annotation)
            if isinstance(kind, type) and issubclass(kind, BaseModel)
        ]
        if not found:
            return []
        section = found[0]
    return list(section.model_fields)


def _kinds(annotation: Any) -> Iterator[Any]:
    """The types that `annotation` allows, one inside the other."""
    yield annotation
    for inner in get_args(annotation):
        yield from _kinds(inner)


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())
