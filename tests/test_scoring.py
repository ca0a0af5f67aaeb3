"""Answers of tiny random models, against one record and one label at a time without any cache."""

from __future__ import annotations

import random
import subprocess
import sys
from typing import Any

import pytest
import torch
from tiny import tiny_llama, tiny_t5, word_tokenizer

from rkif.continual.scoring import (
    accuracy,
    exact_match,
    label_scores,
    predict_by_generation,
    predict_by_likelihood,
)
from rkif.continual.tasks import Item, Record
from rkif.continual.text import Encoder, TextFormat

WORDS = [f"w{i}" for i in range(40)]
LABELS = ["w1", "w2 w3", "w2 w5 w6", "w7"]
EOS = 1


def items(count: int = 13) -> list[Item]:
    rng = random.Random(5)
    return [
        ("Ask: ", Record("t", str(i), " ".join(rng.choices(WORDS, k=rng.randint(1, 30))) + " Answer:", "w1"))
        for i in range(count)
    ]


def setup(kind: str, *, max_length: int = 48, seed: int = 2) -> tuple[Any, Encoder]:
    seq2seq = kind == "t5"
    tokenizer = word_tokenizer(["Ask: Answer:", *WORDS], pad=seq2seq, bos=not seq2seq, eos_after=seq2seq)
    model = (tiny_t5 if seq2seq else tiny_llama)(len(tokenizer), seed)
    if not seq2seq:
        # The random model hardly ever stops by itself; a larger EOS row makes some answers end early.
        model.lm_head.weight.data[EOS] *= 3
    return model, Encoder(tokenizer, seq2seq=seq2seq, max_length=max_length, text=TextFormat())


def plain_logits(model: Any, encoder: Encoder, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """The logits of every token of `answer`, and of the one after it, from one forward pass of one sequence."""
    with torch.no_grad():
        if encoder.seq2seq:
            start = [model.config.decoder_start_token_id]
            return model(
                input_ids=torch.tensor([prompt]),
                decoder_input_ids=torch.tensor([start + answer]),
                use_cache=False,
            ).logits[0]
        return model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0, len(prompt) - 1 :]


def plain_score(model: Any, encoder: Encoder, item: Item, label: str, reserve: int) -> float:
    prompt, target = encoder.prompt(item[0], item[1].input, reserve=reserve), encoder.target(label)
    log_probs = plain_logits(model, encoder, prompt, target[:-1]).double().log_softmax(-1)
    return sum(log_probs[i, token].item() for i, token in enumerate(target))


def plain_generation(model: Any, encoder: Encoder, item: Item, max_new_tokens: int) -> list[str]:
    prompt = encoder.prompt(item[0], item[1].input, reserve=max_new_tokens)
    answer: list[int] = []
    while len(answer) < max_new_tokens and EOS not in answer:
        answer.append(int(plain_logits(model, encoder, prompt, answer)[-1].argmax()))
    return [encoder.tokenizer.decode(token) for token in answer if token not in (0, 1, 2, 3)]


both = pytest.mark.parametrize("kind", ["llama", "t5"])


@both
@pytest.mark.parametrize("max_length", [48, 24])
def test_scores_are_those_of_single_sequences(kind: str, max_length: int) -> None:
    model, encoder = setup(kind, max_length=max_length)
    expected = [[plain_score(model, encoder, item, label, 4) for label in LABELS] for item in items()]
    scores = label_scores(model, encoder, items(), LABELS, batch_size=5)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(
        scores.double(), torch.tensor(expected, dtype=torch.float64), atol=2e-5, rtol=0
    )
    predictions = predict_by_likelihood(model, encoder, items(), LABELS, batch_size=5)
    assert predictions == [LABELS[row.index(max(row))] for row in expected]


@both
def test_scores_do_not_depend_on_the_batch(kind: str) -> None:
    model, encoder = setup(kind)
    single = label_scores(model, encoder, items(), LABELS, batch_size=1)
    for batch_size in (2, 13, 100):
        batched = label_scores(model, encoder, items(), LABELS, batch_size=batch_size)
        torch.testing.assert_close(batched, single, atol=2e-5, rtol=0)
    assert single.std(0).min() > 0.01  # records differ by far more than the tolerance


@both
def test_the_likeliest_label_wins(kind: str) -> None:
    model, encoder = setup(kind)
    scores = label_scores(model, encoder, items(), WORDS, batch_size=4)
    predictions = predict_by_likelihood(model, encoder, items(), WORDS, batch_size=4)
    assert predictions == [WORDS[i] for i in scores.argmax(1)]
    assert len(set(predictions)) > 1


@both
def test_the_first_of_equal_labels_wins(kind: str) -> None:
    model, encoder = setup(kind)
    model.lm_head.weight.data.zero_()
    labels = ["w1 w2", "w3", "w4", "w5"]
    assert predict_by_likelihood(model, encoder, items(3), labels, batch_size=2) == ["w3"] * 3
    assert predict_by_likelihood(model, encoder, items(3), labels[::-1], batch_size=2) == ["w5"] * 3


def test_a_prompt_is_computed_once() -> None:
    model, encoder = setup("llama")
    shapes: list[tuple[int, int]] = []
    model.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: shapes.append(tuple(args[0].shape))
    )
    lengths = [3, 20, 3, 20]
    mixed = [("Ask: ", Record("t", str(i), " ".join(WORDS[:n]), "w1")) for i, n in enumerate(lengths)]
    label_scores(model, encoder, mixed, LABELS, batch_size=2)
    # Short records go together: BOS, "Ask:" and the words; then four labels of at most three tokens for each.
    assert shapes == [(2, 5), (8, 3), (2, 22), (8, 3)]


