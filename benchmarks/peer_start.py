"""TRL's side of `start`, run by the peers' own interpreter: python peer_start.py FOLDER MODEL_FOLDER DTYPE"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer


class Mark(TrainerCallback):
    """Leaves a file when the first step is done."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        (self.folder / "first_step").touch()


def main(folder: Path, model_folder: str, dtype: str) -> None:
    """What a user of TRL writes: rows from a file, LoRA on q and v, three steps of eight rows."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    data = load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train")
    with tempfile.TemporaryDirectory() as kept:
        config = SFTConfig(
            output_dir=kept, max_steps=3, per_device_train_batch_size=8, learning_rate=2e-4, logging_steps=1, save_strategy="no",
            report_to="none", max_length=None, gradient_checkpointing=False, bf16=False, use_cpu=True, dataloader_pin_memory=False,
            disable_tqdm=True,
        )  # fmt: skip
        adapter = LoraConfig(r=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        tokenizer = AutoTokenizer.from_pretrained(model_folder)
        trainer = SFTTrainer(
            model=model, args=config, train_dataset=data, processing_class=tokenizer, peft_config=adapter, callbacks=[Mark(folder)]
        )
        trainer.train()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
