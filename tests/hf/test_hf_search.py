"""A hyperparameter search with a memory: every trial trains as a separate trainer does."""

from __future__ import annotations

from typing import Any
from weakref import ref

import optuna
import pytest
from hf_helpers import FUSION, MEMORY, assert_same_bits, lora_llama, trainer, weights

from rkif.hf import RKIFTrainer

RATES = [1e-2, 3e-3]


def fresh_model() -> Any:
    return lora_llama()


def test_trials_equal_trainings_of_their_own(tmp_path: Any) -> None:
    ends: list[Any] = []

    class Recorded(RKIFTrainer):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            output = super().train(*args, **kwargs)
            ends.append((self.fuser.round, self.args.learning_rate, weights(self.model)))
            return output

    changes = {"kind": Recorded, "eval_dataset": MEMORY, "max_steps": 4}
    run = trainer(tmp_path, model_init=fresh_model, **changes)
    best = run.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", RATES)},
        backend="optuna",
        n_trials=2,
        sampler=optuna.samplers.GridSampler({"learning_rate": RATES}, seed=0),
    )
    assert best.hyperparameters["learning_rate"] in RATES
    assert {rate for _, rate, _ in ends} == set(RATES)
    for rounds, rate, found in list(ends):
        alone = trainer(tmp_path, model_init=fresh_model, learning_rate=rate, **changes)
        alone.train()
        assert rounds == alone.fuser.round == -(-4 // FUSION.inner_steps)
        assert_same_bits(found, weights(alone.model))


def test_an_earlier_training_is_released(tmp_path: Any) -> None:
    """Between trials the search frees the model, and a new one is made before a new fuser."""
    alive = []

    def counted() -> Any:
        alive.append(None if first is None else first())
        return lora_llama()

    first: Any = None
    run = trainer(tmp_path, model_init=counted, max_steps=3)
    run.train()
    first = ref(run.fuser)
    run.train()
    assert alive[-1] is None


def test_a_ledger_is_refused(tmp_path: Any) -> None:
    run = trainer(tmp_path, model_init=fresh_model, ledger=tmp_path / "ledger")
    with pytest.raises(ValueError, match=r"ledger='.*ledger' cannot hold several trials"):
        run.hyperparameter_search(backend="optuna", n_trials=1)
