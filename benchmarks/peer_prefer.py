"""TRL's side of `dpo` and `reward`, run by the peers' own interpreter: python peer_prefer.py FOLDER MODEL_FOLDER DTYPE live|first

DPOTrainer and RewardTrainer with PEFT's LoRA, their defaults apart from what the work fixes: the same pairs in the same order, the
same start, constant learning rate, no checkpointing of activations. live, first: when the reference is read, at each step or before
the first one (precompute_ref_log_probs); `reward` has none.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel, set_peft_model_state_dict
from prefer import read_work, say
from safetensors.torch import load_file
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer


class Clock(TrainerCallback):
    """Seconds of each optimiser step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: object, **kwargs: object) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        self.seconds.append(time.perf_counter() - self.began)


class InOrder:
    """Takes ids as they are and rows as they come, and keeps the losses, which the log would round."""

    losses: list[float]
    train_dataset: Any

    def _prepare_dataset(self, dataset: Dataset, *args: object) -> Dataset:
        return dataset

    def _get_train_sampler(self, *args: object, **kwargs: object) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        self.losses.append(float(loss))
        return loss


class Preferring(InOrder, DPOTrainer):
    """DPO; keeps the time that the reference took before the first step."""

    reading = 0.0

    def _precompute_ref_logps(self, *args: Any) -> Dataset:
        began = time.perf_counter()
        out = super()._precompute_ref_logps(*args)
        self.reading = time.perf_counter() - began
        return out


class Rewarding(InOrder, RewardTrainer):
    """A reward model."""

    reading = 0.0


def preferring(folder: Path, model_folder: str, kind: torch.dtype, pairs: list[dict[str, list[int]]], **given: Any) -> Preferring:
    """The trainer with the work's start. The adapter changes nothing as it begins, so that the reference is the base without it."""
    data = Dataset.from_list([{f"{part}_ids": ids for part, ids in pair.items()} for pair in pairs])
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=kind)
    adapter = PeftConfig.from_pretrained(folder / "start")
    adapter.inference_mode = False
    trainer = Preferring(model=model, args=DPOConfig(**given), train_dataset=data, peft_config=adapter, **about(model_folder))
    set_peft_model_state_dict(trainer.model, load_file(folder / "start" / "adapter_model.safetensors"))
    return trainer


def rewarding(folder: Path, model_folder: str, kind: torch.dtype, pairs: list[dict[str, list[int]]], **given: Any) -> Rewarding:
    """The trainer with the work's start, head and all."""
    data = Dataset.from_list([{f"{which}_ids": pair["prompt"] + pair[which] for which in ("chosen", "rejected")} for pair in pairs])
    model = AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=1, dtype=kind)
    model = PeftModel.from_pretrained(model, folder / "start", is_trainable=True, autocast_adapter_dtype=kind == torch.float32)
    return Rewarding(model=model, args=RewardConfig(**given), train_dataset=data, **about(model_folder))


def about(model_folder: str) -> dict[str, Any]:
    """What both trainers are given beside."""
    return {"processing_class": AutoTokenizer.from_pretrained(model_folder), "callbacks": [Clock()]}


def main(folder: Path, model_folder: str, dtype: str, when: str) -> None:
    """Train the folder's pairs in their order and say losses, speed and peak memory."""
    settings, pairs = read_work(folder)
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    with tempfile.TemporaryDirectory() as kept:
        given = dict(
            output_dir=kept, max_steps=settings["steps"], per_device_train_batch_size=settings["batch"], learning_rate=settings["lr"],
            warmup_steps=0, lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to="none", max_length=None,
            gradient_checkpointing=False, bf16=False, use_cpu=True, dataloader_pin_memory=False, disable_tqdm=True,
        )  # fmt: skip
        if settings["name"] == "dpo":
            trainer: Any = preferring(folder, model_folder, kind, pairs, precompute_ref_log_probs=when == "first", **given)
        else:
            trainer = rewarding(folder, model_folder, kind, pairs, **given)
        trainer.losses = []
        trainer.train()
    (clock,) = (callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Clock))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    say(trainer.losses, clock.seconds, trainer.reading, settings, peak, dtype)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4])
