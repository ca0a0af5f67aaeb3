"""Scores of tiny random models, compared with single records and labels without a cache."""

from __future__ import annotations

import random
import subprocess
import sys
from typing import Any

import pytest
import torch
from plain_scoring import LABELS, WORDS, both, items, plain_generation, plain_score, setup
from transformers import GPT2Config, GPT2LMHeadModel

from rkif.continual.models.scoring import (
    label_scores,
    predict_by_generation,
    predict_by_likelihood,
)
from rkif.continual.tasks.records import Record


@both
@pytest.mark.parametrize("max_length", [48, 24])
def test_scores_are_those_of_single_sequences(kind: str, max_length: int) -> None:
    model, collator = setup(kind, max_length=max_length)
    expected = [[plain_score(model, collator, item, label, 4) for label in LABELS] for item in items()]
    scores = label_scores(model, collator, items(), LABELS, batch_size=5)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(
        scores.double(), torch.tensor(expected, dtype=torch.float64), atol=2e-5, rtol=0
    )
    predictions = predict_by_likelihood(model, collator, items(), LABELS, batch_size=5)
    assert predictions == [LABELS[row.index(max(row))] for row in expected]


@both
def test_scores_do_not_depend_on_the_batch(kind: str) -> None:
    model, collator = setup(kind)
    single = label_scores(model, collator, items(), LABELS, batch_size=1)
    for batch_size in (2, 13, 100):
        batched = label_scores(model, collator, items(), LABELS, batch_size=batch_size)
        torch.testing.assert_close(batched, single, atol=2e-5, rtol=0)
    assert single.std(0).min() > 0.01  # scores of records differ by much more than the tolerance


@both
def test_the_likeliest_label_wins(kind: str) -> None:
    model, collator = setup(kind)
    scores = label_scores(model, collator, items(), WORDS, batch_size=4)
    predictions = predict_by_likelihood(model, collator, items(), WORDS, batch_size=4)
    assert predictions == [WORDS[i] for i in scores.argmax(1)]
    assert len(set(predictions)) > 1


@both
def test_the_first_of_equal_labels_wins(kind: str) -> None:
    model, collator = setup(kind)
    model.lm_head.weight.data.zero_()
    labels = ["w1 w2", "w3", "w4", "w5"]
    assert predict_by_likelihood(model, collator, items(3), labels, batch_size=2) == ["w3"] * 3
    assert predict_by_likelihood(model, collator, items(3), labels[::-1], batch_size=2) == ["w5"] * 3


def test_positions_count_from_the_prompts_start() -> None:
    _, collator = setup("llama")
    # GPT-2 has absolute positions, which padding must not shift.
    config = GPT2Config(
        vocab_size=len(collator.tokenizer), n_embd=32, n_layer=2, n_head=4, initializer_range=0.3
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config).eval()
    expected = [[plain_score(model, collator, item, label, 4) for label in LABELS] for item in items()]
    scores = label_scores(model, collator, items(), LABELS, batch_size=5)
    torch.testing.assert_close(
        scores.double(), torch.tensor(expected, dtype=torch.float64), atol=1e-4, rtol=0
    )
    written = [collator.decode(plain_generation(model, collator, item, 6)) for item in items()]
    assert predict_by_generation(model, collator, items(), batch_size=5, max_new_tokens=6) == written


def test_a_prompt_is_computed_once() -> None:
    model, collator = setup("llama")
    shapes: list[tuple[int, int]] = []
    logits: list[tuple[int, int]] = []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    model.lm_head.register_forward_pre_hook(lambda _, args: logits.append(tuple(args[0].shape[:2])))
    lengths = [3, 20, 3, 20]
    mixed = [("Ask: ", Record("t", str(i), " ".join(WORDS[:n]), "w1")) for i, n in enumerate(lengths)]
    label_scores(model, collator, mixed, LABELS, batch_size=2)
    # Short records form a batch: BOS, "Ask:" and the words; then four labels of at most three tokens each.
    assert shapes == [(2, 5), (8, 3), (2, 22), (8, 3)]
    assert logits == [(2, 1), (8, 3), (2, 1), (8, 3)]
    logits.clear()
    predict_by_generation(model, collator, mixed[:2], batch_size=2, max_new_tokens=1)
    assert logits == [(2, 1)]


