"""Adapter files: LoRA in PEFT's own format, both ways; in-place methods as the tensors that they changed.

A saved adapter is a folder: `adapter_config.json` + `adapter_model.safetensors` as the `peft` library writes them (names
never in keys, prefix `base_model.model.`), and beside them `tunesmith.json` with what PEFT has no place for.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tunesmith.adapters.attach import Adapter, attach
from tunesmith.core.errors import AdapterError

WEIGHTS, CONFIG, OURS = "adapter_model.safetensors", "adapter_config.json", "tunesmith.json"
_PREFIX = "base_model.model."
_FORMAT = 1


def save_adapter(adapter: Adapter, folder: Path, *, base: str, fingerprint: str) -> None:
    """Write the adapter's folder (which must exist). base, fingerprint: what it belongs to."""
    tensors = _in_place_tensors(adapter) if adapter.in_place else _peft_tensors(adapter)
    tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    if not adapter.in_place:
        (folder / CONFIG).write_text(json.dumps(_peft_config(adapter, base), indent=2, sort_keys=True) + "\n")
    words = next((rows.words.tolist() for rows in adapter.rows.values()), [])
    ours = {"format": _FORMAT, "expression": adapter.expression, "base": base, "fingerprint": fingerprint, "new_words": words}
    (folder / OURS).write_text(json.dumps(ours, indent=2) + "\n")


def load_adapter(model: nn.Module, folder: Path, *, fingerprint: str | None = None, name: str = "default") -> Adapter:
    """Attach a saved adapter: ours, or any plain LoRA that the `peft` library wrote.

    fingerprint: of the base it is put on; a different one than it was made for is refused. Raises AdapterError for
    files that are missing, damaged or made for another base, and then leaves the model as it was.
    """
    tensors = _read(folder / WEIGHTS)
    ours = _ours(folder, fingerprint)
    if ours is not None:
        expression, words = ours
    else:
        config = _json(folder / CONFIG)
        expression, words = _expression(config, tensors, folder), _token_indices(config, folder)
    adapter = attach(model, expression, name=name, new_words=words)
    try:
        state = tensors if adapter.in_place else _from_peft(tensors, folder)
        if ours is None:  # a table that the file leaves as it is keeps its rows
            state = {f"{path}.rows": rows.rows.detach() for path, rows in adapter.rows.items()} | state
        adapter.load(state)
    except AdapterError as cause:
        adapter.detach()
        raise AdapterError(cause.what, where=cause.where or str(folder), hints=cause.hints) from None
    return adapter


def _ours(folder: Path, fingerprint: str | None) -> tuple[str, list[int]] | None:
    """(expression, new words) of an adapter that we wrote; None for one of the `peft` library."""
    file = folder / OURS
    if not file.exists():
        return None
    values = _json(file)
    kinds = {"format": int, "expression": str, "base": str, "fingerprint": str, "new_words": list}
    if not all(isinstance(values.get(key), kind) for key, kind in kinds.items()) or values["format"] != _FORMAT:
        raise AdapterError("is damaged, or of a newer version.", where=str(file), hints=["Copy the adapter again, or upgrade Tunesmith."])
    if fingerprint is not None and values["fingerprint"] and values["fingerprint"] != fingerprint:
        made, here = values["fingerprint"][:12], fingerprint[:12]
        raise AdapterError(
            f"the adapter was made for another base ({values['base']}, fingerprint {made}; this base has {here}).",
            where=str(folder),
            hints=["Load the base it was made for."],
        )
    return values["expression"], values["new_words"]


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


def _from_peft(tensors: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
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
        config["trainable_token_indices"] = {path.rsplit(".", 1)[-1]: rows.words.tolist() for path, rows in adapter.rows.items()}
    return config


_PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (False,),
    "bias": ("none",),
    "modules_to_save": (),
    "lora_bias": (False,),
    "use_qalora": (False,),
    "use_bdlora": (),
    "target_parameters": (),
    "layer_replication": (),
    "alora_invocation_tokens": (),
    "arrow_config": (),
    "kasa_config": (),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),  # the others change the base's weights as well
}
"""Options of PEFT's LoRA that change what is computed, with the values that are plain LoRA (beside None and empty)."""


def _expression(config: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> str:
    """The adapter expression of a LoRA that PEFT wrote: one term for each rank and alpha, with its sites by path."""
    if config.get("peft_type") != "LORA":
        what = f"peft_type {config.get('peft_type')!r} cannot be read."
        raise AdapterError(what, where=str(folder / CONFIG), hints=["Readable here:  LORA"])
    for key, plain in _PLAIN.items():
        value = config.get(key)
        if value and value not in plain:
            shown = " or ".join(repr(each) for each in plain) or "null"
            raise AdapterError(f"{key}={value!r} cannot be read.", where=str(folder / CONFIG), hints=[f"Readable here:  {key}={shown}"])
    paths = sorted(key.removeprefix(_PREFIX).removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight"))
    if not paths:
        raise AdapterError("no LoRA matrices inside.", where=str(folder / WEIGHTS))
    try:
        groups: dict[tuple[int, float], list[str]] = {}
        for path in paths:
            rank, alpha = _for_path(config, "r", "rank_pattern", path), _for_path(config, "lora_alpha", "alpha_pattern", path)
            groups.setdefault((rank, alpha), []).append(path)
    except (KeyError, TypeError, AttributeError, re.error) as cause:
        raise AdapterError(f"rank and alpha cannot be read: {cause!r}.", where=str(folder / CONFIG)) from None
    method, dropout = "rslora" if config.get("use_rslora") else "lora", config.get("lora_dropout") or 0.0
    return " + ".join(f"{method}(rank={r}, alpha={a}, dropout={dropout}, sites={sites})" for (r, a), sites in groups.items())


def _for_path(config: dict[str, Any], key: str, patterns: str, path: str) -> Any:
    """A setting of one module: PEFT takes the first pattern that matches the end of its path, as a regular expression."""
    for pattern, value in (config.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return config[key]


def _token_indices(config: dict[str, Any], folder: Path) -> list[int]:
    """Words whose vectors are trained, in the order of their rows; the same ones at every table."""
    given = config.get("trainable_token_indices") or []
    lists = [list(words) for words in given.values()] if isinstance(given, dict) else [list(given)]
    if any(words != lists[0] for words in lists):
        raise AdapterError("trainable_token_indices differ from table to table, which cannot be read.", where=str(folder / CONFIG))
    return lists[0] if lists else []


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
        what = f"is damaged or no safetensors file: {cause}."
        raise AdapterError(what, where=str(path), hints=["Copy or train the adapter again."]) from None
