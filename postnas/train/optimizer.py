"""AdamW on float32 weights, and its cosine schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

WARMUP = 0.05
"""Share of the steps over which the learning rate rises from zero."""
FLOOR = 0.1
"""Share of the peak that the cosine ends at."""


def learning_rate(step: int, steps: int, peak: float) -> float:
    """The rate of step 0 <= step < steps: linear warm-up, then a cosine down to a tenth of the peak."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - 1 - warmup)
    return peak * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def make_optimizer(parameters: list[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with betas 0.9 and 0.95; decay falls on matrices only, not on norms, biases, decays and convolutions."""
    groups = [
        {"params": [p for p in parameters if p.ndim == 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim != 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=(0.9, 0.95), fused=True)
