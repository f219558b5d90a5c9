"""A function of tensors whose shapes do not change, as one CUDA graph: small layers cost more to launch than to run.

A layer of a small model is some fifty kernels of a few microseconds, and a training step thousands. Captured once
and replayed, they follow each other without Python between them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

WARM_UP = 2
"""Calls that run as they are: kernels are compiled and tuned in them, and libraries set up."""
CLOSE = 2e-2
"""Largest relative difference between a graph's result, or its gradients, and the function's: kernels that add up in
another order each time stay far below."""


class Shared:
    """Memory that many graphs use in turn: their input and output, and what they need in between."""

    def __init__(self, like: Tensor) -> None:
        """like: a tensor on a GPU of the shape and type of all inputs and outputs."""
        self.buffers = torch.empty_like(like), torch.empty_like(like)
        self.pool: Any = torch.cuda.graph_pool_handle()


class Replayed:
    """`function`, run as it is at first and on a CPU, then captured, compared with itself and replayed.

    The function gets tensors on a GPU and returns one tensor without a gradient; a backward pass may be a part of it.
    Everything else that it reads must stay where it is, and it must not wait for the GPU (no `.item()`). Where it
    cannot be captured, or its graph gives something else, a warning says so and the function is run as it is.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        parameters: Iterable[nn.Parameter] = (),
        warm_up: int = WARM_UP,
        shared: Shared | None = None,
    ) -> None:
        """parameters: those that the function's backward pass fills the gradients of, anew in each call. shared: for
        functions of one tensor to one of the same shape, whose graphs run one after another."""
        self.function, self.parameters, self.shared = function, list(parameters), shared
        self.left: int | None = warm_up
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[Tensor] = []
        self.gradients: list[Tensor | None] = []
        self.output: Tensor

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The function's result, in memory of its own. Every call must bring inputs of the first one's shapes."""
        if not inputs[0].is_cuda or self.left is None:
            return self.function(*inputs)
        if self.left > 0:
            self.left -= 1
            return self.function(*inputs)
        if self.graph is None:
            return self._captured(inputs)
        return self._replayed(inputs)

    def _replayed(self, inputs: tuple[Tensor, ...]) -> Tensor:
        assert self.graph is not None
        for static, value in zip(self.inputs, inputs, strict=True):
            static.copy_(value)
        self.graph.replay()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        return self.output.clone()

    def _captured(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """The function's own result, after which the graph is there; or never will be."""
        expected, wanted = self._plain(inputs)
        other = tuple(value.flip(-1) for value in inputs)  # a graph must not have kept what it was captured with
        try:
            self._capture(inputs)
            problem = self._wrong(inputs, expected, wanted) or self._wrong(other, *self._plain(other))
        except (RuntimeError, AssertionError) as error:
            problem = _line(error)
        if problem is not None:
            _warn(problem)
            self.graph, self.left = None, None
        for parameter, gradient in zip(self.parameters, wanted, strict=True):
            parameter.grad = gradient
        return expected

    def _plain(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor | None]]:
        """The function's result and the gradients that it fills."""
        for parameter in self.parameters:
            parameter.grad = None
        return self.function(*inputs), [None if p.grad is None else p.grad.clone() for p in self.parameters]

    def _wrong(self, inputs: tuple[Tensor, ...], expected: Tensor, wanted: list[Tensor | None]) -> str | None:
        return _difference(self._replayed(inputs), expected, self.gradients, wanted)

    def _capture(self, inputs: tuple[Tensor, ...]) -> None:
        self.inputs = [value.clone() for value in inputs] if self.shared is None else [self.shared.buffers[0]]
        for static, value in zip(self.inputs, inputs, strict=True):
            static.copy_(value)
        for parameter in self.parameters:
            parameter.grad = None  # so that the graph writes gradients instead of adding to what is there
        graph = torch.cuda.CUDAGraph()
        pool = None if self.shared is None else self.shared.pool
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # other threads may use the GPU
            result = self.function(*self.inputs)
            self.output = result if self.shared is None else self.shared.buffers[1].copy_(result)
        self.gradients = [p.grad for p in self.parameters]
        self.graph = graph


