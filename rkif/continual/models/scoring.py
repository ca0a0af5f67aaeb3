"""Predictions of a language model, and their accuracy.

No function draws random numbers. The caller enables autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rkif.continual.tasks.records import Item, Record
from rkif.continual.tasks.text import IGNORED, TextCollator, pad

T = TypeVar("T")


def predict_by_likelihood(
    model: nn.Module, collator: TextCollator, items: Sequence[Item], labels: Sequence[str], *, batch_size: int
) -> list[str]:
    """Answer each question with its most likely label; the first of equally likely ones.

    Args, Raises: as `label_scores`.

    Returns:
        One of `labels` for each item, in the order of the items.
    """
    rows = label_scores(model, collator, items, labels, batch_size=batch_size).tolist()
    return [labels[row.index(max(row))] for row in rows]


def label_scores(
    model: nn.Module, collator: TextCollator, items: Sequence[Item], labels: Sequence[str], *, batch_size: int
) -> Tensor:
    """Compute log p(label | prompt), summed over the label's tokens and EOS.

    The model processes a prompt once. Its keys and values (causal models) or its encoding (encoder-decoder
    models) are repeated for the labels, so peak memory grows with `batch_size * len(labels)`.

    Args:
        model: a Hugging Face language model, or a PEFT model around one.
        collator: for the model's tokenizer and architecture. It cuts prompts so that the longest label fits.
        items: (instruction, record) pairs.
        labels: the answers to choose from.
        batch_size: records per batch. It changes the scores by rounding only.

    Returns:
        fp32 [len(items), len(labels)], on the CPU, in the order of the items.

    Raises:
        ValueError: there are no labels, a label has no tokens or those of another label, `batch_size` is
            below 1, a prompt does not fit (see `TextCollator.prompt`), or a score is NaN.
    """
    if not labels:
        raise ValueError("labels are empty: for free text use predict_by_generation")
    targets = [collator.target(label) for label in labels]
    for label, target in zip(labels, targets, strict=True):
        if len(target) == 1:
            raise ValueError(f"label {label!r} has no tokens")
        if targets.count(target) > 1:
            raise ValueError(f"label {label!r} has the same tokens as another label: {target[:-1]}")
    score = _seq2seq_scores if collator.seq2seq else _causal_scores
    reserve = max(map(len, targets))

    def run(chunk: Sequence[Item]) -> list[list[float]]:
        rows: list[list[float]] = score(model, _prompts(model, collator, chunk, reserve), targets).tolist()
        return rows

    scores = torch.tensor(in_batches(model, items, batch_size, run)).reshape(len(items), len(labels))
    for (_, record), bad in zip(items, scores.isnan().any(1).tolist(), strict=True):
        if bad:
            raise ValueError(f"model gives NaN for record {record.id!r} of task {record.task!r}")
    return scores


def predict_by_generation(
    model: nn.Module, collator: TextCollator, items: Sequence[Item], *, batch_size: int, max_new_tokens: int
) -> list[str]:
    """Answer each question with the text of greedy decoding.

    The model's `generation_config` is ignored: its penalties and sampling would make the answers depend on
    the checkpoint's metadata.

    Args:
        model: a Hugging Face language model, or a PEFT model around one.
        collator: for the model's tokenizer and architecture. It cuts prompts so that the answer fits.
        items: (instruction, record) pairs.
        batch_size: records per batch.
        max_new_tokens: maximum length of an answer.

    Returns:
        The answers up to EOS, without surrounding space, in the order of the items.

    Raises:
        ValueError: `batch_size` or `max_new_tokens` is below 1, or a prompt does not fit.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")

    def run(chunk: Sequence[Item]) -> list[str]:
        tokens = _greedy(model, collator, _prompts(model, collator, chunk, max_new_tokens), max_new_tokens)
        return [collator.decode(row) for row in tokens.tolist()]

    return in_batches(model, items, batch_size, run)


def exact_match(prediction: str, output: str) -> bool:
    """Whether two answers are equal up to case and surrounding whitespace."""
    return prediction.strip().lower() == output.strip().lower()


def accuracy(predictions: Sequence[str], records: Sequence[Record]) -> float:
    """The percentage of predictions that match their record's output.

    Raises:
        ValueError: there are no records, or their number differs from that of the predictions.
    """
    if not records:
        raise ValueError("records are empty: there is nothing to compare the predictions with")
    if len(predictions) != len(records):
        raise ValueError(f"{len(predictions)} predictions for {len(records)} records")
    right = sum(exact_match(p, record.output) for p, record in zip(predictions, records, strict=True))
    return 100.0 * right / len(records)


