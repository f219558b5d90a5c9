"""What the command line can do: one function a command, whose signature and docstring are its flags and help.

Commands that take a recipe have a `Recipe` as their first argument; its fields are flags beside their own.
Heavy imports stand inside, so that `postnas --help` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from postnas.errors import UserError
from postnas.recipe import DTYPES, STARTS, Evaluate, Recipe


def run(recipe: Recipe) -> None:
    """Run a recipe to its end; stopped at any moment, the same command goes on."""
    from postnas.pipeline import run as run_pipeline
    from postnas.report.table import demo_table

    print(demo_table(run_pipeline(recipe)))


def _stage(recipe: Recipe, stage: str, solve: bool = False) -> None:
    from postnas.pipeline import run as run_pipeline

    folder = run_pipeline(recipe, only=stage, solve=solve)
    print(f"{stage}: done, see {folder}")


def align(recipe: Recipe) -> None:
    """Train a candidate for each layer and block to stand in for the layer's attention."""
    _stage(recipe, "align")


def place(recipe: Recipe, solve: bool = False) -> None:
    """Find which layers keep full attention.

    Args:
        recipe: What the run does.
        solve: Take the scores that are there, without a model; refuse where one is missing.
    """
    _stage(recipe, "place", solve)


def select(recipe: Recipe) -> None:
    """Find which linear block suits the placement best, each trained alike."""
    _stage(recipe, "select")


def design(recipe: Recipe) -> None:
    """Find which options of the block are best, each variant trained alike."""
    _stage(recipe, "design")


def size(recipe: Recipe) -> None:
    """Find which heads and dims are best at one size of the cache, on the device at hand."""
    _stage(recipe, "size")


def train(recipe: Recipe) -> None:
    """Distil the placed hybrid from its base and write the model folder."""
    _stage(recipe, "train")


def evaluate(recipe: Recipe) -> None:
    """Measure what was kept, by a recipe; `postnas eval MODEL --help` tells how to measure any model."""
    _stage(recipe, "evaluate")


def evaluate_model(
    model: str,
    base: str | None = None,
    tasks: str = "",
    suite: str = "",
    limit: int | None = None,
    text: str | None = None,
    perplexity_tokens: int = 16_384,
    length: int = 512,
    copy_passages: int = 32,
    copy_tokens: int = 200,
    copy_filler: int = 300,
    allow_code: bool = False,
    out: Path = Path("eval"),
    seed: int = 0,
    device: str = "cpu",
    dtype: str | None = None,
    threads: int = 2,
) -> None:
    """Measure a model by itself or beside its base, without a recipe; `--harness ARGS` hands over to lm_eval.

    Args:
        model: A hybrid's folder, a Jet-Nemotron checkpoint, a base, or the hub id or package: name of one.
        base: The model that it is compared with, on the same rows.
        tasks: Names with commas between: arc_easy,gsm8k,needle@4096.
        suite: Groups of the paper with commas between: general, math, commonsense, retrieval, code, long, paper.
        limit: Rows a task; all where left out.
        text: A text for perplexity and the copy test, as a recipe's data.text has it; none where left out.
        perplexity_tokens: Tokens of it that perplexity is measured on.
        length: Tokens of a sequence for perplexity.
        copy_passages: Passages of the copy test; 0 leaves it out.
        copy_tokens: Tokens of a passage, which stands twice.
        copy_filler: Tokens between the two.
        allow_code: Run programs that the model wrote (humaneval, mbpp), each in a sandbox.
        out: The folder for eval.json: scores, rows and what the model gave to each.
        seed: Draws the rows of a limit, and what is made up.
        device: cpu or cuda.
        dtype: bfloat16 or float32; as saved where left out, for a base bfloat16.
        threads: CPU threads.
    """
    from postnas.evaluate.standalone import Settings, evaluate_alone, table

    if dtype is not None:
        _dtype(dtype)
    names = [name.strip() for part in (suite, tasks) for name in part.split(",") if name.strip()]
    if not names and text is None:
        raise UserError("tasks: none is given; name some with --tasks or --suite, or a text with --text")
    sizes = (perplexity_tokens, length, copy_passages, copy_tokens, copy_filler)
    Evaluate(names, limit, *sizes, allow_code)  # refuses what a recipe's section would
    if threads < 1:
        raise UserError(f"threads: {threads} is not possible; give 1 or more")
    settings = Settings(model, base, names, limit, text, *sizes, allow_code, seed, dtype, threads)
    print(table(evaluate_alone(settings, out, _device(device))))
    print(f"eval: wrote {out / 'eval.json'}")


