"""Adapter files: LoRA in PEFT's own format, both ways; in-place methods as the tensors that they changed.

A saved adapter is a folder: `adapter_config.json` + `adapter_model.safetensors` as the `peft` library writes them (names
never in keys, prefix `base_model.model.`), and beside them `tunesmith.json` with what PEFT has no place for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tunesmith.adapters.attach import Adapter, attach
from tunesmith.adapters.forms import LowRank
from tunesmith.core.errors import AdapterError

WEIGHTS, CONFIG, OURS = "adapter_model.safetensors", "adapter_config.json", "tunesmith.json"
_PREFIX = "base_model.model."


def save_adapter(adapter: Adapter, folder: Path, *, base: str, fingerprint: str) -> None:
    """Write the adapter's folder (which must exist). base, fingerprint: what it belongs to."""
    tensors = _in_place_tensors(adapter) if adapter.in_place else _peft_tensors(adapter)
    tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    if not adapter.in_place:
        (folder / CONFIG).write_text(json.dumps(_peft_config(adapter, base), indent=2, sort_keys=True) + "\n")
    first = next((rows.first for rows in adapter.rows.values()), None)
    ours = {"format": 1, "expression": adapter.expression, "base": base, "fingerprint": fingerprint, "new_from": first}
    (folder / OURS).write_text(json.dumps(ours, indent=2) + "\n")


def load_adapter(
    model: nn.Module, folder: Path, *, fingerprint: str | None = None, name: str = "default", new_from: int | None = None
) -> Adapter:
    """Attach a saved adapter: ours, or any plain LoRA that the `peft` library wrote.

    fingerprint: of the base it is put on; a different one than it was made for is refused. Raises AdapterError for
    files that are missing, damaged or made for another base.
    """
    tensors = _read(folder / WEIGHTS)
    ours = _json(folder / OURS) if (folder / OURS).exists() else None
    if ours is not None:
        if fingerprint is not None and ours["fingerprint"] and ours["fingerprint"] != fingerprint:
            raise AdapterError(
                f"the adapter was made for another base ({ours['base']}, fingerprint {ours['fingerprint'][:12]}; this base has {fingerprint[:12]}).",
                where=str(folder),
                hints=["Load the base it was made for."],
            )
        adapter = attach(model, ours["expression"], name=name, new_from=ours["new_from"])
        adapter.load(tensors if adapter.in_place else _from_peft(adapter, tensors, folder))
        return adapter
    config = _json(folder / CONFIG)
    indices = _token_indices(config)
    adapter = attach(model, _expression(config, tensors, folder), name=name, new_from=min(indices) if indices else new_from)
    _check_rows(adapter, indices, folder)
    for path, form in adapter.forms.items():
        _check_pattern(config, path, form, folder)
    adapter.load(_from_peft(adapter, tensors, folder))
    return adapter


def _peft_tensors(adapter: Adapter) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for path, form in adapter.forms.items():
        out[f"{_PREFIX}{path}.lora_A.weight"] = form.a.detach()
        out[f"{_PREFIX}{path}.lora_B.weight"] = form.b.detach()
    for path, rows in adapter.rows.items():
        out[f"{_PREFIX}{path}.token_adapter.trainable_tokens_delta"] = rows.rows.detach()
    return out


def _in_place_tensors(adapter: Adapter) -> dict[str, Tensor]:
    out = {path: parameter.detach() for path, parameter in adapter.trained.items()}
    return out | {f"{path}.rows": rows.rows.detach() for path, rows in adapter.rows.items()}


