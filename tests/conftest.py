"""What every test stands on: no network, one thread, a fixed seed, a cache of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# Read by huggingface_hub when it is imported, so it stands before any test module is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# The same examples each time, and no deadline: two workers share a small machine.
settings.register_profile("postnas", derandomize=True, deadline=None)
settings.load_profile("postnas")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none"))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """POSTNAS_CACHE is a new folder for the session, or the one that POSTNAS_TEST_CACHE names."""
    with pytest.MonkeyPatch.context() as patch:
        kept = os.environ.get("POSTNAS_TEST_CACHE")
        patch.setenv("POSTNAS_CACHE", kept or str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def one_thread_and_seed() -> None:
    """Set anew for each test, since a run sets the threads that its recipe names."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN, so that what a kernel leaves unwritten or reads beyond its input shows."""
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(float("nan")))
