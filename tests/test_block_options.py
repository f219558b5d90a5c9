"""Options of the blocks: what is refused, and in which words; what is filled in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from postnas.blocks import BLOCKS, make_block
from postnas.blocks.dims import Dims
from postnas.errors import UserError

every_block = pytest.mark.parametrize("block", list(BLOCKS))
DIMS = Dims(hidden=24, heads=4, kv_heads=2, head_dim=6)

REFUSED = [
    ("nonsense", {}, "nonsense"),
    ("swa", {"window_size": 1}, "window_size"),
    ("swa", {"window_size": 0}, "window_size"),
    ("attn", {"window_size": 8}, "window_size"),
    ("jet", {"heads": 2}, "heads"),
    *[(b, {"num_heads": 0}, "num_heads") for b in ("jet", "gated_deltanet")],
    *[(b, {"num_heads": -1}, "num_heads") for b in ("jet", "gated_deltanet")],
    *[(b, {"head_dim": 0}, "head_dim") for b in ("jet", "gated_deltanet")],
    *[(b, {"expand_v": 0.1}, "expand_v") for b in ("jet", "gated_deltanet")],
    *[(b, {"conv_size": 1}, "conv_size") for b in ("jet", "gated_deltanet")],
    ("jet", {"dconv_generator_reduction": 1000}, "dconv_generator_reduction"),
    ("jet", {"dconv_generator_reduction": 0}, "dconv_generator_reduction"),
    ("jet", {"num_heads": "four"}, "num_heads: 'four' is no int or null"),
    ("jet", {"num_heads": 2.5}, "num_heads: 2.5 is no int or null"),
    ("jet", {"num_heads": True}, "num_heads"),
    ("jet", {"conv_size": None}, "conv_size"),
    ("jet", {"expand_v": "two"}, "expand_v"),
    ("jet", {"expand_v": float("nan")}, "expand_v"),
    ("jet", {"expand_v": float("inf")}, "expand_v"),
    ("gated_deltanet", {"norm_eps": "tiny"}, "norm_eps"),
    ("gated_deltanet", {"qkv_bias": "no"}, "qkv_bias"),
    ("swa", {"window_size": "8"}, "window_size"),
]


@pytest.mark.parametrize("block, options, field", REFUSED)
def test_options_that_cannot_be_are_one_line(block: str, options: dict[str, Any], field: str) -> None:
    with pytest.raises(UserError, match=field) as raised:
        make_block(block, DIMS, options)
    assert "\n" not in str(raised.value)


@every_block
def test_an_unknown_option_is_one_line_that_lists_the_known(block: str) -> None:
    with pytest.raises(UserError, match=rf"blocks\.{block}\.colour") as raised:
        make_block(block, DIMS, {"colour": 3})
    for known in BLOCKS[block].Options.__dataclass_fields__:
        assert known in str(raised.value)


@every_block
def test_options_leave_nothing_open_and_resolve_once(block: str) -> None:
    options = BLOCKS[block].Options().resolve(DIMS)
    values = {name: getattr(options, name) for name in options.__dataclass_fields__}
    assert None not in values.values()
    assert options.resolve(replace(DIMS, heads=8)) == options


def test_official_options_are_taken_as_they_are() -> None:
    """The official files hold norm_eps as text and expand_v cut short: 96 x 2.6666666667 is 256 channels."""
    dims = Dims(hidden=1536, heads=12, kv_heads=2, head_dim=128)
    given = {"num_heads": 12, "head_dim": 96, "expand_v": 2.6666666667, "conv_size": 4, "norm_eps": "1e-5"}
    with torch.device("meta"):
        mixer = make_block("jet", dims, given | {"dconv_generator_reduction": 8, "qkv_bias": False})
    shapes = {name: tuple(value.shape) for name, value in mixer.state_dict().items()}
    channels = 12 * 256
    assert shapes == {
        "q_proj.weight": (12 * 96, 1536),
        "k_proj.weight": (12 * 96, 1536),
        "v_proj.weight": (channels, 1536),
        "g_proj.weight": (channels, 1536),
        "o_proj.weight": (1536, channels),
        "a_proj.weight": (12, 1536),
        "b_proj.weight": (12, 1536),
        "A_log": (12,),
        "dt_bias": (12,),
        "o_norm.weight": (256,),
        "dynamic_conv1d.kernel_generator.w1.weight": (channels // 8, 1536),
        "dynamic_conv1d.kernel_generator.w2.weight": (channels * 4, channels // 8),
        "dynamic_conv1d.kernel_generator.w2.bias": (channels * 4,),
    }
    assert mixer.options.norm_eps == 1e-5
