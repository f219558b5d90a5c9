"""The plan: its bytes are those that caches and training hold, its operations those that torch counts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from postnas.__main__ import main
from postnas.blocks import BLOCKS, make_block
from postnas.blocks.attention import visible_pairs
from postnas.blocks.dims import Dims
from postnas.blocks.inherit import plain_step, relative_error
from postnas.errors import UserError
from postnas.models.checkpoint import base_config
from postnas.models.config import HybridConfig
from postnas.models.model import HybridForCausalLM
from postnas.models.supernet import Supernet
from postnas.ops.chunked_loss import chunked_kl
from postnas.search.cost import (
    GPUS,
    Decoder,
    Gpu,
    align_stage,
    break_even,
    decode_seconds,
    largest_batch,
    mixers_stage,
    prefill_seconds,
    search_stage,
    weights_stage,
)
from postnas.search.plan import CONTEXT_UNITS, TOKEN_UNITS, count, plan

CONFIGS = Path(__file__).parent / "shapes"
MIB = 2**20
SLOW = Gpu("slow memory", bandwidth=1e9, flops=1e30, memory=2**34)
DIMS = Dims(hidden=96, heads=6, kv_heads=2, head_dim=32, qkv_bias=True)


def decoder(name: str, placement: list[str] | None = None) -> Decoder:
    return Decoder(base_config(str(CONFIGS / f"{name}.json")), placement)


def small_config(**fields: Any) -> HybridConfig:
    settings: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }
    return HybridConfig(**settings | fields)


def counted(work: Callable[[], Any]) -> int:
    """Operations that torch sees: matrix products, attention as such, and the triangular system."""

    def triangular(matrix: Any, columns: Any, *args: Any, **kwargs: Any) -> int:
        return torch.Size(matrix).numel() * columns[-1]

    formulas = {torch.ops.aten.linalg_solve_triangular: triangular}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        work()
    return counter.get_total_flops()


def masked(tokens: int, window: int | None = None, past: int = 0) -> int:
    """Pairs that the counter sees and the mask hides."""
    return tokens * (past + tokens) - visible_pairs(tokens, past, window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [100, 300])
@pytest.mark.parametrize(
    "placement",
    [["attn"] * 4, ["jet", "attn", "gated_deltanet", "swa"], ["jet", "jet", "swa", "jet"], ["gated_deltanet"] * 4],
)
def test_cache_bytes_are_those_the_cache_takes(placement: list[str], window: int, dtype: torch.dtype) -> None:
    config = small_config(placement=placement, blocks={"swa": {"window_size": window}, "jet": {"expand_v": 1.5}})
    model = HybridForCausalLM(config).to(dtype).eval()
    tokens = torch.randint(0, config.vocab_size, (2, 512))
    cache = None
    with torch.no_grad():
        for context in (256, 512):
            cache = model.model(tokens[:, context - 256 : context], past_key_values=cache, use_cache=True)[1]
            assert cache.nbytes == 2 * Decoder(config).cache_bytes(context, dtype)


def test_cache_bytes_are_the_papers() -> None:
    """Table of the paper at 64K; its MB are MiB."""
    assert decoder("qwen2.5-1.5b").cache_bytes(65536) == 1792 * MIB
    assert decoder("qwen3-1.7b").cache_bytes(65536) == 7168 * MIB


def official(
    hidden: int, layers: int, inner: int, heads: int, jet: dict[str, Any], window: int, **kept: Any
) -> Decoder:
    placement = [next((name for name, where in kept.items() if i in where), "jet") for i in range(layers)]
    config = HybridConfig(
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=2,
        qkv_bias=True,
        tie_word_embeddings=True,
        placement=placement,
        blocks={"jet": jet | {"qkv_bias": False}, "swa": {"window_size": window}},
    )
    return Decoder(config)


def test_official_hybrids_have_their_weights_and_cache() -> None:
    jet = {"num_heads": 12, "head_dim": 96, "expand_v": 2.6666666667}
    small = official(1536, 28, 8960, 12, jet, 1152, attn=(14, 19), swa=(20, 21))
    assert small.parameters == 1_964_806_208
    jet = {"num_heads": 16, "head_dim": 128, "expand_v": 2}
    large = official(2048, 36, 11008, 16, jet, 2048, attn=(17, 20, 32), swa=(5, 16, 19, 21, 22, 25, 27))
    assert large.cache_bytes(65536) / MIB == pytest.approx(258, abs=1)


@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": False}, {"mlp_bias": True, "qk_norm": True}])
def test_parameters_are_the_models(fields: dict[str, Any]) -> None:
    config = small_config(placement=["jet", "attn", "gated_deltanet", "swa"], **fields)
    assert Decoder(config).parameters == sum(p.numel() for p in HybridForCausalLM(config).parameters())
    assert decoder("smollm2-135m").parameters == 134_515_008


def test_visible_pairs_are_those_of_the_mask() -> None:
    for tokens, past, window in [(7, 0, None), (7, 5, None), (9, 0, 4), (9, 2, 4), (3, 20, 4), (1, 3, 4), (5, 1, 50)]:
        query, key = torch.arange(past, past + tokens)[:, None], torch.arange(past + tokens)
        seen = (key <= query) & (query - key < (window or 10**6))
        assert visible_pairs(tokens, past, window) == seen.sum()


@pytest.mark.parametrize("tokens", [1, 48, 64, 100, 256])
@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_mixer_flops_are_those_torch_counts(name: str, tokens: int) -> None:
    """What torch does not see is elementwise: convolutions, and at a single token the write to the state.

    `kda` and `rwkv7` write to the state in products, which it sees.
    """
    mixer = make_block(name, DIMS, {"window_size": 70} if name == "swa" else None)
    x, rope = torch.randn(1, tokens, DIMS.hidden), (torch.ones(1, tokens, 32), torch.zeros(1, tokens, 32))
    with torch.no_grad():
        found = counted(lambda: mixer(x, plain_step(x, rope)))
    if name in ("attn", "swa"):
        found -= 4 * DIMS.heads * DIMS.head_dim * masked(tokens, mixer.window)
    else:
        found += 2 * tokens * mixer.conv_channels * getattr(mixer.options, "conv_size", 0)
        written = tokens == 1 and name not in ("kda", "rwkv7")
        found += 2 * mixer.heads * mixer.key_dim * mixer.value_dim if written else 0
    assert found == mixer.flops(tokens)


@pytest.mark.parametrize("past", [0, 64])
def test_forward_flops_are_those_torch_counts(past: int) -> None:
    config = small_config(placement=["jet", "attn", "gated_deltanet", "attn"])
    model, tokens = HybridForCausalLM(config).eval(), torch.randint(0, 512, (1, past + 128))
    with torch.no_grad():
        cache = model(tokens[:, :past], use_cache=True).past_key_values if past else None
        found = counted(lambda: model(tokens[:, past:], past_key_values=cache, use_cache=True))
    expected = Decoder(config).body_flops(128, past) + Decoder(config).head_flops(128)
    assert found - 2 * 4 * 64 * masked(128, past=past) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("block", ["jet", "gated_deltanet"])
def test_stage_flops_are_those_torch_counts(block: str) -> None:
    """Attention's hidden pairs are taken off for every forward, and twice for every backward."""
    config, length = small_config(vocab_size=4096), 128
    base = HybridForCausalLM(config).requires_grad_(False)
    net = Supernet(base, {block: {layer: make_block(block, config.dims()) for layer in range(4)}})
    placement = [block, "attn", block, block]
    tokens, hidden = torch.randint(0, 512, (1, length)), 4 * 64 * masked(length)
    full, hybrid, linear = Decoder(config), Decoder(config, placement), Decoder(config, [block] * 4)

    def align() -> None:
        with torch.no_grad():
            h, step = net.embed(tokens)
            for layer, x, y in net.walk(h, step):
                with torch.enable_grad():
                    relative_error(net.mixer(layer, block)(x, step)[0], y).backward()

    def train() -> None:
        with torch.no_grad():
            h, step = net.embed(tokens)
            teacher = net.norm(net.run(h, step, net.attention))
        student = net.norm(net.run(h, step, placement))
        chunked_kl(student[0], net.head, teacher[0], net.head).backward()

    whole = net.build(placement, torch.float32).requires_grad_(True)

    def train_all() -> None:
        with torch.no_grad():
            teacher = base.model(tokens, use_cache=False).last_hidden_state
        student = whole.model(tokens, use_cache=False).last_hidden_state
        chunked_kl(student[0], whole.lm_head.weight, teacher[0], base.lm_head.weight).backward()

    bound = align_stage(full, linear, length, length).flops
    assert 0.85 * bound < counted(align) - 4 * hidden <= bound
    expected = mixers_stage(full, hybrid, linear, length, length).flops
    assert counted(train) - 7 * hidden == pytest.approx(expected, rel=0.03)
    expected = weights_stage(full, hybrid, linear, length, length).flops
    assert counted(train_all) - 7 * hidden == pytest.approx(expected, rel=0.03)


