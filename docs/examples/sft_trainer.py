"""SFTTrainer of TRL with RKIFMixin: chat messages, a memory of an earlier task, and LoRA.

python docs/examples/sft_trainer.py
"""

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

import rkif
from rkif.hf import RKIFMixin


class RKIFSFTTrainer(RKIFMixin, SFTTrainer):
    """SFTTrainer that fuses; the mixin comes first."""


torch.manual_seed(0)
# A tokenizer of bytes and a small model with random weights; use from_pretrained(...) for both instead.
tokenizer = ByT5Tokenizer()
tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "initializer_range": 0.2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1, **size))


def chats(pairs):
    rows = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs]
    return Dataset.from_dict({"messages": rows})


trainer = RKIFSFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir="out",
        max_steps=16,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        max_length=64,
        logging_steps=8,
        bf16=torch.cuda.is_available(),
        report_to="none",
    ),
    processing_class=tokenizer,
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    train_dataset=chats([("sky?", "blue"), ("grass?", "green"), ("snow?", "white")]),
    memory_dataset=chats([("France?", "Paris"), ("Peru?", "Lima")]),  # prepared like the training data
    fusion=rkif.FusionConfig.paper(),
    outer_learning_rate=1e-2,
)
trainer.train()
print(f"{trainer.fuser.round} fusions, the last one: {trainer.fuser.last_report.counts}")
