"""Reads and validates ``configs/*.yaml``: families, their variants and their hyper-parameters.

The schema of a variant is the signature and the type hints of its family's constructor, so that a
file can say nothing the model would not understand. Every error names file, line and key. This
module imports no torch.
"""

import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from backbones.errors import ConfigError, nearest
from backbones.schema import PerStage, constructor_hints, fits, in_words

__all__ = [
    "FamilyConfig",
    "PerStage",
    "Source",
    "Variant",
    "YamlMapping",
    "check_arguments",
    "data_folder",
    "read_family",
    "read_yaml",
]

# What is bounded by these and holds no alias takes memory and time in proportion to its size.
MAX_FILE_BYTES = 1024 * 1024
MAX_NESTING = 64
MAX_SCALAR = 64  # characters of anything but text
MAX_NUMBER = 1 << 53
RESERVED_KEYS = ("like", "timm_name", "source")
FAMILY_KEYS = ("family", "sources", "defaults", "variants", "aliases")

_YamlLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_YamlLoader):
    """A safe loader that reads ``1e-6`` as a number, as YAML 1.2 does and YAML 1.1 does not."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


class YamlMapping(dict[str, Any]):
    """A mapping read from a file that remembers where it and each of its keys stand."""

    def __init__(self, path: Path, line: int) -> None:
        super().__init__()
        self.path = path
        self.line = line
        self.lines: dict[str, int] = {}

    def where(self, key: str | None = None) -> str:
        """Return ``file:line`` of `key`, or of the mapping itself."""
        return f"{self.path}:{self.lines.get(key, self.line) if key else self.line}"


@dataclass(frozen=True)
class Source:
    """Where an architecture comes from: the paper and the authors' code."""

    title: str
    paper: str
    repository: str
    commit: str | None = None
    license: str = "unstated"


@dataclass(frozen=True)
class Variant:
    """One named architecture: a family and the arguments of its constructor."""

    name: str
    family: str
    arguments: Mapping[str, Any]
    source: Source | None = None
    timm_name: str | None = None
    where: str = ""
    lines: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True)
class FamilyConfig:
    """The content of one YAML file."""

    family: str
    path: Path
    sources: Mapping[str, Source]
    variants: Mapping[str, Variant]
    aliases: Mapping[str, str]


def data_folder() -> Path:
    """Return the folder that holds ``configs/`` and ``weights_manifest.yaml``.

    In a wheel that is the package's own folder, in a source tree or editable install its parent.
    """
    here = Path(__file__).resolve().parent
    return here if (here / "configs").is_dir() else here.parent


def read_yaml(path: str | Path) -> YamlMapping:
    """Read a YAML file whose top level is a mapping.

    Raises:
        ConfigError: the file is missing, too large, no YAML, holds a duplicate key, an alias or
            merge key (``*name``, ``<<``: a few lines of them can expand without bound), a tag
            (``!!python/...``) or a key that is no text.
    """
    path = Path(path)
    text = _read_text(path)
    try:
        _check_events(yaml.parse(text, Loader=_Loader), path)
        content = _construct(yaml.compose(text, Loader=_Loader), path, _Loader(""))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(content, YamlMapping):
        raise ConfigError(f"{path}: expected 'key: value' lines at the top level")
    return content


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            # A device or pipe has no size to go by, and may never end.
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise ConfigError(f"{path}: no regular file; not a config file")
            content = stream.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_FILE_BYTES >> 20} MiB; not a config file")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file in UTF-8") from None


def _check_events(events: Iterable[yaml.Event], path: Path) -> None:
    """Refuse what a config needs not, before anything is built of it."""
    depth = 0
    for event in events:
        where = f"{path}:{event.start_mark.line + 1 if event.start_mark else 1}"
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_NESTING:
            raise ConfigError(f"{where}: not valid YAML for a config: nested too deeply")
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(
                f"{where}: YAML aliases (*name) are not supported; use 'like: <name>'"
            )
        tag = getattr(event, "tag", None)
        if tag not in (None, "!"):  # quotes leave the latter
            raise ConfigError(
                f"{where}: YAML tags ({tag[:80]}) are not supported; write plain values"
            )


def _construct(node: yaml.Node | None, path: Path, loader: Any) -> Any:
    if isinstance(node, yaml.MappingNode):
        result = YamlMapping(path, node.start_mark.line + 1)
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = _construct(key_node, path, loader)
            if not isinstance(key, str):
                raise ConfigError(
                    f"{path}:{line}: key {str(key)[:80]!r} is not text; put it in quotes"
                )
            if key in result:
                first = result.lines[key]
                raise ConfigError(
                    f"{path}:{line}: duplicate key {key[:80]!r} (first on line {first})"
                )
            result[key] = _construct(value_node, path, loader)
            result.lines[key] = line
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_construct(item, path, loader) for item in node.value]
    if node is None:
        return None
    where = f"{path}:{node.start_mark.line + 1}"
    if node.tag == "tag:yaml.org,2002:merge":
        raise ConfigError(f"{where}: YAML merge keys (<<) are not supported; use 'like: <name>'")
    if node.tag != "tag:yaml.org,2002:str" and len(node.value) > MAX_SCALAR:
        raise ConfigError(
            f"{where}: the value {node.value[:20]}... is too long; put text in quotes"
        )
    try:
        value = loader.construct_object(node)
    except ValueError as error:
        raise ConfigError(f"{where}: cannot read the value {node.value!r}: {error}") from None
    if isinstance(value, int) and abs(value) > MAX_NUMBER:
        raise ConfigError(f"{where}: the number {node.value} is too large; put text in quotes")
    return value


