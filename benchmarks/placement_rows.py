"""What benchmarks/placement_h100.py measures hybrids on: rows that no search has seen, the same for every seed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from postnas.data import Tokens
from postnas.evaluate import suite
from postnas.evaluate.perplexity import perplexity
from postnas.evaluate.recall import copy
from postnas.evaluate.task import load_task
from postnas.recipe import Evaluate
from postnas.search import objectives

MEASURED = ("kl", "copy", "needle", "key_value")
"""Objectives that distilled hybrids are measured on."""
ANSWERED = {"arc": ("arc_easy", "arc_challenge"), "mmlu": ("mmlu",)}
"""Objectives that follow from tasks' outputs: the negative log-likelihood of the right answer."""
OWN_SEED = 7_919
"""The seed of these rows, so that they are not the search's."""


class Rows:
    """Held-out text, made prompts and test files."""

    def __init__(self, base: Any, tokenizer: Any, heldout: Tokens, settings: Evaluate, excluded: Any) -> None:
        """base: the model that kl is taken to. heldout: what of the text is not searched on. excluded: {task: ids of
        rows that are}."""
        self.base, self.tokenizer, self.heldout, self.settings = base, tokenizer, heldout, settings
        self.own = objectives.make(MEASURED, heldout, tokenizer, settings.perplexity_tokens // 2, OWN_SEED)
        self.tasks = {
            name: suite.rows(load_task(name), tokenizer, settings.limit, OWN_SEED, excluded.get(name, ()))
            for name in settings.tasks
        }

    @torch.no_grad()
    def outputs(self, model: Any) -> dict[str, Any]:
        """What the model gives to every row, by measure."""
        settings = self.settings
        sequences = self.heldout.sequences(settings.perplexity_tokens // settings.length, settings.length)
        passages = settings.copy_passages, settings.copy_tokens, settings.copy_filler
        found: dict[str, Any] = {
            "perplexity": [
                {"id": n, "nll": nll, "tokens": settings.length - 1}
                for n, nll in enumerate(perplexity(model, sequences)["nll"])
            ],
            "copy": copy(model, self.heldout.stream(), *passages, OWN_SEED)["passages"],
        }
        found |= {f"objective {name}": self._losses(model, objective) for name, objective in self.own.items()}
        for name, asked in self.tasks.items():
            found[name] = suite.outputs(load_task(name), model, self.tokenizer, asked, name)
        for objective, tasks in ANSWERED.items():  # on test files, where the search has the validation files
            own = [
                {"id": f"{task}-{row['id']}", "nll": -row["loglikelihoods"][row["gold"]]}
                for task in tasks
                for row in found.get(task, [])
            ]
            found |= {f"objective {objective}": own} if own else {}
        return found

    def _losses(self, model: Any, objective: objectives.Objective) -> list[dict[str, Any]]:
        head, softcap = self.base.lm_head.weight, self.base.config.final_logit_softcapping
        objective = objective.to(head.device)

        def hidden(one: Any, part: objectives.Objective) -> Tensor:
            return one.model(input_ids=part.tokens, use_cache=False).last_hidden_state

        def run(part: objectives.Objective) -> tuple[Tensor, Tensor | None]:
            return hidden(model, part), hidden(self.base, part) if part.kind == "kl" else None

        values = objectives.measure_all(objective, run, head, softcap, 16_384)
        return [{"id": i, "nll": value} for i, value in zip(objective.ids, values.tolist(), strict=True)]
