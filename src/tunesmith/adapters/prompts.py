"""Prompts that are learned: vectors in place of words, trained alone. Prompt Tuning and P-Tuning.

Neither is the identity at the start: a text behind other tokens is another text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from tunesmith.adapters.methods import Plan, method
from tunesmith.adapters.virtual import Encode, Place, VirtualTokens, vocabulary_of
from tunesmith.core.errors import AdapterError, unknown

Init = Literal["vocabulary", "normal", "text"]
Encoder = Literal["mlp", "lstm"]


class Prompt(VirtualTokens):
    """One trained vector a token. table [count, width], fp32."""

    def __init__(self, table: Tensor, places: Sequence[Place] = (0,)) -> None:
        super().__init__(table.shape[0], places)
        self.table = nn.Parameter(table.detach().float().clone())

    def vectors(self) -> Tensor:
        return self.table

    def saved(self) -> Tensor | None:
        return self.vectors().detach() if self.places == (0,) else None


class EncodedPrompt(VirtualTokens):
    """Vectors that a small network makes of trained ones, fp32: a two-layer bidirectional LSTM and an MLP, or an MLP alone.

    h = table [count, width]; mlp: W3 relu(W2 relu(W1 h)); lstm: V2 relu(V1 [forward; backward]).
    """

    def __init__(self, count: int, width: int, hidden: int, encoder: Encoder, dropout: float, places: Sequence[Place] = (0,)) -> None:
        super().__init__(count, places)
        self.hidden = hidden
        self.table = nn.Parameter(torch.randn(count, width))
        self.lstm: nn.LSTM | None = None
        if encoder == "lstm":
            self.lstm = nn.LSTM(width, hidden, num_layers=2, dropout=dropout, bidirectional=True, batch_first=True)
            self.mlp = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, width))
        else:
            linears = nn.Linear(width, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, width)
            self.mlp = nn.Sequential(linears[0], nn.ReLU(), linears[1], nn.ReLU(), linears[2])

    def vectors(self) -> Tensor:
        """[count, width]."""
        inner = self.table if self.lstm is None else self.lstm(self.table[None])[0][0]
        return cast(Tensor, self.mlp(inner))

    def saved(self) -> Tensor | None:
        return self.vectors().detach() if self.places == (0,) else None


@method("prompt")
def prompt(*, tokens: int = 20, init: str = "vocabulary", text: str = "", places: Sequence[Place] = (0,)) -> Plan:
    """Prompt Tuning: n trained vectors stand before every text, and nothing else is trained.

    x = [p_1 .. p_n; E(text)]. Lester, Al-Rfou and Constant 2021 · 2104.08691. init: "vocabulary" begins with the vectors of
    n words drawn at random (what the paper found better than random numbers), "normal" with numbers of deviation 1 (PEFT's
    default), "text" with the words of `text`, repeated or cut to n. places: where they stand, split evenly: 0 is the start, a
    number p after p tokens of the text, "end" right before the answer (or before the token that a task head reads).
    Trains n x width values, the fewest of all methods, and catches up with others on large models only; it wants learning
    rates of 1e-2 to 3e-1. Costs n more tokens: once a pack or a generation on decoders, before each text on encoders.
    When to use it: many tasks on one large model. Not the identity at the start.
    """
    _check("prompt", tokens, places)
    if init not in get_args(Init):
        raise unknown("init", init, get_args(Init), error=AdapterError)
    if (init == "text") != bool(text):
        raise AdapterError('prompt: init=text and text="..." go together.', hints=['For example:  prompt(init=text, text="Sentiment:")'])

    def make(model: Any, encode: Encode | None) -> VirtualTokens:
        return Prompt(_start(model, tokens, cast(Init, init), text, encode), places)

    return Plan("prompt", "virtual", tokens=tokens, make_tokens=make, lr=1e-2)


@method("ptuning")
def ptuning(*, tokens: int = 20, encoder: str = "mlp", hidden: int = 128, dropout: float = 0.0, places: Sequence[Place] = (0,)) -> Plan:
    """P-Tuning: like Prompt Tuning, with the vectors made by a small network of trained ones, which eases their training.

    p = MLP(h), or MLP(biLSTM(h)). Liu et al. 2021 · 2103.10385; sizes as in PEFT. encoder: "mlp" or "lstm" (the paper's).
    hidden: width within. places: as of prompt, since the paper puts its tokens anywhere in a template:  places=[0, end].
    The network costs about 4 hidden x width more values in training and nothing in use.
    When to use it: where prompt does not train well. Not the identity at the start.
    """
    _check("ptuning", tokens, places)
    if encoder not in get_args(Encoder):
        raise unknown("encoder", encoder, get_args(Encoder), error=AdapterError)
    if type(hidden) is not int or hidden < 1:
        raise AdapterError(f"ptuning: hidden must be a whole number of at least 1, not {hidden!r}.")
    if not 0 <= dropout < 1 or (dropout and encoder != "lstm"):
        raise AdapterError(f"ptuning: dropout lies in [0, 1), between the layers of encoder=lstm; not {dropout} with {encoder}.")

    def make(model: Any, encode: Encode | None) -> VirtualTokens:
        width = int(model.get_input_embeddings().weight.shape[1])
        return EncodedPrompt(tokens, width, hidden, cast(Encoder, encoder), dropout, places)

    return Plan("ptuning", "virtual", tokens=tokens, make_tokens=make, lr=1e-3)


def _check(name: str, tokens: int, places: Sequence[Place]) -> None:
    if type(tokens) is not int or tokens < 1:
        raise AdapterError(f"{name}: tokens must be a whole number of at least 1, not {tokens!r}.")
    right = isinstance(places, list | tuple) and places and all(p == "end" or (type(p) is int and p >= 0) for p in places)
    if not right or len(set(places)) < len(places):
        raise AdapterError(f"{name}: places is a list of different numbers from 0, and end; not {places!r}.", hints=["places=[0, end]"])
    if tokens % len(places):
        many = len(places)
        raise AdapterError(
            f"{name}: {tokens} tokens cannot be split evenly over {many} places.", hints=[f"tokens={tokens + many - tokens % many}"]
        )


@torch.no_grad()
def _start(model: Any, tokens: int, init: Init, text: str, encode: Encode | None) -> Tensor:
    """The vectors to begin with, [tokens, width]: numbers, or what the embedding says of words."""
    embedding = model.get_input_embeddings()
    if init == "normal":
        return torch.randn(tokens, embedding.weight.shape[1])
    if init == "vocabulary":
        words = torch.randint(0, vocabulary_of(model), (tokens,))
    else:
        if encode is None:
            raise AdapterError("prompt: init=text needs a tokenizer.", hints=["Attach through the engine, which has the base's."])
        ids = list(encode(text))
        if not ids:
            raise AdapterError(f"prompt: the text {text!r} has no tokens.")
        words = torch.tensor((ids * math.ceil(tokens / len(ids)))[:tokens])
    found: Tensor = embedding(words.to(embedding.weight.device))
    return found
