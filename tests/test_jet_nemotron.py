"""Official Jet-Nemotron folders: read without remote code, written so that others read them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_golden import read
from tiny import make_base, make_hybrid, make_tokenizer, plain, tokens

from postnas.__main__ import main
from postnas.errors import UserError
from postnas.export.jet_nemotron import export, to_jet_nemotron
from postnas.models import JetNemotronConfig, JetNemotronForCausalLM
from postnas.models.convert import convert
from postnas.models.load import load

EIGHT = {
    "conv_size",
    "dconv_generator_reduction",
    "dconv_implementation",
    "expand_v",
    "head_dim",
    "mode",
    "norm_eps",
    "num_heads",
}
"""The keys of `efficient_attention_config.jet` that SGLang's loader takes, none more."""


def official_folder(folder: Path, name: str = "mixed", **changes: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder as the hub has it, from a recorded model: config.json, safetensors, tokenizer, remote code's names."""
    config, weights = read(name)
    config |= {"auto_map": {"AutoConfig": "x.JetNemotronConfig", "AutoModelForCausalLM": "y.JetNemotronForCausalLM"}}
    config |= {"architectures": ["JetNemotronForCausalLM"], "torch_dtype": "bfloat16", "max_window_layers": 6}
    config |= {"use_mrope": False} | changes
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    kept = {key: value for key, value in weights.items() if not key.startswith("_")}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    make_tokenizer().save_pretrained(folder)
    return folder, weights


FORMS: dict[str, Any] = {
    "list": ["jet", "attn", "jet", "swa", "jet", "jet"],
    "json": '["jet", "attn", "jet", "swa", "jet", "jet"]',
    "python": "['jet', 'attn', 'jet', 'swa', 'jet', 'jet']",
}


@pytest.mark.parametrize("form", list(FORMS))
def test_an_official_folder_loads(form: str, tmp_path: Path) -> None:
    """In bfloat16 as saved, and in float32 with the recorded logits but for RoPE's rounding (see test_golden)."""
    folder, weights = official_folder(tmp_path / "model", layer_types=FORMS[form])
    model, tokenizer = load(folder)
    assert isinstance(model, JetNemotronForCausalLM)
    assert model.dtype == torch.bfloat16
    assert model.config.placement == FORMS["list"]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert tokenizer("river")["input_ids"]
    wide, _ = load(folder, torch.float32)
    with torch.no_grad():
        error = (plain(wide, weights["_input_ids"]) - weights["_logits"]).abs().max()
    assert error < 1e-2


def test_an_untied_head_loads(tmp_path: Path) -> None:
    folder, weights = official_folder(tmp_path / "model", "attn_swa")
    model, _ = load(folder)
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight"])


AUTO = """
import sys
import postnas
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder)
made = [AutoConfig.from_pretrained(folder), model, AutoModel.from_pretrained(folder)]
print(*[type(one).__name__ for one in made])
import torch
print(model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False).shape[1])
"""


def test_the_auto_classes_take_it_without_remote_code(tmp_path: Path) -> None:
    folder, _ = official_folder(tmp_path / "model")
    done = subprocess.run([sys.executable, "-c", AUTO, str(folder)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    names, count = done.stdout.splitlines()
    assert names == "JetNemotronConfig JetNemotronForCausalLM JetNemotronModel"
    assert 3 < int(count) <= 7


def test_a_saved_folder_has_the_official_fields_and_names(tmp_path: Path) -> None:
    folder, weights = official_folder(tmp_path / "model", layer_types=FORMS["python"])
    given = json.loads((folder / "config.json").read_text())
    model, _ = load(folder)
    model.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    named = [
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps"),
        *("use_cache", "tie_word_embeddings", "rope_theta", "rope_scaling", "attention_dropout", "max_window_layers"),
        *("use_mrope", "bos_token_id", "eos_token_id", "torch_dtype", "model_type", "architectures"),
    ]
    for name in named:
        assert written[name] == given[name], name
    assert written["layer_types"] == FORMS["list"]
    jet = written["efficient_attention_config"]["jet"]
    assert set(jet) == EIGHT
    assert float(jet.pop("norm_eps")) == 1e-5
    assert jet == {k: v for k, v in given["efficient_attention_config"]["jet"].items() if k != "norm_eps"}
    assert written["efficient_attention_config"]["swa"] == {"window_size": 48}
    assert not {"placement", "blocks", "qkv_bias", "rope_parameters", "head_dim", "family"} & written.keys()
    saved = load_file(tmp_path / "again" / "model.safetensors")
    assert saved.keys() == {key for key in weights if not key.startswith("_")}
    assert all(torch.equal(saved[key], weights[key]) for key in saved)


def test_scaled_rope_is_read_and_written() -> None:
    scaling = {"type": "linear", "factor": 4.0}
    config = JetNemotronConfig(**read("attn_swa")[0] | {"rope_scaling": scaling})
    assert config.rope_parameters == {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0}
    again = JetNemotronConfig(**config.to_dict())
    assert again.rope_parameters == config.rope_parameters
    assert config.to_dict()["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


JET = read("mixed")[0]["efficient_attention_config"]
BAD: list[tuple[dict[str, Any], str]] = [
    ({"layer_types": "jet, attn"}, "layer_types"),
    ({"layer_types": ["jet"] * 5 + ["mamba"]}, r"'mamba'"),
    ({"layer_types": ["jet"] * 5 + ["gated_deltanet"]}, r"layer_types\[5\]: 'gated_deltanet'"),
    ({"layer_types": ["jet"]}, "1 mixers for 6 layers"),
    ({"efficient_attention_config": {"swa": {"window_size": 4}}}, "efficient_attention_config.jet: is missing"),
    ({"efficient_attention_config": {"jet": JET["jet"]}}, "efficient_attention_config.swa: is missing"),
    ({"efficient_attention_config": JET | {"swa": {}}}, "window_size: is missing"),
    ({"efficient_attention_config": JET | {"gla": {}}}, "gla: is unknown"),
    ({"efficient_attention_config": JET | {"jet": JET["jet"] | {"speed": 2}}}, "jet.speed: is unknown"),
    ({"efficient_attention_config": "jet"}, "efficient_attention_config: 'jet'"),
    ({"head_dim": 8}, "head_dim: 8"),
    ({"qk_norm": True}, "qk_norm: True"),
    (
        {"layer_types": None, "efficient_attention_config": None, "placement": ["jet"] * 6}
        | {"blocks": {"jet": {"qkv_bias": True}}},
        "blocks.jet.qkv_bias",
    ),
]


@pytest.mark.parametrize("changes, message", BAD, ids=[message for _, message in BAD])
def test_a_config_that_cannot_be_is_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        JetNemotronConfig(**read("mixed")[0] | changes)
    assert "\n" not in str(raised.value)


def test_jet_layers_have_no_biases_however_the_config_is_made() -> None:
    config = JetNemotronConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        placement=["jet", "attn"], blocks={"jet": {"conv_size": 3}},
    )  # fmt: skip
    names = JetNemotronForCausalLM(config).state_dict().keys()
    assert "model.layers.1.self_attn.q_proj.bias" in names
    assert not [name for name in names if name.startswith("model.layers.0.self_attn.q_proj.b")]


def test_a_tied_config_with_a_head_of_its_own_is_one_line(tmp_path: Path) -> None:
    folder, weights = official_folder(tmp_path / "model")
    kept = {name: value for name, value in weights.items() if not name.startswith("_")}
    embedding = kept["model.embed_tokens.weight"]
    save_file(kept | {"lm_head.weight": embedding.clone()}, folder / "model.safetensors", metadata={"format": "pt"})
    assert load(folder)[0].config.tie_word_embeddings
    save_file(kept | {"lm_head.weight": embedding + 1}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lm_head\.weight is not the embedding"):
        load(folder)


@pytest.mark.parametrize("fault", ["missing", "left over", "wrong shape"])
def test_weights_that_do_not_fit_are_one_line(fault: str, tmp_path: Path) -> None:
    folder, _ = official_folder(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.A_log"
    value = weights.pop(name)
    if fault == "left over":
        weights |= {name: value, "model.layers.1.self_attn.A_log": value.clone()}
        name = "model.layers.1.self_attn.A_log"
    if fault == "wrong shape":
        weights[name] = value[:-1].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=name) as raised:
        load(folder)
    assert "\n" not in str(raised.value)


# Export


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Bases of the Llama and the Qwen2 family, as folders."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("bases")
    llama = make_base(folder / "llama", layers=3)
    config = Qwen2Config(**json.loads((llama / "config.json").read_text()) | {"model_type": "qwen2"})
    qwen = Qwen2ForCausalLM(config)
    for parameter in qwen.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.15)
    qwen.save_pretrained(folder / "qwen2")
    make_tokenizer().save_pretrained(folder / "qwen2")
    return llama, folder / "qwen2"


@pytest.mark.parametrize("family", [0, 1], ids=["llama", "qwen2"])
def test_a_hybrid_exports_and_reads_back(family: int, speaker: tuple[Path, Path], tmp_path: Path) -> None:
    options: dict[str, Any] = {"jet": {"qkv_bias": False}, "swa": {"window_size": 9}}
    hybrid = convert(str(speaker[family]), ["jet", "attn", "swa"], options, dtype=torch.float32)
    assert export(hybrid, make_tokenizer(), tmp_path / "out") == 0.0
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["model_type"] == "jet_nemotron"
    assert written["architectures"] == ["JetNemotronForCausalLM"]
    assert set(written["efficient_attention_config"]["jet"]) == EIGHT
    saved = load_file(tmp_path / "out" / "model.safetensors")
    for part in "qkv":
        biases = [saved[f"model.layers.{layer}.self_attn.{part}_proj.bias"] for layer in (1, 2)]
        assert all((bias == 0).all() == (family == 0) for bias in biases)
        assert f"model.layers.0.self_attn.{part}_proj.bias" not in saved
    again, _ = load(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(plain(again, tokens()), plain(hybrid, tokens()), rtol=0, atol=0)


def test_the_command_exports(speaker: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hybrid = convert(str(speaker[0]), ["jet", "attn", "jet"])
    hybrid.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "out"), "--format", "jet_nemotron"]) == 0
    assert "wrote" in capsys.readouterr().out
    assert main(["generate", str(tmp_path / "out"), "The river", "--max_new_tokens", "3"]) == 0
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "out")]) == 2
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "new"), "--format", "onnx"]) == 2
    assert not (tmp_path / "new").exists()


