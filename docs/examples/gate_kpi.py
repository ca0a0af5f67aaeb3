"""A gate on your own KPI: a fusion that makes it too much worse is damped or undone, and recorded.

python docs/examples/gate_kpi.py && rkif log out/ledger
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

import rkif
from rkif.hf import RKIFTrainer

torch.manual_seed(0)
size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **size))


def encode(texts):
    rows = [list(text.ljust(24).encode()) for text in texts]
    return [{"input_ids": row, "labels": row} for row in rows]


old_task = encode(["France: Paris", "Italy: Rome", "Peru: Lima", "Japan: Tokyo"])
new_task = encode(["sky: blue", "grass: green", "snow: white", "coal: black"])
measured = torch.tensor([row["input_ids"] for row in old_task])


def cost():
    """Euro per 1,000 requests: 0.5 for each byte of the answer that an agent has to correct."""
    model.eval()
    with torch.no_grad():
        guess = model(input_ids=measured).logits[:, :-1].argmax(-1)
    model.train()
    return 0.5 * 1000 * float((guess != measured[:, 1:]).float().mean())


def train(dataset, **settings):
    args = TrainingArguments(output_dir="out", max_steps=64, learning_rate=3e-3, report_to="none")
    trainer = RKIFTrainer(model=model, args=args, train_dataset=dataset, **settings)
    trainer.train()
    return trainer


train(old_task)
print(f"after the old task: {cost():.0f} euro")
# One fusion may add 20 euro, and the cost may not exceed 60. Otherwise half of the step is tried, then none.
kpi = rkif.Criterion("euro per 1,000 requests", cost, higher_is_better=False, tolerance=20, floor=60)
trainer = train(
    new_task,
    memory_dataset=old_task[:2],  # the gate also measures samples that are not in it
    fusion=rkif.FusionConfig.paper(),
    outer_learning_rate=3e-3,
    gate=rkif.Gate([kpi], ladder=(0.5,), otherwise="undo"),
    ledger="out/ledger",
)
gate = trainer.fuser.last_report.gate
print(f"after the new task: {cost():.0f} euro; last verdict: {gate.verdict}, factor {gate.factor}")
