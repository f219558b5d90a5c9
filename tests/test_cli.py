"""The command line itself: overview, help from signatures, numbers as people write them, exit codes."""

from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml
from tiny import tiny_recipe, write_recipe

from postnas import __main__ as command_line
from postnas import __version__
from postnas.__main__ import main, parse
from postnas.commands import COMMANDS, takes_recipe
from postnas.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = [
    node
    for name in ("recipe", "trials")
    for node in ast.parse((ROOT / "postnas" / f"{name}.py").read_text(encoding="utf-8")).body
    if isinstance(node, ast.ClassDef)
]
RECIPE_COMMANDS = [name for name, command in COMMANDS.items() if takes_recipe(command)]


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "recipe.yaml", tiny_recipe(tmp_path, tmp_path / "base", tmp_path / "text.jsonl"))


def read(*arguments: str) -> Recipe:
    _, values = parse("run", list(arguments))
    return values["recipe"]


def shown(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What `--help` prints, on one line."""
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_without_arguments_every_command_has_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, command in COMMANDS.items():
        [line] = [line for line in lines if line.split()[:1] == [name]]
        assert line.endswith(command.__doc__.splitlines()[0])


def test_version_is_the_package_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"postnas {__version__}\n"


def test_overview_is_quick_and_loads_no_heavy_library() -> None:
    code = (
        "import sys; from postnas.__main__ import main; main([]);"
        "print('loaded', *{'torch', 'transformers', 'jsonargparse', 'numpy', 'yaml'} & sys.modules.keys())"
    )
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert time.monotonic() - begin < 2.0  # a tenth of a second, and room for a busy machine
    assert done.stdout.splitlines()[-1] == "loaded"


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from postnas.__main__ import main\n"
        "try: main(['run', '--help'])\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown([name, "--help"], capsys)
    assert f"usage: postnas {name}" in text
    assert COMMANDS[name].__doc__.splitlines()[0] in text


def documented(section: Any) -> list[tuple[str, str]]:
    """Each field of a section's dataclass, its parents' too, and the text under it."""
    names = [kind.__name__ for kind in section.__mro__]
    trees = [node for node in SECTIONS if node.name in names]
    return [
        (field.target.id, str(line.value.value))
        for tree in trees
        for field, line in pairwise(tree.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(line, ast.Expr)
        and isinstance(line.value, ast.Constant)
    ]


def test_help_of_a_recipe_holds_the_line_under_each_field(capsys: pytest.CaptureFixture[str]) -> None:
    text = "".join(shown(["run", "--help"], capsys).split())
    sections: dict[str, Any] = {
        name: hint for name, hint in get_type_hints(Recipe).items() if dataclasses.is_dataclass(hint)
    }
    for name, section in {"": Recipe, **sections}.items():
        own = [(field, line) for field, line in documented(section) if field not in sections]
        assert own
        for field, line in own:
            flag = f"--{name}.{field}" if name else f"--{field}"
            assert flag in text and "".join(line.split()) in text, f"{flag} has no help"


def test_help_of_a_function_holds_its_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(["plan", "--help"], capsys)
    assert "model A hub id, a folder or a config.json." in text
    assert "--gpu GPU Whose bandwidth and arithmetic the rooflines take." in text


@pytest.mark.parametrize("name", RECIPE_COMMANDS)
def test_a_recipe_command_without_a_recipe_asks_for_one(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name]) == 2
    assert capsys.readouterr().err.startswith("postnas: recipe: none is given; name a YAML file")


@pytest.mark.parametrize("flag", [["--data.tokens", "1e9"], ["--data.tokens=1e9"], ["--data.tokens", "1000000000"]])
def test_exponents_are_whole_numbers_in_flags(flag: list[str], recipe_file: Path) -> None:
    assert read(str(recipe_file), *flag).data.tokens == 1_000_000_000


@pytest.mark.parametrize("number", ["1e6", "1.0e+6", "1_000_000", "1000000.0"])
def test_exponents_are_whole_numbers_in_yaml(number: str, recipe_file: Path) -> None:
    text = recipe_file.read_text().replace("tokens: 6000", f"tokens: {number}")
    recipe_file.write_text(text)
    tokens = read(str(recipe_file)).data.tokens
    assert tokens == 1_000_000 and isinstance(tokens, int)


def test_exponents_are_whole_numbers_in_lists_and_behind_null(recipe_file: Path) -> None:
    recipe = read(str(recipe_file), "--bench.contexts", "[1e3, 1.5e3]", "--evaluate.limit", "1e2")
    assert recipe.bench.contexts == [1000, 1500] and recipe.evaluate.limit == 100
    assert read(str(recipe_file), "--evaluate.limit", "null").evaluate.limit is None


def test_a_text_that_looks_like_a_number_stays_a_text(recipe_file: Path) -> None:
    assert read(str(recipe_file), "--out", "1e6").out == "1e6"


def test_flags_go_before_the_file_wherever_they_stand(recipe_file: Path) -> None:
    before = read("--train.lr", "1e-3", str(recipe_file), "--place.objective", "{kl: 2}")
    assert (before.train.lr, before.place.objective) == (1e-3, {"kl": 2.0})
    assert before.data == read(str(recipe_file)).data


def test_a_recipe_can_be_given_in_flags_alone() -> None:
    recipe = read("--base.model", "org/name", "--data.text", "[{source: a.txt}]")
    assert recipe.base.model == "org/name" and recipe.data.text[0].source == "a.txt"


def test_a_resolved_recipe_reads_as_itself(recipe_file: Path, tmp_path: Path) -> None:
    recipe = read(str(recipe_file))
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(yaml.safe_dump(recipe.to_dict()))
    assert read(str(resolved)) == recipe


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_the_recipes_of_this_repository_are_sound(path: Path) -> None:
    assert read(str(path)).base.model


@pytest.mark.parametrize(("name", "said"), [("report", "the same command goes on from here"), ("plan", "interrupted")])
def test_an_interrupt_is_one_line_and_130(
    name: str, said: str, recipe_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(recipe: Recipe) -> None:
        raise KeyboardInterrupt

    def interrupted_plan(model: str) -> None:
        raise KeyboardInterrupt

    stopped = interrupted if takes_recipe(COMMANDS[name]) else interrupted_plan
    stopped.__doc__ = "Stop."
    monkeypatch.setitem(command_line.COMMANDS, name, stopped)
    assert main([name, str(recipe_file) if takes_recipe(stopped) else "org/name"]) == 130
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("postnas: interrupted") and said in line


def test_a_bug_of_ours_keeps_its_traceback(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(recipe: Recipe) -> None:
        """Break."""
        raise RuntimeError("our fault")

    monkeypatch.setitem(command_line.COMMANDS, "run", broken)
    with pytest.raises(RuntimeError, match="our fault"):
        main(["run", str(recipe_file)])


def test_the_installed_module_gives_the_exit_code() -> None:
    command = [sys.executable, "-m", "postnas", "runn"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "postnas: command: 'runn' is unknown; did you mean run?\n"


def test_auto_config_alone_knows_a_hybrid(tmp_path: Path) -> None:
    """Tools that read the configuration first meet it through AutoConfig, without AutoModel."""
    from tiny import make_hybrid

    make_hybrid().save_pretrained(tmp_path)
    code = (
        "import sys, postnas\n"
        "from transformers import AutoConfig\n"
        "print(type(AutoConfig.from_pretrained(sys.argv[1])).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.strip() == "HybridConfig", done.stderr
