"""Adapter files: in PEFT's own format, both ways, where PEFT has the method; others as the tensors that they trained.

A saved adapter is a folder: `adapter_config.json` + `adapter_model.safetensors` as the `peft` library writes them (names
never in keys, prefix `base_model.model.`), and beside them `tunesmith.json` with what PEFT has no place for. A task head is
stored as PEFT stores that of transformers' ...ForSequenceClassification models.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tunesmith.adapters.attach import Adapter, attach
from tunesmith.adapters.exchange import EXCHANGES, Exchange, exchange_for, fan_in_fan_out
from tunesmith.adapters.headfiles import FoundHead, find_head
from tunesmith.adapters.heads import Pool, Says, TaskHead, Way, states_width
from tunesmith.core.errors import AdapterError

WEIGHTS, CONFIG, OURS = "adapter_model.safetensors", "adapter_config.json", "tunesmith.json"
OWN = "tunesmith.safetensors"
"""What was trained, where PEFT keeps only what came of it."""
_PREFIX, _OUTER = "base_model.model.", "base_model."
"""Before the keys of what stands in a model, and before those of a head beside virtual tokens, around which there is no model of PEFT's."""
_FORMAT = 1
_TASK_TYPES = {"label": "SEQ_CLS", "value": "SEQ_CLS", "tags": "TOKEN_CLS", "choice": None}  # PEFT knows no multiple choice
_ROWS = ".token_adapter.trainable_tokens_delta"


def save_adapter(adapter: Adapter, folder: Path, *, base: str, fingerprint: str, beneath: Sequence[str] = ()) -> None:
    """Write the adapter's folder (which must exist). base, fingerprint, beneath (digests of adapters under it): what it belongs to."""
    kind = exchange_for(adapter)
    tensors = adapter.stored() if kind is None else _peft_tensors(adapter, kind)
    tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    if kind is not None and kind.bare and len(adapter.stored()) > 1:
        save_file({name: value.cpu().contiguous() for name, value in adapter.stored().items()}, folder / OWN, metadata={"format": "pt"})
    if kind is not None:
        (folder / CONFIG).write_text(json.dumps(_peft_config(adapter, kind, base), indent=2, sort_keys=True) + "\n")
    words = next((rows.words.tolist() for rows in adapter.rows.values()), [])
    ours: dict[str, Any] = {
        "format": _FORMAT,
        "expression": adapter.expression,
        "base": base,
        "fingerprint": fingerprint,
        "new_words": words,
    }
    adapter.digest = ours["digest"] = _digest(folder / WEIGHTS, adapter.expression)
    if beneath:
        ours["beneath"] = list(beneath)
    if adapter.finished:
        ours["finished"] = adapter.finished
    if adapter.head is not None:
        ours["head"] = {"labels": adapter.head.labels, **asdict(adapter.head.way)}
    (folder / OURS).write_text(json.dumps(ours, indent=2) + "\n")


