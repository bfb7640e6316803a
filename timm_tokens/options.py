"""Dataclasses of options, whose fields carry their help and their range: commands and checks are made of them.

@dataclass(frozen=True, kw_only=True)
class Blur(Options):
    '''Blurring.'''  # the title of the group of options

    sigma: float = option(1.0, "standard deviation in pixels", above=0)
"""

import math
import operator
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints


def option(
    default: Any = MISSING, help: str = "", *, at_least: float | None = None, above: float | None = None,
    at_most: float | None = None, below: float | None = None, infinite: bool = False, ascending: bool = False,
    **words: Any,
) -> Any:  # fmt: skip
    """A field of a dataclass of options.

    Args:
        default: None: the help says what happens then. Left out: the option must be given.
        help: Says what the option does, and what it does without it where the default is None.
        at_least: The least of its numbers.
        above: What its numbers exceed.
        at_most: The largest of its numbers.
        below: What its numbers stay under.
        infinite: Whether infinity is a number that makes sense.
        ascending: Whether several numbers must not fall, as the ends of a range.
        words: For the command line: `choices`, `metavar`, `flag` (another spelling), `aliases` (older spellings,
            which the help leaves out), `positional`, `group` (a title other than the class's), `rare` (shown last).
    """
    limits = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    limits |= {"infinite": infinite, "ascending": ascending}
    metadata = {"help": help} | limits | words
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def changed(of: type, name: str, default: Any) -> Any:
    """The field of a dataclass with another default, for one that inherits from it."""
    return field(default=default, metadata=next(each.metadata for each in fields(of) if each.name == name))


class Kind(NamedTuple):
    """What an option holds: values of a type, so many of them (None: one, 0: one or more), or None as well."""

    type: type
    count: int | None  # type: ignore[assignment]  # it hides the method of tuples
    optional: bool


def kind(hint: Any) -> Kind:
    """What the type hint of a field says: `int`, `Path | None`, `tuple[float, float]`, `tuple[int, ...] | None`."""
    optional = False
    if get_origin(hint) in (Union, UnionType):
        optional = True
        (hint,) = (part for part in get_args(hint) if part is not NoneType)
    if get_origin(hint) is tuple:
        inner = get_args(hint)
        return Kind(inner[0], 0 if inner[-1] is Ellipsis else len(inner), optional)
    return Kind(get_origin(hint) or hint, None, optional)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What dataclasses of options inherit: as one is made, its values are converted to the types of its fields (text to
    paths, lists to tuples), and checked.

    Raises:
        ValueError: A value is of the wrong type or out of range; names the field, the value, and what is allowed.
    """

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for each in fields(self):
            value = getattr(self, each.name)
            nothing = each.metadata.get("rest") and not value  # what follows on the command line may be nothing
            value = () if nothing else _converted(each.name, kind(hints[each.name]), value)
            _check(each, value)
            object.__setattr__(self, each.name, value)  # the dataclass is frozen


def _converted(name: str, kind: Kind, value: Any) -> Any:
    """The value as a field of this kind holds it."""
    if value is None and kind.optional:
        return None
    if kind.count is None:
        return _one(name, kind.type, value)
    if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__"):
        raise ValueError(f"{name} must be several values, got {value!r}")
    values = tuple(_one(name, kind.type, item) for item in value)
    if len(values) != kind.count if kind.count else not values:
        raise ValueError(f"{name} must be {kind.count or 'one or more'} values, got {len(values)}")
    return values


def _one(name: str, wanted: type, value: Any) -> Any:
    if wanted in (Path, str) and isinstance(value, str | Path):
        if "\0" in str(value):
            raise ValueError(f"{name} must be free of null characters, got {str(value)!r}")
        return wanted(value)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", Path: "a path"}
        raise ValueError(f"{name} must be {words.get(wanted, wanted.__name__)}, got {value!r}")
    return value


def _check(field: Field, value: Any) -> None:
    """Refuse a value that is out of the field's range, or none of its choices."""
    choices = field.metadata.get("choices")
    for item in value if isinstance(value, tuple) else (value,):
        if isinstance(item, int | float) and not isinstance(item, bool) and not _within(field.metadata, item):
            most = f" and at most {_LARGEST}" if item > _LARGEST and isinstance(item, int) else ""
            raise ValueError(f"{field.name} must be {_bounds(field.metadata)}{most}, got {item}")
        if choices is not None and item is not None and item not in choices:
            raise ValueError(f"{field.name} must be one of {', '.join(map(str, choices))}, got {item!r}")
    if field.metadata.get("ascending") and value is not None and list(value) != sorted(value):
        raise ValueError(f"{field.name} must be a range, its lower end first, got {' '.join(map(str, value))}")


_LARGEST = 2**31 - 1  # of whole numbers whose limits don't say otherwise: what they count must fit into memory
_TESTS = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}


def _within(metadata: Any, value: float) -> bool:
    if math.isnan(value) or (math.isinf(value) and not metadata.get("infinite")):
        return False
    if isinstance(value, int) and abs(value) > _LARGEST and metadata.get("below") is None:
        return False
    return all(test(value, metadata[name]) for name, test in _TESTS.items() if metadata.get(name) is not None)


def _bounds(metadata: Any) -> str:
    """The range of a field in words, such as "at least 0 and below 1"."""
    said = [f"{name.replace('_', ' ')} {metadata[name]:g}" for name in _TESTS if metadata.get(name) is not None]
    return " and ".join(said) or f"a finite number, up to {_LARGEST}"
