"""The peer's side of `classify-minilm`, run by the peers' own interpreter: python peer_classify.py FOLDER MODEL_FOLDER DTYPE

transformers' Trainer with PEFT's LoRA on BertForSequenceClassification, its defaults apart from what the work fixes: the
same rows in the same order, the same start, constant learning rate, dropout off. Batches are padded to their longest row.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
from classify import read_work, say
from datasets import Dataset
from peer_adapter import opened
from torch.utils.data import SequentialSampler
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)


class Clock(TrainerCallback):
    """Seconds of each optimiser step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: object, **kwargs: object) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        self.seconds.append(time.perf_counter() - self.began)


class InOrder(Trainer):
    """Takes rows as they come."""

    def _get_train_sampler(self, *args: object, **kwargs: object) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def main(folder: Path, model_folder: str, dtype: str) -> None:
    """Train the folder's rows in their order and say losses, speed and peak memory."""
    settings, rows = read_work(folder)
    batch = settings["batch"]
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=settings["labels"], dtype=kind, **off)
    model = opened(model, folder, dtype == "fp32")
    data = Dataset.from_list([{"input_ids": row["ids"], "attention_mask": [1] * len(row["ids"]), "labels": row["label"]} for row in rows])
    clock = Clock()
    with tempfile.TemporaryDirectory() as kept:
        config = TrainingArguments(
            output_dir=kept, num_train_epochs=1, per_device_train_batch_size=batch, learning_rate=settings["lr"], warmup_steps=0,
            lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to="none", bf16=False, use_cpu=True,
            dataloader_pin_memory=False, disable_tqdm=True,
        )  # fmt: skip
        collator = DataCollatorWithPadding(AutoTokenizer.from_pretrained(model_folder))
        trainer = InOrder(model=model, args=config, train_dataset=data, data_collator=collator, callbacks=[clock])
        trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    counts = [min(batch, len(rows) - at) for at in range(0, len(rows), batch)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    say(losses, clock.seconds, counts, settings["warm"], peak, dtype)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