def load_adapter(model: nn.Module, folder: Path, *, fingerprint: str | None = None, name: str = "default") -> Adapter:
    """Attach a saved adapter: ours, or one that the `peft` library wrote, of the kinds in `exchange`.

    fingerprint: of the base it is put on; a different one than it was made for is refused. Raises AdapterError for
    files that are missing, damaged or made for another base, and then leaves the model as it was.
    """
    tensors = _read(folder / WEIGHTS)
    ours = _ours(folder, fingerprint)
    theirs: FoundHead | None = None
    head: dict[str, Any] | None = None
    if ours is not None:
        expression, words, head = ours["expression"], ours["new_words"], ours.get("head")
    else:
        config = _json(folder / CONFIG)
        theirs = _their_head(model, config, tensors, folder)
        plain = (config, tensors) if theirs is None else (theirs.config, theirs.rest)
        expression, words = _expression(*plain, folder), _token_indices(config, folder)
    finished = {} if ours is None else _finished(ours, folder)
    digest = _digest(folder / WEIGHTS, expression) if ours is None else str(ours.get("digest", ""))
    adapter = attach(model, expression, name=name, new_words=words, encode=lambda text: [0], finished=finished)  # values are read below
    try:
        if head is not None:
            _head(adapter, head, folder)
        elif theirs is not None:
            adapter.give_head(states_width(model), theirs.labels, theirs.way)
        state = tensors
        kind = exchange_for(adapter)
        if ours is not None and kind is not None and kind.bare and (folder / OWN).exists():
            state = _read(folder / OWN)
        elif kind is not None:
            state = _from_peft(adapter, kind, _without_tables(tensors, model, folder), _json(folder / CONFIG), folder)
        if ours is None:  # a table that the file leaves as it is keeps its rows
            state = {f"{path}.rows": rows.rows.detach() for path, rows in adapter.rows.items()} | state
        adapter.restore(state)
        adapter.digest = digest
    except AdapterError as cause:
        adapter.detach()
        raise AdapterError(cause.what, where=cause.where or str(folder), hints=cause.hints) from None
    return adapter


def _digest(weights: Path, expression: str) -> str:
    """Of what an adapter computes: its weights' file, and its expression, which holds scales and the like."""
    with weights.open("rb") as file:
        found = hashlib.file_digest(file, "sha256")
    found.update(expression.encode())
    return found.hexdigest()


def _finished(ours: dict[str, Any], folder: Path) -> dict[str, str]:
    """Expressions of the adapters that this one joins, by name."""
    found = ours.get("finished", {})
    if not isinstance(found, dict) or not all(isinstance(each, str) for each in (*found, *found.values())):
        raise AdapterError("the description of the adapters that it joins is damaged.", where=str(folder / OURS))
    return found


def read_finished(run: Path, fingerprint: str | None, beneath: Sequence[str]) -> tuple[str, dict[str, Tensor]]:
    """Expression and values of the adapter that a finished run left, or of an adapter's own folder, in our format.

    fingerprint, beneath: of the base that it is to be used on, and digests of the adapters on that. Raises AdapterError where there
    is none, or one that was made for another base or stood on other adapters.
    """
    folder = next((each for each in (run / "adapter", run / "train" / "adapter", run) if (each / WEIGHTS).exists()), None)
    if folder is None:
        raise AdapterError("there is no finished adapter here.", where=str(run), hints=["Train it first, to its end."])
    ours = _ours(folder, fingerprint)
    if ours is None:
        what = "there is an adapter of the peft library here, which knows no method with a bottleneck."
        raise AdapterError(what, where=str(folder), hints=["Train one here:  adapter: pfeiffer"])
    if ours.get("beneath", []) != list(beneath):
        raise AdapterError(
            "the adapter was trained above other adapters than those that are here, without which it computes something else.",
            where=str(folder),
            hints=["Begin with what its run began with:  base: runs/FIRST"],
        )
    return ours["expression"], _read(folder / WEIGHTS)


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