def in_batches(
    model: nn.Module, items: Sequence[Item], batch_size: int, run: Callable[[Sequence[Item]], list[T]]
) -> list[T]:
    """Call `run` with batches of items of similar length; return the results in the order of the items."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    by_length = sorted(range(len(items)), key=lambda i: len(items[i][0]) + len(items[i][1].input))
    results: dict[int, T] = {}
    with evaluating(model):
        for start in range(0, len(items), batch_size):
            chosen = by_length[start : start + batch_size]
            results.update(zip(chosen, run([items[i] for i in chosen]), strict=True))
    return [results[i] for i in range(len(items))]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context manager: evaluation mode without gradients in the block; then each module's mode as before."""
    # A caller may train with some modules in evaluation mode.
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        # Not inference_mode: buffers that a model fills in the block could not be used in training.
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _prompts(
    model: nn.Module, collator: TextCollator, items: Sequence[Item], reserve: int
) -> dict[str, Tensor]:
    batch = collator.prompt_batch(items, side="right" if collator.seq2seq else "left", reserve=reserve)
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _positions(mask: Tensor) -> Tensor:
    # Positions are counted from each prompt's first token, so that padding on the left does not shift them.
    return (mask.cumsum(-1) - 1).clamp(min=0)


def _cache(out: Any) -> dict[str, Any]:
    """The keys and values of an output, as the keyword argument of the next call.

    transformers is renaming output and argument from `past_key_values` to `cache`.
    """
    name = "cache" if "cache" in out else "past_key_values"
    return {name: out[name]}


def _causal_scores(model: Any, prompts: dict[str, Tensor], targets: Sequence[list[int]]) -> Tensor:
    mask = prompts["attention_mask"]
    positions = _positions(mask)
    rows, labels = mask.shape[0], len(targets)
    answers = pad(targets, IGNORED, "right").to(mask.device).repeat(rows, 1)  # [rows * labels, longest]
    tokens = answers[:, :-1]
    asked = model(**prompts, position_ids=positions, use_cache=True, logits_to_keep=1)
    cache = _cache(asked)
    for states in cache.values():
        states.batch_repeat_interleave(labels)
    answered = model(
        input_ids=tokens.clamp(min=0),
        attention_mask=torch.cat([mask.repeat_interleave(labels, 0), (tokens != IGNORED).to(mask.dtype)], 1),
        position_ids=positions[:, -1:].repeat_interleave(labels, 0)
        + torch.arange(1, tokens.shape[1] + 1, device=mask.device),
        use_cache=True,
        **cache,
    )
    logits = torch.cat([asked.logits[:, -1:].repeat_interleave(labels, 0), answered.logits], 1)
    return _sum_log_probs(logits, answers).view(rows, labels)


def _seq2seq_scores(model: Any, prompts: dict[str, Tensor], targets: Sequence[list[int]]) -> Tensor:
    mask = prompts["attention_mask"]
    rows, labels = mask.shape[0], len(targets)
    answers = pad(targets, IGNORED, "right").to(mask.device).repeat(rows, 1)
    encoded = model.get_encoder()(**prompts).last_hidden_state
    logits = model(
        encoder_outputs=(encoded.repeat_interleave(labels, 0),),
        attention_mask=mask.repeat_interleave(labels, 0),
        labels=answers,  # the model makes the decoder's input from them
    ).logits
    return _sum_log_probs(logits, answers).view(rows, labels)


def _sum_log_probs(logits: Tensor, answers: Tensor) -> Tensor:
    """Sum of log-probabilities, fp32 [n].

    Args:
        logits: [n, length, vocabulary].
        answers: int64 [n, length]; -100 at positions without a token.
    """
    log_probs = torch.log_softmax(logits.float(), -1)
    chosen = log_probs.gather(-1, answers.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return chosen.masked_fill(answers == IGNORED, 0).sum(-1)


def _greedy(model: Any, collator: TextCollator, prompts: dict[str, Tensor], max_new_tokens: int) -> Tensor:
    """Greedy continuation: int64 [prompts, at most max_new_tokens]; arbitrary tokens after a row's EOS."""
    step: dict[str, Any]
    mask = prompts["attention_mask"]
    if collator.seq2seq:
        start = torch.full_like(mask[:, :1], model.config.decoder_start_token_id)
        encoded = model.get_encoder()(**prompts).last_hidden_state
        step = {"encoder_outputs": (encoded,), "attention_mask": mask, "decoder_input_ids": start}
    else:
        step = {**prompts, "position_ids": _positions(mask), "logits_to_keep": 1}
    done = torch.zeros_like(mask[:, 0], dtype=torch.bool)
    written: list[Tensor] = []
    while len(written) < max_new_tokens and not done.all():
        out = model(**step, use_cache=True)
        token = out.logits[:, -1].argmax(-1)
        written.append(token)
        done |= token == collator.eos_id
        step |= _cache(out)
        if collator.seq2seq:
            step["decoder_input_ids"] = token[:, None]
        else:
            step["input_ids"] = token[:, None]
            step["attention_mask"] = torch.cat([step["attention_mask"], torch.ones_like(mask[:, :1])], 1)
            step["position_ids"] = step["position_ids"][:, -1:] + 1
    return torch.stack(written, 1)
