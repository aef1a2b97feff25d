"""Task heads in files of the `peft` library: the ones of transformers' ...ForSequenceClassification and ...ForTokenClassification.

PEFT keeps the weights of such a head under its module's name and says nothing of what it reads or how. That is found by trying:
a small model of the class is made with the head in it, and our head has to say the same from its hidden states.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from tunesmith.adapters.heads import Pool, Says, TaskHead, Way, states_width
from tunesmith.core.errors import AdapterError

_CLASSES = {"SEQ_CLS": "AutoModelForSequenceClassification", "TOKEN_CLS": "AutoModelForTokenClassification"}
_ROOTS = ("classifier", "score")
"""What families call their heads; PEFT saves both by default, whichever there is."""
_PARTS = {"weight": "out.weight", "bias": "out.bias"}
_DEEPER = {f"{theirs}.{kind}": f"{ours}.{kind}" for theirs, ours in {"dense": "hidden", "out_proj": "out"}.items() for kind in _PARTS}
_PATTERNS = ("rank_pattern", "alpha_pattern")
_TOKENS = 7
_CLOSE = 1e-4


@dataclass(frozen=True, slots=True)
class FoundHead:
    """A head of a file. rest: the file's other tensors, by key as of the base. config: what is left to read of its configuration."""

    labels: tuple[str, ...]
    way: Way
    rest: dict[str, Tensor]
    config: dict[str, Any]


def find_head(model: Any, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> FoundHead | None:
    """The head that a file of PEFT's holds; None for a file without one. tensors: by key, without PEFT's prefix.

    Raises AdapterError for a head that is not of a shape that heads have here, or reads what this base does not have.
    """
    task = config.get("task_type")
    if task not in _CLASSES:
        return None
    saved = [name for name in dict.fromkeys(config.get("modules_to_save") or _ROOTS) if any(key.startswith(f"{name}.") for key in tensors)]
    if not saved:
        raise AdapterError(
            f"there is no head among its tensors, though it is made for {task}.", hints=["Save the adapter again with peft."]
        )
    if len(saved) > 1 or saved[0] not in _ROOTS:
        raise AdapterError(
            f"beside the adapter it trains {' and '.join(saved)} of a {task} model, which is no head of a shape that can be read.",
            hints=["Readable here:  a linear map, or a dense layer with tanh and a linear map, named classifier or score"],
        )
    (root,) = saved
    own = {key.removeprefix(f"{root}."): value for key, value in tensors.items() if key.startswith(f"{root}.")}
    parts = _DEEPER if any(key.startswith("dense.") for key in own) else _PARTS
    if not own.keys() <= parts.keys() or "out.weight" not in (state := {parts[key]: value.float() for key, value in own.items()}):
        raise AdapterError(f"its head '{root}' holds {', '.join(sorted(own))}, which is no shape that heads have here.")
    outputs, width = state["out.weight"].shape[0], states_width(model)
    inputs = state["hidden.weight"].shape[1] if "hidden.weight" in state else state["out.weight"].shape[1]
    if inputs != width:
        raise AdapterError(f"its head reads states of {inputs} values, and those of this base have {width}.", hints=["Is it of this base?"])
    way = _way(model, str(task), root, own, state)
    rest = {_inside(model, key): value for key, value in tensors.items() if not key.startswith(f"{root}.")}
    inner = {name: {_inside(model, path): value for path, value in (config.get(name) or {}).items()} for name in _PATTERNS}
    return FoundHead(_labels(model, outputs, way.says), way, rest, {**config, **inner, "modules_to_save": None})


def _labels(model: Any, outputs: int, says: Says) -> tuple[str, ...]:
    """What PEFT's files do not say: the base's own names for as many outputs, or numbers."""
    if says == "value":
        return ("value",)
    named = getattr(model.config, "id2label", None) or {}
    names = tuple(str(named.get(n, n)) for n in range(outputs))
    own = len(named) == outputs and len(set(names)) == outputs and not all(name.startswith("LABEL_") for name in names)
    return names if own else tuple(map(str, range(outputs)))


def _inside(model: Any, key: str) -> str:
    """A key as of the base: one that is a body alone has no name for itself."""
    return key.removeprefix(f"{model.base_model_prefix}.") if model.base_model is model else key


def _way(model: Any, task: str, root: str, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Way:
    """How the head reads, found by trying."""
    hidden = state["hidden.weight"].shape[0] if "hidden.weight" in state else 0
    outputs, bias = state["out.weight"].shape[0], "out.bias" in state
    says: Says = "tags" if task == "TOKEN_CLS" else "value" if outputs == 1 else "label"
    plain = Way("last", hidden, bias=bias, says=says)
    head = TaskHead(states_width(model), [str(n) for n in range(outputs)], plain)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            head.load_state_dict(state)
            states, pooled, wanted = _tried(model, task, root, own, outputs)
    except Exception as cause:  # a class that cannot be made small, or has other parts than these
        first = (str(cause).splitlines() or [type(cause).__name__])[0][:120]
        raise AdapterError(f"its head cannot be tried on {type(model).__name__}'s {task} model: {first}.", hints=[_READABLE]) from None
    reads: dict[Pool, Tensor | None] = {"last": states[:, -1], "first": states[:, 0], "pooler": pooled, "mean": states.mean(1)}
    if says == "tags":
        reads = {"last": states}
    with torch.no_grad():
        for pool in (pool for pool in get_args(Pool) if reads.get(pool) is not None):
            said = head(reads[pool])
            if said.shape == wanted.shape and bool((said - wanted).abs().max() <= _CLOSE * max(1.0, float(wanted.abs().max()))):
                if pool == "pooler" and getattr(model.base_model, "pooler", None) is None:
                    raise AdapterError(
                        "its head reads the base's pooler, without which this base was loaded.", hints=["Load the encoder with its pooler."]
                    )
                theirs = "" if root == Way(pool, bias=bias).root else root
                return Way(pool, hidden, bias=bias, says=says, theirs=theirs)
    raise AdapterError(f"its head '{root}' computes something else from the states of {type(model).__name__}.", hints=[_READABLE])


_READABLE = "Readable here:  heads as of BERT, RoBERTa (with tanh) and decoders, which read one state or the base's own pooler"


def _tried(model: Any, task: str, root: str, own: Mapping[str, Tensor], outputs: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """Of a model of one layer with this head on a short text: its last states, what its pooler makes of them, and what it says."""
    import transformers

    config = copy.deepcopy(model.config.get_text_config())
    config.num_hidden_layers = 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    config.vocab_size, config.num_labels, config.pad_token_id = 32, outputs, 0
    made: Any = getattr(transformers, _CLASSES[task]).from_config(config).float().eval()
    made.get_submodule(root).load_state_dict({key: value.float() for key, value in own.items()})
    for parameter in made.parameters():  # biases and scales that a model begins without would hide what it does
        if parameter.ndim == 1:
            parameter.detach().add_(0.1 * torch.randn_like(parameter))
    made.get_submodule(root).load_state_dict({key: value.float() for key, value in own.items()})
    heard: list[Tensor] = []
    hook = made.base_model.register_forward_hook(lambda module, args, out: heard.append(out[0]))
    ids = torch.randint(3, 32, (2, _TOKENS))
    with torch.no_grad():
        wanted: Tensor = made(input_ids=ids).logits
        hook.remove()
        pooler: nn.Module | None = getattr(made.base_model, "pooler", None)
        pooled = None if pooler is None else pooler(heard[0])
    return heard[0], pooled, wanted
