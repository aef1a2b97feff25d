"""Prefixes: learned keys and values at every layer, before those of the text. Prefix Tuning and P-Tuning v2.

They are those of virtual tokens, which stand at the start of every text and whose own states nobody reads. As in the `peft`
library a learned key is what the attention meets, after the norm and the rotation that a model gives to keys, and the text
takes the positions behind the prefix. Neither method is the identity at the start.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from tunesmith.adapters.keys import KeyValueSites, key_value_sites
from tunesmith.adapters.methods import Plan, method
from tunesmith.adapters.virtual import Encode, VirtualTokens
from tunesmith.core.errors import AdapterError


class Prefix(VirtualTokens):
    """Keys and values of `count` tokens, fp32 [count, layers, 2, heads, dim], keys first.

    Without `hidden` they are the parameter `table` [count, all of them]; with it P = W2 tanh(W1 E), where E is `table` [count,
    width of a key]. Trained so, a prefix is less sensitive to its start and to the learning rate.
    """

    fixed = True

    def __init__(self, count: int, width: int, sites: KeyValueSites, hidden: int) -> None:
        super().__init__(count)
        self.__dict__["sites"] = sites
        self.__dict__["forms"] = sites.forms
        self.width = width  # of the embedding
        key = sites.heads * sites.dim
        every = sites.layers * 2 * key
        self.table = nn.Parameter(torch.randn(count, key if hidden else every))
        self.mlp = nn.Sequential(nn.Linear(key, hidden), nn.Tanh(), nn.Linear(hidden, every)) if hidden else None
        for number, turn in enumerate(sites.turns or ()):
            self.register_buffer(f"back{number}", turn.back, persistent=False)

    sites: KeyValueSites

    def vectors(self) -> Tensor:
        """Zeros: no state of these tokens is read."""
        return self.table.new_zeros(self.count, self.width)

    def flat(self) -> Tensor:
        """All keys and values as the attention meets them, [count, layers * 2 * heads * dim]."""
        return self.table if self.mlp is None else cast(Tensor, self.mlp(self.table))

    def layers(self) -> Sequence[Tensor]:
        """As they leave their sites."""
        sites = self.sites
        both = self.flat().view(self.count, sites.layers, 2, sites.heads, sites.dim)
        keys, values = both[:, :, 0], both[:, :, 1].flatten(2).unbind(1)
        of_layer = list(keys.flatten(2).unbind(1))
        for number, turn in enumerate(sites.turns or ()):
            back = getattr(self, f"back{number}")
            turned = torch.einsum("nlhd,ned->nlhe", keys[:, turn.layers], back).flatten(2).unbind(1)
            for layer, key in zip(turn.layers, turned, strict=True):
                of_layer[layer] = key
        parts = (of_layer, values)
        return [torch.cat([of_layer[n], values[n]], -1) if part is None else parts[part][n] for n, part in sites.order]

    def saved(self) -> Tensor | None:
        """None where keys could not be seen at the attention, so that what is learned is not what PEFT keeps."""
        return None if self.sites.turns is None else self.flat().detach()


def _plan(name: str, tokens: int, hidden: int | None) -> Plan:
    if type(tokens) is not int or tokens < 1:
        raise AdapterError(f"{name}: tokens must be a whole number of at least 1, not {tokens!r}.")
    if hidden is not None and (type(hidden) is not int or hidden < 1):
        raise AdapterError(f"{name}: hidden must be a whole number of at least 1, or none, not {hidden!r}.")

    def make(model: Any, encode: Encode | None) -> VirtualTokens:
        width = int(model.get_input_embeddings().weight.shape[1])
        return Prefix(tokens, width, key_value_sites(model, tokens, name), hidden or 0)

    return Plan(name, "virtual", tokens=tokens, make_tokens=make, lr=2e-4 if hidden else 5e-3)


@method("prefix")
def prefix(*, tokens: int = 30, hidden: int | None = 512) -> Plan:
    """Prefix Tuning: n learned keys and values stand before the text's at every layer.

    attention(q, [P_k; K], [P_v; V]) with P = MLP(E) = W2 tanh(W1 E). Li and Liang 2021 · 2101.00190; n = 30 and hidden = 512
    as in He et al. 2022 · 2110.04366. hidden: width of the MLP, none to train P itself; the MLP costs about hidden x 2 x layers
    x width of a key more values in training, and nothing in use, where P alone is needed.
    When to use it: to steer generation with few values.
    Costs n more keys at every layer, and positions: the text starts at n; layers with a sliding window
    see it as far as that reaches. Refused where layers share
    weights or words reach later ones otherwise than by keys and values. Not the identity at the start.
    """
    return _plan("prefix", tokens, hidden)


@method("ptuning_v2")
def ptuning_v2(*, tokens: int = 20, hidden: int | None = None) -> Plan:
    """P-Tuning v2: Prefix Tuning without the MLP, meant for understanding: a prefix and a task head.

    attention(q, [P_k; K], [P_v; V]), P trained itself. Liu et al. 2022 · 2110.07602, whose best lengths lie between 5 (simple
    classification) and 100 (labelling sequences). hidden: an MLP as in prefix, for tasks where it helps. It wants learning
    rates of about 5e-3. Costs as prefix does. When to use it: to read texts, with a task head.
    Not the identity at the start.
    """
    return _plan("ptuning_v2", tokens, hidden)
