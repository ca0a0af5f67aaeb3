"""Perplexity of a language model, compared with its definition, and in the rows of runs."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from run_inputs import go, make_config
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from bench.forgetting.perplexity import WINDOW, WINDOWS, perplexities, perplexity, plain_text
from rkif.continual.rundir.folder import task_folder


class Halving(nn.Module):
    """Gives token t the probability 1/2 after t - 1, and divides the rest evenly over three others."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        probabilities = torch.full((*input_ids.shape, 4), 1 / 6)
        probabilities.scatter_(2, ((input_ids + 1) % 4).unsqueeze(2), 0.5)
        return SimpleNamespace(logits=probabilities.log())


@pytest.mark.parametrize("count", [2, WINDOW, WINDOW + 1, 2 * WINDOW + 7])
def test_perplexity_is_that_of_the_definition(count: int) -> None:
    counting = [index % 4 for index in range(count)]
    assert perplexity(Halving(), counting) == pytest.approx(2.0)
    assert perplexity(Halving(), [0] * count) == pytest.approx(6.0)


def test_a_run_has_the_perplexity_before_and_after(inputs: Path, tmp_path: Path) -> None:
    config = make_config(
        inputs, method="sequential", training={"steps": 2, "batch_size": 4, "learning_rate": 1e-2}
    )
    tasks = go(config, tmp_path / "run")["tasks"]
    before, after = perplexities(config, tmp_path / "run", tasks)
    base = AutoModelForCausalLM.from_pretrained(config.model)
    windows = torch.tensor(plain_text(config.model)).view(-1, WINDOW)
    assert len(windows) == WINDOWS

    def by_transformers(model: nn.Module) -> float:
        with torch.no_grad():
            return math.exp(model(input_ids=windows, labels=windows).loss)

    assert before == pytest.approx(by_transformers(base), rel=1e-4)
    trained = PeftModel.from_pretrained(base, task_folder(tmp_path / "run", len(tasks) - 1, tasks[-1]))
    assert after == pytest.approx(by_transformers(trained), rel=1e-4)
    assert before != after