def _expect_mapping(content: YamlMapping, key: str) -> YamlMapping:
    value = content.get(key)
    if value is None:
        return YamlMapping(content.path, content.lines.get(key, content.line))
    if not isinstance(value, YamlMapping):
        raise ConfigError(f"{content.where(key)}: {key!r} must hold 'name: value' lines")
    return value


def _check_keys(content: YamlMapping, allowed: Sequence[str], what: str) -> None:
    for key in content:
        if key not in allowed:
            raise ConfigError(
                f"{content.where(key)}: unknown key {key!r} in {what}{nearest(key, allowed)}"
                f" (known: {', '.join(allowed)})"
            )


def _read_source(content: YamlMapping, name: str) -> Source:
    fields = Source.__dataclass_fields__
    _check_keys(content, tuple(fields), f"source {name!r}")
    for key in ("title", "paper", "repository"):
        if not isinstance(content.get(key), str):
            raise ConfigError(f"{content.where(key)}: source {name!r} needs a text for {key!r}")
    return Source(**{key: content[key] for key in fields if key in content})


def read_family(path: str | Path, known: Mapping[str, Variant] | None = None) -> FamilyConfig:
    """Read one family file, ours or a user's.

    Args:
        path: a YAML file with ``family``, ``variants`` and optionally ``sources``, ``defaults``
            and ``aliases``.
        known: variants registered already, which ``like:`` may name beside those of the file.

    Raises:
        ConfigError: with file, line, key and, for a misspelled key, the nearest valid one.
    """
    content = read_yaml(path)
    _check_keys(content, FAMILY_KEYS, "a family file")
    family = content.get("family")
    if not isinstance(family, str):
        raise ConfigError(f"{content.where('family')}: 'family: <name>' is missing")
    source_nodes = _expect_mapping(content, "sources")
    sources = {name: _read_source(source_nodes[name], name) for name in source_nodes}
    defaults = _expect_mapping(content, "defaults")
    nodes = _expect_mapping(content, "variants")
    if not nodes:
        raise ConfigError(f"{content.where('variants')}: no variants are listed")
    variants: dict[str, Variant] = {}
    relatives = {name: v for name, v in (known or {}).items() if v.family == family}

    def resolve(name: str, path: tuple[str, ...]) -> Variant:
        """Read one variant, after those that it is `like`; `path` holds the names before it."""
        if name in variants:
            return variants[name]
        node = _expect_mapping(nodes, name)
        if name in path:
            raise ConfigError(f"{nodes.where(name)}: 'like' runs in a circle: {' -> '.join(path)}")
        inherited = None
        if (parent := node.get("like")) is not None:
            if parent in nodes and parent != name:
                inherited = resolve(parent, (*path, name))
            elif parent in relatives:
                inherited = relatives[parent]
            else:
                raise ConfigError(
                    f"{node.where('like')}: {name!r} is like {parent!r}, which is no variant of"
                    f" family {family!r}{nearest(str(parent), [*nodes, *relatives])}"
                )
        chosen: Any = node.get("source", next(iter(sources), None))
        if "source" in node and chosen not in sources:
            raise ConfigError(
                f"{node.where('source')}: no source {chosen!r}{nearest(str(chosen), sources)}"
            )
        source = inherited.source if inherited and "source" not in node else sources.get(chosen)
        own = {key: value for key, value in node.items() if key not in RESERVED_KEYS}
        arguments = {**defaults, **(inherited.arguments if inherited else {}), **own}
        lines = {key: defaults.where(key) for key in defaults}
        lines |= dict(inherited.lines) if inherited else {}
        lines |= {key: node.where(key) for key in own}
        variants[name] = Variant(
            name, family, arguments, source, node.get("timm_name"), nodes.where(name), lines
        )
        return variants[name]

    for name in nodes:
        resolve(name, ())
    alias_node = _expect_mapping(content, "aliases")
    for alias, target in alias_node.items():
        if target not in variants:
            raise ConfigError(
                f"{alias_node.where(alias)}: alias {alias!r} names no variant: {target!r}"
                f"{nearest(str(target), variants)}"
            )
        if alias in variants:
            raise ConfigError(f"{alias_node.where(alias)}: {alias!r} is a variant already")
    return FamilyConfig(family, content.path, sources, variants, dict(alias_node))


def check_arguments(variant: Variant, model_class: type, hidden: Sequence[str] = ()) -> None:
    """Compare a variant's arguments with its family's constructor, without those `hidden` there.

    Raises:
        ConfigError: for an unknown or missing key or a value of the wrong type.
    """
    hints, required = constructor_hints(model_class)
    choices = [key for key in hints if key not in hidden]
    for key, value in variant.arguments.items():
        where = variant.lines.get(key, variant.where)
        if key not in choices:
            raise ConfigError(
                f"{where}: {variant.name}: unknown key {key!r}{nearest(key, choices)}"
                f" (family {variant.family!r} knows: {', '.join(sorted(choices))})"
            )
        if not fits(value, hints[key]):
            raise ConfigError(
                f"{where}: {variant.name}: {key} must be {in_words(hints[key])}, not {value!r}"
            )
    missing = sorted(required - set(variant.arguments) - set(hidden))
    if missing:
        raise ConfigError(f"{variant.where}: {variant.name}: missing {', '.join(missing)}")