def held(*tensors: torch.Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def test_stage_memory_is_what_training_holds() -> None:
    config = small_config(placement=["attn"] * 4)
    base = HybridForCausalLM(config).to(torch.bfloat16)
    candidates = [make_block("jet", config.dims()) for _ in range(4)]
    full, hybrid, linear = Decoder(config), Decoder(config, ["jet", "attn", "jet", "jet"]), Decoder(config, ["jet"] * 4)
    fixed = held(*base.parameters())

    def trained(parameters: list[torch.nn.Parameter]) -> int:
        for p in parameters:
            p.grad = torch.zeros_like(p)
        optimizer = torch.optim.AdamW(parameters)
        optimizer.step()
        moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
        return held(*parameters, *(p.grad for p in parameters if p.grad is not None), *moments)

    every = [p for mixer in candidates for p in mixer.parameters()]
    assert align_stage(full, linear, 64, 64).memory == fixed + trained(every)
    some = [p for index in (0, 2, 3) for p in candidates[index].parameters()]
    idle = held(*candidates[1].parameters())
    assert mixers_stage(full, hybrid, linear, 64, 64).memory == fixed + idle + trained(some)
    student = HybridForCausalLM(small_config(placement=hybrid.placement))
    assert weights_stage(full, hybrid, linear, 64, 64).memory == fixed + held(*every) + trained([*student.parameters()])


def test_search_scores_every_layer_once_for_each_objective() -> None:
    base = decoder("smollm2-135m")
    stage = search_stage(base, decoder("smollm2-135m", ["jet"] * 30), 2048, 2, 256)
    assert stage.tokens == 30 * 2 * 2048
    layers = stage.flops - 30 * 16 * 2 * base.head_flops(256)
    assert layers == pytest.approx(16 * base.body_flops(256) * (1 + 30 / 2), rel=1e-6)


def test_decode_reads_keys_once_and_states_twice() -> None:
    config = small_config(placement=["jet", "attn", "attn", "jet"])
    model = Decoder(config)
    jet, attn = model.mixers[0], model.mixers[1]
    weights = 2 * sum(p.numel() for p in HybridForCausalLM(config).parameters())
    states = 2 * 2 * jet.state_bytes(1000, torch.bfloat16) + 2 * attn.state_bytes(1000, torch.bfloat16)
    assert decode_seconds(model, 1000, 3, SLOW) == pytest.approx((weights + 3 * states) / 1e9)


def test_untied_embeddings_are_held_but_not_read() -> None:
    tied, untied = Decoder(small_config()), Decoder(small_config(tie_word_embeddings=False))
    assert untied.parameters - tied.parameters == 512 * 64
    assert untied.step_bytes(100, 1) == tied.step_bytes(100, 1)


def test_rooflines_are_arithmetic_where_memory_is_fast() -> None:
    model, fast = Decoder(small_config()), Gpu("fast memory", bandwidth=1e30, flops=1e9, memory=2**34)
    assert prefill_seconds(model, 256, 2, fast) == 2 * (model.body_flops(256) + model.head_flops(1)) / 1e9
    assert decode_seconds(model, 256, 2, fast) == 2 * (model.body_flops(1, 256) + model.head_flops(1)) / 1e9


def test_roofline_of_the_official_model_is_below_its_measured_parts() -> None:
    """On an H100 its kernels, batch 128 at 64K, add up to about 10.5 ms a step."""
    jet = {"num_heads": 12, "head_dim": 96, "expand_v": 2.6666666667}
    model = official(1536, 28, 8960, 12, jet, 1152, attn=(14, 19), swa=(20, 21))
    assert 0.007 < decode_seconds(model, 65536, 128, GPUS["h100"]) < 0.0105


def test_largest_batch_fills_the_memory() -> None:
    model, gpu = decoder("qwen2.5-1.5b"), GPUS["h100"]
    batch = largest_batch(model, 65536, gpu)
    weights = 2 * model.parameters
    assert weights + batch * 1792 * MIB <= gpu.memory < weights + (batch + 1) * 1792 * MIB
    assert largest_batch(model, 2**24, GPUS["l4"]) == 0


@pytest.mark.parametrize("kept", [0, 1, 8])
@pytest.mark.parametrize("batch", [1, 64])
def test_break_even_is_where_the_hybrid_begins_to_win(kept: int, batch: int) -> None:
    base, gpu = decoder("qwen2.5-1.5b"), GPUS["h100"]
    hybrid = decoder("qwen2.5-1.5b", ["attn"] * kept + ["jet"] * (28 - kept))
    found = break_even(base, hybrid, batch, gpu, MIB)
    assert found is not None

    def gain(context: int) -> float:
        return decode_seconds(base, context, batch, gpu) / decode_seconds(hybrid, context, batch, gpu)

    assert gain(found) > 1 >= gain(found - 1)
    gains = [gain(found * 2**i) for i in range(8)]
    assert gains == sorted(gains)


def test_break_even_comes_earlier_in_a_larger_batch_and_later_for_a_larger_block() -> None:
    base = decoder("qwen2.5-1.5b")

    def at(batch: int, **options: Any) -> int:
        config = base_config(str(CONFIGS / "qwen2.5-1.5b.json"))
        config.blocks = {"jet": options}
        found = break_even(base, Decoder(config, ["jet"] * 28), batch, GPUS["h100"], MIB)
        assert found is not None
        return found

    batches = [at(batch) for batch in (1, 2, 8, 64)]
    assert batches == sorted(batches, reverse=True) and len(set(batches)) == 4
    blocks = [at(1, expand_v=expand) for expand in (0.5, 1, 2, 3)]
    assert blocks == sorted(blocks) and len(set(blocks)) == 4


def test_break_even_may_be_never_or_at_once() -> None:
    base, hybrid = decoder("qwen2.5-1.5b"), decoder("qwen2.5-1.5b", ["jet"] * 28)
    assert break_even(base, hybrid, 1, GPUS["h100"], 1024) is None
    config = small_config(blocks={"jet": {"num_heads": 1, "head_dim": 4}})
    assert break_even(Decoder(config), Decoder(config, ["jet"] * 4), 1, SLOW, 1024) == 1


@pytest.mark.parametrize("name", ["qwen2.5-1.5b", "qwen3-1.7b", "smollm2-135m"])
@pytest.mark.parametrize("context", ["64k", "1M", "1"])
def test_plan_is_a_table_of_a_hundred_columns(name: str, context: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS)
    lines = plan(f"{name}.json", context, batch=8).splitlines()
    assert max(map(len, lines)) <= 100
    start = next(i for i, line in enumerate(lines) if set(line) == {"-"})
    assert [line.split()[0] for line in lines[start + 2 : start + 7]] == ["0", "1", "2", "4", "8"]


def test_plan_tells_the_papers_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(CONFIGS / "qwen2.5-1.5b.json"), "--context", "64k", "--gpu", "h100"]) == 0
    base = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("28 (base)"))
    assert base.split()[4:6] == ["1.75", "GiB"]


