"""lm-evaluation-harness, unforked, on our models: its own command line with `--model postnas` as the default.

    python -m postnas.evaluate.harness --model_args pretrained=runs/x/model,dtype=float32 --tasks arc_easy

What could run foreign code or read a pickle is refused, whether it comes as a flag or from a `--config` file.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import sys
from argparse import Namespace
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from postnas.errors import UserError
from postnas.sources.formats import short

MODEL = "postnas"
DTYPES: dict[str, torch.dtype | None] = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
REFUSED = {
    "--trust_remote_code": "would run code from the hub",
    "--use_cache": "keeps pickled answers, and no pickle is read here",
    "--cache_requests": "keeps pickled prompts, and no pickle is read here",
    "--confirm_run_unsafe_code": "would run what the model wrote in this very process",
}
"""Settings of lm_eval that we do not take, as its flags, and why."""
OPTIONS = {
    "add_bos_token",
    "batch_size",
    "chat_template_args",
    "enable_thinking",
    "logits_cache",
    "max_batch_size",
    "max_length",
    "prefix_token_id",
    "softmax_dtype",
    "think_end_token",
    "truncation",
}
"""Arguments of lm_eval's own Hugging Face model that make sense for a model that we load."""
EVALS = "lm_eval.tasks.score.math.math_grader"
"""Module of the SCORE math tasks; it hands the model's answer to sympy's parse_expr, which runs it as Python."""
EVALS_NAME = "robustness_math"
"""What the names of those tasks and their groups hold."""
MISTAKES = ("Tasks not found", "Couldn't find cache", "BuilderConfig", "Bad split", "Unknown split", "The repository")
"""How lm_eval and datasets begin a ValueError that tells of a name that is wrong, or of data that is not here."""


def main(argv: list[str]) -> int:
    """Run lm_eval's command line on `argv` and return its exit code.

    Raises UserError where lm_eval is missing, for what REFUSED names, for another model than ours, and for
    flags, tasks, files or data sets that lm_eval cannot take or find.
    """
    cli = _command_line()
    # lm_eval's parser reads sys.argv itself, and puts the command `run` into it where none is given.
    kept, sys.argv = sys.argv, ["lm-eval", *argv]
    try:
        args = cli.parse_args()
        if args.command == "run":
            _check(args)
        with _no_code_from_the_hub():
            cli.execute(args)
    except SystemExit as stop:  # argparse has printed help, or what is wrong
        return int(stop.code or 0)
    except OSError as error:  # a file, or data that cannot be fetched
        raise UserError(f"lm_eval: {short(error)}; check the name, the path and the way to the hub") from error
    except ValueError as error:
        if str(error).startswith("Attempted to run"):  # a task that runs the model's code, or shows it pictures
            raise UserError(f"--tasks: {short(str(error).partition('. ')[0])}; choose another task") from error
        if not str(error).startswith(MISTAKES):
            raise
        raise UserError(f"lm_eval: {short(error)}; `lm-eval ls tasks` lists what there is") from error
    except ImportError as error:  # lm_eval's own words name the extra
        raise UserError(f"lm_eval: {short(error)}; install what it names") from error
    finally:
        sys.argv = kept
    return 0


def load(pretrained: str, dtype: str = "auto", device: str | None = None) -> tuple[Any, Any]:
    """Model and tokenizer of a hybrid or a base, as `postnas.models.load.load_any` gives them.

    dtype: a key of DTYPES. device: as torch names it, with or without its number; cuda becomes the CPU where torch
    sees none, since lm_eval's default is cuda:0. Raises UserError for a name, a type or a device that does not fit.
    """
    from postnas.models.load import load_any

    if dtype not in DTYPES:
        raise UserError(f"model_args: dtype {dtype!r} is unknown; choose from {', '.join(DTYPES)}")
    return load_any(pretrained, DTYPES[dtype], _device(device))


def language_model() -> type[Any]:
    """The class that lm_eval knows as `postnas`: its Hugging Face model, around a model that we loaded.

    Registered at the first call. Raises UserError where lm_eval is missing.
    """
    try:
        import lm_eval.models.huggingface  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(f"lm_eval: {error.name} is not installed; pip install 'postnas[eval]'") from None
    return _registered()


