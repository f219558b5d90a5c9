"""The command line: `postnas COMMAND ...`, or `python -m postnas COMMAND ...`.

Flags and help come from the signature of each command in commands.py, through jsonargparse. A user's mistake
is one line on stderr and exit code 2; an interrupted run exits with 130.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import re
import sys
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from postnas import __version__
from postnas.commands import COMMANDS, compare, harness, takes_recipe, variant
from postnas.errors import UserError
from postnas.recipe import Recipe

EXAMPLE = "recipes/smollm2-cpu.yaml"
EXPONENT = re.compile(r"(?<![\w.+-])[0-9]+(\.[0-9]+)?[eE]\+?[0-9]+(?![\w.])")
"""A number such as 1e9 or 1.5e6."""
NO_FLAGS = ("recipe", "return")
WANTED = {
    "int": "a whole number, such as 1000 or 1e6",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list, such as [a, b]",
    "dict": "a mapping, such as {name: value}",
    "NoneType": "null",
}
"""How a mend calls a type."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return the exit code: 0, 2 for a user's mistake, 130 where interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return 0
    if arguments[0] == "--version":
        print(f"postnas {__version__}")
        return 0
    try:
        command, values = parse(arguments[0], arguments[1:])
        command(**values)
    except UserError as error:
        print(f"postnas: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        resumes = takes_recipe(COMMANDS[arguments[0]])
        print(f"postnas: interrupted{'; the same command goes on from here' if resumes else ''}", file=sys.stderr)
        return 130
    return 0


def overview() -> str:
    """The commands with one line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.__doc__.splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: postnas COMMAND ...", "", *lines, "", "postnas COMMAND --help tells a command's flags."])


def parse(name: str, arguments: list[str]) -> tuple[Any, dict[str, Any]]:
    """The command and its keyword arguments. Raises UserError for a command, flag or value that does not fit."""
    if name == "eval" and arguments[:1] == ["--harness"]:
        return harness, {"arguments": arguments[1:]}
    command = variant(name, arguments)
    if command is None:
        raise UserError(f"command: {name!r} is unknown; {_near(name, COMMANDS, 'see postnas --help')}")
    if takes_recipe(command):
        return command, _recipe_and_flags(name, command, arguments)
    if command is compare:
        arguments = _listed(arguments)
    parser = _parser(name, command)
    parser.add_function_arguments(command, as_group=False, as_positional=True)
    return command, _parsed(parser, arguments, typing.get_type_hints(command)).as_dict()


def _listed(arguments: list[str]) -> list[str]:
    """The arguments with the words that are no flag and no flag's value as one list in front, as jsonargparse wants."""
    words: list[str] = []
    flags: list[str] = []
    for word in arguments:
        value = bool(flags) and flags[-1].startswith("--") and "=" not in flags[-1]
        (flags if word.startswith("-") or value else words).append(word)
    return [json.dumps(words), *flags]


def read_recipe(name: str, arguments: list[str]) -> Recipe:
    """The recipe of `postnas NAME FILE --section.field VALUE ...`. Raises UserError for what does not fit."""
    return _recipe_and_flags(name, COMMANDS[name], arguments)["recipe"]


def _recipe_and_flags(name: str, command: Any, arguments: list[str]) -> dict[str, Any]:
    """The arguments of a command that takes a recipe: that, and the command's own flags."""
    if not arguments:
        raise UserError(f"recipe: none is given; name a YAML file, as in postnas {name} {EXAMPLE}")
    parser = _parser(name, command, usage=f"postnas {name} RECIPE.yaml [--SECTION.FIELD VALUE ...]")
    parser.add_argument("recipe", nargs="?", type=str, help=f"The recipe, a YAML file such as {EXAMPLE}.")
    parser.add_function_arguments(command, as_group=False, skip={"recipe"})
    parser.add_class_arguments(Recipe, None)
    flags = {flag: hint for flag, hint in typing.get_type_hints(command).items() if flag not in NO_FLAGS}
    known = _fields(Recipe) | flags
    values = _parsed(parser, arguments, known)
    if values.recipe is not None:
        values = _parsed(parser, arguments, known, _document(Path(values.recipe)))
    sections = parser.instantiate(values)
    recipe = Recipe(**{field.name: sections[field.name] for field in dataclasses.fields(Recipe)})
    return {"recipe": recipe} | {flag: sections[flag] for flag in flags}


def _parser(name: str, command: Any, **settings: Any) -> Any:
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    return jsonargparse.ArgumentParser(
        prog=f"postnas {name}",
        description=command.__doc__.splitlines()[0],
        allow_abbrev=False,
        exit_on_error=False,
        **settings,
    )


def _parsed(parser: Any, arguments: list[str], known: dict[str, Any], document: dict[str, Any] | None = None) -> Any:
    """The values of a recipe's `document` and of the flags, which go before. known: the type of each flag."""
    try:
        values = None if document is None else parser.parse_object(document)
        return parser.parse_args(_spelt_out(arguments, known), namespace=values)
    except argparse.ArgumentError as error:
        raise UserError(_line(str(error), known, f"see {parser.prog} --help")) from None


def _line(text: str, known: Iterable[str], otherwise: str) -> str:
    """One line in our words for jsonargparse's many: the field, the value, and the mend."""
    if unknown := re.search(r"unrecognized arguments: ([^\s=]+)", text):
        flag = unknown[1]
        return f"{flag}: is not understood; {_near(flag, [f'--{name}' for name in known], otherwise)}"
    if missing := re.search(r"arguments are required: (.+)", text):
        return f"{missing[1]}: is missing; {otherwise}"
    field = ".".join(re.findall(r'key "([^"]+)"', text))
    value = re.search(r"(?:Got|Given) value: (.+)", text)
    wanted = dict.fromkeys(re.findall(r"Expected (?:a )?<class '(\w+)'>", text))
    if field and value and wanted:
        mend = " or ".join(WANTED[kind] for kind in wanted)
        return f"{field}: {value[1]!r} is not possible; give {mend}"
    return f"{text}; {otherwise}"


def _near(name: str, known: Iterable[str], otherwise: str) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"did you mean {near[0]}?" if near else otherwise


def _fields(section: Any, prefix: str = "") -> dict[str, Any]:
    """The type of each flag of a recipe, {"train.lr": float, ...}."""
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(section).items():
        found |= _fields(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else {f"{prefix}{name}": hint}
    return found


def _document(path: Path) -> dict[str, Any]:
    """The sections of a YAML file, their keys checked."""
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a YAML file, such as {EXAMPLE}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}, line {mark.line + 1}" if mark else str(path)
        raise UserError(f"{place}: is not YAML ({getattr(error, 'problem', None) or error}); mend the file") from error
    return _checked(found, Recipe, "")


def _checked(value: Any, hint: Any, name: str) -> Any:
    """A value of a recipe file, with 1e6 for whole numbers. Raises UserError for a key that a section has not."""
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        where = f"{name}." if name else ""
        if not isinstance(value, dict):
            fields = f"give fields, such as {next(iter(hints))}, and their values"
            raise UserError(f"{name or 'recipe'}: {value!r} is not possible; {fields}")
        for key in value:
            if key not in hints:
                mend = _near(str(key), hints, f"choose from {', '.join(hints)}")
                raise UserError(f"{where}{key}: is no field of a recipe; {mend}")
        for field in dataclasses.fields(hint):
            needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if name and needed and field.name not in value:
                raise UserError(f"{where}{field.name}: is missing; add it")
        return {key: _checked(inner, hints[key], f"{where}{key}") for key, inner in value.items()}
    if typing.get_origin(hint) is list:
        [inner] = typing.get_args(hint)
        if isinstance(value, list):
            return [_checked(item, inner, f"{name}[{index}]") for index, item in enumerate(value)]
        if dataclasses.is_dataclass(inner):
            example = f"[{{{dataclasses.fields(inner)[0].name}: ...}}]"
            raise UserError(f"{name}: {value!r} is not possible; give a list, such as {example}")
    if _whole(hint):
        spelt = EXPONENT.sub(_digits, value) if isinstance(value, str) else value
        return int(spelt) if isinstance(spelt, float) and spelt.is_integer() else spelt
    return value


def _spelt_out(arguments: list[str], known: dict[str, Any]) -> list[str]:
    """The arguments as jsonargparse wants them: 1e9 as 1000000000 behind the flags that want whole numbers,
    --allow-code as --allow_code, and `true` behind a switch that has no value."""
    flag, spelt = "", []
    for index, argument in enumerate(arguments):
        if argument.startswith("--"):
            flag, equals, value = argument[2:].partition("=")
            flag = flag if flag in known else flag.replace("-", "_")
            argument = f"--{flag}{equals}{value}" if flag in known else argument
        spelt.append(EXPONENT.sub(_digits, argument) if _whole(known.get(flag)) else argument)
        bare = argument == f"--{flag}" and known.get(flag) is bool
        if bare and (index + 1 == len(arguments) or arguments[index + 1] not in ("true", "false")):
            spelt.append("true")
    return spelt


def _whole(hint: Any) -> bool:
    return int in (hint, *typing.get_args(hint))


def _digits(number: re.Match[str]) -> str:
    value = float(number[0])
    return str(int(value)) if value.is_integer() else number[0]


if __name__ == "__main__":
    sys.exit(main())