def test_an_encoder_runs_once_for_all_labels() -> None:
    model, encoder = setup("t5")
    calls: list[int] = []
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    label_scores(model, encoder, items(4), LABELS, batch_size=2)
    assert len(calls) == 2


@both
@pytest.mark.parametrize("max_length", [48, 24])
def test_generation_is_greedy(kind: str, max_length: int) -> None:
    model, encoder = setup(kind, max_length=max_length)
    expected = [" ".join(plain_generation(model, encoder, item, 6)) for item in items()]
    lengths = {len(text.split()) for text in expected}
    assert len(lengths) > 1  # so that some rows end before their neighbours
    for batch_size in (1, 5, 13):
        assert (
            predict_by_generation(model, encoder, items(), batch_size=batch_size, max_new_tokens=6)
            == expected
        )


@both
def test_generation_ignores_the_models_generation_config(kind: str) -> None:
    model, encoder = setup(kind)
    expected = predict_by_generation(model, encoder, items(), batch_size=4, max_new_tokens=5)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.do_sample = True
    model.generation_config.min_new_tokens = 5
    assert predict_by_generation(model, encoder, items(), batch_size=4, max_new_tokens=5) == expected


@both
def test_half_precision_models_are_summed_in_fp32(kind: str) -> None:
    model, encoder = setup(kind)
    exact = label_scores(model, encoder, items(), LABELS, batch_size=4)
    with torch.autocast("cpu", torch.bfloat16):
        scores = label_scores(model, encoder, items(), LABELS, batch_size=4)
    torch.testing.assert_close(scores, exact, atol=1.0, rtol=0)
    assert not torch.equal(scores, exact)  # the caller's autocast is in force
    assert not torch.equal(scores, scores.bfloat16().float())


@both
def test_modes_gradients_and_generators_are_left_alone(kind: str) -> None:
    model, encoder = setup(kind)
    expected = predict_by_likelihood(model, encoder, items(), LABELS, batch_size=4)
    written = predict_by_generation(model, encoder, items(), batch_size=4, max_new_tokens=3)
    model.train()
    model.lm_head.eval()
    modes = [module.training for module in model.modules()]
    assert {True, False} == set(modes)
    before = torch.get_rng_state(), random.getstate()
    assert predict_by_likelihood(model, encoder, items(), LABELS, batch_size=4) == expected
    assert predict_by_generation(model, encoder, items(), batch_size=4, max_new_tokens=3) == written
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert torch.is_grad_enabled()
    assert not label_scores(model, encoder, items(2), LABELS, batch_size=4).requires_grad


def test_modes_come_back_after_an_error() -> None:
    model, encoder = setup("llama", max_length=20)
    model.train()
    with pytest.raises(ValueError, match="max_length must hold"):
        predict_by_likelihood(model, encoder, items(), LABELS, batch_size=4)
    assert all(module.training for module in model.modules())


@both
def test_training_goes_on_after_scoring(kind: str) -> None:
    model, encoder = setup(kind)
    label_scores(model, encoder, items(4), LABELS, batch_size=4)
    model.train()
    model(**encoder.training_batch(items(4))).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_no_items_no_answers() -> None:
    model, encoder = setup("llama")
    assert predict_by_likelihood(model, encoder, [], LABELS, batch_size=1) == []
    assert label_scores(model, encoder, [], LABELS, batch_size=1).shape == (0, 4)
    assert predict_by_generation(model, encoder, [], batch_size=1, max_new_tokens=1) == []


def test_wrong_arguments() -> None:
    model, encoder = setup("llama")
    with pytest.raises(ValueError, match="labels are empty: for free text use predict_by_generation"):
        predict_by_likelihood(model, encoder, items(), [], batch_size=4)
    with pytest.raises(ValueError, match="label ' ' has no tokens"):
        predict_by_likelihood(model, encoder, items(), ["w1", " "], batch_size=4)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        predict_by_likelihood(model, encoder, items(), LABELS, batch_size=0)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got -1"):
        predict_by_generation(model, encoder, items(), batch_size=-1, max_new_tokens=1)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        predict_by_generation(model, encoder, items(), batch_size=1, max_new_tokens=0)


@both
def test_a_model_that_gives_nan_is_named(kind: str) -> None:
    model, encoder = setup(kind)
    model.lm_head.weight.data[:] = float("nan")
    with pytest.raises(ValueError, match="model gives NaN for record '0' of task 't'"):
        predict_by_likelihood(model, encoder, items(), LABELS, batch_size=4)


@pytest.mark.parametrize(
    ("prediction", "output", "same"),
    [
        ("World", "World", True),
        (" world\n", "WORLD ", True),
        ("wor ld", "world", False),
        ("", "world", False),
        ("1 + 1", "2", False),
    ],
)
def test_exact_match(prediction: str, output: str, same: bool) -> None:
    assert exact_match(prediction, output) is same


def test_accuracy_is_in_percent() -> None:
    records = [Record("t", str(i), "", output) for i, output in enumerate(["a", "b", "C", "d"])]
    assert accuracy(["a", "x", "c ", "d"], records) == 75.0
    assert accuracy(["x"] * 4, records) == 0.0
    with pytest.raises(ValueError, match="3 predictions for 4 records"):
        accuracy(["a"] * 3, records)
    with pytest.raises(ValueError, match="no records"):
        accuracy([], [])


def test_import_needs_no_model_library() -> None:
    code = (
        "import sys; import rkif.memory, rkif.continual.metrics, rkif.continual.scoring, rkif.continual.text;"
        "sys.exit(bool({'transformers', 'peft', 'tokenizers', 'triton'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
