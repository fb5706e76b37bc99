"""The options of a command as a person types them: what is wrong with one is one line that names it so."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import re
import shlex
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import tyro

from esper_jax.config import Config, Range, fault, kinds, nearest_hint

# Fields that have a shorter option of their own, which decides the sizes too.
INSTEAD = {"--data.name": "--data", "--data.data-dir": "--data-dir"}
T = TypeVar("T")


class Option(NamedTuple):
    """What may follow an option."""

    field: str  # Class.field, as an error of the class calls it
    annotation: Any
    bounds: Range


def table(options: type, prefix: str = "--") -> dict[str, Option]:
    """The options of a dataclass by name; those of a `Config` in it stand beside its own."""
    found: dict[str, Option] = {}
    hints = get_type_hints(options)
    for field in dataclasses.fields(options):
        hint, name = hints[field.name], prefix + field.name.replace("_", "-")
        if isinstance(hint, type) and issubclass(hint, Config):
            found |= table(hint)
        elif dataclasses.is_dataclass(hint):
            found |= table(hint, f"{name}.")  # type: ignore[arg-type]  # a class of one
        else:
            names = [name, no(name)] if hint is bool else [name]
            bounds = field.metadata.get("range", Range())
            found |= dict.fromkeys(names, Option(f"{options.__name__}.{field.name}", hint, bounds))
    return found


def no(name: str) -> str:
    """`--quiet` the other way round: `--no-quiet`."""
    return re.sub(r"([^.-][^.]*)$", r"no-\1", name)


def given(argv: list[str]) -> dict[str, list[str]]:
    """The words after each option, which is called by its name with dashes. Raises ValueError for others, and for an
    option that is given twice."""
    found: dict[str, list[str]] = {}
    names = [word.split("=")[0].replace("_", "-") for word in argv if word.startswith("--")]
    words: list[str] = []
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            name = name.replace("_", "-")
            if name in found:
                raise ValueError(f"{name}: is given {names.count(name)} times; must be given once")
            words = found[name] = [value] if equals else []
        elif word != "-h":
            if not found:
                raise ValueError(f"{shlex.quote(word)}: must be an option, such as --help")
            words.append(word)
    return found


def check(argv: list[str], options: type) -> dict[str, list[str]]:
    """The words after each option. Raises ValueError for an unknown option and for words that its type or bounds do not
    allow; what concerns two options shows itself when they are used."""
    known, found = table(options), given(argv)
    for name, words in found.items():
        if name == "--help" or name.startswith("--tyro-"):
            continue
        if name not in known:
            raise ValueError(f"{name}: must be an option that --help names{nearest_hint(name, known)}")
        if (allowed := _fault(known[name], words)) is not None:
            raise ValueError(f"{' '.join([name, shlex.join(words)]).strip()}: must be {allowed}")
    return found


def _fault(option: Option, words: list[str]) -> str | None:
    """What an option has to be given with, if not with these words."""
    if option.annotation is bool:
        return "given without a value" if words else None
    several = get_origin(option.annotation) is tuple
    values = [_value(option.annotation, word) for word in words]
    if not several and len(values) != 1:  # None is never allowed where a value is read
        return f"given with one value, {fault(option.annotation, ..., option.bounds)}"
    return fault(option.annotation, tuple(values) if several else values[0], option.bounds)


def _value(annotation: Any, word: str) -> Any:
    """A word as the type of a field reads it, or as it is."""
    kind, *none = get_args(annotation)[:1] if get_origin(annotation) is tuple else kinds(annotation)
    if none and word.lower() == "none":
        return None
    if get_origin(annotation) is not Literal and kind in (int, float, Path):
        with contextlib.suppress(ValueError):
            return kind(word)
    return word


def cli(options: type[T], argv: list[str], *, prog: str, default: T | None = None) -> T:
    """`tyro.cli`, which prints the help and exits; what it refuses is a ValueError of one line."""
    said = io.StringIO()
    words = [re.sub(r"(^|=)none$", r"\1None", word) for word in argv]  # as the help and all messages spell it
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(options, args=words, prog=prog, **({} if default is None else {"default": default}))
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(_reason(stop, said.getvalue())) from None


def _reason(stop: SystemExit, said: str) -> str:
    """What a class said when it refused its values, else the words in tyro's box."""
    cause = stop.__context__
    while cause is not None and not isinstance(cause, ValueError):
        cause = cause.__context__
    if cause is not None:
        return str(cause)
    rows = [row.strip("│ ") for row in said.splitlines() if row.startswith("│")]
    return " ".join(itertools.takewhile(lambda row: row.strip("─"), rows)) or said


def typed(message: str, argv: list[str], options: type) -> str:
    """A message about a field of the configuration, about the option instead, with what was typed."""
    match = re.match(r"(\w+\.\w+) = (.*?): ", message, re.DOTALL)
    for name, option in table(options).items():
        if match and match[1] in (option.field, option.field.replace("TextConfig.", "Config.")):
            name = INSTEAD.get(name, name)
            with contextlib.suppress(ValueError):
                words = given(argv).get(name)
                return f"{name} {shlex.join(words) if words else match[2]}: {message[match.end() :]}"
    return message
