"""What a Trainer logs of a round, which callbacks are called, and the content of the model card."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hf_helpers import (
    FUSION,
    MEMORY,
    NEW,
    OUTER_RATE,
    InOrderTrainer,
    arguments,
    lora_llama,
    trainer,
    weights,
)
from huggingface_hub import ModelCard
from tiny import tiny_llama, word_tokenizer
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from rkif import Criterion, FusionConfig, Gate
from rkif.hf import RKIFMixin, RKIFTrainer

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "trainer.md"
STEPS = {"logging_strategy": "steps", "logging_steps": 1}


def rounds(run: Any) -> list[dict[str, float]]:
    return [log for log in run.state.log_history if "rkif/round" in log]


def gate(*, floor: float = 0.0, **changes: Any) -> Gate:
    return Gate([Criterion("kpi", lambda: 1.0, floor=floor, tolerance=None)], **changes)


def test_every_round_is_logged(tmp_path: Any) -> None:
    losses: list[float] = []

    class Recording(InOrderTrainer):
        def training_step(self, *args: Any) -> torch.Tensor:
            loss: torch.Tensor = super().training_step(*args)
            losses.append(float(loss))
            return loss

    run = trainer(tmp_path, kind=Recording, **{**STEPS, "logging_steps": 2})
    reports = []

    class Listener(TrainerCallback):
        def on_fusion(self, args: Any, state: Any, control: Any, report: Any, **_: Any) -> None:
            reports.append(report)

    run.add_callback(Listener())
    run.train()
    found = rounds(run)
    assert [(log["step"], log["rkif/round"]) for log in found] == [(3, 1), (6, 2), (7, 3)]
    outer = [losses[3:5], losses[8:10], losses[11:13]]
    for log, report, own in zip(found, reports, outer, strict=True):
        assert log["rkif/outer_loss"] == pytest.approx(sum(own) / 2, rel=1e-6)
        assert log["rkif/outer_learning_rate"] <= OUTER_RATE
        assert (log["rkif/threshold_inner"], log["rkif/threshold_outer"]) == report.thresholds
        for case, count in report.counts.items():
            assert log[f"rkif/share_{case}"] == count / report.numel
        for name, norm in report.norms.items():
            assert log[f"rkif/norm_{name}"] == norm
        assert (log["rkif/applied"], log["rkif/nonfinite"], log["rkif/missing"]) == (1, 0, 0)
        assert not any("gate" in name for name in log)
    assert sum(found[0][f"rkif/share_{case}"] for case in reports[0].counts) == pytest.approx(1)


def test_logs_of_steps_are_those_of_the_trainer(tmp_path: Any) -> None:
    """The log of a round neither removes a log of a step nor adds to it."""
    run = trainer(tmp_path, **STEPS)
    run.train()
    logs = [log for log in run.state.log_history if "loss" in log]
    assert [log["step"] for log in logs] == list(range(1, 8))
    assert not any(name.startswith("rkif") for log in logs for name in log)
    assert not any(name.startswith("rkif") for name in run.state.log_history[-1])
    silent = trainer(tmp_path)
    silent.train()
    assert rounds(silent) == []


def test_thresholds_by_tensor_are_logged_by_their_ends(tmp_path: Any) -> None:
    fusion = FusionConfig.paper(inner_steps=3, outer_steps=2, scope="tensor")
    run = trainer(tmp_path, fusion=fusion, **STEPS)
    run.train()
    inner = list(run.fuser.last_report.thresholds[0].values())
    log = rounds(run)[-1]
    assert (log["rkif/threshold_inner_min"], log["rkif/threshold_inner_max"]) == (min(inner), max(inner))


def test_values_that_json_cannot_name_are_left_out(tmp_path: Any) -> None:
    fusion = FusionConfig.paper(inner_steps=3, outer_steps=2, density=1)
    run = trainer(tmp_path, fusion=fusion, save_strategy="steps", save_steps=7, **STEPS)
    run.train()
    assert not any("threshold" in name for name in rounds(run)[-1])
    text = (tmp_path / "checkpoint-7" / "trainer_state.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(name))


@pytest.mark.parametrize(("floor", "factor"), [(0.0, 1.0), (2.0, 0.0)])
def test_the_figures_of_a_gate_are_logged(tmp_path: Any, floor: float, factor: float) -> None:
    run = trainer(tmp_path, gate=gate(floor=floor), max_steps=3, **STEPS)
    run.train()
    (log,) = rounds(run)
    found = {name: value for name, value in log.items() if "gate" in name}
    tries = 1 if factor else 3  # the whole step, and the fractions of the ladder
    assert found == {
        "rkif/gate_factor": factor,
        "rkif/gate_samples": 0,
        "rkif/gate_stop": 0,
        "rkif/gate_before/kpi": 1.0,
        "rkif/gate_after/kpi": 1.0,
        "rkif/gate_objections/kpi": 0 if factor else tries,
    }


def test_a_stop_is_logged_as_a_warning(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    run = trainer(tmp_path, gate=gate(floor=2.0, otherwise="stop"), **STEPS)
    with caplog.at_level(logging.WARNING, logger="rkif"):
        run.train()
    assert run.state.global_step == 3
    assert [log["rkif/gate_stop"] for log in rounds(run)] == [1]
    said = "round 1: the gate undid the fusion and stops training: kpi 1 is below 2"
    assert caplog.messages == [said]


def test_other_verdicts_are_logged_at_a_lower_level(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="rkif"):
        trainer(tmp_path, gate=gate(floor=2.0), max_steps=3).train()
        trainer(tmp_path, gate=gate(), max_steps=3).train()
    assert caplog.messages == ["round 1: the gate undid the fusion: kpi 1 is below 2"]
    assert [record.levelno for record in caplog.records] == [logging.INFO]


class Listener(TrainerCallback):
    """Records fusions and logs of rounds; saves after each fusion, and stops after the second."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def on_fusion(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.calls.append((state.global_step, given["report"], weights(given["model"])))
        control.should_save = True
        control.should_training_stop = len(self.calls) == 2

    def on_log(self, args: Any, state: Any, control: Any, logs: Any, **_: Any) -> None:
        self.calls += [state.global_step] if "rkif/round" in logs else []