def harness(arguments: list[str]) -> None:
    """Run lm-evaluation-harness with its own arguments on a model of ours."""
    from postnas.evaluate.harness import main as run_harness

    if code := run_harness(arguments):
        raise SystemExit(code)


def bench(recipe: Recipe) -> None:
    """Measure what was won: prefill, decode and cache of base and hybrid."""
    _stage(recipe, "bench")


def report(recipe: Recipe) -> None:
    """Write a run's report and model card, by its recipe; `postnas report RUN RUN ...` compares runs."""
    _stage(recipe, "report")


def warm(recipe: Recipe) -> None:
    """Compile and try the GPU kernels of a recipe's linear blocks, so that its run begins at once."""
    import torch

    from postnas.check import check
    from postnas.warm import warm_layers

    check(recipe)
    if not torch.cuda.is_available():
        raise UserError("device: there is no GPU here, and on a CPU there is nothing to warm; leave this out")
    warm_layers(recipe, "cuda")


def compare(folders: list[Path], out: Path | None = None) -> None:
    """Write one page that compares several runs; of one run, its own report.

    Args:
        folders: Run directories, up to six.
        out: The page that compares; comparison.html where left out.
    """
    from postnas.report.compare import write_comparison
    from postnas.report.html import write_report

    if len(folders) == 1 and out is not None:
        raise UserError("out: a single run's report lies in its own folder; leave --out away, or give several runs")
    one = len(folders) == 1
    path = write_report(folders[0]) if one else write_comparison(folders, out or Path("comparison.html"))
    print(f"report: wrote {path}")


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
        model: The `model` folder of a run, a Jet-Nemotron checkpoint, or the hub id of one.
        prompt: Text to go on from.
        max_new_tokens: Tokens to make at most.
        temperature: 0 takes the likeliest token; above, tokens are drawn.
        device: cpu or cuda.
        dtype: bfloat16 or float32; as saved where left out.
    """
    from postnas.generate.text import generate as stream
    from postnas.models.load import load

    loaded, tokenizer = load(model, None if dtype is None else _dtype(dtype), _device(device))
    for piece in stream(loaded, tokenizer, prompt, max_new_tokens, temperature):
        print(piece, end="", flush=True)
    print()


def _dtype(name: str) -> Any:
    import torch

    if name not in DTYPES:
        raise UserError(f"dtype: {name!r} is not possible; choose one of {', '.join(DTYPES)}")
    return getattr(torch, name)


def _device(name: str) -> str:
    import torch

    if name not in ("cpu", "cuda"):
        raise UserError(f"device: {name!r} is not possible; choose cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device: 'cuda' is not there on this machine; choose cpu")
    return name


def convert(model: str, placement: Path, out: Path, start: str = "random", dtype: str = "bfloat16") -> None:
    """Make a hybrid from a base and somebody's placement.json, weights inherited, nothing trained.

    Args:
        model: A hub id, a folder, a .gguf file or package:NAME==VERSION/PATH.
        placement: A JSON file: a list of mixer names, or an object with such a list as `placement`.
        out: The folder to write; it must not exist.
        start: How value channels beyond the attention's start: random or plus_minus.
        dtype: bfloat16 or float32.
    """
    from postnas.data import load_tokenizer
    from postnas.files import read_json, replacing
    from postnas.models.checkpoint import base_folder
    from postnas.models.convert import convert as convert_model

    if out.exists():
        raise UserError(f"out: {out} exists already; choose another folder")
    if start not in STARTS:
        raise UserError(f"start: {start!r} is not possible; choose one of {', '.join(STARTS)}")
    found = read_json(placement)
    names, options = (found.get("placement"), found.get("blocks")) if isinstance(found, dict) else (found, None)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{placement}: holds no list of mixer names; give a list, or an object with `placement`")
    if not isinstance(options or {}, dict) or not all(isinstance(one, dict) for one in (options or {}).values()):
        raise UserError(f"{placement}: its `blocks` are not possible; give {{block: {{option: value}}}}")
    folder = base_folder(model)
    hybrid = convert_model(str(folder), names, options, start=start, dtype=_dtype(dtype))
    with replacing(out) as temporary:
        hybrid.save_pretrained(temporary)
        load_tokenizer(folder).save_pretrained(temporary)
    print(f"convert: wrote {out}")


def export(model: str, out: Path, format: str = "jet_nemotron", dtype: str | None = None) -> None:
    """Write a finished hybrid in a format that other engines load.

    Args:
        model: The `model` folder of a run.
        out: The folder to write; it must not exist.
        format: jet_nemotron, which SGLang serves: Llama or Qwen2 with jet, swa and attn layers.
        dtype: bfloat16 or float32; as saved where left out.
    """
    from postnas.export.jet_nemotron import export as write
    from postnas.models.load import load

    if format != "jet_nemotron":
        raise UserError(f"format: {format!r} is not possible; choose jet_nemotron")
    if out.exists():
        raise UserError(f"out: {out} exists already; choose another folder")
    loaded, tokenizer = load(model, None if dtype is None else _dtype(dtype))
    difference = write(loaded, tokenizer, out)
    print(f"export: wrote {out}; read back, its logits differ by {difference:.1g} at most")


def plan(
    model: str,
    context: str = "64k",
    gpu: str = "h100",
    block: str = "jet",
    batch: int = 1,
    align_tokens: str = "6M",
    train_tokens: str = "1B",
    tokens_per_s: float | None = None,
    length: str = "2k",
) -> None:
    """Tell what a hybrid or a recipe will cost, before anything is downloaded but a config.

    Args:
        model: A hub id, a folder or a config.json. Or a recipe: see postnas plan RECIPE.yaml --help.
        context: Tokens of a sequence; 64k is 65,536.
        gpu: Whose bandwidth and arithmetic the rooflines take.
        block: The linear block.
        batch: Sequences prefilled and decoded together.
        align_tokens: Tokens of alignment; 6M is 6,000,000.
        train_tokens: Tokens of each stage of distillation; 1B and 1e9 are the same.
        tokens_per_s: What every stage is taken to run at; 40% of the GPU's peak where left out.
        length: Tokens of a training sequence.
    """
    from postnas.search.plan import plan as make_plan

    print(make_plan(model, context, gpu, block, batch, align_tokens, train_tokens, tokens_per_s, length))


def plan_recipe(recipe: Recipe, measured: Path | None = None, gpu: str = "h100", config: str | None = None) -> None:
    """Tell what each stage of a recipe will cost, before anything is downloaded but a config.

    Args:
        recipe: What the run does.
        measured: What benchmarks/dry_run_h100.py wrote: stages are taken to run at the tokens/s in it.
        gpu: Whose memory is compared, and whose arithmetic stages are taken to reach 40% of where none are measured.
        config: The config.json of the base, where its hub cannot be asked.
    """
    from postnas.search.plan import plan_recipe as make_plan

    print(make_plan(recipe, measured, gpu, config))


COMMANDS: dict[str, Any] = {
    "run": run,
    "plan": plan,
    "align": align,
    "place": place,
    "select": select,
    "design": design,
    "size": size,
    "train": train,
    "eval": evaluate,
    "bench": bench,
    "report": report,
    "warm": warm,
    "generate": generate,
    "convert": convert,
    "export": export,
}
"""Every command by the name that is typed."""


def variant(name: str, arguments: list[str]) -> Any:
    """The command that `name` means with these arguments, or None where there is none.

    `eval` and `report` take a recipe, or what a recipe made: a model, several run directories. `plan` takes a base, or
    a recipe.
    """
    if any(Path(word).suffix in (".yaml", ".yml") for word in arguments):
        return {"plan": plan_recipe}.get(name, COMMANDS.get(name))
    if all(word.startswith("-") for word in arguments):
        return COMMANDS.get(name)
    return {"eval": evaluate_model, "report": compare}.get(name, COMMANDS.get(name))


def takes_recipe(command: Any) -> bool:
    return "recipe" in command.__annotations__
