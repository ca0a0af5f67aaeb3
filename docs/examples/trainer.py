"""RKIFTrainer: a Hugging Face Trainer with a replay memory and an outer learner.

python docs/examples/trainer.py
"""

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

import rkif
from rkif.hf import RKIFTrainer

torch.manual_seed(0)
# A small model with random weights that reads bytes; use AutoModelForCausalLM.from_pretrained(...) instead.
size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "initializer_range": 0.2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **size))
model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))


def encode(texts):
    rows = [list(text.ljust(24).encode()) for text in texts]
    return [{"input_ids": row, "labels": row} for row in rows]


tasks = {
    "capitals": encode(["France: Paris", "Italy: Rome", "Peru: Lima", "Japan: Tokyo"]),
    "colours": encode(["sky: blue", "grass: green", "snow: white", "coal: black"]),
}
memory = []
for name, dataset in tasks.items():
    trainer = RKIFTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=f"out/{name}",
            max_steps=64,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            logging_steps=32,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=dataset,
        memory_dataset=memory,  # empty for the first task: plain fine-tuning
        fusion=rkif.FusionConfig.paper(),  # Q = 8 inner steps, M = 4 outer steps
        outer_learning_rate=1e-2,
    )
    trainer.train()
    memory = memory + dataset[:2]  # in practice about 2 % of each task, chosen at random
    if trainer.fuser is not None:
        print(f"{name}: {trainer.fuser.round} fusions, the last one: {trainer.fuser.last_report.counts}")
for name, dataset in tasks.items():
    print(f"loss on {name}: {trainer.evaluate(dataset)['eval_loss']:.2f}")
model.save_pretrained("out/adapter")
