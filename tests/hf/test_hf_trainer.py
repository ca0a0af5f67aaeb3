"""The steps that `rkif.hf` takes in a Trainer, and the state of the Trainer that it keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_helpers import (
    FUSION,
    MEMORY,
    NEW,
    OUTER_RATE,
    InOrderTrainer,
    assert_at_base,
    assert_same_bits,
    lora_llama,
    plain_loop,
    rows,
    trainable,
    trainer,
    weights,
)
from tiny import tiny_llama, tiny_t5
from torch import Tensor
from transformers import Trainer, TrainerCallback, default_data_collator

from rkif import FusionConfig
from rkif.hf import RKIFTrainer


class RecordingSGD(torch.optim.SGD):
    """Plain SGD that keeps the learning rate, the weights and the gradients of every step of any instance."""

    steps: list[tuple[float, list[Tensor], list[Tensor]]]

    def step(self, closure: Any = None) -> Any:
        parameters = [p for group in self.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in parameters]
        self.steps.append((self.param_groups[0]["lr"], before, [p.grad for p in parameters]))
        return super().step(closure)


@pytest.fixture
def recording_sgd() -> Any:
    return type("FreshRecordingSGD", (RecordingSGD,), {"steps": []})


ACCUMULATED = {"gradient_accumulation_steps": 3, "max_grad_norm": 0.05}


@pytest.mark.parametrize("steps", [{"max_grad_norm": 0.0}, ACCUMULATED], ids=["single", "accumulated"])
@pytest.mark.parametrize("adapter", [True, False], ids=["lora", "full"])
def test_training_equals_a_plain_loop(tmp_path: Any, steps: dict[str, Any], adapter: bool) -> None:
    models = [lora_llama() if adapter else tiny_llama(40, 0) for _ in range(2)]
    run = trainer(tmp_path, model=models[0], **steps)
    run.train()
    fuser = plain_loop(models[1], run.args)
    assert_same_bits(weights(models[0]), weights(models[1]))
    for learner in ("inner", "outer"):
        assert_same_bits(run.fuser.scores(learner), fuser.scores(learner))
    assert run.fuser.last_report == fuser.last_report
    assert run.fuser.round == 3


@pytest.mark.parametrize("ragged", [False, True], ids=["even", "ragged"])
@pytest.mark.parametrize("tokenwise", [True, False], ids=["mean over tokens", "mean of micro-batches"])
def test_outer_micro_batches_equal_one_large_batch(
    tmp_path: Any, recording_sgd: Any, ragged: bool, tokenwise: bool
) -> None:
    """Also after the short last step of an epoch: 7 micro-batches give steps of 3, 3 and 1."""
    memory = rows(6, seed=3, ragged=ragged)
    model = lora_llama()
    drawn = []

    def collate(samples: Any) -> Any:
        if samples[0] in memory:
            drawn.append(samples)
        return default_data_collator(samples)

    run = trainer(
        tmp_path,
        model=model,
        train_dataset=NEW[:14],
        memory_dataset=memory,
        data_collator=collate,
        optimizer_cls_and_kwargs=(recording_sgd, {"lr": 0.5}),
        gradient_accumulation_steps=3,
        max_grad_norm=0.0,
        max_steps=FUSION.inner_steps,
    )
    run.model_accepts_loss_kwargs = tokenwise  # otherwise the Trainer averages the means of the micro-batches
    run.train()

    outer = recording_sgd.steps[FUSION.inner_steps :]
    assert len(outer) == FUSION.outer_steps
    for number, (_, before, gradients) in enumerate(outer):
        batches = [default_data_collator(samples) for samples in drawn[3 * number : 3 * number + 3]]
        with torch.no_grad():
            for p, value in zip(trainable(model), before, strict=True):
                p.copy_(value)
        if tokenwise:
            batches = [{name: torch.cat([b[name] for b in batches]) for name in batches[0]}]
        loss = sum(model(**batch).loss for batch in batches) / len(batches)
        expected = torch.autograd.grad(loss, trainable(model))
        assert max(g.abs().max() for g in expected) > 1e-3
        for found, wanted in zip(gradients, expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)


def test_outer_rate_follows_the_inner_schedule(tmp_path: Any, recording_sgd: Any) -> None:
    trainer(
        tmp_path,
        optimizer_cls_and_kwargs=(recording_sgd, {"lr": 0.5}),
        outer_learning_rate=0.25,
        warmup_steps=4,
        max_steps=8,
    ).train()
    fractions = [0, 0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25]
    inner, outer = [0.5 * f for f in fractions], [0.25 * f for f in fractions]
    expected = inner[:3] + 2 * outer[2:3] + inner[3:6] + 2 * outer[5:6] + inner[6:] + 2 * outer[7:]
    assert [rate for rate, _, _ in recording_sgd.steps] == expected


def test_outer_optimizer_is_built_like_the_inner_one(tmp_path: Any) -> None:
    model = tiny_llama(40, 0)
    run = trainer(tmp_path, model=model, weight_decay=0.1, adam_beta2=0.9, lr_scheduler_type="constant")
    run.train()
    inner, outer = run.optimizer.optimizer, run._rkif.optimizer
    assert type(inner) is type(outer)
    for mine, theirs in zip(outer.param_groups, inner.param_groups, strict=True):
        assert [id(p) for p in mine.pop("params")] == [id(p) for p in theirs.pop("params")]
        assert mine.pop("lr") == mine.pop("initial_lr") == OUTER_RATE
        assert theirs.pop("lr") == theirs.pop("initial_lr") == run.args.learning_rate
        assert mine == theirs
    assert [group["weight_decay"] for group in outer.param_groups] == [0.1, 0.0]
    p = next(model.parameters())
    assert inner.state[p]["step"] == 7
    assert outer.state[p]["step"] == 3 * FUSION.outer_steps  # one optimizer state over all rounds
    assert not torch.equal(inner.state[p]["exp_avg"], outer.state[p]["exp_avg"])


class TwoRatesTrainer(InOrderTrainer):
    def create_optimizer(self, *_: Any) -> Any:
        if self.optimizer is None:
            first, *others = trainable(self.model)
            self.optimizer = torch.optim.SGD([{"params": [first], "lr": 0.25}, {"params": others, "lr": 4.0}])
        return self.optimizer


def test_learning_rates_of_parameter_groups_keep_their_ratio(tmp_path: Any) -> None:
    run = trainer(tmp_path, kind=TwoRatesTrainer, lr_scheduler_type="constant")
    run.train()
    assert [group["lr"] for group in run._rkif.optimizer.param_groups] == [OUTER_RATE, 16 * OUTER_RATE]


def test_the_outer_optimizer_can_be_chosen(tmp_path: Any) -> None:
    class Chosen(InOrderTrainer):
        def create_outer_optimizer(self) -> Any:
            return torch.optim.SGD(trainable(self.model), lr=2.0)

    model = lora_llama()
    inner = torch.optim.Adam(trainable(model), lr=1e-3)
    run = trainer(tmp_path, kind=Chosen, model=model, optimizers=(inner, None), lr_scheduler_type="constant")
    run.train()
    assert run.optimizer.optimizer is inner
    assert type(run._rkif.optimizer) is torch.optim.SGD
    assert run._rkif.optimizer.param_groups[0]["lr"] == 2.0


class Watch(TrainerCallback):
    """Records the state at the start of every step."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gradients = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        rate = kwargs["lr_scheduler"].get_last_lr()[0]
        self.seen.append((state.global_step, rate, len(gradients), state.num_input_tokens_seen))


