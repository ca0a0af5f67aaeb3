"""LoRA in a custom training loop: an adapter learns a second task and keeps the first.

python docs/examples/lora_loop.py
"""

# %% A model with an adapter
from itertools import cycle

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import rkif

torch.manual_seed(0)
# A small model with random weights that reads bytes; use AutoModelForCausalLM.from_pretrained(...) instead.
size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "initializer_range": 0.2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **size))
model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))

# %% Two tasks
capitals = ["France: Paris", "Italy: Rome", "Peru: Lima", "Japan: Tokyo"]
colours = ["sky: blue", "grass: green", "snow: white", "coal: black"]
capitals, colours = (torch.tensor([list(t.ljust(24).encode()) for t in x]) for x in (capitals, colours))


def loss(batch):
    return model(input_ids=batch, labels=batch).loss


# %% The first task has no memory: plain fine-tuning
inner = torch.optim.AdamW(model.parameters(), lr=1e-2)
for _ in range(64):
    loss(capitals).backward()
    inner.step()
    inner.zero_grad()
print(f"loss on capitals: {loss(capitals):.2f}")

# %% The second task: Q inner steps, M outer steps, fusion
memory = cycle(capitals.split(2))  # in practice about 2 % of the first task
outer = torch.optim.AdamW(model.parameters(), lr=1e-2)
fuser = rkif.Fuser(model, rkif.FusionConfig.paper())


def step(optimizer, batch):
    loss(batch).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    fuser.observe()  # after clipping, before the optimizer's step
    optimizer.step()
    optimizer.zero_grad()


for _ in range(8):
    for _ in range(fuser.config.inner_steps):
        step(inner, colours)
    with fuser.outer():  # leaving the block fuses
        for _ in range(fuser.config.outer_steps):
            step(outer, next(memory))
print(f"loss on capitals: {loss(capitals):.2f}, on colours: {loss(colours):.2f}; {fuser.last_report.counts}")
