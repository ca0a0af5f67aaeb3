"""`rkif.hf` inside the Trainer: the steps it takes, the precisions, the data, the errors."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from hf_helpers import (
    FUSION,
    MEMORY,
    NEW,
    OUTER_RATE,
    InOrderTrainer,
    arguments,
    assert_same_bits,
    lora_llama,
    plain_loop,
    rows,
    scale_losses,
    trainer,
    weights,
)
from tiny import tiny_llama, tiny_t5, word_tokenizer
from torch import Tensor
from transformers import Trainer, TrainerCallback, default_data_collator

from rkif import FusionConfig
from rkif.hf import MemoryBatches, RKIFMixin, RKIFTrainer

ACCUMULATED = {"gradient_accumulation_steps": 3, "max_grad_norm": 0.05}


class RecordingSGD(torch.optim.SGD):
    """Plain SGD that keeps, for every step of every instance, its learning rate, the weights and gradients."""

    steps: list[tuple[float, list[Tensor], list[Tensor]]]

    def step(self, closure: Any = None) -> Any:
        parameters = [p for group in self.param_groups for p in group["params"]]
        type(self).steps.append(
            (
                self.param_groups[0]["lr"],
                [p.detach().clone() for p in parameters],
                [p.grad for p in parameters],
            )
        )
        return super().step(closure)


@pytest.fixture
def recording_sgd() -> type[RecordingSGD]:
    return type("FreshRecordingSGD", (RecordingSGD,), {"steps": []})


class Stop(TrainerCallback):
    """Stops training at an event of a step."""

    def __init__(self, event: str, step: int) -> None:
        def stop(args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop |= state.global_step == step

        setattr(self, event, stop)


# --- The steps taken -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [{"max_grad_norm": 0.0}, ACCUMULATED], ids=["single", "accumulated"])
@pytest.mark.parametrize("adapter", [True, False], ids=["lora", "full"])
def test_equals_a_plain_loop(tmp_path: Any, accumulation: dict[str, Any], adapter: bool) -> None:
    models = [lora_llama() if adapter else tiny_llama(40, 0) for _ in range(2)]
    run = trainer(tmp_path, model=models[0], **accumulation)
    run.train()
    fuser = plain_loop(models[1], run.args)
    assert_same_bits(weights(models[0]), weights(models[1]))
    for side in ("inner", "outer"):
        assert_same_bits(dict(run.fuser.scores(side)), dict(fuser.scores(side)))
    assert run.fuser.last_report.to_dict() == fuser.last_report.to_dict()
    assert run.fuser.round == 3  # 7 steps by 3: two full rounds and the tail


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("tokenwise", [True, False], ids=["mean over tokens", "mean of micro-batches"])
def test_outer_micro_batches_make_one_big_batch(
    tmp_path: Any, recording_sgd: type[RecordingSGD], ragged: bool, tokenwise: bool
) -> None:
    memory = rows(6, seed=3, ragged=ragged)
    model = lora_llama()
    run = trainer(
        tmp_path,
        model=model,
        memory_dataset=memory,
        optimizer_cls_and_kwargs=(recording_sgd, {"lr": 0.5}),
        gradient_accumulation_steps=3,
        max_grad_norm=0.0,
        max_steps=FUSION.inner_steps,
    )
    run.model_accepts_loss_kwargs = tokenwise
    drawn = []
    run.data_collator = lambda samples: drawn.append(samples) or default_data_collator(samples)
    run.train()

    outer = recording_sgd.steps[FUSION.inner_steps :]
    assert len(outer) == FUSION.outer_steps
    drawn = [samples for samples in drawn if all(sample in memory for sample in samples)]
    for number, (_, before, gradients) in enumerate(outer):
        batches = [default_data_collator(samples) for samples in drawn[3 * number : 3 * number + 3]]
        with torch.no_grad():
            for p, value in zip(_trainable(model), before, strict=True):
                p.copy_(value)
        if tokenwise:
            batches = [{name: torch.cat([b[name] for b in batches]) for name in batches[0]}]
        loss = sum(model(**batch).loss for batch in batches) / len(batches)
        expected = torch.autograd.grad(loss, _trainable(model))
        assert max(g.abs().max() for g in expected) > 1e-3
        for found, wanted in zip(gradients, expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)


def _trainable(model: Any) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def test_outer_rate_follows_the_inner_schedule(tmp_path: Any, recording_sgd: type[RecordingSGD]) -> None:
    trainer(
        tmp_path,
        optimizer_cls_and_kwargs=(recording_sgd, {"lr": 0.5}),
        learning_rate=0.5,
        outer_learning_rate=0.25,
        warmup_steps=4,
        max_steps=8,
    ).train()
    rates = [rate for rate, _, _ in recording_sgd.steps]
    up, down = [i / 4 for i in range(4)], [(8 - i) / 4 for i in range(4, 8)]
    fractions = up + down
    inner = [0.5 * f for f in fractions]
    outer = [0.25 * f for f in (fractions[2], fractions[5], fractions[7])]
    assert rates == inner[:3] + 2 * outer[:1] + inner[3:6] + 2 * outer[1:2] + inner[6:] + 2 * outer[2:]


def test_outer_optimizer_is_built_like_the_inner_one(tmp_path: Any) -> None:
    model = tiny_llama(40, 0)
    run = trainer(tmp_path, model=model, weight_decay=0.1, adam_beta2=0.9, lr_scheduler_type="constant")
    run.train()
    inner, outer = run.optimizer.optimizer, run._rounds.optimizer.optimizer
    assert type(inner) is type(outer)
    for mine, theirs in zip(outer.param_groups, inner.param_groups, strict=True):
        assert [id(p) for p in mine["params"]] == [id(p) for p in theirs["params"]]
        assert mine["lr"] == OUTER_RATE
        assert {**mine, "params": 0, "lr": 0, "initial_lr": 0} == {
            **theirs,
            "params": 0,
            "lr": 0,
            "initial_lr": 0,
        }
    assert [group["weight_decay"] for group in outer.param_groups] == [0.1, 0.0]
    p = next(model.parameters())
    assert inner.state[p]["step"] == 7
    assert outer.state[p]["step"] == 3 * FUSION.outer_steps  # one state over all rounds
    assert not torch.equal(inner.state[p]["exp_avg"], outer.state[p]["exp_avg"])


def test_rates_of_parameter_groups_keep_their_proportion(tmp_path: Any) -> None:
    class TwoRates(InOrderTrainer):
        def create_optimizer(self, *_: Any) -> torch.optim.Optimizer:
            if self.optimizer is None:
                first, *others = _trainable(self.model)
                groups = [{"params": [first], "lr": 1e-3}, {"params": others, "lr": 1.6e-2}]
                self.optimizer = torch.optim.SGD(groups)
            return self.optimizer

    run = trainer(tmp_path, kind=TwoRates, lr_scheduler_type="constant")
    run.train()
    assert [g["lr"] for g in run._rounds.optimizer.param_groups] == [OUTER_RATE, 16 * OUTER_RATE]


def test_a_step_leaves_nothing_behind(tmp_path: Any) -> None:
    """The inner batches, the step count, the schedule and the counters are those of the plain trainer."""

    class Watch(TrainerCallback):
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            gradients = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
            rate = kwargs["lr_scheduler"].get_last_lr()[0]
            self.seen.append((state.global_step, rate, len(gradients), state.num_input_tokens_seen))

    found = []
    for kind in (RKIFTrainer, Trainer):
        batches: list[Any] = []

        def collate(samples: Any, batches: list[Any] = batches) -> Any:
            if samples[0] in NEW:
                batches.append([sample["input_ids"] for sample in samples])
            return default_data_collator(samples)

        watch = Watch()
        run = trainer(
            tmp_path,
            kind=kind,
            model=lora_llama(dropout=0.1),
            data_collator=collate,
            callbacks=[watch],
            include_num_input_tokens_seen="all",
            max_steps=14,  # into the second epoch
        )
        run.train()
        found.append((batches, watch.seen, run.state.total_flos, run.state.global_step))
    assert found[0] == found[1]
    assert found[0][0] != sorted(found[0][0])


def test_without_memory_it_is_the_plain_trainer(tmp_path: Any) -> None:
    models, histories = [], []
    for kind, memory in (
        (Trainer, {}),
        (RKIFTrainer, {"memory_dataset": None}),
        (RKIFTrainer, {"memory_dataset": []}),
    ):
        model = lora_llama(dropout=0.1)
        run = trainer(tmp_path, kind=kind, model=model, logging_strategy="steps", logging_steps=1, **memory)
        run.train()
        models.append(weights(model))
        histories.append([(log.get("loss"), log.get("grad_norm")) for log in run.state.log_history])
        assert getattr(run, "fuser", None) is None
    for model, history in zip(models[1:], histories[1:], strict=True):
        assert_same_bits(model, models[0])
        assert history == histories[0]


def test_the_fuser_exists_from_the_start_of_training(tmp_path: Any) -> None:
    run = trainer(tmp_path)
    assert run.fuser is None
    run.train()
    first = run.fuser
    assert first.round == 3
    run.train()
    assert run.fuser is not first


@pytest.mark.parametrize("kwargs", [{}, {"logging_steps": 2}])
def test_logs_figures_beside_the_loss(tmp_path: Any, kwargs: dict[str, Any]) -> None:
    run = trainer(tmp_path, logging_strategy="steps" if kwargs else "no", **kwargs)
    run.train()
    logs = {log["step"]: log for log in run.state.log_history if "rkif/round" in log}
    assert {step: log["rkif/round"] for step, log in logs.items()} == ({4: 1, 6: 2} if kwargs else {})
    for log in logs.values():
        assert "loss" in log
        assert 0 < log["rkif/share_neither"] < 1
        assert log["rkif/norm_outer"] > 0


# --- The tail --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "rounds"), [(6, 2), (7, 3), (2, 1)])
def test_the_tail_is_fused_and_in_the_last_checkpoint(tmp_path: Any, steps: int, rounds: int) -> None:
    model = lora_llama()
    run = trainer(tmp_path, model=model, max_steps=steps, save_strategy="steps", save_steps=100)
    run.train()
    assert run.fuser.round == rounds
    assert run.fuser.inner_observed == 0
    _assert_at_base(run, model)
    saved = lora_llama()
    saved.load_adapter(str(tmp_path / f"checkpoint-{steps}"), "default")
    assert_same_bits(weights(saved), weights(model))


def _assert_at_base(run: Any, model: Any) -> None:
    """The model is at the fuser's base: going back to it moves nothing."""
    after = weights(model)
    run.fuser.rollback()
    assert_same_bits(weights(model), after)