def _from_peft(adapter: Adapter, tensors: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for key, value in tensors.items():
        path = key.removeprefix(_PREFIX)
        for theirs, ours in ((".lora_A.weight", ".a"), (".lora_B.weight", ".b"), (".token_adapter.trainable_tokens_delta", ".rows")):
            if path.endswith(theirs):
                state[path.removesuffix(theirs) + ours] = value
                break
        else:
            raise AdapterError(f"the tensor '{key}' belongs to no method that can be read here.", where=str(folder / WEIGHTS))
    return state


def _peft_config(adapter: Adapter, base: str) -> dict[str, Any]:
    forms = list(adapter.forms.items())
    first = forms[0][1]
    rank_pattern = {path: form.rank for path, form in forms if form.rank != first.rank}
    alpha_pattern = {path: form.alpha for path, form in forms if form.alpha != first.alpha}
    if any(form.stabilised != first.stabilised for _, form in forms):
        raise AdapterError("lora and rslora in one adapter cannot be written in PEFT's format.", hints=["Use one of the two for all sites."])
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout,
        "use_rslora": first.stabilised,
        "bias": "none",
        "fan_in_fan_out": any(type(adapter.model.get_submodule(path)).__name__ == "Conv1D" for path, _ in forms),
        "target_modules": [path for path, _ in forms],
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
    }
    if adapter.rows:
        config["trainable_token_indices"] = {
            path.rsplit(".", 1)[-1]: list(range(rows.first, rows.first + rows.rows.shape[0])) for path, rows in adapter.rows.items()
        }
    return config


def _expression(config: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> str:
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"peft_type {config.get('peft_type')!r} cannot be read.", where=str(folder / CONFIG), hints=["Readable here:  LORA"])
    unread = {"use_dora": False, "bias": "none", "modules_to_save": None, "lora_bias": False, "use_qalora": False, "target_parameters": None}
    for key, plain in unread.items():
        if config.get(key, plain) not in (plain, [], None):
            raise AdapterError(f"{key}={config[key]!r} cannot be read.", where=str(folder / CONFIG), hints=[f"Readable here:  {key}={plain!r}"])
    paths = sorted(key.removeprefix(_PREFIX).removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight"))
    if not paths:
        raise AdapterError("no LoRA matrices inside.", where=str(folder / WEIGHTS))
    return _expression_of(config, paths)


def _expression_of(config: dict[str, Any], paths: list[str]) -> str:
    method = "rslora" if config.get("use_rslora") else "lora"
    listed = ", ".join(repr(path) for path in paths)
    return f"{method}(rank={config['r']}, alpha={config['lora_alpha']}, dropout={config.get('lora_dropout') or 0.0}, sites=[{listed}])"


def _token_indices(config: dict[str, Any]) -> list[int]:
    given = config.get("trainable_token_indices") or []
    return sorted({index for part in given.values() for index in part}) if isinstance(given, dict) else sorted(given)


def _check_rows(adapter: Adapter, indices: list[int], folder: Path) -> None:
    for rows in adapter.rows.values():
        if indices != list(range(rows.first, rows.first + rows.rows.shape[0])):
            raise AdapterError(
                f"trains the vectors of words {indices}, which are not the last of the vocabulary.",
                where=str(folder / CONFIG),
                hints=["Give the base the same new_tokens as the adapter was made with."],
            )


def _check_pattern(config: dict[str, Any], path: str, form: LowRank, folder: Path) -> None:
    for key, value in (("rank_pattern", form.rank), ("alpha_pattern", form.alpha)):
        for pattern, other in (config.get(key) or {}).items():
            if (path == pattern or path.endswith("." + pattern)) and other != value:
                raise AdapterError(f"{key} gives '{path}' its own value, which cannot be read.", where=str(folder / CONFIG))


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise AdapterError("there is no adapter here.", where=str(path)) from None
    except (OSError, ValueError) as cause:
        raise AdapterError(f"cannot be read: {cause}.", where=str(path)) from None
    if not isinstance(value, dict):
        raise AdapterError("is not a JSON object.", where=str(path))
    return value


def _read(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise AdapterError("there are no adapter weights here.", where=str(path))
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as cause:
        raise AdapterError(f"is damaged or no safetensors file: {cause}.", where=str(path), hints=["Copy or train the adapter again."]) from None


def total_bytes(folder: Path) -> int:
    """Bytes on disk of a saved adapter."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


