"""`postnas eval MODEL`: any model of ours by itself, or beside its base, without a run directory."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from postnas.data import load_tokenizer
from postnas.errors import UserError
from postnas.evaluate import suite
from postnas.evaluate.verdict import check_text, evaluate
from postnas.files import locked, read_json, write_json
from postnas.models.checkpoint import base_folder
from postnas.models.load import load_any
from postnas.progress import Progress
from postnas.sources import documents, file_sha256

NAMES = 100
"""Documents that are tokenised at a time."""
FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
)
"""What of a model's folder its scores follow from."""
MEASURED = ("model_files", "base_files", "text_tokens", "device")
"""Kept settings that are found out, beside those that a command names."""
PROBE = "The 3 cafés\n\n    return x+12345  # naïve 日本語 🌍\tI'LL don't"
"""A text that tokenizers cut in different ways."""


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

    An interrupted evaluation goes on from OUT/eval.partial.json; a finished one is read and nothing runs, unless it
    has skipped something. `settings` there are the command's and what its names stood for: digests of the models'
    files and of the text's tokens, and the device. The base runs in the model's type where no type is asked for.
    Raises UserError where OUT holds an evaluation with other settings, where the base has another tokenizer or
    vocabulary, and for everything that `verdict.evaluate` refuses.
    """
    suite.check(settings.tasks, settings.allow_code)  # a wrong name is told before a model is loaded
    torch.set_num_threads(settings.threads)
    # A mistake must leave nothing behind, so the folder is made when everything that is asked for is there.
    _kept(out, asdict(settings))
    folder = base_folder(settings.model)
    tokenizer = load_tokenizer(folder)
    files = {"model": files_sha256(folder)}
    if settings.base is not None:
        base = base_folder(settings.base)
        _same_tokens(settings.base, tokenizer, load_tokenizer(base))
        files["base"] = files_sha256(base)
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
    asked = asdict(settings) | {
        "model_files": files["model"],
        "base_files": files.get("base"),
        "text_tokens": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
        "device": device,
    }
    done = _kept(out, asked)
    if done is not None and (out / "eval.json").exists() and not done["skipped"]:
        print(f"eval: {out / 'eval.json'} is done already")
        return done
    models = _models(settings, device)
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


def files_sha256(folder: Path) -> str:
    """SHA-256 over the names, sizes and contents of a model's files (FILES), all bytes of them: 1 to 2 GB a second."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in FILES for path in folder.glob(pattern) if path.is_file()}):
        digest.update(f"{path.name} {path.stat().st_size} {file_sha256(path)}\n".encode())
    return digest.hexdigest()


def _models(settings: Settings, device: str) -> dict[str, Any]:
    """The models by the names that `verdict.evaluate` compares. Raises UserError where they have other vocabularies."""
    dtype = None if settings.dtype is None else getattr(torch, settings.dtype)
    model, _ = load_any(settings.model, dtype, device)
    if settings.base is None:
        return {"model": model}
    base, _ = load_any(settings.base, dtype or model.dtype, device)  # a difference of types is none of the models'
    sizes = base.config.vocab_size, model.config.vocab_size
    if sizes[0] != sizes[1]:
        raise UserError(f"--base: {settings.base} has {sizes[0]} tokens, the model {sizes[1]}; give the model's base")
    return {"base": base, "hybrid": model}


def _same_tokens(name: str, one: Any, other: Any) -> None:
    """Raises UserError where two tokenizers do not give the same ids. Files that differ in form only are alike."""

    def kind(tokenizer: Any) -> tuple[Any, ...]:
        return tokenizer.get_vocab(), tokenizer.eos_token_id, tokenizer(PROBE)["input_ids"], _merges(tokenizer)

    if kind(one) != kind(other):
        raise UserError(f"--base: {name} has another tokenizer than the model; give the base that it was made from")


def _merges(tokenizer: Any) -> list[tuple[str, ...]]:
    """The pairs that a BPE joins, in order; a pair may stand as one text or as two. Empty for other kinds."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    merges = json.loads(backend.to_str())["model"].get("merges", []) if backend is not None else []
    return [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in merges]


def _kept(out: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """What an earlier process left of this very evaluation. Raises UserError where it was another.

    asked: all settings, or first those of the command alone, which are there before anything is read.
    """
    for path in (out / "eval.json", out / "eval.partial.json"):
        if path.exists():
            found = read_json(path)
            kept = found.get("settings") if isinstance(found, dict) else None
            if not isinstance(kept, dict):
                raise UserError(f"{path}: does not tell its settings; choose another --out")
            names = [*asked, *(name for name in kept if name not in asked and name not in MEASURED)]
            changed = [name for name in names if name not in kept or name not in asked or kept[name] != asked[name]]
            if changed:
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
