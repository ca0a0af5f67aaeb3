"""accelerate: the same loop on one process or on several, with gradient accumulation.

python docs/examples/accelerate_loop.py
torchrun --nproc-per-node 2 docs/examples/accelerate_loop.py
"""

from itertools import cycle, islice

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import rkif

accelerator = Accelerator(cpu=not torch.cuda.is_available(), gradient_accumulation_steps=2)
torch.manual_seed(0)
size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **size))


def loader(texts):
    return DataLoader(torch.tensor([list(text.ljust(24).encode()) for text in texts]), batch_size=1)


model, inner, outer, new_task, memory = accelerator.prepare(
    model,
    torch.optim.AdamW(model.parameters(), lr=1e-3),
    torch.optim.AdamW(model.parameters(), lr=1e-3),
    loader(["sky: blue", "grass: green", "snow: white", "coal: black"]),
    loader(["France: Paris", "Italy: Rome", "Peru: Lima", "Japan: Tokyo"]),
)
new_task, memory = cycle(new_task), cycle(memory)
fuser = rkif.Fuser(model, rkif.FusionConfig.paper())  # the prepared model


def step(optimizer, batches):
    """One optimizer step: two micro-batches."""
    for batch in islice(batches, 2):
        with accelerator.accumulate(model):
            accelerator.backward(model(input_ids=batch, labels=batch).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                fuser.observe()  # once for each optimizer step, on the accumulated gradient
            optimizer.step()
            optimizer.zero_grad()


for _ in range(2):
    for _ in range(fuser.config.inner_steps):
        step(inner, new_task)
    with fuser.outer():
        for _ in range(fuser.config.outer_steps):
            step(outer, memory)
    processes, counts = accelerator.num_processes, fuser.last_report.counts
    accelerator.print(f"round {fuser.round}, {processes} processes: {counts}")
accelerator.end_training()