def test_plan_leaves_out_budgets_the_base_has_no_layers_for(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads((CONFIGS / "smollm2-135m.json").read_text()) | {"num_hidden_layers": 4}))
    text = plan(str(tmp_path), "8k")
    kept = [line.split()[2] for line in text.splitlines() if line.startswith("mixers only")]
    assert kept == ["0", "1", "2"]


def test_stated_throughput_gives_the_hours() -> None:
    text = plan(str(CONFIGS / "smollm2-135m.json"), train_tokens="36M", tokens_per_s=1000.0)
    hours = [line.split()[-2:] for line in text.splitlines() if line.startswith(("mixers only", "all weights"))]
    assert len(hours) == 10 and all(pair == ["1,000", "10.0"] for pair in hours)


def test_what_does_not_fit_is_marked() -> None:
    small = plan(str(CONFIGS / "qwen3-1.7b.json"), gpu="rtx4090", batch=4)
    assert sum("GiB*" in line for line in small.splitlines() if line.startswith("all weights")) == 5
    assert "GiB*" not in plan(str(CONFIGS / "smollm2-135m.json"))


def test_counts_take_units() -> None:
    contexts = {"65536": 65536, "64k": 65536, "64K": 65536, "1M": 2**20, "1.5k": 1536}
    assert {text: count("context", text, CONTEXT_UNITS) for text in contexts} == contexts
    tokens = {"6M": 6_000_000, "1B": 10**9, "1e9": 10**9, "2.5e6": 2_500_000, "500k": 500_000, "1T": 10**12}
    assert {text: count("tokens", text, TOKEN_UNITS) for text in tokens} == tokens


