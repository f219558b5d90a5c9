"""What the command line can do: one function a command, whose signature and docstring are its flags and help.

Commands that take a recipe have a `Recipe` as their only argument; its fields are their flags.
Heavy imports stand inside, so that `postnas --help` answers at once.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from postnas.errors import UserError
from postnas.recipe import Recipe


def run(recipe: Recipe) -> None:
    """Run a recipe to its end; stopped at any moment, the same command goes on."""
    from postnas.pipeline import run as run_pipeline
    from postnas.report.table import demo_table

    print(demo_table(run_pipeline(recipe)))


def _stage(recipe: Recipe, stage: str) -> None:
    from postnas.pipeline import run as run_pipeline

    folder = run_pipeline(recipe, only=stage)
    print(f"{stage}: done, see {folder}")


def align(recipe: Recipe) -> None:
    """Train a candidate for each layer and block to stand in for the layer's attention."""
    _stage(recipe, "align")


def place(recipe: Recipe) -> None:
    """Find which layers keep full attention."""
    _stage(recipe, "place")


def train(recipe: Recipe) -> None:
    """Distil the placed hybrid from its base and write the model folder."""
    _stage(recipe, "train")


def evaluate(recipe: Recipe) -> None:
    """Measure what was kept: perplexity, recall, multiple choice."""
    _stage(recipe, "evaluate")


def bench(recipe: Recipe) -> None:
    """Measure what was won: prefill, decode and cache of base and hybrid."""
    _stage(recipe, "bench")


def report(recipe: Recipe) -> None:
    """Write report.html and the model card from what a run has measured."""
    _stage(recipe, "report")


def generate(
    model: str,
    prompt: str,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    device: str = "cpu",
    dtype: str | None = None,
) -> None:
    """Stream text from a finished hybrid into the terminal.

    Args:
        model: The `model` folder of a run.
        prompt: Text to go on from.
        max_new_tokens: Tokens to make at most.
        temperature: 0 takes the likeliest token; above, tokens are drawn.
        device: cpu or cuda.
        dtype: bfloat16 or float32; as saved where left out.
    """
    import torch

    from postnas.generate.text import generate as stream
    from postnas.models.load import load

    loaded, tokenizer = load(model, None if dtype is None else getattr(torch, dtype), device)
    for piece in stream(loaded, tokenizer, prompt, max_new_tokens, temperature):
        print(piece, end="", flush=True)
    print()


def convert(model: str, placement: Path, out: Path, start: str = "random", dtype: str = "bfloat16") -> None:
    """Make a hybrid from a base and somebody's placement.json, weights inherited, nothing trained.

    Args:
        model: A hub id, a folder, a .gguf file or package:NAME==VERSION/PATH.
        placement: A JSON file: a list of mixer names, or an object with such a list as `placement`.
        out: The folder to write; it must not exist.
        start: How value channels beyond the attention's start: random or plus_minus.
        dtype: bfloat16 or float32.
    """
    import torch

    from postnas.data import load_tokenizer
    from postnas.files import read_json, replacing
    from postnas.models.checkpoint import base_folder
    from postnas.models.convert import convert as convert_model

    if out.exists():
        raise UserError(f"out: {out} exists already; choose another folder")
    found = read_json(placement)
    names = found.get("placement") if isinstance(found, dict) else found
    options = found.get("blocks") if isinstance(found, dict) else None
    if not isinstance(names, list):
        raise UserError(f"{placement}: holds no list of mixer names; give a list, or an object with `placement`")
    folder = base_folder(model)
    hybrid = convert_model(str(folder), names, options, start=start, dtype=getattr(torch, dtype))
    with replacing(out) as temporary:
        hybrid.save_pretrained(temporary)
        load_tokenizer(folder).save_pretrained(temporary)
    print(f"convert: wrote {out}")


def plan(
    model: str,
    context: str = "64k",
    gpu: str = "h100",
    block: str = "jet",
    batch: int = 1,
    align_tokens: str = "6M",
    train_tokens: str = "1B",
    tokens_per_s: float | None = None,
) -> None:
    """Tell what a hybrid will cost and win, before anything is downloaded but a config.

    Args:
        model: A hub id, a folder or a config.json.
        context: Tokens of a sequence; 64k is 65,536.
        gpu: Whose bandwidth and arithmetic the rooflines take.
        block: The linear block.
        batch: Sequences decoded together.
        align_tokens: Tokens of alignment.
        train_tokens: Tokens of distillation.
        tokens_per_s: Training throughput; estimated from the roofline where left out.
    """
    from postnas.search.plan import plan as make_plan

    print(make_plan(model, context, gpu, block, batch, align_tokens, train_tokens, tokens_per_s))


COMMANDS: dict[str, Any] = {
    "run": run,
    "plan": plan,
    "align": align,
    "place": place,
    "train": train,
    "eval": evaluate,
    "bench": bench,
    "report": report,
    "generate": generate,
    "convert": convert,
}
"""Every command by the name that is typed."""


def takes_recipe(command: Any) -> bool:
    return "recipe" in command.__annotations__


def overview() -> str:
    """The commands with one line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.__doc__.splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: postnas COMMAND ...", "", *lines, "", "postnas COMMAND --help tells a command's flags."])


def parse(name: str, arguments: list[str]) -> tuple[Any, dict[str, Any]]:
    """The command and its keyword arguments. Raises UserError for flags that do not fit."""
    import jsonargparse

    command = COMMANDS.get(name)
    if command is None:
        import difflib

        near = difflib.get_close_matches(name, COMMANDS, 1)
        raise UserError(f"command: {name!r} is unknown; {f'did you mean {near[0]}?' if near else 'see postnas --help'}")
    parser = jsonargparse.ArgumentParser(
        prog=f"postnas {name}", description=command.__doc__.splitlines()[0], exit_on_error=False
    )
    if not takes_recipe(command):
        parser.add_function_arguments(command, as_positional=True, sub_configs=False)
        return command, _values(parser, arguments).as_dict()
    parser.add_argument("--config", action="config", help="The recipe, a YAML file; may stand first without the flag.")
    parser.add_class_arguments(Recipe, None, fail_untyped=False)
    if arguments and not arguments[0].startswith("-"):
        path = Path(arguments[0])
        if not path.is_file():
            raise UserError(
                f"recipe: {path} is not there; give the path of a YAML file, such as recipes/smollm2-cpu.yaml"
            )
        arguments = ["--config", *arguments]
    namespace = _values(parser, arguments)
    sections = parser.instantiate(namespace)
    return command, {"recipe": Recipe(**{f.name: sections[f.name] for f in dataclasses.fields(Recipe)})}


def _values(parser: Any, arguments: list[str]) -> Any:
    return parser.parse_args(arguments)
