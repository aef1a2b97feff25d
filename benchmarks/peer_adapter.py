"""PEFT's adapter for a peer's training: ours, through its files, or one that it makes itself."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_config, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file


def opened(model: torch.nn.Module, folder: Path, cast: bool) -> torch.nn.Module:
    """The model with the adapter of a benchmark's folder on it, to be trained: of `fresh.json` where there is one, else `start`.

    cast: its values in fp32, as the `peft` library does unless told otherwise.
    """
    fresh, start = folder / "fresh.json", folder / "start"
    if fresh.exists():
        return get_peft_model(model, get_peft_config(json.loads(fresh.read_text())), autocast_adapter_dtype=cast)
    config = PeftConfig.from_pretrained(start)
    if not config.is_prompt_learning:
        return PeftModel.from_pretrained(model, start, is_trainable=True, autocast_adapter_dtype=cast)
    config.inference_mode = False  # prompts are opened for training only as new ones
    made = get_peft_model(model, config, autocast_adapter_dtype=cast)
    set_peft_model_state_dict(made, load_file(start / "adapter_model.safetensors"))
    return made