@functools.cache
def _registered() -> type[Any]:
    from lm_eval.api.registry import model_registry
    from lm_eval.models.huggingface import HFLM

    class PostnasLM(HFLM):
        def __init__(self, pretrained: str = "", dtype: str = "auto", device: str | None = None, **options: Any):
            if not pretrained:
                raise UserError("model_args: pretrained is missing; give --model_args pretrained=FOLDER")
            if unknown := sorted(options.keys() - OPTIONS):
                known = ", ".join(sorted({"pretrained", "dtype", "device"} | OPTIONS))
                raise UserError(f"model_args: {unknown[0]} is not taken; choose from {known}")
            model, tokenizer = load(str(pretrained), str(dtype), device)
            options = {"softmax_dtype": "float32"} | options  # lm_eval's default would round to the model's type
            try:
                super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", **options)
            except (TypeError, ValueError) as error:
                raise UserError(f"model_args, batch_size: {short(error)}; mend it") from error
            self.pretrained = str(pretrained)  # lm_eval writes it into its results

        def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
            """Logits [B, T, vocab] of tokens [B, T] that are padded at the right; no cache is filled for a score."""
            with torch.inference_mode():
                return self.model(input_ids=inps, use_cache=False).logits

    model_registry.register(MODEL, target=PostnasLM)
    return PostnasLM


def _command_line() -> Any:
    """lm_eval's parser, with our model registered."""
    language_model()
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    setup_logging()
    return HarnessCLI()


def _check(args: Namespace) -> None:
    """Refuse what REFUSED names, and make ours the model. The file of `--config` counts like flags."""
    from lm_eval.config.evaluate_config import EvaluatorConfig

    given = {name: value for name, value in vars(args).items() if value}
    try:
        if args.config:
            given = EvaluatorConfig.load_yaml_config(args.config) | given
        for flag, why in REFUSED.items():
            if given.get(flag.removeprefix("--")):
                raise UserError(f"{flag}: {why}; leave it out, or run lm_eval itself")
        if given.get("model", MODEL) != MODEL:
            raise UserError(f"--model: {given['model']!r} is not ours; leave it out, or run lm_eval itself")
        if not given.get("tasks"):
            raise UserError("--tasks: none is given; name some, as `lm-eval ls tasks` lists them")
        tasks = given["tasks"]
        for name in tasks.split(",") if isinstance(tasks, str) else tasks:
            if EVALS_NAME in str(name):
                raise UserError(f"--tasks: {name} {_EVALS_WHY}")
        args.model = MODEL
        with contextlib.redirect_stdout(io.StringIO()):  # it shows a file's settings, and will again
            EvaluatorConfig.from_cli(args)
    except UserError:
        raise
    except (OSError, TypeError, ValueError) as error:
        raise UserError(f"lm_eval: {short(error)}; mend the flags or the file of --config") from error


_EVALS_WHY = "runs what the model wrote as Python in this very process; choose another task"


class _Refused(ModuleType):
    """Stands for a module that must not be used, however a task comes to it: by a group, a wildcard or a file."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what importing itself asks for
            raise AttributeError(name)
        raise UserError(f"--tasks: SCORE's math {_EVALS_WHY}")


@contextlib.contextmanager
def _no_code_from_the_hub() -> Iterator[None]:
    """Nothing that a task fetches is run, whatever the task itself asks for.

    Some tasks take their metric from the hub as a Python file, as soon as they are loaded. Some (RULER, babilong) load
    the model's tokenizer anew and allow it code of its own: that is taken back.
    """
    evaluate: Any = importlib.import_module("evaluate")

    def refuse(path: str, *_: Any, **__: Any) -> Any:
        raise UserError(f"--tasks: a task's metric {path!r} is code from the hub; choose another task")

    with contextlib.ExitStack() as stack:
        stack.enter_context(_replaced(evaluate, "load", refuse))
        for kind in _auto_classes():
            stack.enter_context(_replaced(kind, "from_pretrained", _without_code(kind)))
        kept = sys.modules.get(EVALS)
        sys.modules[EVALS] = _Refused(EVALS)
        try:
            yield
        finally:
            sys.modules.pop(EVALS)
            if kept is not None:
                sys.modules[EVALS] = kept


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    kept = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, kept)


def _auto_classes() -> list[Any]:
    """transformers' classes that choose a class by a file's word, each with a `from_pretrained` of its own."""
    import transformers
    from transformers.models.auto import auto_factory

    kinds = [getattr(transformers, name) for name in dir(transformers) if name.startswith("Auto")]
    kinds.append(auto_factory._BaseAutoModelClass)
    return [kind for kind in kinds if "from_pretrained" in vars(kind)]


def _without_code(kind: Any) -> Any:
    kept = vars(kind)["from_pretrained"].__func__

    def from_pretrained(cls: Any, *arguments: Any, trust_remote_code: Any = None, **options: Any) -> Any:
        return kept(cls, *arguments, trust_remote_code=False, **options)

    return classmethod(from_pretrained)


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or "cuda")
    except RuntimeError:
        raise UserError(f"--device: {name!r} is unknown to torch; give cpu, cuda or cuda:0") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        return torch.device("cpu")
    return device


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"postnas: {error}", file=sys.stderr)
        sys.exit(2)
