"""The same model on a GPU: the CPU's logits, the CPU's tokens, and a whole run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import make_base, make_text, tiny_recipe, write_recipe

from postnas.__main__ import main
from postnas.files import read_json
from postnas.models.config import HybridConfig
from postnas.models.model import HybridForCausalLM

pytestmark = pytest.mark.gpu


@pytest.fixture
def hybrid() -> HybridForCausalLM:
    config = HybridConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        placement=["jet", "attn", "gated_deltanet", "swa", "jet"],
        blocks={"swa": {"window_size": 9}},
    )
    model = HybridForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, 0.0, 0.1)
    return model


@torch.no_grad()
def test_cuda_logits_equal_cpu_logits(hybrid: HybridForCausalLM) -> None:
    tokens = torch.randint(0, 97, (2, 150))
    mask = torch.ones_like(tokens)
    mask[0, :30] = 0
    here = hybrid(tokens, attention_mask=mask, use_cache=False).logits
    there = hybrid.cuda()(tokens.cuda(), attention_mask=mask.cuda(), use_cache=False).logits.cpu()
    assert (here - there)[mask.bool()].abs().max() < 1e-4


@torch.no_grad()
def test_cuda_pieces_equal_whole(hybrid: HybridForCausalLM) -> None:
    hybrid, tokens = hybrid.cuda(), torch.randint(0, 97, (2, 150), device="cuda")
    whole = hybrid(tokens, use_cache=False).logits
    cache, pieces = None, []
    for piece in tokens.split([1, 7, 64, 1, 77], dim=1):
        output = hybrid(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    assert (torch.cat(pieces, 1) - whole).abs().max() < 1e-4


def test_cuda_generates_what_the_cpu_does(hybrid: HybridForCausalLM) -> None:
    prompt = torch.randint(0, 97, (2, 12))
    settings = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    here = hybrid.generate(prompt, **settings)
    there = hybrid.cuda().generate(prompt.cuda(), **settings).cpu()
    assert (here == there).all()


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_cuda_run_goes_to_its_end(tmp_path: Path, compute: str) -> None:
    base, text = make_base(tmp_path / "base"), make_text(tmp_path / "text.jsonl")
    recipe = tiny_recipe(tmp_path, base, text, device="cuda", compute=compute)
    assert main(["run", str(write_recipe(tmp_path / "recipe.yaml", recipe))]) == 0
    assert {row["model"] for row in read_json(tmp_path / "run" / "bench.json")["rows"]} == {"base", "hybrid"}
