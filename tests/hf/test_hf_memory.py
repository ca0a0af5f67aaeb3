"""The memory of `rkif.hf`: its order, its preparation by the trainer, and refused configurations."""

from __future__ import annotations

import math
import random
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from hf_helpers import (
    FUSION,
    MEMORY,
    NEW,
    OUTER_RATE,
    arguments,
    assert_at_base,
    assert_same_bits,
    lora_llama,
    rows,
    trainable,
    trainer,
    weights,
)
from tiny import tiny_llama, word_tokenizer
from transformers import Trainer, default_data_collator
from trl import SFTConfig, SFTTrainer

from rkif.hf import RKIFMixin, RKIFTrainer
from rkif.hf.rounds import memory_walk


def test_the_walk_is_epochs_without_replacement() -> None:
    walk = list(islice(memory_walk(10, 0, seed=3), 60))
    epochs = [walk[i : i + 10] for i in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert walk != list(islice(memory_walk(10, 0, seed=4), 60))


@pytest.mark.parametrize("start", [1, 9, 10, 25])
def test_the_walk_resumes_from_any_position(start: int) -> None:
    whole = list(islice(memory_walk(10, 0, seed=3), 60))
    assert list(islice(memory_walk(10, start, seed=3), 60 - start)) == whole[start:]


def drawn_memory(folder: Any, memory: Any, **changes: Any) -> list[Any]:
    """The batches of memory records that a run collates."""
    drawn = []

    def collate(samples: Any) -> Any:
        if samples[0] in MEMORY:
            drawn.append(samples)
        return default_data_collator(samples)

    trainer(folder, memory_dataset=memory, data_collator=collate, **changes).train()
    return drawn


@pytest.mark.parametrize("data_seed", [None, 11])
def test_batches_follow_the_walk_without_unused_columns(tmp_path: Any, data_seed: int | None) -> None:
    noted = [{**row, "note": "not for the model"} for row in MEMORY]
    for memory in (noted, Dataset.from_list(noted)):
        walk = memory_walk(5, 0, seed=7 if data_seed is None else data_seed)
        expected = [[MEMORY[i] for i in islice(walk, 2)] for _ in range(3 * FUSION.outer_steps)]
        assert drawn_memory(tmp_path, memory, data_seed=data_seed) == expected


def test_a_memory_smaller_than_a_batch_is_repeated(tmp_path: Any) -> None:
    batches = drawn_memory(tmp_path, MEMORY[:2], per_device_train_batch_size=5, max_steps=3)
    assert [len(batch) for batch in batches] == [5, 5]
    samples = [sample for batch in batches for sample in batch]
    for i in range(0, 10, 2):
        assert sorted(samples[i : i + 2], key=MEMORY.index) == MEMORY[:2]


def global_random_states() -> list[Any]:
    numpy_state = np.random.get_state()[1].tolist()  # noqa: NPY002
    return [random.getstate(), numpy_state, torch.get_rng_state().tolist()]


def test_drawing_uses_no_global_random_numbers(tmp_path: Any) -> None:
    run = trainer(tmp_path, max_steps=1)
    run.train()
    before = global_random_states()
    next(run._rkif._memory_batches())
    assert global_random_states() == before


@pytest.mark.parametrize(
    "given", [None, rows(4, 5), {"a": rows(4, 5), "b": rows(4, 6)}], ids=["none", "single", "named"]
)
def test_eval_dataset_is_restored(tmp_path: Any, given: Any) -> None:
    run = trainer(tmp_path, eval_dataset=given)
    assert run.eval_dataset == given
    if given is None:
        with pytest.raises(ValueError, match="requires an eval_dataset"):
            run.evaluate()
    else:
        losses = {key for key in run.evaluate() if key.endswith("_loss")}
        assert losses == ({"eval_a_loss", "eval_b_loss"} if isinstance(given, dict) else {"eval_loss"})


def test_a_missing_eval_dataset_is_still_refused(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="didn't pass an `eval_dataset`"):
        trainer(tmp_path, eval_strategy="steps", eval_steps=2)


class OwnEvaluationSet(Trainer):
    """Makes an evaluation set from the training data if none is given."""

    def __init__(self, *args: Any, eval_dataset: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, eval_dataset=eval_dataset or NEW[:4], **kwargs)


def test_a_memory_is_not_dropped_if_a_trainer_makes_its_evaluation_set(tmp_path: Any) -> None:
    kind = type("Own", (RKIFMixin, OwnEvaluationSet), {})
    changes = {"kind": kind, "eval_strategy": "steps", "eval_steps": 2}
    with pytest.raises(ValueError, match=r"eval_strategy='steps' .* needs an eval_dataset: Own made one"):
        trainer(tmp_path, **changes)
    assert trainer(tmp_path, memory_dataset=None, **changes).eval_dataset == NEW[:4]
    run = trainer(tmp_path, eval_dataset=NEW[:2], **changes)
    run.train()
    assert (run.fuser.round, run.eval_dataset) == (3, NEW[:2])


def test_a_trainer_that_replaces_its_evaluation_sets_is_refused(tmp_path: Any) -> None:
    class Replacing(Trainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.eval_dataset = NEW[:4]

    with pytest.raises(ValueError, match=r"Own has replaced its eval_dataset"):
        trainer(tmp_path, kind=type("Own", (RKIFMixin, Replacing), {}))


class RKIFSFTTrainer(RKIFMixin, SFTTrainer):
    pass


WORDS = [f"w{i}" for i in range(20)]


def texts(name: str) -> list[str]:
    return [" ".join(random.Random(f"{name}{i}").sample(WORDS, 5)) for i in range(6)]


@pytest.mark.parametrize("kind", ["none", "single", "named"])
def test_sft_trainer_prepares_the_memory(tmp_path: Any, kind: str) -> None:
    new, memory, a, b = (Dataset.from_dict({"text": texts(name)}) for name in "nmab")
    given = {"none": None, "single": a, "named": {"a": a, "b": b}}[kind]
    tokenizer = word_tokenizer([" ".join(WORDS)])
    run = RKIFSFTTrainer(
        model=lora_llama(),
        args=SFTConfig(**{**arguments(tmp_path).to_dict(), "max_length": 16}),
        train_dataset=new,
        memory_dataset=memory,
        eval_dataset=given,
        processing_class=tokenizer,
        fusion=FUSION,
        outer_learning_rate=OUTER_RATE,
    )
    collate, seen = run.data_collator, []
    run.data_collator = lambda samples: seen.extend(samples) or collate(samples)
    run.train()
    assert run.fuser.round == 3
    assert_at_base(run)

    tokens = {(*tokenizer(text)["input_ids"], tokenizer.eos_token_id) for text in texts("m")}
    drawn = [sample for sample in (tuple(row["input_ids"]) for row in seen) if sample in tokens]
    assert len(drawn) == 2 * 3 * FUSION.outer_steps
    assert set(drawn) == tokens

    if kind == "none":
        assert run.eval_dataset is None
        return
    prepared = {"eval": run.eval_dataset} if kind == "single" else run.eval_dataset
    assert prepared.keys() == ({"eval"} if kind == "single" else {"a", "b"})
    assert all("input_ids" in dataset.column_names for dataset in prepared.values())
    assert any(key.endswith("_loss") for key in run.evaluate())


@pytest.mark.parametrize("rate", [0, -1e-3, math.inf, math.nan])
def test_refuses_an_outer_learning_rate(tmp_path: Any, rate: float) -> None:
    with pytest.raises(ValueError, match=f"outer_learning_rate must be positive and finite, got {rate}"):
        trainer(tmp_path, outer_learning_rate=rate)


def test_refuses_unsupported_configurations(tmp_path: Any) -> None:
    with pytest.raises(TypeError, match="fusion must be a FusionConfig, got dict"):
        trainer(tmp_path, fusion={"density": 0.2})


class Endless(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(MEMORY)


UNINDEXED = {
    "torch": Endless(),
    "datasets": IterableDataset.from_generator(lambda: iter(MEMORY)),
    "iterator": iter(MEMORY),
}


@pytest.mark.parametrize("memory", UNINDEXED.values(), ids=UNINDEXED)
def test_refuses_a_memory_without_length_and_indexing(tmp_path: Any, memory: Any) -> None:
    with pytest.raises(TypeError, match="memory_dataset must have a length and indexing"):
        trainer(tmp_path, memory_dataset=memory)


SEVERAL = {
    "dict": {"a": MEMORY, "b": MEMORY},
    "DatasetDict": DatasetDict({"a": Dataset.from_list(MEMORY), "b": Dataset.from_list(MEMORY)}),
    "columns": {"a": [1], "b": [2]},
}


def test_a_ledger_without_a_memory_is_an_error_or_a_warning(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="memory_dataset is empty, so there is no fusion for the ledger"):
        trainer(tmp_path, memory_dataset=[], ledger=tmp_path / "ledger")
    with pytest.warns(UserWarning, match="without a memory_dataset there are no fusions"):
        trainer(tmp_path, memory_dataset=None, ledger=tmp_path / "ledger")
    assert not (tmp_path / "ledger").exists()


@pytest.mark.parametrize("kind", SEVERAL)
def test_refuses_a_memory_of_several_datasets(tmp_path: Any, kind: str) -> None:
    name = type(SEVERAL[kind]).__name__
    with pytest.raises(TypeError, match=f"must be one dataset, got a {name} of 'a', 'b': concatenate them"):
        trainer(tmp_path, memory_dataset=SEVERAL[kind])


def test_refuses_a_path_as_memory(tmp_path: Any) -> None:
    with pytest.raises(TypeError, match="memory_dataset must have a length and indexing, got str"):
        trainer(tmp_path, memory_dataset="memory.jsonl")


@pytest.mark.parametrize("as_dataset", [False, True])
def test_refuses_a_memory_without_labels(tmp_path: Any, as_dataset: bool) -> None:
    unlabelled: Any = [{"input_ids": row["input_ids"]} for row in MEMORY]
    memory = Dataset.from_list(unlabelled) if as_dataset else unlabelled
    with pytest.raises(ValueError, match="memory_dataset has no 'labels', which train_dataset has"):
        trainer(tmp_path, memory_dataset=memory)


def test_labels_may_have_another_name_that_collators_know(tmp_path: Any) -> None:
    memory = [{"input_ids": row["input_ids"], "label_ids": row["labels"]} for row in MEMORY]
    run = trainer(tmp_path, memory_dataset=memory, max_steps=3, remove_unused_columns=False)
    run.train()
    assert run.fuser.round == 1


def test_training_data_of_unknown_columns_is_not_read(tmp_path: Any) -> None:
    class ByName(torch.utils.data.Dataset[Any]):
        """Its samples have names, which a sampler of its own gives."""

        def __len__(self) -> int:
            return len(NEW)

        def __getitem__(self, name: str) -> Any:
            return NEW[int(name.removeprefix("sample "))]

    class Named(RKIFTrainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return [f"sample {n}" for n in range(len(NEW))]

    run = trainer(tmp_path, kind=Named, train_dataset=ByName(), max_steps=3)
    run.train()
    assert run.fuser.round == 1


def test_labels_may_come_from_the_collator(tmp_path: Any) -> None:
    def collate(samples: Any) -> Any:
        return default_data_collator([{**sample, "labels": sample["input_ids"]} for sample in samples])

    new, memory = ([{"input_ids": row["input_ids"]} for row in rows] for rows in (NEW, MEMORY))
    run = trainer(tmp_path, train_dataset=new, memory_dataset=memory, data_collator=collate, max_steps=3)
    run.train()
    assert run.fuser.round == 1


def test_sft_trainer_takes_a_list_as_memory(tmp_path: Any) -> None:
    changes = {
        "train_dataset": Dataset.from_dict({"text": texts("n")}),
        "processing_class": word_tokenizer([" ".join(WORDS)]),
        "fusion": FUSION,
    }
    ends = []
    for memory in (Dataset.from_dict({"text": texts("m")}), [{"text": text} for text in texts("m")]):
        args = SFTConfig(**{**arguments(tmp_path).to_dict(), "max_length": 16})
        run = RKIFSFTTrainer(model=lora_llama(), args=args, memory_dataset=memory, **changes)
        run.train()
        ends.append(weights(run.model))
    assert_same_bits(ends[1], ends[0])


def test_arguments_may_be_positional(tmp_path: Any) -> None:
    """In the order of the trainer after the mixin, as without it."""
    ends = []
    for positional in (True, False):
        given = (lora_llama(), arguments(tmp_path), default_data_collator, NEW, NEW[:2])
        names = ("model", "args", "data_collator", "train_dataset", "eval_dataset")
        changes = {"memory_dataset": MEMORY, "fusion": FUSION}
        if positional:
            run = RKIFTrainer(*given, **changes)
        else:
            run = RKIFTrainer(**dict(zip(names, given, strict=True)), **changes)
        run.train()
        assert run.eval_dataset == NEW[:2]
        ends.append(weights(run.model))
    assert_same_bits(ends[1], ends[0])


def test_positional_arguments_have_the_names_of_the_next_trainer(tmp_path: Any) -> None:
    class Reordered(Trainer):
        def __init__(self, args: Any, model: Any, *, extra: int, **kwargs: Any) -> None:
            super().__init__(model, args, **kwargs)
            self.extra = extra

    class Forwarding(Reordered):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, extra=3, **kwargs)

    kind = type("RKIFForwarding", (RKIFMixin, Forwarding), {})
    model, args = lora_llama(), arguments(tmp_path)
    run = kind(args, model, train_dataset=NEW, memory_dataset=MEMORY)
    assert (run.model is model, run.args is args, run.extra) == (True, True, 3)
    with pytest.raises(TypeError, match="RKIFForwarding takes 2 positional arguments, got 3"):
        kind(args, model, NEW)
    with pytest.raises(TypeError, match="RKIFForwarding got model by position and by name"):
        kind(args, model, model=model)


def test_refuses_a_frozen_model(tmp_path: Any) -> None:
    model = tiny_llama(40, 0).requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter is trainable"):
        trainer(tmp_path, model=model).train()


def test_refuses_a_ready_made_optimizer(tmp_path: Any) -> None:
    model = lora_llama()
    optimizers = (torch.optim.SGD(trainable(model)), None)
    with pytest.raises(ValueError, match="pass optimizer_cls_and_kwargs instead"):
        trainer(tmp_path, model=model, optimizers=optimizers)
    trainer(tmp_path, model=model, optimizers=optimizers, memory_dataset=None).train()


UNSEEN = ["DeepSpeed", "FSDP1", "nn.DataParallel on 2 GPUs", "a model on cpu, meta"]


@pytest.mark.parametrize("found", UNSEEN)
def test_refuses_wrappers_that_hide_the_gradients(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, found: str
) -> None:
    run = trainer(tmp_path, train_dataset=NEW)
    before = weights(run.model)
    if found == "nn.DataParallel on 2 GPUs":
        monkeypatch.setattr(run.args, "_n_gpu", 2)
    elif found == "a model on cpu, meta":
        run.model.get_base_model().lm_head.to("meta")
    else:
        monkeypatch.setattr(run, f"is_{found.lower().rstrip('1')}_enabled", True)
    with pytest.raises(RuntimeError, match=f"needs DDP, FSDP2 or one process on one device, found: {found}"):
        run.train()
    assert_same_bits(weights(run.model), before)