def test_outer_steps_do_not_change_the_state_of_the_trainer(tmp_path: Any) -> None:
    """Batches, steps, schedule and counters are the plain trainer's, with dropout and over an epoch."""
    found = []
    for kind in (RKIFTrainer, Trainer):
        batches: list[Any] = []

        def collate(samples: Any, batches: list[Any] = batches) -> Any:
            if samples[0] not in MEMORY:
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
            max_steps=14,
        )
        run.train()
        found.append((batches, watch.seen, run.state.total_flos, run.state.num_input_tokens_seen))
    assert found[0] == found[1]
    assert found[0][0] != sorted(found[0][0])


@pytest.mark.parametrize("memory", [None, []], ids=["none", "empty"])
def test_without_memory_it_equals_the_plain_trainer(tmp_path: Any, memory: Any) -> None:
    models = [lora_llama(dropout=0.1) for _ in range(2)]
    logs = {"logging_strategy": "steps", "logging_steps": 1}
    plain = trainer(tmp_path, kind=Trainer, model=models[0], **logs)
    plain.train()
    run = trainer(tmp_path, kind=RKIFTrainer, model=models[1], memory_dataset=memory, **logs)
    run.train()
    assert_same_bits(weights(models[1]), weights(models[0]))
    assert run.fuser is None
    for log, expected in zip(run.state.log_history[:-1], plain.state.log_history[:-1], strict=True):
        assert log == expected


