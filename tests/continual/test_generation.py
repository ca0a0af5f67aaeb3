"""Generated answers of tiny random models, compared with a greedy loop over single sequences."""

from __future__ import annotations

import pytest
from plain_scoring import both, items, plain_generation, setup

from rkif.continual.models.scoring import predict_by_generation


@both
@pytest.mark.parametrize("max_length", [48, 24])
def test_generation_is_greedy(kind: str, max_length: int) -> None:
    model, collator = setup(kind, max_length=max_length)
    tokens = [plain_generation(model, collator, item, 6) for item in items()]
    assert len({len(answer) for answer in tokens}) > 2  # so that some rows end before others
    expected = [collator.decode(answer) for answer in tokens]
    for batch_size in (1, 5, 13):
        assert (
            predict_by_generation(model, collator, items(), batch_size=batch_size, max_new_tokens=6)
            == expected
        )


@both
def test_generation_stops_when_every_answer_has_ended(kind: str) -> None:
    model, collator = setup(kind)
    lengths = {item: len(plain_generation(model, collator, item, 6)) for item in items()}
    early = [item for item, length in lengths.items() if length < 6]
    assert len({lengths[item] for item in early}) > 1
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    predict_by_generation(model, collator, early, batch_size=13, max_new_tokens=6)
    assert len(calls) == max(lengths[item] for item in early)


@both
def test_generation_ignores_the_models_generation_config(kind: str) -> None:
    model, collator = setup(kind)
    expected = predict_by_generation(model, collator, items(), batch_size=4, max_new_tokens=5)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.do_sample = True
    model.generation_config.min_new_tokens = 5
    assert predict_by_generation(model, collator, items(), batch_size=4, max_new_tokens=5) == expected
