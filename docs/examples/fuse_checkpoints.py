"""`rkif fuse`: two fine-tuned models on disk are fused into one, in bounded memory.

python docs/examples/fuse_checkpoints.py
"""

import subprocess
import sys

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
LlamaForCausalLM(LlamaConfig(vocab_size=256, **size)).save_pretrained("base")
for name in ("law", "medicine"):  # noise instead of two trainings of the same base
    model = AutoModelForCausalLM.from_pretrained("base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1e-3 * torch.randn_like(parameter)
    model.save_pretrained(name)


def rkif(*words):
    """Run a command, such as `rkif fuse base law medicine --out fused`."""
    print("$ rkif", *words, flush=True)
    subprocess.run([sys.executable, "-m", "rkif", *words], check=True)


# Both models start from `base`: --outer-from base. Of each, the largest 20 % of the changes are selected.
command = ["fuse", "base", "law", "medicine", "--outer-from", "base", "--density", "0.2", "--out", "fused"]
rkif(*command, "--dry-run")  # compares the checkpoints and prints the plan
rkif(*command, "--max-memory", "1GiB")
rkif("verify", "fused")

fused = AutoModelForCausalLM.from_pretrained("fused")
print(f"loaded {sum(p.numel() for p in fused.parameters()):,} parameters of the fused model")
