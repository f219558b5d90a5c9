"""The 2B shape of Jet-Nemotron with random weights: what it takes to load, prefill and decode.

    python benchmarks/jet_nemotron_2b.py cpu      # peak memory of loading in bfloat16, greedy decode
    python benchmarks/jet_nemotron_2b.py cuda     # prefill of 4,096 tokens and 128 decode steps, batch 1 and 32; logits
                                                  # against the CPU's float32; peak memory

Weights are random, since the released ones are under their own licence and are not needed for any of this. The
checkpoint (3.7 GiB in bfloat16, the official names and config.json) is written to $POSTNAS_CACHE or ~/.cache/postnas.
Writes benchmarks/results/jet-nemotron-2b-{cpu,cuda}.json, under $OUT where that is set.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from postnas.files import replacing, write_json
from postnas.models import JetNemotronConfig, JetNemotronForCausalLM
from postnas.models.load import load_model
from postnas.sources import cache_dir

CONTEXT, STEPS, BATCHES = 4096, 128, (1, 32)
CPU_PROMPT, CPU_STEPS = 64, 32
OFFICIAL: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "layer_types": ["attn" if i in (14, 19) else "swa" if i in (20, 21) else "jet" for i in range(28)],
    "efficient_attention_config": {
        "jet": {
            "conv_size": 4,
            "dconv_generator_reduction": 8,
            "dconv_implementation": "triton",
            "expand_v": 2.6666666667,
            "head_dim": 96,
            "mode": "chunk",
            "norm_eps": "1e-5",
            "num_heads": 12,
        },
        "swa": {"window_size": 1152},
    },
}


def write() -> Path:
    """The checkpoint, in shards of 1 GB, made when it is not there."""
    folder = cache_dir() / "random-jet-nemotron-2b"
    if (folder / "config.json").exists():
        return folder
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = JetNemotronForCausalLM(JetNemotronConfig(**OFFICIAL))
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "kernel_generator.w2.weight" in name:  # it starts at zero, and then makes no kernel of its own
                parameter.normal_(0.0, 0.02)
    with replacing(folder) as temporary:
        model.save_pretrained(temporary, max_shard_size="1GB")
    return folder


def measure_load(folder: Path) -> None:
    """In a process of its own: prints peak memory of loading and the speed of greedy decoding as JSON."""
    torch.set_num_threads(int(os.environ.get("THREADS", "2")))
    before = peak()
    begin = time.monotonic()
    model = load_model(folder, torch.bfloat16).eval()
    seconds, after = time.monotonic() - begin, peak()
    ids = torch.randint(0, 151936, (1, CPU_PROMPT), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model.generate(ids, max_new_tokens=2, do_sample=False, eos_token_id=None)
        begin = time.monotonic()
        cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
        prefill = time.monotonic() - begin
        token, begin = ids[:, -1:], time.monotonic()
        for _ in range(CPU_STEPS):
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        decode = time.monotonic() - begin
    found = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "weight_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "peak_before": before,
        "peak_loaded": after,
        "peak_end": peak(),
        "load_seconds": seconds,
        "prefill_tokens_per_s": CPU_PROMPT / prefill,
        "decode_tokens_per_s": CPU_STEPS / decode,
    }
    print(json.dumps(found))


def peak() -> int:
    """Largest resident size of this process so far, in bytes; getrusage would count its parent's, too."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def on_cpu() -> list[dict[str, Any]]:
    folder = write()
    done = subprocess.run([sys.executable, __file__, "load", str(folder)], stdout=subprocess.PIPE, check=True)
    row = json.loads(done.stdout.splitlines()[-1])
    row["peak_over_weights"] = row["peak_end"] / row["weight_bytes"]  # loading maps the files; use reads them in
    return [row]


@torch.inference_mode()
def on_cuda() -> list[dict[str, Any]]:
    model = load_model(write(), torch.bfloat16).eval()
    ids = torch.randint(0, 151936, (max(BATCHES), CONTEXT), generator=torch.Generator().manual_seed(0))
    rows = []
    wide = load_model(write(), torch.float32).eval()
    begin = time.monotonic()
    expected = wide(ids[:1], use_cache=False).logits[0]
    print(f"float32 on the CPU: {time.monotonic() - begin:.0f} s", flush=True)
    del wide
    model = model.cuda()
    rows.append({"phase": "load", "batch": 0, "peak_bytes": torch.cuda.max_memory_allocated()})
    got = model(ids[:1].cuda(), use_cache=False).logits[0].float().cpu()
    error = float((got - expected).norm() / expected.norm())
    same = float((got.argmax(-1) == expected.argmax(-1)).float().mean())
    rows.append({"phase": "logits", "batch": 1, "tokens": CONTEXT, "relative_error": error, "same_argmax": same})
    print(rows[-1], flush=True)
    del got
    for batch in BATCHES:
        part = ids[:batch].cuda()
        model(part[:, :256], use_cache=True, logits_to_keep=1)  # warm
        torch.cuda.reset_peak_memory_stats()
        seconds, output = timed(lambda part=part: model(part, use_cache=True, logits_to_keep=1))  # type: ignore[misc]
        speed = batch * CONTEXT / seconds
        rows.append({"phase": "prefill", "batch": batch, "tokens": CONTEXT, "tokens_per_s": speed})
        cache, token = output.past_key_values, output.logits[:, -1:].argmax(-1)

        def decode(token: Tensor = token, cache: Any = cache) -> Tensor:
            for _ in range(STEPS):
                token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            return token

        seconds, _ = timed(decode)
        speed, used = batch * STEPS / seconds, {"cache_bytes": cache.nbytes}
        used |= {"peak_bytes": torch.cuda.max_memory_allocated()}
        rows.append({"phase": "decode", "batch": batch, "tokens": STEPS, "tokens_per_s": speed} | used)
        print(rows[-2:], flush=True)
        del output, cache
    return rows


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    torch.cuda.synchronize()
    begin = time.monotonic()
    value = work()
    torch.cuda.synchronize()
    return time.monotonic() - begin, value


def main() -> None:
    where = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    if where == "load":
        measure_load(Path(sys.argv[2]))
        return
    rows = on_cuda() if where == "cuda" else on_cpu()
    for row in rows:
        print(row)
    write_json(
        Path(os.environ.get("OUT", "benchmarks/results")) / f"jet-nemotron-2b-{where}.json",
        {
            "command": f"python benchmarks/jet_nemotron_2b.py {where}",
            "device": torch.cuda.get_device_name() if where == "cuda" else "cpu, 2 threads",
            "torch": torch.__version__,
            "date": date.today().isoformat(),
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
