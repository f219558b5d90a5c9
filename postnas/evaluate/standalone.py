"""`postnas eval MODEL`: any model of ours by itself, or beside its base, without a run directory."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from postnas.errors import UserError
from postnas.evaluate import suite
from postnas.evaluate.verdict import check_text, evaluate
from postnas.files import locked, read_json, write_json
from postnas.models.load import load_any
from postnas.progress import Progress
from postnas.sources import documents

NAMES = 100
"""Documents that are tokenised at a time."""


@dataclass(frozen=True)
class Settings:
    """What is measured; kept beside the result, so that an interrupted evaluation goes on with the same."""

    model: str
    base: str | None
    tasks: list[str]
    limit: int | None
    text: str | None
    perplexity_tokens: int
    length: int
    copy_passages: int
    copy_tokens: int
    copy_filler: int
    allow_code: bool
    seed: int
    dtype: str | None
    threads: int


def evaluate_alone(settings: Settings, out: Path, device: str) -> dict[str, Any]:
    """What `verdict.evaluate` gives for the model, beside its base where there is one; written to OUT/eval.json.

    An interrupted evaluation goes on from OUT/eval.partial.json. Raises UserError where OUT holds an evaluation with
    other settings, and for everything that `verdict.evaluate` refuses.
    """
    suite.wanted(settings.tasks, settings.allow_code)  # a wrong name is told before a model is loaded
    torch.set_num_threads(settings.threads)
    asked = asdict(settings)
    # A mistake must leave nothing behind, so the folder is made when everything that is asked for is there.
    done = _kept(out, asked)
    dtype = None if settings.dtype is None else getattr(torch, settings.dtype)
    model, tokenizer = load_any(settings.model, dtype, device)
    models = {"model": model}
    if settings.base is not None:
        models = {"base": load_any(settings.base, dtype, device)[0], "hybrid": model}
    tokens = _stream(settings, tokenizer)
    check_text(
        tokens,
        settings.perplexity_tokens if settings.text else 0,
        settings.length,
        settings.copy_passages if settings.text else 0,
        settings.copy_tokens,
        settings.copy_filler,
        settings.seed,
    )
    partial = out / "eval.partial.json"
    with locked(out):
        result = evaluate(
            models,
            tokenizer,
            tokens,
            tasks=settings.tasks,
            limit=settings.limit,
            perplexity_tokens=settings.perplexity_tokens if settings.text else 0,
            length=settings.length,
            copy_passages=settings.copy_passages if settings.text else 0,
            copy_tokens=settings.copy_tokens,
            copy_filler=settings.copy_filler,
            allow_code=settings.allow_code,
            seed=settings.seed,
            done=done,
            save=lambda value: write_json(partial, value | {"settings": asked}),
        )
        write_json(out / "eval.json", result | {"settings": asked})
        partial.unlink(missing_ok=True)
    return result


def _kept(out: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """What an earlier process left of this very evaluation. Raises UserError where it was another."""
    for path in (out / "eval.json", out / "eval.partial.json"):
        if path.exists():
            found = read_json(path)
            kept = found.get("settings") if isinstance(found, dict) else None
            if kept != asked:
                changed = [name for name, value in asked.items() if not kept or kept.get(name) != value]
                raise UserError(f"{path}: holds an evaluation with another {changed[0]}; choose another --out")
            return found
    return None


def _stream(settings: Settings, tokenizer: Any) -> Tensor:
    """The first tokens of the text, as many as are needed, each document followed by the end-of-text id."""
    if settings.text is None:
        return torch.empty(0, dtype=torch.int64)
    copies = settings.copy_passages * settings.copy_tokens + 2 * settings.copy_filler + settings.copy_tokens
    wanted = max(settings.perplexity_tokens, copies)
    tokens: list[int] = []
    texts = iter(documents(settings.text))
    with Progress("text", total=wanted) as bar:
        while len(tokens) < wanted and (some := list(islice(texts, NAMES))):
            before = len(tokens)
            for ids in tokenizer(some, add_special_tokens=False)["input_ids"]:
                tokens += [*ids, tokenizer.eos_token_id]
            bar.advance(len(tokens) - before)
    return torch.tensor(tokens[:wanted], dtype=torch.int64)


def table(result: dict[str, Any]) -> str:
    """The result in lines: each score with its error and n, the difference from the base, and what was left out."""
    pairs = {(pair["task"], pair["metric"]): pair for pair in result["paired"]}
    lines = []
    for row in result["rows"]:
        text = f"{row['task']:<26} {row['metric']:<14} {row['model']:<7} {_with_error(row['value'], row['stderr'])}"
        pair = pairs.get((row["task"], row["metric"]))
        if pair and row["model"] == "hybrid":
            text += f"  {_with_error(pair['difference'], pair['stderr'], '+')}"
            text += f"  kept {pair['kept']:.1%}" if pair["kept"] is not None else ""
        lines.append(f"{text}  n {row['n']:,}")
    if result["paired"] and result["kept"]["mean"] is not None:
        lines.append(f"kept above chance, {len(result['kept']['tasks'])} tasks: {result['kept']['mean']:.1%}")
    lines += [f"skipped {one['task']}: {one['reason']}" for one in result["skipped"]]
    return "\n".join(lines)


def _with_error(value: float, stderr: float | None, sign: str = "") -> str:
    return f"{value:{sign}.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")
