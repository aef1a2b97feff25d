"""Adapter files: LoRA in PEFT's own format, both ways; in-place methods as the tensors that they changed.

A saved adapter is a folder: `adapter_config.json` + `adapter_model.safetensors` as the `peft` library writes them (names
never in keys, prefix `base_model.model.`), and beside them `tunesmith.json` with what PEFT has no place for. A task head is
stored as PEFT stores that of transformers' ...ForSequenceClassification models.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tunesmith.adapters.attach import Adapter, attach
from tunesmith.adapters.forms import LowRank
from tunesmith.adapters.heads import Pool, TaskHead, Way, states_width
from tunesmith.core.errors import AdapterError

WEIGHTS, CONFIG, OURS = "adapter_model.safetensors", "adapter_config.json", "tunesmith.json"
_PREFIX = "base_model.model."
_FORMAT = 1


def save_adapter(adapter: Adapter, folder: Path, *, base: str, fingerprint: str) -> None:
    """Write the adapter's folder (which must exist). base, fingerprint: what it belongs to."""
    own = _own_format(adapter)
    tensors = _own_tensors(adapter) if own else _peft_tensors(adapter)
    tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    if not own:
        (folder / CONFIG).write_text(json.dumps(_peft_config(adapter, base), indent=2, sort_keys=True) + "\n")
    words = next((rows.words.tolist() for rows in adapter.rows.values()), [])
    ours: dict[str, Any] = {
        "format": _FORMAT,
        "expression": adapter.expression,
        "base": base,
        "fingerprint": fingerprint,
        "new_words": words,
    }
    if adapter.head is not None:
        ours["head"] = {"labels": adapter.head.labels, **asdict(adapter.head.way)}
    (folder / OURS).write_text(json.dumps(ours, indent=2) + "\n")


def load_adapter(model: nn.Module, folder: Path, *, fingerprint: str | None = None, name: str = "default") -> Adapter:
    """Attach a saved adapter: ours, or any plain LoRA that the `peft` library wrote.

    fingerprint: of the base it is put on; a different one than it was made for is refused. Raises AdapterError for
    files that are missing, damaged or made for another base, and then leaves the model as it was.
    """
    tensors = _read(folder / WEIGHTS)
    ours = _ours(folder, fingerprint)
    if ours is not None:
        expression, words, head = ours["expression"], ours["new_words"], ours.get("head")
    else:
        config = _json(folder / CONFIG)
        expression, words, head = _expression(config, tensors, folder), _token_indices(config, folder), None
    adapter = attach(model, expression, name=name, new_words=words)
    try:
        if head is not None:
            _head(adapter, head, folder)
        state = tensors if _own_format(adapter) else _from_peft(adapter, _without_tables(tensors, model, folder), folder)
        if ours is None:  # a table that the file leaves as it is keeps its rows
            state = {f"{path}.rows": rows.rows.detach() for path, rows in adapter.rows.items()} | state
        adapter.restore(state)
    except AdapterError as cause:
        adapter.detach()
        raise AdapterError(cause.what, where=cause.where or str(folder), hints=cause.hints) from None
    return adapter


def _ours(folder: Path, fingerprint: str | None) -> dict[str, Any] | None:
    """What we wrote beside an adapter of ours; None for one of the `peft` library."""
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
    return values


def _head(adapter: Adapter, values: dict[str, Any], folder: Path) -> None:
    """Put on the head that `tunesmith.json` describes."""
    try:
        labels, way = [str(label) for label in values["labels"]], Way(**{key: value for key, value in values.items() if key != "labels"})
        if way.pool not in get_args(Pool):
            raise ValueError(f"unknown pool {way.pool!r}")
        adapter.give_head(states_width(adapter.model), labels, way)
    except (KeyError, TypeError, ValueError) as cause:
        raise AdapterError(f"the description of the head is damaged: {cause!r}.", where=str(folder / OURS)) from None


def _own_format(adapter: Adapter) -> bool:
    """Has PEFT no format for it? So it is with what trains the base in place, with a head alone, and with most forms."""
    return adapter.in_place or not adapter.forms or any(type(form) is not LowRank for form in adapter.forms.values())


def _own_tensors(adapter: Adapter) -> dict[str, Tensor]:
    return adapter.stored()