def test_every_training_makes_a_new_fuser(tmp_path: Any) -> None:
    run = trainer(tmp_path)
    assert run.fuser is None
    run.train()
    first = run.fuser
    run.train()
    assert run.fuser is not first
    assert run.fuser.round == first.round == 3
    assert run._rkif.memory_position == 3 * 2 * FUSION.outer_steps


def test_a_refused_fusion_is_reported(tmp_path: Any) -> None:
    class Poisoned(InOrderTrainer):
        def training_step(self, model: Any, *args: Any) -> Tensor:
            loss: Tensor = super().training_step(model, *args)
            trainable(model)[0].grad.fill_(torch.nan)
            return loss

    model = lora_llama()
    before = weights(model)
    skip = FusionConfig.paper(inner_steps=3, outer_steps=2, nonfinite="skip")
    run = trainer(tmp_path, kind=Poisoned, model=model, fusion=skip, max_steps=3)
    run.train()
    assert not run.fuser.last_report.applied
    assert_same_bits(weights(model), before)
    with pytest.raises(RuntimeError, match="non-finite importance"):
        trainer(tmp_path, kind=Poisoned, model=model).train()


class SeldomTrainer(InOrderTrainer):
    """Has no gradient of the parameters in `unused` in some steps, as if a router left out an expert."""

    unused: dict[int, str]
    calls = 0

    def training_step(self, model: Any, *args: Any) -> Tensor:
        loss: Tensor = super().training_step(model, *args)
        self.calls += 1
        for name, parameter in model.named_parameters():
            if (part := self.unused.get(self.calls)) and part in name:
                parameter.grad = None
        return loss


def test_parameters_without_a_gradient_are_left_out_with_one_warning(tmp_path: Any) -> None:
    """Without a gradient in the second and the third round; a round has 3 and 2 steps."""
    model = lora_llama()
    run = trainer(tmp_path, kind=SeldomTrainer, model=model, max_steps=9)
    run.unused = dict.fromkeys(range(6, 16), "layers.1.self_attn.v_proj.lora_A")
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_A.default.weight"
    kept = []
    close = run._rkif.close

    def watched(*, tail: bool) -> None:
        close(tail=tail)
        kept.append(weights(model)[name])

    run._rkif.close = watched
    with pytest.warns(UserWarning, match=f"round 2 had no gradient of {name}: they took no part") as caught:
        run.train()
    assert len([w for w in caught if "took no part" in str(w.message)]) == 1
    assert run.fuser.round == 3
    assert run.fuser.last_report.missing == (name,)
    assert not torch.equal(kept[0], kept[2])
    assert torch.equal(kept[2], kept[-1])
    strict = FusionConfig.paper(inner_steps=3, outer_steps=2, missing="raise")
    run = trainer(tmp_path, kind=SeldomTrainer, fusion=strict)
    run.unused = dict.fromkeys(range(1, 16), "layers.1.self_attn.v_proj.lora_A")
    with pytest.raises(ValueError, match=r"had no gradient .* FusionConfig\(missing='zero'\)"):
        run.train()


# The name in all versions of transformers that rkif supports; later ones prefer `activation_checkpointing`.
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
def test_gradient_checkpointing_changes_no_bit(tmp_path: Any) -> None:
    models = [lora_llama(dropout=0.1) for _ in range(2)]
    for model, on in zip(models, (False, True), strict=True):
        calls = []
        norm = model.get_base_model().model.layers[0].input_layernorm
        norm.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        trainer(tmp_path, model=model, gradient_checkpointing=on).train()
        assert len(calls) == (1 + on) * (7 + 3 * FUSION.outer_steps)
    assert_same_bits(weights(models[0]), weights(models[1]))


def test_an_encoder_decoder_model_can_be_trained(tmp_path: Any) -> None:
    model = tiny_t5(40, 0)
    before = weights(model)
    run = trainer(tmp_path, model=model, gradient_accumulation_steps=2)
    run.train()
    assert run.fuser.round == 3
    assert_at_base(run)
    assert any(not torch.equal(p, before[name]) for name, p in weights(model).items())