class Differentiable:
    """A module from tensors to one tensor, whose forward and backward passes are two CUDA graphs.

    Each set of shapes that it is called with is captured at its first use and compared with the module itself. On a
    CPU, without gradients, and where the graphs cannot be made or give something else, the module is run as it is; so
    it is where half of the GPU's memory is in use, since each graph holds its own activations. A call's backward pass
    must come before the next call.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.made: dict[tuple[Any, ...], Callable[..., Tensor]] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The module's output for these inputs, in memory that the next call writes over."""
        if not inputs[0].is_cuda or not torch.is_grad_enabled():
            return self.module(*inputs)
        key = tuple((value.shape, value.dtype, value.requires_grad) for value in inputs)
        if key not in self.made:
            self.made[key] = self._made(inputs)
        return self.made[key](*inputs)

    def _made(self, inputs: tuple[Tensor, ...]) -> Callable[..., Tensor]:
        samples = tuple(value.detach().clone().requires_grad_(value.requires_grad) for value in inputs)
        others = tuple(value.detach().flip(-1).requires_grad_(value.requires_grad) for value in inputs)
        learnt = [value for value in self.module.parameters() if value.requires_grad]
        free, total = torch.cuda.mem_get_info(inputs[0].device)
        if not (learnt or any(value.requires_grad for value in inputs)) or free < total / 2:
            return self.module

        def run(module: Callable[..., Tensor], given: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor | None]]:
            output = module(*given)
            wanted = [*(value for value in given if value.requires_grad), *learnt]
            along = torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output).to(output.dtype)
            gradients = torch.autograd.grad(output, wanted, along, allow_unused=True)
            return output.detach().clone(), [None if g is None else g.clone() for g in gradients]

        expected = [run(self.module, given) for given in (samples, others)]
        try:
            graphed: Any = torch.cuda.make_graphed_callables(_Call(self.module), samples, allow_unused_input=True)
            found = [run(graphed, given) for given in (samples, others)]
            problems = [
                _difference(output, wanted, slopes, wanted_slopes)
                for (output, slopes), (wanted, wanted_slopes) in zip(found, expected, strict=True)
            ]
            problem = problems[0] or problems[1]
        except (RuntimeError, AssertionError) as error:
            problem = _line(error)
        if problem is None:
            return graphed
        _warn(problem)
        return self.module


class _Call(nn.Module):
    """A module of its own around another, since capturing changes the one that it is given."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.inner(*inputs)


def _difference(
    found: Tensor, expected: Tensor, gradients: Sequence[Tensor | None], wanted: Sequence[Tensor | None]
) -> str | None:
    """What is wrong with a result and gradients that should be the same; None where nothing is.

    A result's error is the mean over its rows, and each gradient is compared by itself: a few tokens and weights are
    larger than all others together. What is below a ten-thousandth of the largest gradient may be rounding alone.
    """
    errors = [_relative(found, expected)]
    pairs = [(one, other) for one, other in zip(gradients, wanted, strict=True) if other is not None]
    if len(pairs) != sum(one is not None for one in gradients):
        return "it leaves out gradients"
    norms = [float(other.norm()) for _, other in pairs]
    floor = max(norms, default=0.0) * 1e-4
    for (one, other), norm in zip(pairs, norms, strict=True):
        assert one is not None
        errors.append(float((one.float() - other.float()).norm()) / max(norm, floor, 1e-12))
    wrong = [error for error in errors if not error < CLOSE]
    return f"its results differ by {max(wrong):.2g}" if wrong else None


def _line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _warn(problem: str) -> None:
    warnings.warn(f"CUDA graph: not used, since {problem}; the same work runs several times slower", stacklevel=4)


def _relative(found: Tensor, expected: Tensor) -> float:
    """Size of the difference as a share of the expected rows' size, the mean over all rows but empty ones."""
    got, rows = (torch.atleast_2d(value.float()).flatten(0, -2) for value in (found, expected))
    return float(((got - rows).norm(dim=-1) / rows.norm(dim=-1).clamp(min=1e-12)).mean())