def test_an_encoder_runs_once_for_all_labels() -> None:
    model, collator = setup("t5")
    calls: list[int] = []
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    label_scores(model, collator, items(4), LABELS, batch_size=2)
    assert len(calls) == 2


@both
def test_half_precision_scores_are_summed_in_float32(kind: str) -> None:
    model, collator = setup(kind)
    exact = label_scores(model, collator, items(), LABELS, batch_size=4)
    with torch.autocast("cpu", torch.bfloat16):
        scores = label_scores(model, collator, items(), LABELS, batch_size=4)
    torch.testing.assert_close(scores, exact, atol=1.0, rtol=0)
    assert not torch.equal(scores, exact)  # the caller's autocast is active
    assert not torch.equal(scores, scores.bfloat16().float())


@both
def test_modes_gradients_and_generators_are_unchanged(kind: str) -> None:
    model, collator = setup(kind)
    expected = predict_by_likelihood(model, collator, items(), LABELS, batch_size=4)
    written = predict_by_generation(model, collator, items(), batch_size=4, max_new_tokens=3)
    model.train()
    model.lm_head.eval()
    modes = [module.training for module in model.modules()]
    assert {True, False} == set(modes)
    with_gradients: list[bool] = []
    model.register_forward_pre_hook(lambda *_: with_gradients.append(torch.is_grad_enabled()))
    before = torch.get_rng_state(), random.getstate()
    assert predict_by_likelihood(model, collator, items(), LABELS, batch_size=4) == expected
    assert predict_by_generation(model, collator, items(), batch_size=4, max_new_tokens=3) == written
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert torch.is_grad_enabled()
    assert set(with_gradients) == {False}


def test_modes_are_restored_after_an_error() -> None:
    model, collator = setup("llama", max_length=20)
    model.train()
    with pytest.raises(ValueError, match="max_length must hold"):
        predict_by_likelihood(model, collator, items(), LABELS, batch_size=4)
    assert all(module.training for module in model.modules())


@both
def test_training_continues_after_scoring(kind: str) -> None:
    model, collator = setup(kind)
    filled_on_first_use: list[torch.Tensor] = []

    def scaled(_module: Any, _args: Any, logits: torch.Tensor) -> torch.Tensor:
        filled_on_first_use[:] = filled_on_first_use or [torch.ones(logits.shape[-1])]
        return logits * filled_on_first_use[0]

    model.lm_head.register_forward_hook(scaled)
    label_scores(model, collator, items(4), LABELS, batch_size=4)
    model.train()
    model(**collator.training_batch(items(4))).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_no_items_give_no_answers() -> None:
    model, collator = setup("llama")
    assert predict_by_likelihood(model, collator, [], LABELS, batch_size=1) == []
    assert label_scores(model, collator, [], LABELS, batch_size=1).shape == (0, 4)
    assert predict_by_generation(model, collator, [], batch_size=1, max_new_tokens=1) == []


def test_invalid_arguments_are_refused() -> None:
    model, collator = setup("llama")
    with pytest.raises(ValueError, match="labels are empty: for free text use predict_by_generation"):
        predict_by_likelihood(model, collator, items(), [], batch_size=4)
    with pytest.raises(ValueError, match="label ' ' has no tokens"):
        predict_by_likelihood(model, collator, items(), ["w1", " "], batch_size=4)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        predict_by_likelihood(model, collator, items(), LABELS, batch_size=0)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got -1"):
        predict_by_generation(model, collator, items(), batch_size=-1, max_new_tokens=1)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        predict_by_generation(model, collator, items(), batch_size=1, max_new_tokens=0)


@both
def test_nan_logits_are_an_error(kind: str) -> None:
    model, collator = setup(kind)
    model.lm_head.weight.data[:] = float("nan")
    with pytest.raises(ValueError, match="model gives NaN for record '0' of task 't'"):
        predict_by_likelihood(model, collator, items(), LABELS, batch_size=4)


def test_import_needs_no_model_library() -> None:
    code = (
        "import sys; import rkif.continual.tasks.replay_memory, rkif.continual.evaluation.metrics;"
        "import rkif.continual.models.scoring, rkif.continual.tasks.text;"
        "sys.exit(bool({'transformers', 'peft', 'tokenizers', 'triton'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
