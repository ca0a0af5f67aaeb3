"""What a run publishes for serving: the form of its adapters, and the prompt format in its cards."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from run_inputs import TASKS, go
from safetensors.torch import load_file

from rkif.continual.config import RunConfig
from rkif.continual.models.load import load_model
from rkif.continual.tasks.load import load_tasks


def test_adapters_have_the_form_that_vllm_loads(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """vllm/lora/peft_helper.py and utils.py: only these settings, and names that end in lora_A or lora_B."""
    go(config(adapter={"r": 8, "target_modules": ["q_proj", "v_proj"]}), tmp_path)
    for index, task in enumerate(TASKS):
        folder = tmp_path / "tasks" / f"{index + 1:02d}-{task}"
        settings = json.loads((folder / "adapter_config.json").read_text())
        assert settings["peft_type"] == "LORA"
        assert settings["bias"] == "none"
        assert not settings["use_dora"]
        assert not settings["modules_to_save"]
        assert isinstance(settings["lora_alpha"], int | float)
        assert sorted(settings["target_modules"]) == ["q_proj", "v_proj"]
        tensors = load_file(folder / "adapter_model.safetensors")
        modules = {}
        for name, tensor in tensors.items():
            match = re.fullmatch(r"base_model\.model\.(.+)\.lora_(A|B)\.weight", name)
            assert match is not None, name
            assert match[1].split(".")[-1] in settings["target_modules"]
            assert tensor.shape[match[2] == "B"] == settings["r"]
            modules[match[1]] = modules.get(match[1], "") + match[2]
        assert set(map("".join, map(sorted, modules.values()))) == {"AB"}


def test_the_card_has_the_prompts_that_the_model_was_trained_with(
    config: Callable[..., RunConfig], inputs: Path, tmp_path: Path
) -> None:
    settings = config(text={"max_length": 64, "prompt": "Q: {instruction}{input} A:", "target": " {output}!"})
    go(settings, tmp_path)
    tasks = load_tasks(inputs / "tasks", TASKS)
    _, objective = load_model(settings, tasks)
    for index in range(len(TASKS)):
        card = ModelCard.load(tmp_path / "tasks" / f"{index + 1:02d}-{TASKS[index]}" / "README.md")
        assert card.data.library_name == "peft"
        assert card.data.base_model == "model"
        assert {"rkif", "continual-learning", "recurrent-kif"} <= set(card.data.tags)
        prompts = re.findall(r"```text\n(.*?)\n```", card.text, re.DOTALL)
        assert len(prompts) == index + 1  # only learned tasks
        for task, prompt in zip(tasks, prompts, strict=False):
            # The text, filled with an input, has the tokens of the training prompt.
            record = task.train[0]
            filled = prompt.replace("INPUT", record.input)
            batch = objective.collate([(task.instruction, record)])
            trained = batch["input_ids"][0][batch["labels"][0] == -100].tolist()
            assert objective.tokenizer(filled)["input_ids"] == trained
            assert all(f"`{label}`" in card.text for label in task.labels)
        assert "` {output}!`" in card.text


@pytest.mark.parametrize(
    ("folder", "architecture", "words"),
    [("t5", "seq2seq", "The decoder answers with"), ("bert", "encoder", "has the most similar embedding")],
)
def test_cards_of_other_architectures(
    config: Callable[..., RunConfig], inputs: Path, tmp_path: Path, folder: str, architecture: str, words: str
) -> None:
    settings = config(model=str(inputs / folder), architecture=architecture, adapter=None, method="replay")
    go(settings, tmp_path)
    card = ModelCard.load(tmp_path / "tasks" / f"01-{TASKS[0]}" / "README.md")
    assert card.data.library_name == "transformers"
    assert words in card.text
    assert f"# {folder} after 1 task: {TASKS[0]}" in card.text
