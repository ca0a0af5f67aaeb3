"""Converts records to token tensors, for training and for prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any, Literal

import torch
from torch import Tensor

from rkif.continual.tasks.records import Item

IGNORED = -100
"""The label that cross-entropy ignores."""

_TAIL = 16
"""Number of tokens that are kept at the end of a cut prompt, such as "Answer:"."""


@dataclass(frozen=True)
class TextFormat:
    """Templates for the text of a record.

    `prompt` must contain the placeholder {input} and may contain {instruction}; `target` must contain
    {output}. The two are tokenized separately. The space between question and answer belongs to the target,
    because most tokenizers merge it into the token of the word.

    Raises:
        ValueError: a template is malformed, lacks its placeholder, or has an unknown one.
    """

    prompt: str = "{instruction}{input}"
    target: str = " {output}"

    def __post_init__(self) -> None:
        _check_template("prompt", self.prompt, needed="input", allowed={"instruction", "input"})
        _check_template("target", self.target, needed="output", allowed={"output"})


class TextCollator:
    """Makes batches of (instruction, record) pairs, for one tokenizer and one architecture.

    Args:
        tokenizer: a Hugging Face tokenizer. It must have an EOS token, which ends every target. EOS also pads
            if the tokenizer has no padding token.
        seq2seq: True for encoder-decoder models (T5), for which prompt and target are separate sequences;
            False for causal models, for which the target follows the prompt.
        max_length: maximum number of tokens of a sequence: prompt and target for causal models, the prompt
            for encoder-decoder models. The middle of a longer prompt is removed; its beginning and its last
            16 tokens are kept. Targets are never cut.
        text: the templates.

    Raises:
        ValueError: the tokenizer has no EOS token.
    """

    def __init__(self, tokenizer: Any, *, seq2seq: bool, max_length: int, text: TextFormat) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError("tokenizer has no EOS token: it is needed to end targets and to pad batches")
        self.tokenizer = tokenizer
        self.seq2seq = seq2seq
        self.max_length = max_length
        self.text = text
        self.eos_id: int = tokenizer.eos_token_id
        self.pad_id: int = self.eos_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._before, self._after = _special_tokens(tokenizer)
        if not seq2seq:
            # An EOS between question and answer would mark the end of the text for the model.
            self._after = []

    def prompt(self, instruction: str, record_input: str, *, reserve: int = 0) -> list[int]:
        """Tokenize a question.

        Args:
            instruction: fills {instruction}.
            record_input: fills {input}.
            reserve: number of tokens of `max_length` that the target of a causal model needs.

        Returns:
            Token ids, with the special tokens that the tokenizer adds before and after a text (only before it
            for causal models), cut to `max_length` (minus `reserve` for causal models).

        Raises:
            ValueError: the target leaves no room for 17 tokens of the prompt, or the prompt has no tokens.
        """
        room = self.max_length if self.seq2seq else self.max_length - reserve
        if room <= _TAIL:
            raise ValueError(
                f"max_length must hold at least {_TAIL + 1} tokens of the prompt"
                + ("" if self.seq2seq else f" beside {reserve} of the target")
                + f", got {self.max_length}"
            )
        filled = self.text.prompt.format(instruction=instruction, input=record_input)
        tokens = [*self._before, *_encode(self.tokenizer, filled), *self._after]
        if not tokens:
            raise ValueError(f"prompt has no tokens: {filled!r}")
        return cut(tokens, room)

    def target(self, output: str) -> list[int]:
        """Tokenize an answer: its tokens and EOS, without other special tokens."""
        return [*_encode(self.tokenizer, self.text.target.format(output=output)), self.eos_id]

    def decode(self, tokens: Sequence[int]) -> str:
        """Decode generated tokens: the text before the first EOS, without surrounding whitespace."""
        answer = list(tokens)
        if self.eos_id in answer:
            answer = answer[: answer.index(self.eos_id)]
        return str(self.tokenizer.decode(answer, skip_special_tokens=True)).strip()

    def training_batch(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """Make a batch whose loss covers only the answers with their EOS.

        Args:
            items: (instruction, record) pairs.

        Returns:
            `input_ids`, `attention_mask` and `labels`, int64, on the CPU, padded on the right. For causal
            models all are [len(items), length], with prompt and target in one sequence. For encoder-decoder
            models the first two are [len(items), length], of the prompts, and the labels are [len(items),
            target length]. Labels are -100 for prompts and padding.

        Raises:
            ValueError: there are no items, or a target leaves too little of `max_length`.
        """
        targets = [self.target(record.output) for _, record in items]
        prompts = [
            self.prompt(instruction, record.input, reserve=len(target))
            for (instruction, record), target in zip(items, targets, strict=True)
        ]
        if self.seq2seq:
            return {**self._padded(prompts, "right"), "labels": pad(targets, IGNORED, "right")}
        pairs = list(zip(prompts, targets, strict=True))
        # Padding is ignored by position, not by token: EOS may pad, but the EOS of the answer is learned.
        labels = pad([[IGNORED] * len(prompt) + target for prompt, target in pairs], IGNORED, "right")
        return {**self._padded([prompt + target for prompt, target in pairs], "right"), "labels": labels}

    def prompt_batch(
        self, items: Sequence[Item], *, side: Literal["left", "right"], reserve: int = 0
    ) -> dict[str, Tensor]:
        """Make a batch of questions without answers.

        Args:
            items: (instruction, record) pairs.
            side: side of the padding. Generation with a causal model needs it on the left.
            reserve: number of tokens of `max_length` for the longest answer of a causal model.

        Returns:
            `input_ids` and `attention_mask`, int64 [len(items), length], on the CPU.

        Raises:
            ValueError: there are no items, or `reserve` leaves too little of `max_length`.
        """
        prompts = [self.prompt(instruction, record.input, reserve=reserve) for instruction, record in items]
        return self._padded(prompts, side)

    def _padded(self, rows: Sequence[list[int]], side: Literal["left", "right"]) -> dict[str, Tensor]:
        return {
            "input_ids": pad(rows, self.pad_id, side),
            "attention_mask": pad([[1] * len(row) for row in rows], 0, side),
        }


def cut(tokens: list[int], room: int) -> list[int]:
    """At most `room` tokens (more than 16): the middle of a longer list is removed, the last 16 are kept."""
    return tokens if len(tokens) <= room else tokens[: room - _TAIL] + tokens[-_TAIL:]


def pad(rows: Sequence[list[int]], value: int, side: Literal["left", "right"]) -> Tensor:
    """Stack lists of integers into an int64 tensor [len(rows), longest], padded with `value` on one side.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("a batch needs at least one item")
    longest = max(map(len, rows))
    filling = [[value] * (longest - len(row)) for row in rows]
    pairs = zip(filling, rows, strict=True) if side == "left" else zip(rows, filling, strict=True)
    return torch.tensor([first + second for first, second in pairs], dtype=torch.int64)


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer adds before and after a text, found by tokenizing a sample."""
    plain = _encode(tokenizer, "Answer:")
    full = list(tokenizer("Answer:")["input_ids"])
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    raise ValueError(f"tokenizer changes a text's tokens when it adds special ones: {plain} became {full}")


def _check_template(name: str, template: str, *, needed: str, allowed: set[str]) -> None:
    try:
        parsed = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{name} template {template!r} is malformed: {error}") from error
    fields = {field for _, field, _, _ in parsed if field is not None}
    if needed not in fields:
        raise ValueError(f"{name} template {template!r} lacks the placeholder {{{needed}}}")
    if fields - allowed or any(spec or conversion for _, _, spec, conversion in parsed):
        raise ValueError(f"{name} template {template!r} may hold only the placeholders {sorted(allowed)}")
