"""Serving: an adapter of `rkif run`, loaded with PEFT, and the request that loads it into vLLM.

python docs/examples/serving.py
"""

import json
import re
import subprocess
import sys
from pathlib import Path

from peft import PeftConfig, PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from rkif.demo import write_inputs

# A small model and small tasks. Replace them by your own.
write_inputs(Path("inputs"), train=40, dev=10, seed=0)
order = list(json.loads(Path("inputs/tasks/tasks.json").read_text())["tasks"])[:2]
Path("config.yaml").write_text(f"""
model: inputs/model
adapter: {{r: 8, alpha: 16, target_modules: [q_proj, v_proj]}}
tasks: {{folder: inputs/tasks, order: [{", ".join(order)}]}}
training: {{steps: 8, batch_size: 8}}
memory: {{fraction: 0.1}}
""")
subprocess.run([sys.executable, "-m", "rkif", "run", "config.yaml", "--out", "run"], check=True)

# The folder of the last task is an adapter for all tasks so far, in PEFT's own format.
adapter = str(max(Path("run/tasks").iterdir()).resolve())
tokenizer = AutoTokenizer.from_pretrained("inputs/model")
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("inputs/model"), adapter)
prompt = json.loads(Path("inputs/tasks/dev.jsonl").read_text().splitlines()[0])["input"]
tokens = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
answer = model.generate(**tokens, max_new_tokens=4, do_sample=False)[0, tokens["input_ids"].shape[1] :]
print(f"{prompt!r} -> {tokenizer.decode(answer)!r}")

# vLLM requires LoRA without DoRA, biases and modules_to_save, with the names of PEFT, and with a rank of at
# most --max-lora-rank (16 by default).
config = PeftConfig.from_pretrained(adapter).to_dict()
features = {name: config[name] for name in ("peft_type", "use_dora", "bias", "modules_to_save")}
assert features == {"peft_type": "LORA", "use_dora": False, "bias": "none", "modules_to_save": None}
with safe_open(f"{adapter}/adapter_model.safetensors", "pt") as file:
    keys = list(file.keys())
assert all(re.fullmatch(r"base_model\.model\..+\.lora_[AB]\.weight", key) for key in keys), keys

# VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve MODEL --enable-lora --max-lora-rank 8
# curl localhost:8000/v1/load_lora_adapter -H "Content-Type: application/json" -d '...'
print(json.dumps({"lora_name": "my-tasks", "lora_path": adapter}))
