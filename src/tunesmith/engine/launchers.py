"""What a launcher's configuration asks for besides processes: carried out where something here is the same, refused where not."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith.core.errors import RunError

_DEEPSPEED, _MEGATRON = "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM"


def zero_stage(environment: Mapping[str, str] = os.environ) -> int:
    """The stage of ZeRO (Rajbhandari et al. 2020, 1910.02054) that a DeepSpeed configuration asks for; 0 where none does.

    DeepSpeed itself is not used: FSDP2 spreads weights, gradients and moments, which is stage 3, and more than 1 and 2 ask.
    Raises RunError for a configuration that cannot be read, and for what FSDP2 is no substitute for: keeping state off the device.
    """
    if environment.get(_DEEPSPEED, "").lower() != "true":
        return 0
    file = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "")
    if file:
        stage, away = _of_file(Path(file))
    else:
        stage = _stage(environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"), "the launcher's configuration")
        away = [environment.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE", "none") for what in ("OPTIMIZER", "PARAM")]
    if any(device not in ("", "none") for device in away):
        raise RunError(
            "the launcher's DeepSpeed configuration keeps state off the device (offload), which nothing here does.",
            where=file,
            hints=["Nearest that works here:  train.sharding=fsdp  train.checkpointing=true  and an adapter instead of full",
                   "In the configuration:  offload_optimizer_device: none  and  offload_param_device: none"],
        )  # fmt: skip
    return stage


def check() -> None:
    """Refuse what the launcher's configuration asks for and nobody here would do. Raises RunError."""
    if os.environ.get(_MEGATRON, "").lower() == "true":
        raise RunError("the launcher's configuration asks for Megatron-LM.", hints=["Nearest that works here:  train.sharding=fsdp"])
    zero_stage()


def _of_file(file: Path) -> tuple[int, list[str]]:
    """(stage, devices that state is kept on) of a DeepSpeed configuration file."""
    try:
        values = json.loads(file.read_text())
    except OSError as cause:
        raise RunError(f"the DeepSpeed configuration cannot be read: {cause.strerror}.", where=str(file)) from None
    except ValueError as cause:
        raise RunError(f"the DeepSpeed configuration is no JSON: {cause}.", where=str(file)) from None
    zero: Any = values.get("zero_optimization", {}) if isinstance(values, dict) else None
    if not isinstance(zero, dict):
        raise RunError("the DeepSpeed configuration must be a JSON object, and so must its zero_optimization.", where=str(file))
    away = [zero.get(key) or {} for key in ("offload_optimizer", "offload_param")]
    return _stage(zero.get("stage", 0), str(file)), [str(each.get("device", "cpu")) for each in away if isinstance(each, dict) and each]


def _stage(value: Any, where: str) -> int:
    if str(value) not in ("0", "1", "2", "3"):
        raise RunError(f"a ZeRO stage is 0, 1, 2 or 3, not {value!r}.", where=where)
    return int(value)