@pytest.mark.parametrize("event", ["on_step_end", "on_epoch_end", "on_substep_end"])
def test_a_stop_by_a_callback_fuses_the_tail(tmp_path: Any, event: str) -> None:
    model = lora_llama()
    run = trainer(
        tmp_path,
        model=model,
        max_steps=14,
        gradient_accumulation_steps=3,
        callbacks=[Stop(event, 4)],
        save_strategy="epoch",
    )
    run.add_callback(Stop("on_init_end", -1))  # one that comes after the trainer's own
    run.train()
    assert run.state.global_step == 4
    assert run.fuser.round == 2
    _assert_at_base(run, model)
    saved = lora_llama()
    saved.load_adapter(str(tmp_path / "checkpoint-4"), "default")
    assert_same_bits(weights(saved), weights(model))


class StopAtEvaluation(Stop):
    def __init__(self, step: int) -> None:
        super().__init__("on_evaluate", step)


@pytest.mark.parametrize("best", [False, True])
def test_a_stop_by_an_evaluation(tmp_path: Any, best: bool) -> None:
    """The tail is in the checkpoint, unless the checkpoint may be chosen by what was measured before it."""
    model = lora_llama()
    measured: dict[int, dict[str, Tensor]] = {}

    class Measure(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            measured[state.global_step] = weights(kwargs["model"])

    run = trainer(
        tmp_path,
        model=model,
        eval_dataset=rows(4, seed=5),
        callbacks=[StopAtEvaluation(4), Measure()],
        eval_strategy="steps",
        eval_steps=4,
        save_strategy="steps",
        save_steps=4,
        load_best_model_at_end=best,
    )
    run.train()
    assert run.state.global_step == 4
    assert run.fuser.round == 2
    saved = lora_llama()
    saved.load_adapter(str(tmp_path / "checkpoint-4"), "default")
    if best:
        assert run.state.best_model_checkpoint.endswith("checkpoint-4")
        assert_same_bits(weights(saved), measured[4])
    else:
        _assert_at_base(run, model)
        assert any(
            not torch.equal(a, b) for a, b in zip(weights(saved).values(), measured[4].values(), strict=True)
        )
    assert_same_bits(weights(model), weights(saved))


def test_the_best_model_is_not_fused_again(tmp_path: Any) -> None:
    model = lora_llama()
    run = trainer(
        tmp_path,
        model=model,
        eval_dataset=rows(4, seed=5),
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        learning_rate=0.3,  # gets worse and worse
    )
    run.train()
    best = run.state.best_model_checkpoint
    assert not best.endswith("-7")
    saved = lora_llama()
    saved.load_adapter(best, "default")
    assert_same_bits(weights(model), weights(saved))


# --- Precision -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_outer_learning_rate_sets_the_outer_task_vector(tmp_path: Any, precision: str) -> None:
    norms = []
    for rate in (1e-4, 1e-3):
        run = trainer(
            tmp_path,
            outer_learning_rate=rate,
            fusion=FusionConfig.paper(inner_steps=3, outer_steps=4, beta1=0.5),
            bf16=precision == "bf16",
            max_steps=12,
            lr_scheduler_type="constant",
            callbacks=[Stop("on_optimizer_step", -1)],
        )
        if precision == "fp16":
            scale_losses(run, autocast=True)
        reports = _reports(run)
        run.train()
        assert reports[0].norms["inner"] > 1e-3
        norms.append(reports[0].norms)
        for optimizer in (run.optimizer.optimizer, run._rounds.optimizer.optimizer):
            assert all(optimizer.state[p]["step"] >= 12 for p in _trainable(run.model))
        if precision != "fp32":
            assert next(iter(run.hidden)) == {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert norms[0]["inner"] == norms[1]["inner"]
    assert 9 < norms[1]["outer"] / norms[0]["outer"] < 11


def _reports(run: Any) -> list[Any]:
    """Collects the report of every fusion of a trainer, and the dtypes of its logits as `run.hidden`."""
    reports: list[Any] = []
    close, run.hidden = run._rounds.close, set()

    def watched(*, tail: bool) -> None:
        before = run.fuser.round
        close(tail=tail)
        if run.fuser.round > before:
            reports.append(run.fuser.last_report)

    run._rounds.close = watched
    run.model.get_base_model().lm_head.register_forward_hook(
        lambda _m, _i, output: run.hidden.add(output.dtype)
    )
    return reports


class Overflows:
    """Makes a gradient of the given steps infinite; steps are counted over both learners."""

    overflows: frozenset[int] = frozenset()
    calls = 0

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(model, *args, **kwargs)
        if self.calls in self.overflows:
            _trainable(model)[0].grad.view(-1)[0] = math.inf
        self.calls += 1
        return loss


class OverflowingTrainer(Overflows, InOrderTrainer):
    pass


class EarlierTrainer(OverflowingTrainer):
    """Leaves gradients scaled where it does not clip them, as the Trainer of transformers 5.0 did."""

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        return grad_norm


# Of 7 inner steps by 3 with 2 outer steps each: the second inner step, and the first outer step of round 2.
OVERFLOWS = frozenset({1, 9})


@pytest.mark.parametrize("kind", [OverflowingTrainer, EarlierTrainer])
@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("overflows", [frozenset(), OVERFLOWS], ids=["no overflow", "overflows"])
def test_the_loss_scale_is_never_seen(tmp_path: Any, kind: Any, clip: float, overflows: frozenset[int]) -> None:
    """A power-of-two scale changes no bit of weights or importance; a step that overflows never happened."""
    model, expected = lora_llama(), lora_llama()
    run = scale_losses(trainer(tmp_path, kind=kind, model=model, max_grad_norm=clip), autocast=False)
    run.overflows = overflows
    run.train()
    fuser = plain_loop(expected, run.args, overflows=overflows)
    assert_same_bits(weights(model), weights(expected))
    for side in ("inner", "outer"):
        assert_same_bits(run.fuser.scores(side), fuser.scores(side))
    assert run.fuser.last_report == fuser.last_report
    assert run.calls == 7 + 2 * run.fuser.round + len(overflows & {9})
    assert run.accelerator.scaler.get_scale() == 2.0 ** (16 - len(overflows))


def test_overflows_without_end_are_an_error(tmp_path: Any) -> None:
    run = scale_losses(trainer(tmp_path, kind=OverflowingTrainer), autocast=False)
    run.overflows = frozenset(range(3, 1000))
    with pytest.raises(RuntimeError, match="17 outer steps of one round"):
        run.train()


def test_gradient_checkpointing_changes_no_bit(tmp_path: Any) -> None:
    models = [lora_llama(dropout=0.1) for _ in range(2)]
    for model, on in zip(models, (False, True), strict=True):
        recomputed = []
        model.get_base_model().model.layers[0].input_layernorm.register_forward_hook(lambda *_, r=recomputed: r.append(1))
        trainer(tmp_path, model=model, gradient_checkpointing=on).train()
        steps = 7 + 3 * FUSION.outer_steps
        assert len(recomputed) == (2 * steps if on else steps)
    assert_same_bits(weights(models[0]), weights(models[1]))


def test_an_encoder_decoder_model(tmp_path: Any) -> None:
    model = tiny_t5(40, 0)
    before = weights(model)
    run = trainer(tmp_path, model=model, gradient_accumulation_steps=2)
    run.train()
    assert run.fuser.round == 3
    _assert_at_base(run, model)
    assert run.fuser.last_report.counts["neither"] > 0
    assert any(not torch.equal(p, before[name]) for name, p in weights(model).items())


# --- The memory ------------------------------------------------------------------------------------------------


def test_memory_batches_are_epochs_without_replacement() -> None:
    batches = MemoryBatches(list(range(10)), 4, list, seed=3)
    drawn = [next(batches) for _ in range(15)]
    assert {len(batch) for batch in drawn} == {4}
    samples = [sample for batch in drawn for sample in batch]
    epochs = [samples[i : i + 10] for i in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert batches.position == 60

    again = MemoryBatches(list(range(10)), 4, list, seed=3)
    again.position = 28
    assert next(again) == drawn[7]
    other = MemoryBatches(list(range(10)), 4, list, seed=4)
    assert [next(other) for _ in range(15)] != drawn


def test_a_memory_smaller_than_a_batch() -> None:
    batch = next(MemoryBatches(["a", "b"], 5, list, seed=0))
    assert sorted(batch[:4]) == ["a", "a", "b", "b"]
    assert set(batch[:2]) == set(batch[2:4]) == {"a", "b"}


def test_memory_batches_draw_no_global_random_numbers() -> None:
    states = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]
    next(MemoryBatches(MEMORY, 4, default_data_collator, seed=0))
    assert states == [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]


@pytest.mark.parametrize("data_seed", [None, 11])
def test_the_trainer_seeds_and_collates_the_memory(tmp_path: Any, data_seed: int | None) -> None:
    extra = [{**row, "note": "not for the model"} for row in MEMORY]
    drawn = []
    run = trainer(
        tmp_path,
        memory_dataset=extra,
        train_dataset=NEW[:2],
        data_collator=lambda samples: drawn.append(samples) or default_data_collator(samples),
        data_seed=data_seed,
    )
    run.train()
    batches = MemoryBatches(MEMORY, 2, list, seed=7 if data_seed is None else data_seed)
    expected = [next(batches) for _ in range(3 * FUSION.outer_steps)]
    assert [samples for samples in drawn if samples[0] in MEMORY] == expected


@pytest.mark.parametrize("kind", ["none", "single", "named"])
def test_eval_dataset_is_left_alone(tmp_path: Any, kind: str) -> None:
    given = {"none": None, "single": rows(4, 5), "named": {"a": rows(4, 5), "b": rows(4, 6)}}[kind]
    run = trainer(tmp_path, eval_dataset=given)
    assert run.eval_dataset is given
    if kind == "none":
        with pytest.raises(ValueError, match="requires an eval_dataset"):
            run.evaluate()
    else:
        keys = {"single": {"eval_loss"}, "named": {"eval_a_loss", "eval_b_loss"}}[kind]
        assert {key for key in run.evaluate() if key.endswith("_loss")} == keys


@pytest.mark.parametrize("kind", ["none", "single", "named"])
def test_sft_trainer_prepares_the_memory(tmp_path: Any, kind: str) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    class RKIFSFTTrainer(RKIFMixin, SFTTrainer):
        pass

    words = [f"w{i}" for i in range(20)]
    texts = {name: [" ".join(random.Random(f"{name}{i}").sample(words, 5)) for i in range(6)] for name in "nmab"}
    new, memory, a, b = (Dataset.from_dict({"text": text}) for text in texts.values())
    given = {"none": None, "single": a, "named": {"a": a, "b": b}}[kind]
    tokenizer = word_tokenizer([" ".join(words)])
    model = lora_llama()
    run = RKIFSFTTrainer(
        model=model,
        args=SFTConfig(**{**arguments(tmp_path).to_dict(), "max_length": 16}),
        train_dataset=new,
        memory_dataset=memory,
        eval_dataset=given,
        processing_class=tokenizer,
        fusion=FUSION,
        outer_learning_rate=OUTER_RATE,
    )
    drawn = []
    collate = run.data_collator
    run.data_collator = lambda samples: drawn.append(samples) or collate(samples)
    run.train()
    assert run.fuser.round == 3
    _assert_at_base(run, model)
    of_memory = {tuple(tokenizer(text)["input_ids"]) + (1,) for text in texts["m"]}
    seen = [tuple(sample["input_ids"]) for samples in drawn for sample in samples]
    assert sum(tokens in of_memory for tokens in seen) == 2 * 3 * FUSION.outer_steps
    assert {tokens for tokens in seen if tokens in of_memory} == of_memory
    if kind == "none":
        assert run.eval_dataset is None
    else:
        sets = {"eval": run.eval_dataset} if kind == "single" else run.eval_dataset
        assert sets.keys() == ({"eval"} if kind == "single" else {"a", "b"})
        assert all("input_ids" in s.column_names for s in sets.values())
        assert any(key.endswith("_loss") for key in run.evaluate())


# --- Errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0, -1e-3, math.inf, math.nan])
def test_refuses_an_outer_learning_rate(tmp_path: Any, rate: float) -> None:
    with pytest.raises(ValueError, match=f"outer_learning_rate must be positive and finite, got {rate}"):
        trainer(tmp_path, outer_learning_rate=rate)


def test_refuses_other_configurations(tmp_path: Any) -> None:
    with pytest.raises(TypeError, match="fusion must be a FusionConfig, got dict"):
        trainer(tmp_path, fusion={"density": 0.2})


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self) -> Any:
        return iter(MEMORY)


@pytest.mark.parametrize("memory", [Endless(), iter(MEMORY), 3], ids=["iterable", "iterator", "number"])
def test_refuses_a_memory_without_length_and_indexing(tmp_path: Any, memory: Any) -> None:
    with pytest.raises(TypeError, match="memory_dataset must have a length and indexing"):
        trainer(tmp_path, memory_dataset=memory)


def test_a_missing_eval_dataset_is_still_an_error(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="didn't pass an `eval_dataset`"):
        trainer(tmp_path, eval_strategy="steps", eval_steps=2)


def test_refuses_a_frozen_model(tmp_path: Any) -> None:
    model = tiny_llama(40, 0).requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter is trainable"):
        trainer(tmp_path, model=model).train()


def test_refuses_a_ready_made_optimizer(tmp_path: Any) -> None:
    model = lora_llama()
    optimizers = (torch.optim.SGD(_trainable(model)), None)
    with pytest.raises(ValueError, match="pass optimizer_cls_and_kwargs instead"):
        trainer(tmp_path, model=model, optimizers=optimizers).train()
    trainer(tmp_path, model=model, optimizers=optimizers, memory_dataset=None).train()


@pytest.mark.parametrize("found", ["2 processes", "DeepSpeed", "FSDP", "nn.DataParallel over 2 GPUs", "a model on cpu, meta"])
def test_refuses_several_devices(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    model = lora_llama()
    runs = [trainer(tmp_path, model=model, memory_dataset=memory, max_steps=1) for memory in (MEMORY, None)]
    for run in runs:
        if found == "2 processes":
            monkeypatch.setattr(type(run.accelerator), "num_processes", 2)
        elif found == "nn.DataParallel over 2 GPUs":
            monkeypatch.setattr(run.args, "_n_gpu", 2)
        elif found == "a model on cpu, meta":
            model.get_base_model().lm_head.to("meta")
        else:
            monkeypatch.setattr(run, f"is_{found.lower()}_enabled", True)
    before = weights(model)
    with pytest.raises(RuntimeError, match=f"one process on one device so far, found: {found}$"):
        runs[0].train()
    assert_same_bits(weights(model), before)