def test_callbacks_are_called_after_every_fusion(tmp_path: Any) -> None:
    """After the fusion, also where nothing is logged; callbacks without the event are not called."""

    class WithoutEvent(TrainerCallback):
        pass

    listener = Listener()
    run = trainer(tmp_path, callbacks=[WithoutEvent(), listener], logging_strategy="no")
    run.train()
    assert [step for step, _, _ in listener.calls] == [3, 6]
    assert run.state.global_step == 6
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
    assert listener.calls[-1][1] == run.fuser.last_report
    base = run.fuser.base()
    assert all(torch.equal(base[name], value) for name, value in listener.calls[-1][2].items())


def test_a_round_is_logged_before_callbacks_are_called(tmp_path: Any) -> None:
    listener = Listener()
    run = trainer(tmp_path, callbacks=[listener], max_steps=3, **STEPS)
    run.train()
    assert listener.calls[0] == 3
    assert listener.calls[1][0] == 3


class Order(TrainerCallback):
    """Records the events of the third step, which ends the first round."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("on_") or name == "on_prediction_step":
            return super().__getattribute__(name)

        def record(args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            kind = "" if logs is None else " of the round" if "rkif/round" in logs else " of the step"
            kind = " of the evaluation" if logs is not None and "eval_loss" in logs else kind
            if state.global_step + (name in BEFORE_THE_STEP) == 3:
                self.events.append(name + kind)

        return record


BEFORE_THE_STEP = ("on_step_begin", "on_pre_optimizer_step", "on_optimizer_step")


def test_the_order_of_events_is_that_of_the_page(tmp_path: Any) -> None:
    order = Order()
    strategies = {f"{what}_strategy": "steps" for what in ("eval", "save")}
    run = trainer(
        tmp_path,
        callbacks=[order],
        eval_dataset=NEW[:2],
        eval_steps=3,
        save_steps=3,
        max_steps=4,
        gate=gate(),
        **strategies,
        **STEPS,
    )
    run.train()
    _, _, section = PAGE.read_text(encoding="utf-8").partition("## What happens at a step")
    listed = re.findall(r"`(on_\w+)`( of the \w+)?", section.partition("\n## ")[0])
    assert ["".join(event) for event in listed] == order.events


def test_the_page_lists_the_logged_names(tmp_path: Any) -> None:
    names: set[str] = set()
    for number, scope in enumerate(("global", "tensor")):
        fusion = FusionConfig.paper(inner_steps=3, outer_steps=2, scope=scope)
        run = trainer(tmp_path / str(number), fusion=fusion, gate=gate(), **STEPS)
        run.train()
        names |= {name for log in rounds(run) for name in log if name.startswith("rkif/")}
    listed = set(re.findall(r"`(rkif/[^`]+)`", PAGE.read_text(encoding="utf-8")))
    assert {name.replace("NAME", "kpi") for name in listed} == names


def test_the_examples_of_the_page_work(tmp_path: Any) -> None:
    args = arguments(tmp_path / "page", max_steps=9)
    names: dict[str, Any] = {"model": lora_llama(), "args": args, "new_task": NEW, "memory": MEMORY}
    for example in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(example, names)
    assert names["trainer"].fuser.round == 2
    assert issubclass(names["RKIFSFTTrainer"], SFTTrainer)
    undone = {"gate": gate(floor=2.0), "callbacks": [names["Watch"]()]}
    run = trainer(tmp_path, kind=names["SGDOutside"], **undone)
    run.train()
    assert type(run._rkif.optimizer) is torch.optim.SGD
    saved = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert saved == ["checkpoint-3", "checkpoint-6", "checkpoint-7"]


class SeparateSFT(RKIFMixin, SFTTrainer):
    pass


WORDS = [f"w{i}" for i in range(20)]


def sft(folder: Path, memory: Any, **changes: Any) -> Any:
    texts = Dataset.from_dict({"text": [" ".join(WORDS[i : i + 5]) for i in range(12)]})
    args = SFTConfig(**{**arguments(folder, **STEPS).to_dict(), "max_length": 16})
    return SeparateSFT(
        model=lora_llama(),
        args=args,
        train_dataset=texts,
        memory_dataset=memory,
        processing_class=word_tokenizer([" ".join(WORDS)]),
        fusion=FUSION,
        **changes,
    )


@pytest.mark.parametrize("evaluates", [False, True], ids=["alone", "with a gate that evaluates"])
def test_running_metrics_of_trl_are_those_of_the_new_data(tmp_path: Path, evaluates: bool) -> None:
    """Tokens, entropy and accuracy of a log are those of its own step, also after a round."""
    memory = Dataset.from_dict({"text": ["w1 w1 w1 w1 w1 w1 w1 w1 w1 w1"] * 4})
    seen: list[float] = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            figures = run._metrics["train"]
            seen.append(figures["entropy"][-1])

    changes: dict[str, Any] = {}
    if evaluates:
        criterion = Criterion("loss", lambda: run.evaluate()["eval_loss"], tolerance=1e9)
        changes = {"gate": Gate([criterion]), "eval_dataset": memory}
    run = sft(tmp_path, memory, callbacks=[Watch()], **changes)
    run.train()
    plain = sft(tmp_path, None)
    plain.train()
    logs, expected = ([log for log in one.state.log_history if "loss" in log] for one in (run, plain))
    assert [log["num_tokens"] for log in logs] == [log["num_tokens"] for log in expected]
    assert [log["entropy"] for log in logs] == seen
    assert all("mean_token_accuracy" in log for log in logs)
    assert not any("entropy" in log or "num_tokens" in log for log in rounds(run))


@pytest.mark.parametrize("adapter", [True, False], ids=["lora", "full"])
def test_the_model_card_names_method_settings_and_memory(tmp_path: Path, adapter: bool) -> None:
    model = lora_llama() if adapter else tiny_llama(40, 0)
    run = trainer(tmp_path, model=model, gate=gate())
    run.train()
    for _ in range(2):
        run.save_model()
        run.create_model_card()
        card = ModelCard.load(tmp_path / "README.md")
        assert {"rkif", "recurrent-kif", "continual-learning"} <= set(card.data.tags)
        assert len(card.data.tags) == len(set(card.data.tags))
        assert card.text.count("## Continual learning") == 1
        for row in ("density | 0.2", "rule | paper", "inner_steps | 3", "memory samples | 5", "rounds | 3"):
            assert f"| {row} |" in card.text
        assert "| gate | kpi |" in card.text
    assert "rkif" in (model.get_base_model() if adapter else model).model_tags


def test_the_card_of_trl_is_extended(tmp_path: Path) -> None:
    run = sft(tmp_path, Dataset.from_dict({"text": ["w1 w2"] * 3}))
    run.create_model_card(model_name="mine")
    card = ModelCard.load(tmp_path / "README.md")
    assert {"trl", "sft", "rkif"} <= set(card.data.tags)
    assert "| memory samples | 3 |" in card.text


def test_without_a_memory_the_card_is_the_trainers(tmp_path: Path) -> None:
    run = trainer(tmp_path, kind=RKIFTrainer, memory_dataset=None, model=tiny_llama(40, 0))
    run.create_model_card()
    assert "rkif" not in (tmp_path / "README.md").read_text().replace("RKIFTrainer", "")
