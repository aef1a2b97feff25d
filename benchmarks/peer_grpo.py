"""TRL's side of `grpo`, run by the peers' own interpreter: python peer_grpo.py FOLDER MODEL_FOLDER DTYPE AT_ONCE sample|replay

GRPOTrainer with PEFT's LoRA, its defaults apart from what the work fixes: the same prompts, the same start, the loss that is named
grpo (the mean over each answer), constant learning rate, no checkpointing of activations. AT_ONCE: answers of a forward and backward;
all of a step's are sampled at once. replay: learn from the answers that ours recorded, instead of sampling.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peer_prefer import Clock
from peft import PeftModel
from rollouts import REPLAYED, read_work, say, vowels
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer


def reward(completions: list[Any], **kwargs: object) -> list[float]:
    """The work's reward, of one message each."""
    return vowels([completion[0]["content"] for completion in completions])


class Replaying(GRPOTrainer):
    """Keeps the losses, which the log would round; says what it is given, where it is given something."""

    said: list[dict[str, list[list[int]]]] | None = None
    losses: list[float]

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        if self.said is None:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        answers = {prompt: iter(ids) for prompt, ids in self.said[self.state.global_step].items()}
        return [next(answers[json.dumps(ids)]) for ids in prompt_ids], None

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        self.losses.append(float(loss))
        return loss


def main(folder: Path, model_folder: str, dtype: str, at_once: int, how: str) -> None:
    """Take the work's steps and say losses, gradient norms, speed and peak memory."""
    settings, prompts = read_work(folder)
    answers = settings["prompts"] * settings["samples"]
    steps = REPLAYED if how == "replay" else settings["steps"]
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    model = PeftModel.from_pretrained(model, folder / "start", is_trainable=True)
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": prompt}]} for prompt in prompts])
    clock = Clock()
    with tempfile.TemporaryDirectory() as kept:
        config = GRPOConfig(
            output_dir=kept, max_steps=steps, per_device_train_batch_size=at_once, gradient_accumulation_steps=answers // at_once,
            num_generations=settings["samples"], max_completion_length=settings["tokens"], loss_type="grpo", shuffle_dataset=False,
            generation_kwargs={"min_new_tokens": settings["tokens"]}, learning_rate=settings["lr"], warmup_steps=0,
            lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to="none", gradient_checkpointing=False, bf16=False,
            use_cpu=True, dataloader_pin_memory=False, disable_tqdm=True,
        )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(model_folder)
        trainer = Replaying(
            model=model, reward_funcs=reward, args=config, train_dataset=data, processing_class=tokenizer, callbacks=[clock]
        )
        trainer.losses = []
        if how == "replay":
            trainer.said = json.loads((folder / "said.json").read_text())
        trainer.train()
    micro = answers // at_once
    losses = [sum(trainer.losses[at : at + micro]) for at in range(0, len(trainer.losses), micro)]
    norms = [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    say(clock.seconds, settings, peak, dtype, losses=losses, norms=norms)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5])