def _their_head(model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> FoundHead | None:
    """The head of a file of PEFT's, if it has one."""
    try:
        return find_head(model, config, {_inner(key): value for key, value in tensors.items()})
    except AdapterError as cause:
        raise AdapterError(cause.what, where=str(folder), hints=cause.hints) from None


def _head(adapter: Adapter, values: dict[str, Any], folder: Path) -> None:
    """Put on the head that `tunesmith.json` describes."""
    try:
        labels, way = [str(label) for label in values["labels"]], Way(**{key: value for key, value in values.items() if key != "labels"})
        if way.pool not in get_args(Pool) or way.says not in get_args(Says):
            raise ValueError(f"unknown pool {way.pool!r} or answer {way.says!r}")
        adapter.give_head(states_width(adapter.model), labels, way)
    except (KeyError, TypeError, ValueError) as cause:
        raise AdapterError(f"the description of the head is damaged: {cause!r}.", where=str(folder / OURS)) from None


def _peft_tensors(adapter: Adapter, kind: Exchange) -> dict[str, Tensor]:
    outer = "" if kind.bare else _PREFIX + _outer(adapter)
    out = {f"{outer}{key}": value for key, value in kind.tensors(adapter).items()}
    for path, rows in adapter.rows.items():
        out[f"{outer}{path}.token_adapter.trainable_tokens_delta"] = rows.rows.detach()
    if adapter.head is not None:
        own = dict(adapter.named_parameters())
        before = _OUTER if kind.bare else _PREFIX
        out |= {before + theirs: own[ours].detach() for theirs, ours in _head_names(adapter.head).items() if ours in own}
    return out


def _inner(key: str) -> str:
    """A key of PEFT's as of the model with its head."""
    return key.removeprefix(_PREFIX).removeprefix(_OUTER)


def _outer(adapter: Adapter) -> str:
    """What stands before our paths in those of the model with a head, where the base is a body alone: "bert."."""
    model: Any = adapter.model
    return f"{model.base_model_prefix}." if adapter.head is not None and model.base_model is model else ""


def _head_names(head: TaskHead) -> dict[str, str]:
    """Names in transformers' ...ForSequenceClassification (or ForTokenClassification, ForMultipleChoice) -> ours."""
    root = head.way.root
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


def _from_peft(adapter: Adapter, kind: Exchange, tensors: dict[str, Tensor], config: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    names = {} if adapter.head is None else _head_names(adapter.head)
    rest: dict[str, Tensor] = {}
    for key, value in tensors.items():
        path = _inner(key)
        if path in names:
            state[names[path]] = value
            continue
        path = path.removeprefix(_outer(adapter))
        if path.endswith(_ROWS):
            state[f"{path.removesuffix(_ROWS)}.rows"] = value
        else:
            rest[path] = value
    try:
        return state | kind.state(adapter, rest, config)
    except AdapterError as cause:
        raise AdapterError(cause.what, where=str(folder / WEIGHTS), hints=cause.hints) from None


def _peft_config(adapter: Adapter, kind: Exchange, base: str) -> dict[str, Any]:
    outer = _outer(adapter)
    config: dict[str, Any] = {
        "peft_type": kind.peft_type,
        "base_model_name_or_path": base,
        "task_type": "CAUSAL_LM" if adapter.head is None else _TASK_TYPES[adapter.head.way.says],
        "inference_mode": True,
        **kind.config(adapter, outer),
    }
    if not kind.bare:
        config |= {"fan_in_fan_out": fan_in_fan_out(adapter), "target_modules": [f"{outer}{path}" for path in adapter.forms]}
    if adapter.head is not None:
        config["modules_to_save"] = [adapter.head.way.root]
    if adapter.rows:
        config["trainable_token_indices"] = {path.rsplit(".", 1)[-1]: rows.words.tolist() for path, rows in adapter.rows.items()}
    return config


def _expression(config: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> str:
    """The adapter expression of what PEFT wrote, with its sites by path."""
    kind = EXCHANGES.get(str(config.get("peft_type")))
    if kind is None:
        what = f"peft_type {config.get('peft_type')!r} cannot be read."
        raise AdapterError(what, where=str(folder / CONFIG), hints=[f"Readable here:  {', '.join(EXCHANGES)}"])
    try:
        return kind.expression(config, {_inner(key): value for key, value in tensors.items()})
    except AdapterError as cause:
        raise AdapterError(cause.what, where=str(folder / CONFIG), hints=cause.hints) from None


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
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as cause:
        what = f"is damaged or no safetensors file: {cause}."
        raise AdapterError(what, where=str(path), hints=["Copy or train the adapter again."]) from None
    for key, value in tensors.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise AdapterError(f"'{key}' holds values that are no numbers.", where=str(path), hints=["Train the adapter again."])
    return tensors
