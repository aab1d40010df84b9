"""Parts as YAML text and back.

A dataclass of parts has one part per key, ``tuning: {LoRA: {r: 8}}``; a part whose type is fixed (``data``, ``evaluate``)
is a plain mapping of its fields. What may stand where is read from the constructors, so a new part needs nothing here.
"""

from __future__ import annotations

import io
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache, reduce
from operator import or_
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar, Union

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from fedfm.core import registry
from fedfm.core.errors import ConfigError
from fedfm.core.parts import Part
from fedfm.core.registry import suggest
from fedfm.models import Model

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")
_OVERRIDE = "override "
# A mapping that can be part of a value (``Model.config``).
_PAIRS = tuple[tuple[str, Any], ...]
_STR, _NULL, _MAP = "tag:yaml.org,2002:str", "tag:yaml.org,2002:null", "tag:yaml.org,2002:map"
# YAML 1.2's scalars. PyYAML speaks 1.1, where 1e-3 is text, 010 is eight and an owner called "no" is false.
_SCALARS = {
    _NULL: (r"~|null|Null|NULL|", "~nN"),
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "tag:yaml.org,2002:int": (r"[-+]?[0-9]+", "-+0123456789"),
    "tag:yaml.org,2002:float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012 (PyYAML's own way)

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        if self.check_event(yaml.AliasEvent):
            # An alias puts one node in two places, so an override of one place would change the other.
            mark = self.get_mark()
            raise ConfigError(f"{_line(mark.name, mark.line)}: each thing is said where it holds; aliases (*name) are not read.")
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Quotes a text that YAML 1.1 or 1.2 would read as something else."""


for _tag, (_pattern, _first) in _SCALARS.items():
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), [*_first, *([""] if _tag == _NULL else [])])
# YAML folds some line breaks in plain text into spaces; written as escapes they stay what they are.
_Dumper.add_representer(str, lambda dumper, text: dumper.represent_scalar(_STR, text, style=None if text.isprintable() else '"'))


def _whole(loader: _Loader, node: ScalarNode) -> int:
    number = int(node.value)
    if not -(2**63) <= number < 2**63:
        raise ValueError("this whole number is beyond 64 bits")
    return number


_Loader.add_constructor("tag:yaml.org,2002:int", _whole)


def build(cls: type[T], text: str, name: str, overrides: Sequence[str] = (), what: str = "recipe") -> T:
    """What a YAML mapping of fields describes.

    Args:
        cls: A dataclass of parts, such as a federation.
        name: What the text is called in messages, a file's name for one.
        overrides: ``key=value`` each, applied before anything is built.
        what: What the text is, in messages.

    Raises:
        ConfigError: telling the place, the key, what was given and what is allowed.
    """
    root = _compose(text, name)
    if root is None or not isinstance(root, MappingNode):
        raise ConfigError(
            f"{name}: a {what} is a mapping of keys such as {', '.join(list(_fields(cls))[:3])}; this one {'is empty' if root is None else 'is not'}."
        )
    for override in overrides:
        _override(cls, root, override)
    built: T = _build_fields(cls, root, "", what)
    return built


def write(parts: object, **first: str) -> str:
    """A dataclass of parts as YAML, every field written out, a line for each; ``build(type(parts), write(parts), ...) == parts``.

    Args:
        first: Fields that come before the others.
    """
    root = _Dumper(io.StringIO(), sort_keys=False).represent_data({**first, **_plain_fields(parts)})
    assert isinstance(root, MappingNode)
    for _, value in root.value:
        if isinstance(value, MappingNode | SequenceNode):
            value.flow_style = True
    root.flow_style = False
    text: str = yaml.serialize(root, Dumper=_Dumper, width=1 << 20, allow_unicode=True)
    return text


# --- YAML to nodes -------------------------------------------------------------------------------------------------


def _compose(text: str, name: str) -> Node | None:
    try:
        loader = _Loader(text)
        loader.name = name
        root = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ConfigError(f"{_line(name, mark.line if mark else 0)}: this is not YAML: {error.problem or error.context}.") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{name}: this is not YAML: {error}") from error
    if root is not None:
        _require_clear(root)
    return root


def _require_clear(node: Node) -> None:
    """Refuses keys that stand twice, and texts with a NUL character, which no path, column or name has."""
    if isinstance(node, SequenceNode):
        for item in node.value:
            _require_clear(item)
    elif isinstance(node, ScalarNode) and "\0" in node.value:
        raise ConfigError(f"{_mark(node)}: a text here has a NUL character, which no path, column or name can have. Remove it.")
    elif isinstance(node, MappingNode):
        first: dict[str, Node] = {}
        for key, value in node.value:
            if not isinstance(key, ScalarNode):
                raise ConfigError(f"{_mark(key)}: a key must be a name, not a list or a mapping.")
            if key.value in first:
                raise ConfigError(
                    f"{_mark(key)}: the key {key.value!r} stands here and at {_mark(first[key.value])}; which of the two holds? Remove one."
                )
            first[key.value] = key
            _require_clear(value)


def _line(name: str, line: int) -> str:
    return name if name.startswith(_OVERRIDE) else f"{name}:{line + 1}"


def _mark(node: Node) -> str:
    return _line(node.start_mark.name, node.start_mark.line)


def _items(node: MappingNode) -> dict[str, Node]:
    return {key.value: value for key, value in node.value}


def _is_null(node: Node) -> bool:
    return isinstance(node, ScalarNode) and node.tag == _NULL


def _value(node: Node) -> Any:
    """The plain Python value of a node."""
    try:
        return _Loader("").construct_document(node)
    except (yaml.constructor.ConstructorError, ValueError, AttributeError) as error:
        # PyYAML raises the last two for a value that does not fit its tag (!!timestamp x).
        problem = getattr(error, "problem", None) or error
        raise ConfigError(f"{_mark(node)}: {problem}; a file like this holds text, numbers, lists and mappings only.") from error


def _given(node: Node) -> str:
    text = repr(_value(node))
    return text if len(text) <= 80 else text[:77] + "..."


# --- what may stand where ------------------------------------------------------------------------------------------


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _fields(cls: type) -> dict[str, Field[Any]]:
    return {item.name: item for item in fields(cls) if item.init}


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def _part_type(hint: Any) -> type[Part] | None:
    return next((option for option in _options(hint) if isinstance(option, type) and issubclass(option, Part)), None)


def _many_type(hint: Any) -> type[Part] | None:
    """``X`` of ``tuple[X, ...]`` where X is a part."""
    for option in _options(hint):
        if typing.get_origin(option) in (tuple, list, Sequence):
            return _part_type(typing.get_args(option)[0])
    return None


def _known(kind: type[Part]) -> dict[str, registry.Entry]:
    """The parts that can stand where a ``kind`` is wanted; a room may hold several kinds, and a method brings parts of many."""
    entries = {**registry.entries("methods"), **registry.entries(kind.room)}
    return {name: entry for name, entry in sorted(entries.items()) if issubclass(entry.load(), kind)}


def _entry(kind: type[Part], node: Node, name: str, at: str) -> registry.Entry:
    known = _known(kind)
    if name not in known:
        raise ConfigError(f"{_mark(node)}: {at}: there is no {name!r} in {kind.room}.{suggest(name, known)} Known: {', '.join(known)}.")
    return known[name]


def _allowed(hint: Any) -> str:
    """What a field takes, in words."""
    many, part = _many_type(hint), _part_type(hint)
    if many is not None:
        return f"a list of parts, [{{Name: {{...}}}}, ...] with names of {', '.join(_known(many))}"
    if part is not None and not is_dataclass(part):
        return f"a part, {{Name: {{...}}}} with a name of {', '.join(_known(part))}"
    if part is not None:
        return f"a mapping of {', '.join(_fields(part))}"
    if hint == _PAIRS:
        return "a mapping of names to values"
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_allowed(option) for option in args)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"a mapping of names to {_allowed(args[-1])}"
    if isinstance(origin, type) and issubclass(origin, Iterable):
        return f"a list, each {_allowed(args[0])}"
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null", Any: "anything"}
    return words.get(hint, getattr(hint, "__name__", str(hint)))


# --- nodes to parts ------------------------------------------------------------------------------------------------


def _build(hint: Any, node: Node, at: str) -> Any:
    if _is_null(node) and type(None) in _options(hint):
        return None
    if hint == _PAIRS and isinstance(node, MappingNode):
        # A library's own configuration passes as it stands: the library knows what it may hold, and wants lists as lists.
        return _value(node)
    many, part = _many_type(hint), _part_type(hint)
    if many is not None and isinstance(node, SequenceNode):
        return tuple(_build(many, item, f"{at}.{i}") for i, item in enumerate(node.value))
    if part is Model:
        return _build_model(node, at)
    others = [option for option in _options(hint) if option not in (part, type(None)) and _many_type(option) is None]
    if part is not None and (isinstance(node, MappingNode) or not others or _names_part(part, node)):
        return _build_fields(part, _body(node, at), at) if is_dataclass(part) else _build_part(part, node, at)
    if not others:
        _refuse(node, at, hint)
    from pydantic import ValidationError

    try:
        return _adapter(reduce(or_, others)).validate_python(_frozen(_value(node)), strict=True)
    except ValidationError:
        _refuse(node, at, hint)


def _names_part(kind: type[Part], node: Node) -> bool:
    """Whether this is the name of a part alone, which stands for the part with its defaults."""
    return isinstance(node, ScalarNode) and not is_dataclass(kind) and node.value in _known(kind)


@cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    # A federation that is written in Python reads no YAML, and needs no pydantic.
    from pydantic import TypeAdapter

    return TypeAdapter(hint)


def _refuse(node: Node, at: str, hint: Any) -> NoReturn:
    raise ConfigError(f"{_mark(node)}: {at} is {_given(node)}; it must be {_allowed(hint)}.")


def _frozen(value: Any) -> Any:
    """Lists as tuples: parts are values."""
    if isinstance(value, list):
        return tuple(map(_frozen, value))
    return {name: _frozen(item) for name, item in value.items()} if isinstance(value, dict) else value


def _body(node: Node, at: str) -> MappingNode:
    """The fields of a part; nothing at all (``LoRA:``) means all defaults."""
    if _is_null(node):
        return MappingNode(_MAP, [], node.start_mark, node.end_mark)
    if not isinstance(node, MappingNode):
        raise ConfigError(f"{_mark(node)}: {at} is {_given(node)}; it must be a mapping of its fields, such as {{name: value}}.")
    return node


def _named(node: Node, at: str, kind: type[Part]) -> tuple[ScalarNode, Node]:
    """The name of a part and its fields, from ``Name`` or ``{Name: {...}}``."""
    if isinstance(node, ScalarNode) and node.tag == _STR:
        return node, MappingNode(_MAP, [], node.start_mark, node.end_mark)
    if not isinstance(node, MappingNode) or len(node.value) != 1:
        _refuse(node, at, kind)
    key, value = node.value[0]
    return key, value


def _build_part(kind: type[Part], node: Node, at: str) -> Any:
    key, body = _named(node, at, kind)
    entry = _entry(kind, key, key.value, at)
    at = f"{at}.{key.value}"
    return _build_fields(entry.load(), _body(body, at), at)


def _build_model(node: Node, at: str) -> Any:
    """A folder or hub name; or ``{Llama: {config..., tokenizer: ...}}``; or the fields of :class:`Model`."""
    if isinstance(node, ScalarNode) and node.tag == _STR:
        return _construct(Model, {"source": node.value}, {"source": node}, node, at)
    body = _body(node, at)
    name = _architecture(body)
    if name is None:
        return _build_fields(Model, body, at)
    key, inner = body.value[0]
    model_fields = [(k, v) for k, v in _body(inner, f"{at}.{name}").value if k.value in _fields(Model)]
    config = MappingNode(
        _MAP, [item for item in inner.value if item not in model_fields] if isinstance(inner, MappingNode) else [], node.start_mark
    )
    text = ScalarNode(_STR, "architecture", key.start_mark)
    return _build_fields(Model, MappingNode(_MAP, [*model_fields, (text, key), (ScalarNode(_STR, "config"), config)], node.start_mark), at)


def _architecture(body: MappingNode) -> str | None:
    if len(body.value) == 1 and body.value[0][0].value not in _fields(Model):
        name: str = body.value[0][0].value
        return name
    return None


def _build_fields(cls: type, node: MappingNode, at: str, what: str = "recipe") -> Any:
    known, hints, values = _fields(cls), _hints(cls), {}
    for key, value in node.value:
        name = key.value
        if name not in known:
            owner = at or f"a {what}"
            raise ConfigError(f"{_mark(key)}: {owner} has no {name!r}.{suggest(name, known)} Known: {', '.join(known) or 'nothing'}.")
        dotted = f"{at}.{name}" if at else name
        values[name] = _build(hints[name], value, dotted)
    missing = [name for name, item in known.items() if name not in values and item.default is MISSING and item.default_factory is MISSING]
    if missing:
        each = "; ".join(f"{name} is {_allowed(hints[name])}" for name in missing)
        raise ConfigError(f"{_mark(node)}: {at or f'the {what}'} needs {' and '.join(missing)}: {each}.")
    return _construct(cls, values, _items(node), node, at)


def _construct(cls: type, values: dict[str, Any], nodes: Mapping[str, Node], node: Node, at: str) -> Any:
    try:
        return cls(**values)
    except ConfigError as error:
        # A constructor's message names its field, so the error gives the place of that field.
        named = re.findall(r"\w+", str(error))
        culprit = next((nodes[word] for word in named if word in nodes), node)
        raise type(error)(f"{_mark(culprit)}: {at + ': ' if at else ''}{error}") from error


# --- overrides -----------------------------------------------------------------------------------------------------


def _override(cls: type, root: MappingNode, text: str) -> None:
    dotted, equals, value = text.partition("=")
    where = f"{_OVERRIDE}{text if len(text) <= 80 else text[:77] + '...'!r}"
    if not equals or not dotted.strip():
        raise ConfigError(f"{where}: an override is key=value, such as rounds=20 or tuning.LoRA.r=16.")
    new = _compose(value, where)
    _assign_field(cls, root, dotted.strip().split("."), new or _scalar("", _NULL, where), where, "")


def _assign(hint: Any, node: Node, path: list[str], new: Node, where: str, at: str) -> Node:
    """``node`` with ``new`` at ``path`` below it."""
    if not path:
        return new
    many, part = _many_type(hint), _part_type(hint)
    if isinstance(node, SequenceNode):
        return _assign_item(many or Any, node, path, new, where, at)
    if part is Model:
        return _assign_model(node, path, new, where, at)
    if part is not None and is_dataclass(part):
        return _assign_field(part, _body(node, at), path, new, where, at)
    if part is not None:
        return _assign_part(part, node, path, new, where, at)
    if isinstance(node, MappingNode):
        return _assign_key(Any, node, path, new, where, at)
    raise ConfigError(f"{where}: {at} is {_given(node)} and has nothing named {path[0]!r} below it.")


def _assign_item(hint: Any, node: SequenceNode, path: list[str], new: Node, where: str, at: str) -> Node:
    if not path[0].isdecimal() or int(path[0]) >= len(node.value):
        raise ConfigError(f"{where}: {at} is a list of {len(node.value)}; {path[0]!r} is not the number of one of them (the first is 0).")
    i = int(path[0])
    node.value[i] = _assign(hint, node.value[i], path[1:], new, where, f"{at}.{i}")
    return node


def _assign_part(kind: type[Part], node: Node, path: list[str], new: Node, where: str, at: str) -> Node:
    if _is_null(node):
        raise ConfigError(
            f"{where}: the recipe has no {at}. Give it whole: {at}={{Name: {{...}}}} with a name of {', '.join(_known(kind))}."
        )
    key, body = _named(node, at, kind)
    entry = _entry(kind, key, key.value, at)
    if path[0] != key.value and path[0] in _known(kind):
        raise ConfigError(
            f"{where}: {at} is {key.value} here, not {path[0]}. To change the part, give it whole: {at}={{{path[0]}: {{...}}}}."
        )
    inner = path[1:] if path[0] == key.value else path
    body = _assign_field(entry.load(), _body(body, at), inner, new, where, f"{at}.{key.value}") if inner else new
    return MappingNode(_MAP, [(key, body)], node.start_mark, node.end_mark)


def _assign_model(node: Node, path: list[str], new: Node, where: str, at: str) -> Node:
    if isinstance(node, ScalarNode):
        node = MappingNode(_MAP, [(_scalar("source", _STR, where), node)], node.start_mark)
    body = _body(node, at)
    name = _architecture(body)
    if name is None:
        if path[0] not in _fields(Model) and "architecture" in _items(body):
            path = ["config", *path]
        return _assign_field(Model, body, path, new, where, at)
    inner = path[1:] if path[0] == name else path
    key, config = body.value[0]
    config = _assign_key(Any, _body(config, f"{at}.{name}"), inner, new, where, f"{at}.{name}") if inner else new
    return MappingNode(_MAP, [(key, config)], node.start_mark)


def _assign_field(cls: type, node: MappingNode, path: list[str], new: Node, where: str, at: str) -> Node:
    known = _fields(cls)
    if path[0] not in known:
        raise ConfigError(
            f"{where}: {at or 'a recipe'} has no {path[0]!r}.{suggest(path[0], known)} Known: {', '.join(known) or 'nothing'}."
        )
    if path[1:] and path[0] not in _items(node):
        # A field that the recipe leaves out has its default, of which a part can be overridden.
        item = known[path[0]]
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        plain = None if default is MISSING else _plain(default, _hints(cls)[path[0]])
        written = _compose(yaml.dump(plain, Dumper=_Dumper), where) if plain is not None else None
        node.value.append((_scalar(path[0], _STR, where), written or _scalar("", _NULL, where)))
    return _assign_key(_hints(cls)[path[0]], node, path, new, where, at)


def _assign_key(hint: Any, node: MappingNode, path: list[str], new: Node, where: str, at: str) -> MappingNode:
    key, *rest = path
    dotted = f"{at}.{key}" if at else key
    for i, (name, value) in enumerate(node.value):
        if name.value == key:
            node.value[i] = (name, _assign(hint, value, rest, new, where, dotted))
            return node
    if rest:
        raise ConfigError(f"{where}: {at} has no {key!r}.{suggest(key, _items(node))}")
    node.value.append((_scalar(key, _STR, where), new))
    return node


def _scalar(value: str, tag: str, where: str) -> ScalarNode:
    mark = yaml.Mark(where, 0, 0, 0, None, 0)
    return ScalarNode(tag, value, mark, mark)


# --- parts to plain values -----------------------------------------------------------------------------------------


def _plain_fields(part: Any) -> dict[str, Any]:
    cls: type = type(part)
    return {name: _plain(getattr(part, name), _hints(cls)[name]) for name in _fields(cls)}


def _plain(value: Any, hint: Any = Any) -> Any:
    if isinstance(value, Part):
        fixed = _part_type(hint)
        written = _plain_fields(value)
        if isinstance(value, Model):
            # A model is given in one of two ways; only that one is written.
            for name in ("architecture", "config") if value.architecture is None else ("source",):
                del written[name]
        return written if fixed is not None and is_dataclass(fixed) else {type(value).__name__: written}
    if hint == _PAIRS:
        return {name: _plain(item) for name, item in value}
    if isinstance(value, tuple | list):
        return [_plain(item, _many_type(hint) or Any) for item in value]
    return {name: _plain(item) for name, item in value.items()} if isinstance(value, Mapping) else value