def test_an_official_folder_is_exported_as_it_is(tmp_path: Path) -> None:
    folder, weights = official_folder(tmp_path / "model")
    assert main(["export", str(folder), str(tmp_path / "out")]) == 0
    assert main(["export", str(tmp_path / "out"), str(tmp_path / "again")]) == 0
    saved = load_file(tmp_path / "again" / "model.safetensors")
    assert saved.keys() == {key for key in weights if not key.startswith("_")}
    assert all(torch.equal(saved[key], weights[key].to(saved[key].dtype)) for key in saved)
    written = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "again")]
    assert written[0] == written[1]


REFUSED: list[tuple[list[str], dict[str, Any], str]] = [
    (["jet", "attn"], {"qkv_bias": True}, "blocks.jet.qkv_bias"),
    (["jet", "gated_deltanet"], {"qkv_bias": False}, r"placement\[1\]: 'gated_deltanet'"),
    (["attn"], {"qk_norm": True}, "qk_norm"),
    (["attn"], {"out_bias": True}, "out_bias"),
    (["attn"], {"mlp_bias": True}, "mlp_bias"),
    (["attn"], {"head_dim": 16}, "head_dim: 16"),
    (["attn"], {"hidden_act": "gelu"}, "hidden_act: 'gelu'"),
    (["attn"], {"sandwich_norm": True}, "sandwich_norm"),
    (["attn"], {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.5}}, "rope_theta: 1000.5"),
]


@pytest.mark.parametrize("placement, fields, message", REFUSED, ids=[message for *_, message in REFUSED])
def test_what_the_format_cannot_hold_is_refused(placement: list[str], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        to_jet_nemotron(make_hybrid(placement, **fields))
    assert "\n" not in str(raised.value)
