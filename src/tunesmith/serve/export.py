"""Export: a finished run in the form that another program reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from tunesmith.adapters import Adapter, Change, as_lora, change_of, exchange_for, merge, plain, save_adapter, stack, untie
from tunesmith.core.errors import AdapterError, RunError, unknown
from tunesmith.engine.checkpoint import new_folder
from tunesmith.engine.model import Model

Profile = Literal["peft", "vllm", "merged"]
PROFILES: tuple[str, ...] = get_args(Profile)
_MERGED = "Nearest that works here:  --profile merged, a model of its own that needs no adapter"


def export(model: Model, folder: Path, profile: str, *, rank: int | None = None, dequantise: bool = False) -> list[str]:
    """Write what a run learned into `folder`, whole or not at all; returns what there is to know of it.

    profile: "peft", the adapter as the `peft` library reads it; "vllm", plain LoRA of one rank and one alpha; "merged", a
    transformers model with the adapters in its weights. rank: cut to this rank, where the profile is vllm. dequantise: make a
    4-bit base floating-point, where the profile is merged. For "merged" the model's own weights are overwritten. Raises
    AdapterError, with the nearest that works, where the profile cannot hold it.
    """
    check_profile(profile)
    if not model.adapters:
        raise RunError("there is no adapter to export.")
    if rank is not None and profile != "vllm":
        raise AdapterError(f"rank changes nothing for the profile {profile}.", hints=["Cut it first:  tunesmith adapter resize"])
    if folder.exists() and any(folder.iterdir()):
        raise RunError("the folder is not empty; nothing was written.", where=str(folder), hints=["Name another one."])
    if dequantise and profile != "merged":
        raise AdapterError(f"dequantise changes nothing for the profile {profile}, which leaves the base alone.")
    if profile == "merged":
        return _merged(model, folder, dequantise)
    if profile == "vllm":
        return _vllm(model, folder, rank)
    return _peft(model, folder)


def check_profile(profile: str) -> None:
    """Refuse a profile that there is not."""
    if profile not in PROFILES:
        raise unknown("profile", profile, PROFILES, error=AdapterError)


def _peft(model: Model, folder: Path) -> list[str]:
    adapter = model.adapter
    if len(model.adapters) > 1:
        what = f"the run lies on top of {len(model.adapters) - 1} other, and PEFT's file holds one adapter of a base."
        raise AdapterError(what, hints=["Make one of them first:  tunesmith adapter combine --how stack", _MERGED])
    if exchange_for(adapter) is None:
        raise AdapterError(f"PEFT has no format for '{adapter.expression}'.", hints=["tunesmith adapter convert RUN FOLDER", _MERGED])
    _save(adapter, model, folder)
    return [f"PEFT's format, for the base {model.base.source}"]


def _vllm(model: Model, folder: Path, rank: int | None) -> list[str]:
    if model.head is not None:
        raise AdapterError("vLLM's adapters have no task heads.", hints=["Answer with it here, or export it:  --profile peft"])
    changes = [change_of(adapter) for adapter in model.adapters]
    if rank is None and (odd := [a for a, change in zip(model.adapters, changes, strict=True) if _needs_rank(change)]):
        raise AdapterError(
            f"vLLM takes plain LoRA, and '{odd[0].expression}' changes weights in more ranks than a LoRA has.",
            hints=["Convert it, and be told the error:  --rank 64", _MERGED],
        )
    fitted = plain(changes[0] if len(changes) == 1 else stack(changes), rank=rank)
    for adapter in reversed(model.adapters):
        adapter.detach()
    adapter = as_lora(model.base.model, fitted, name="exported", one_rank=True)
    _save(adapter, model, folder)
    adapter.detach()
    largest = max(1, *fitted.ranks.values())
    notes = [f"plain LoRA of rank and alpha {largest}: start vLLM with --enable-lora --max-lora-rank {largest} or more"]
    if rank is not None:
        notes.append(f"relative error of the cut to rank {rank}: {fitted.error:.2e}")
    if fitted.left_out:
        notes.append(f"left out, since no LoRA holds them: {len(fitted.left_out)} parameters, first {fitted.left_out[0]}")
    return notes


def _needs_rank(change: Change) -> bool:
    return bool(change.full or change.other)


def _save(adapter: Adapter, model: Model, folder: Path) -> None:
    with new_folder(folder) as beside:
        save_adapter(adapter, beside, base=model.base.source, fingerprint=model.base.fingerprint)


def _merged(model: Model, folder: Path, floating: bool) -> list[str]:
    if model.head is not None:
        raise AdapterError("a task head cannot be merged: it is no part of the base.", hints=["Nearest that works here:  --profile peft"])
    net: Any = model.base.model
    notes = _dequantised(net) if floating else []
    head = net.get_output_embeddings()
    if head is not None and head.weight is net.get_input_embeddings().weight and getattr(head, "ts_active", False):
        untie(net)
        notes.append("the vocabulary head was tied to the embedding; it has a table of its own now")
    lost = max([merge(adapter, keep_original=False) for adapter in model.adapters])
    values = _own_values(net)
    with new_folder(folder) as beside:
        net.save_pretrained(beside, state_dict=values)
        model.base.tokenizer.save_pretrained(beside)
    if lost > 1e-3:
        notes.append(f"rounding to the base's dtype lost {lost:.1%} of the change; base.dtype=fp32 loses nothing")
    return [f"a transformers model in {str(model.base.dtype).removeprefix('torch.')}", *notes]


def _dequantised(net: Any) -> list[str]:
    """Make a 4-bit base floating-point, and say what that comes to."""
    from tunesmith.bases.quantise import dequantise

    count = dequantise(net)
    if not count:
        raise AdapterError("the base is not quantised.", hints=["Leave out --dequantise."])
    return [f"{count} maps of the base are floating-point again, as they were computed with in training: what 4 bits lost stays lost"]


def _own_values(net: Any) -> dict[str, Tensor]:
    """The model's tensors as transformers keeps them, without those of adapters."""
    found = {name: value for name, value in net.state_dict().items() if not any(part.startswith("ts_") for part in name.split("."))}
    for path, module in net.named_modules():
        if hasattr(module, "dequantise"):  # it was 4-bit: its scales are none of the file, and some families keep the weight the other way
            for name in ("scales", "outer", "levels", "mean"):
                del found[f"{path}.{name}"]
            if module.transposed:
                found[f"{path}.weight"] = found[f"{path}.weight"].t().contiguous()
    return found
