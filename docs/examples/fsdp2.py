"""FSDP2: parameters sharded over processes, one exact threshold over all of them.

torchrun --nproc-per-node 2 docs/examples/fsdp2.py
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import rkif

device = "cuda" if torch.cuda.is_available() else "cpu"
dist.init_process_group("nccl" if device == "cuda" else "gloo")
rank, world = dist.get_rank(), dist.get_world_size()
if device == "cuda":
    torch.cuda.set_device(rank % torch.cuda.device_count())
mesh = init_device_mesh(device, (world,))

torch.manual_seed(0)  # the same random weights on every rank
size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **size)).to(device)
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)  # the root too: rkif refuses a mix of sharded and plain parameters


def encode(texts):
    """The texts of this rank."""
    return torch.tensor([list(text.ljust(24).encode()) for text in texts], device=device)[rank::world]


new_task = encode(["sky: blue", "grass: green", "snow: white", "coal: black"])
memory = encode(["France: Paris", "Italy: Rome", "Peru: Lima", "Japan: Tokyo"])
inner = torch.optim.AdamW(model.parameters(), lr=1e-3)
outer = torch.optim.AdamW(model.parameters(), lr=1e-3)
fuser = rkif.Fuser(model, rkif.FusionConfig.paper())  # after fully_shard


def step(optimizer, batch):
    model(input_ids=batch, labels=batch).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    fuser.observe()
    optimizer.step()
    optimizer.zero_grad()


for _ in range(2):
    for _ in range(fuser.config.inner_steps):
        step(inner, new_task)
    with fuser.outer():  # every rank enters and leaves the block
        for _ in range(fuser.config.outer_steps):
            step(outer, memory)
    if rank == 0:
        print(f"round {fuser.round}, {world} ranks: {fuser.last_report.counts}")
fuser.save("fuser-state")  # any number of ranks can load it, in the middle of a round too
dist.destroy_process_group()