def _low_rank(adapter: Adapter) -> dict[str, LowRank]:
    return {path: form for path, form in adapter.forms.items() if isinstance(form, LowRank)}


def _peft_tensors(adapter: Adapter) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    outer = _PREFIX + _outer(adapter)
    for path, form in _low_rank(adapter).items():
        out[f"{outer}{path}.lora_A.weight"] = form.a.detach()
        out[f"{outer}{path}.lora_B.weight"] = form.b.detach()
    for path, rows in adapter.rows.items():
        out[f"{outer}{path}.token_adapter.trainable_tokens_delta"] = rows.rows.detach()
    if adapter.head is not None:
        own = dict(adapter.named_parameters())
        out |= {_PREFIX + theirs: own[ours].detach() for theirs, ours in _head_names(adapter.head).items() if ours in own}
    return out


def _outer(adapter: Adapter) -> str:
    """What stands before our paths in those of the model with a head, where the base is a body alone: "bert."."""
    model: Any = adapter.model
    return f"{model.base_model_prefix}." if adapter.head is not None and model.base_model is model else ""


def _head_names(head: TaskHead) -> dict[str, str]:
    """Names in transformers' ...ForSequenceClassification -> ours. Decoders call the map `score`, and it has no bias."""
    root = "classifier" if head.way.bias else "score"
    parts = {f"{root}.dense": "hidden", f"{root}.out_proj": "out"} if head.way.hidden else {root: "out"}
    return {f"{theirs}.{kind}": f"ts_head.{ours}.{kind}" for theirs, ours in parts.items() for kind in ("weight", "bias")}


def _without_tables(tensors: dict[str, Tensor], model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """The tensors less the copies of the base's own tables that PEFT puts beside a LoRA on the vocabulary head.

    Raises AdapterError where such a table is not the base's.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    out = {}
    for key, value in tensors.items():
        table = own.get(key.removeprefix(_PREFIX).replace(".base_layer.", "."))
        if table is None:
            out[key] = value
        elif table.shape != value.shape or not torch.equal(table.detach().cpu(), value.to(table.dtype)):
            what = f"'{key}' is a table of its own, unlike the base's."
            raise AdapterError(what, where=str(folder / WEIGHTS), hints=["Load the base that the adapter was made with."])
    return out


def _from_peft(adapter: Adapter, tensors: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    names = {} if adapter.head is None else _head_names(adapter.head)
    for key, value in tensors.items():
        path = key.removeprefix(_PREFIX)
        if path in names:
            state[names[path]] = value
            continue
        path = path.removeprefix(_outer(adapter))
        for theirs, ours in ((".lora_A.weight", ".a"), (".lora_B.weight", ".b"), (".token_adapter.trainable_tokens_delta", ".rows")):
            if path.endswith(theirs):
                state[path.removesuffix(theirs) + ours] = value
                break
        else:
            raise AdapterError(f"the tensor '{key}' belongs to no method that can be read here.", where=str(folder / WEIGHTS))
    return state


def _peft_config(adapter: Adapter, base: str) -> dict[str, Any]:
    outer = _outer(adapter)
    forms = [(f"{outer}{path}", form) for path, form in _low_rank(adapter).items()]
    first = forms[0][1]
    rank_pattern = {path: form.rank for path, form in forms if form.rank != first.rank}
    alpha_pattern = {path: form.alpha for path, form in forms if form.alpha != first.alpha}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "task_type": "CAUSAL_LM" if adapter.head is None else "SEQ_CLS",
        "inference_mode": True,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout,
        "use_rslora": first.stabilised,
        "bias": "none",
        "fan_in_fan_out": any(type(adapter.model.get_submodule(path)).__name__ == "Conv1D" for path in adapter.forms),
        "target_modules": [path for path, _ in forms],
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
    }
    if adapter.head is not None:
        config["modules_to_save"] = ["classifier" if adapter.head.way.bias else "score"]
    if adapter.rows:
        config["trainable_token_indices"] = {path.rsplit(".", 1)[-1]: rows.words.tolist() for path, rows in adapter.rows.items()}
    return config


_PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (False,),
    "bias": ("none",),
    "modules_to_save": (),
    "lora_bias": (False,),
    "ensure_weight_tying": (False,),
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
