"""TRL's side of a training benchmark, run by the peers' own interpreter: python peer_trl.py FOLDER MODEL_FOLDER DTYPE

SFTTrainer with PEFT's LoRA, its defaults apart from what the work fixes: the same rows in the same order, the same start,
constant learning rate, no checkpointing of activations, completion-only loss.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from peer_adapter import opened
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer
from work import read, say


class Clock(TrainerCallback):
    """Seconds of each optimiser step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: object, **kwargs: object) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        self.seconds.append(time.perf_counter() - self.began)


class InOrder(SFTTrainer):
    """Takes rows as they come."""

    def _get_train_sampler(self, *args: object, **kwargs: object) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def main(folder: Path, model_folder: str, dtype: str) -> None:
    """Train the folder's rows in their order and say losses, speed and peak memory."""
    work, rows = read(folder)
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=kind)
    if not work.full:
        model = opened(model, folder, True)
    data = Dataset.from_list([{"input_ids": row["ids"], "completion_mask": row["supervised"]} for row in rows])
    clock = Clock()
    with tempfile.TemporaryDirectory() as kept:
        config = SFTConfig(
            output_dir=kept, max_steps=work.steps, per_device_train_batch_size=work.batch, learning_rate=work.lr, warmup_steps=0,
            lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to="none", completion_only_loss=True,
            max_length=None, gradient_checkpointing=False, bf16=False, use_cpu=True, dataloader_pin_memory=False, disable_tqdm=True,
        )  # fmt: skip
        trainer = InOrder(
            model=model, args=config, train_dataset=data, processing_class=AutoTokenizer.from_pretrained(model_folder), callbacks=[clock]
        )
        trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    tokens = [sum(len(row["ids"]) for row in rows[at : at + work.batch]) for at in range(0, len(rows), work.batch)]
    say(losses, clock.seconds, tokens, work.warm, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, dtype)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
