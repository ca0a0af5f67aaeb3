"""Records as token tensors, compared with sequences written by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import word_tokenizer

from rkif.continual.tasks.records import Record
from rkif.continual.tasks.text import TextCollator, TextFormat, pad

EOS, UNK, BOS = 1, 2, 3
WORDS = "Ask: Answer: yes no a b c"  # tokens 4 to 10
ITEMS = [
    ("Ask:", Record("t", "0", " a b Answer:", "yes")),
    ("Ask:", Record("t", "1", " c Answer:", "no no")),
]


def collator(
    *, seq2seq: bool = False, max_length: int = 64, text: TextFormat | None = None, **how: bool
) -> TextCollator:
    tokenizer = word_tokenizer([WORDS, " ".join(f"w{i}" for i in range(50))], **how)
    return TextCollator(tokenizer, seq2seq=seq2seq, max_length=max_length, text=text or TextFormat())


def as_lists(batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    return {name: tensor.tolist() for name, tensor in batch.items()}


def test_a_causal_batch_has_prompt_and_target() -> None:
    assert as_lists(collator().training_batch(ITEMS)) == {
        "input_ids": [[4, 8, 9, 5, 6, EOS], [4, 10, 5, 7, 7, EOS]],
        "attention_mask": [[1] * 6, [1] * 6],
        "labels": [[-100, -100, -100, -100, 6, EOS], [-100, -100, -100, 7, 7, EOS]],
    }


@pytest.mark.parametrize(("own_pad", "filler"), [(True, 0), (False, EOS)])
def test_padding_is_masked_by_length_even_where_it_is_eos(own_pad: bool, filler: int) -> None:
    items = [ITEMS[0], ("Ask:", Record("t", "2", "", "no"))]
    assert as_lists(collator(pad=own_pad).training_batch(items)) == {
        "input_ids": [[4, 8, 9, 5, 6, EOS], [4, 7, EOS, filler, filler, filler]],
        "attention_mask": [[1] * 6, [1, 1, 1, 0, 0, 0]],
        "labels": [[-100, -100, -100, -100, 6, EOS], [-100, 7, EOS, -100, -100, -100]],
    }


def test_a_seq2seq_batch_has_prompts_and_targets() -> None:
    assert as_lists(collator(seq2seq=True, eos_after=True).training_batch(ITEMS)) == {
        "input_ids": [[4, 8, 9, 5, EOS], [4, 10, 5, EOS, 0]],
        "attention_mask": [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]],
        "labels": [[6, EOS, -100], [7, 7, EOS]],
    }


@pytest.mark.parametrize(
    ("seq2seq", "bos", "eos_after", "expected"),
    [
        (False, False, False, [4, 5]),
        (False, True, False, [BOS, 4, 5]),
        (False, True, True, [BOS, 4, 5]),  # no EOS between question and answer
        (False, False, True, [4, 5]),
        (True, False, True, [4, 5, EOS]),
        (True, True, True, [BOS, 4, 5, EOS]),
    ],
)
def test_special_tokens_are_added_as_the_tokenizer_does(
    seq2seq: bool, bos: bool, eos_after: bool, expected: list[int]
) -> None:
    made = collator(seq2seq=seq2seq, bos=bos, eos_after=eos_after)
    assert made.prompt("Ask:", " Answer:") == expected
    assert made.target("yes") == [6, EOS]


def test_a_bos_that_is_also_eos_is_kept_in_front() -> None:
    tokenizer = word_tokenizer([WORDS], bos=True)
    tokenizer.eos_token = tokenizer.bos_token
    made = TextCollator(tokenizer, seq2seq=False, max_length=64, text=TextFormat())
    assert made.prompt("Ask:", " Answer:") == [BOS, 4, 5]
    assert made.target("yes") == [6, BOS]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_prompt_batch_has_only_the_prompts(side: Any) -> None:
    filled = {"left": [[4, 8, 9, 5], [0, 4, 10, 5]], "right": [[4, 8, 9, 5], [4, 10, 5, 0]]}
    mask = {"left": [[1, 1, 1, 1], [0, 1, 1, 1]], "right": [[1, 1, 1, 1], [1, 1, 1, 0]]}
    batch = as_lists(collator().prompt_batch(ITEMS, side=side))
    assert batch == {"input_ids": filled[side], "attention_mask": mask[side]}


# A prompt of 52 tokens: Ask: w0 ... w49 Answer: (w0 is token 11, w49 is token 60).
LONG = ("Ask:", Record("t", "3", " ".join(["", *(f"w{i}" for i in range(50)), "Answer:"]), "yes no"))
TAIL = [*range(46, 61), 5]


def test_a_long_prompt_loses_its_middle() -> None:
    assert collator(max_length=20).prompt(*("Ask:", LONG[1].input)) == [4, 11, 12, 13, *TAIL]
    assert collator(max_length=20, bos=True).prompt("Ask:", LONG[1].input) == [BOS, 4, 11, 12, *TAIL]
    assert collator(max_length=52).prompt("Ask:", LONG[1].input) == [4, *range(11, 61), 5]
    assert collator(max_length=51).prompt("Ask:", LONG[1].input) == [4, *range(11, 45), *TAIL]


def test_max_length_counts_the_target_of_a_causal_model() -> None:
    batch = collator(max_length=23).training_batch([LONG])
    assert batch["input_ids"].tolist() == [[4, 11, 12, 13, *TAIL, 6, 7, EOS]]
    assert batch["labels"].tolist() == [[-100] * 20 + [6, 7, EOS]]
    asked = collator(max_length=23).prompt_batch([LONG], side="left", reserve=3)
    assert asked["input_ids"].tolist() == [[4, 11, 12, 13, *TAIL]]


def test_max_length_counts_only_the_prompt_of_a_seq2seq_model() -> None:
    made = collator(max_length=20, seq2seq=True, eos_after=True)
    expected = [[4, 11, 12, 13, *TAIL[1:], EOS]]
    assert made.training_batch([LONG])["input_ids"].tolist() == expected
    assert made.prompt_batch([LONG], side="right", reserve=9)["input_ids"].tolist() == expected


def test_a_max_length_that_is_too_small_is_refused() -> None:
    assert collator(max_length=20).training_batch([LONG])["input_ids"].shape == (1, 20)
    with pytest.raises(ValueError, match="at least 17 tokens of the prompt beside 3 of the target, got 19"):
        collator(max_length=19).training_batch([LONG])
    with pytest.raises(ValueError, match="beside 2 of the target, got 18"):
        collator(max_length=18).training_batch(ITEMS[:1])
    with pytest.raises(ValueError, match="at least 17 tokens of the prompt, got 16"):
        collator(max_length=16, seq2seq=True).training_batch(ITEMS)
    assert collator(max_length=17, seq2seq=True).training_batch([LONG])["input_ids"].tolist() == [[4, *TAIL]]


def test_decode_stops_at_the_first_eos() -> None:
    made = collator()
    assert made.decode([6, 7, EOS, 8]) == "yes no"
    assert made.decode([6, 0, 7]) == "yes no"  # special tokens are not text
    assert made.decode([EOS, 6]) == ""


def test_templates_are_filled() -> None:
    text = TextFormat(prompt="a {input} b {instruction} {{c}}", target="{output} c")
    made = collator(text=text)
    assert made.prompt("Ask:", "{yes} no") == [8, UNK, 7, 9, 4, UNK]
    assert made.target("no") == [7, 10, EOS]


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        ({"prompt": "{instruction}"}, r"prompt template '\{instruction\}' lacks the placeholder \{input\}"),
        ({"target": "output"}, r"target template 'output' lacks the placeholder \{output\}"),
        ({"prompt": "{input}{label}"}, r"may hold only the placeholders \['input', 'instruction'\]"),
        ({"prompt": "{input}{}"}, r"may hold only the placeholders \['input', 'instruction'\]"),
        ({"target": "{output}{output.x}"}, r"may hold only the placeholders \['output'\]"),
        ({"target": "{output!r}"}, r"may hold only the placeholders \['output'\]"),
        ({"target": "{output:>9}"}, r"may hold only the placeholders \['output'\]"),
        ({"prompt": "{input} {"}, r"prompt template '\{input\} \{' is malformed"),
    ],
)
def test_invalid_templates_are_refused(templates: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextFormat(**templates)


def test_a_tokenizer_without_eos_is_refused() -> None:
    tokenizer = word_tokenizer([WORDS])
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="tokenizer has no EOS token"):
        TextCollator(tokenizer, seq2seq=False, max_length=64, text=TextFormat())


def test_empty_batches_and_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="a batch needs at least one item"):
        collator().training_batch([])
    with pytest.raises(ValueError, match="a batch needs at least one item"):
        collator().prompt_batch([], side="left")
    with pytest.raises(ValueError, match="prompt has no tokens: ' '"):
        collator().prompt("", " ")
    assert collator(bos=True).prompt("", " ") == [BOS]


def test_pad_fills_to_the_longest() -> None:
    assert pad([[1], [], [2, 3]], -7, "left").tolist() == [[-7, 1], [-7, -7], [2, 3]]
    assert pad([[1], [], [2, 3]], -7, "right").tolist() == [[1, -7], [-7, -7], [2, 3]]
