"""How PEFT writes virtual tokens: one tensor `prompt_embeddings`, without the network that made it in training.

[count, width] for prompts. For prefixes [count, layers * 2 * width of a key]: keys of the first layer, its values, and so on,
as the attention meets them. What resuming needs besides is kept in a file of our own beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import Tensor

from tunesmith.adapters.attach import Adapter
from tunesmith.adapters.prefixes import Prefix
from tunesmith.adapters.prompts import EncodedPrompt, Prompt
from tunesmith.adapters.virtual import VirtualTokens
from tunesmith.core.errors import AdapterError

KEY = "prompt_embeddings"


def tokens_alone(adapter: Adapter) -> VirtualTokens | None:
    """The virtual tokens of an adapter that has nothing else, if PEFT's function is theirs.

    Beside a prefix there may be a task head. Not beside a prompt: PEFT's head takes its vectors for the text's first tokens.
    """
    if len(adapter.virtual) != 1 or adapter.forms or adapter.trained or adapter.rows:
        return None
    tokens = next(iter(adapter.virtual.values()))
    if adapter.head is not None and not isinstance(tokens, Prefix):
        return None
    alone = sum(plan.kind != "head" for plan in adapter.plans) == 1
    return tokens if alone and tokens.saved() is not None else None


def fits(kind: type[VirtualTokens]) -> Callable[[Adapter], bool]:
    """Whether an adapter is of this kind and nothing else."""
    return lambda adapter: type(tokens_alone(adapter)) is kind


def tensors(adapter: Adapter) -> dict[str, Tensor]:
    """What PEFT keeps."""
    tokens = tokens_alone(adapter)
    saved = None if tokens is None else tokens.saved()
    assert saved is not None
    return {KEY: saved}


def config(adapter: Adapter, outer: str) -> dict[str, Any]:
    """What PEFT's configuration says of it."""
    tokens, model = tokens_alone(adapter), cast(Any, adapter.model)
    text = model.config.get_text_config()
    assert tokens is not None
    out = {
        "num_virtual_tokens": tokens.count,
        "num_transformer_submodules": 1,
        "num_layers": text.num_hidden_layers,
        "num_attention_heads": getattr(text, "num_attention_heads", None),
    }
    if isinstance(tokens, Prefix):
        sites = tokens.sites
        heads = {"num_layers": sites.layers, "num_attention_heads": sites.heads, "token_dim": sites.heads * sites.dim}
        return out | heads | {"prefix_projection": False}  # the tensor is what a projection has made
    width = int(tokens.vectors().shape[1])
    if isinstance(tokens, EncodedPrompt):
        kind = "MLP" if tokens.lstm is None else "LSTM"
        return out | {"token_dim": width, "encoder_reparameterization_type": kind, "encoder_hidden_size": tokens.hidden}
    return out | {"token_dim": width, "prompt_tuning_init": "RANDOM"}


def state(adapter: Adapter, found: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Our values from a file's. Raises AdapterError where there is more than those, or a network would be needed."""
    if list(found) != [KEY]:
        odd = next((key for key in found if key != KEY), None)
        raise AdapterError(f"the tensor '{odd}' belongs to no method that can be read here." if odd else f"there is no '{KEY}' inside.")
    name, tokens = next(iter(adapter.virtual.items()))
    if len(list(tokens.parameters())) > 1:
        raise AdapterError("it holds the vectors, and not the network that made them.", hints=["Copy the adapter's whole folder again."])
    return {f"ts_virtual.{name}.table": found[KEY]}


def expression(config: Mapping[str, Any], found: Mapping[str, Tensor]) -> str:
    """The adapter expression of what PEFT wrote."""
    given, count = found.get(KEY), config.get("num_virtual_tokens")
    if given is None or given.ndim != 2 or type(count) is not int or given.shape[0] != count:
        raise AdapterError(f"'{KEY}' of {count!r} tokens is needed.")
    if config.get("num_transformer_submodules") not in (None, 1):
        raise AdapterError("virtual tokens of an encoder and a decoder together cannot be read.")
    if config.get("peft_type") == "PREFIX_TUNING":
        return f"prefix(tokens={count}, hidden=none)"
    return f"prompt(tokens={count}, init=normal)"


KINDS: dict[str, type[VirtualTokens]] = {"PROMPT_TUNING": Prompt, "P_TUNING": EncodedPrompt, "PREFIX_TUNING": Prefix}
"""What PEFT calls them."""
