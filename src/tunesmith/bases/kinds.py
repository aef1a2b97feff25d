"""Which kind of model a configuration describes: a decoder, an encoder, or something that cannot be adapted here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunesmith.bases.base import Kind
from tunesmith.core.errors import BaseError, nearest

KINDS = ("auto", "decoder", "encoder")


def read_config(folder: Path, where: str, *, remote_code: bool) -> Any:
    """The configuration of a model folder. Raises BaseError for broken JSON, an unknown model_type, code not allowed."""
    import json

    from transformers import CONFIG_MAPPING, AutoConfig

    try:
        raw = json.loads((folder / "config.json").read_text("utf-8"))
    except ValueError as cause:
        raise BaseError(f"config.json cannot be read: {cause}.", where=where) from None
    model_type = raw.get("model_type") if isinstance(raw, dict) else None
    if not model_type:
        raise BaseError("config.json names no model_type, so the architecture is unknown.", where=where)
    if "auto_map" in raw and model_type not in CONFIG_MAPPING and not remote_code:
        raise BaseError(
            f"the architecture '{model_type}' comes as code with the model, and that is not run unless you ask for it.",
            where=where,
            hints=["If you trust its authors:  trust_remote_code=true"],
        )
    if model_type not in CONFIG_MAPPING and "auto_map" not in raw:
        close = nearest(str(model_type), CONFIG_MAPPING)
        hints = [f"Did you mean:  {'  ·  '.join(close)}"] if close else ["A newer transformers may know it:  pip install -U transformers"]
        raise BaseError(f"transformers does not know the model_type '{model_type}'.", where=where, hints=hints)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=remote_code, local_files_only=True)
    except Exception as cause:  # configurations check themselves in many ways
        raise BaseError(f"config.json is not a valid '{model_type}' configuration: {first_line(cause)}", where=where) from None


def decide_kind(config: Any, asked: str, where: str) -> Kind:
    """ "decoder" or "encoder". Raises BaseError for what is neither, or not what was asked for."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if asked not in KINDS:
        raise BaseError(f"kind '{asked}' is not known.", where=where, hints=[f"Known: {', '.join(KINDS)}"])
    if getattr(config, "is_encoder_decoder", False):
        raise BaseError(
            f"'{config.model_type}' is an encoder-decoder, and only decoders and encoders can be trained and asked.",
            where=where,
            hints=[
                "Nearest that works here:  a decoder (Llama, Qwen, Gemma, SmolLM)  ·  an encoder (BERT, RoBERTa, ModernBERT)",
                "In a training loop of your own:  tunesmith.adapters.attach(model, 'lora')  on the model as transformers loads it",
            ],
        )
    found = _kind(config, config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES)
    if found is None:
        raise BaseError(f"'{config.model_type}' is neither a causal language model nor a masked one.", where=where)
    if asked not in ("auto", found):
        raise BaseError(f"this model is a {found}, not a {asked}.", where=where, hints=[f"Leave kind away, or set kind={found}."])
    return found


def _kind(config: Any, causal: bool, masked: bool) -> Kind | None:
    """Families of both tables (BERT) are told apart by the checkpoint: is_decoder, or a causal class among its architectures."""
    code = getattr(config, "auto_map", None) or {}
    if causal and masked:
        names = " ".join(getattr(config, "architectures", None) or [])
        return "decoder" if getattr(config, "is_decoder", False) or "CausalLM" in names or "LMHead" in names else "encoder"
    if causal or "AutoModelForCausalLM" in code:
        return "decoder"
    return "encoder" if masked or "AutoModelForMaskedLM" in code else None


def first_line(cause: BaseException) -> str:
    """The first line of an exception's text, or its type's name."""
    text = str(cause).strip()
    return text.splitlines()[0] if text else type(cause).__name__