@pytest.mark.parametrize("text", ["", "64q", "-3", "0", "0.2", "k", "nan", "inf", "1e400", "1,000", "64kk", "٣"])
def test_a_bad_count_is_one_line(text: str) -> None:
    with pytest.raises(UserError, match=r"^context: .* is no number of tokens; give one such as 8, 8K, 8M$"):
        count("context", text, CONTEXT_UNITS)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--gpu", "h10"], "gpu: 'h10' is unknown; choose from h100, "),
        (["--context", "64q"], "context: '64q' is no number of tokens"),
        (["--length", "0"], "length: '0' is no number of tokens"),
        (["--train_tokens", "1B2"], "train_tokens: '1B2' is no number of tokens"),
        (["--block", "attn"], "block: 'attn' is not a linear block; choose from jet, "),
        (["--batch", "0"], "batch: 0 is not possible"),
        (["--tokens_per_s", "-1"], "tokens_per_s: -1.0 is not possible"),
    ],
)
def test_a_bad_flag_is_one_line(flags: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(CONFIGS / "smollm2-135m.json"), *flags]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"postnas: {told}") and captured.err.count("\n") == 1 and not captured.out


@pytest.mark.parametrize(
    "text", ['{"a": 1}', "[1]", "no json", '{"model_type": "bert"}', '{"model_type": "none such"}']
)
def test_what_is_no_model_is_one_line(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    assert main(["plan", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
