"""GGUF files: checked, then converted once into a safetensors folder in the cache that loads in a moment.

transformers de-quantises a GGUF file at every load and marks the result as quantised, so that it cannot be saved. Here
the values are moved into a model built from the same configuration without that mark and saved in fp32, which holds every
de-quantised value exactly.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from tunesmith.bases.fingerprint import remembered_sha256
from tunesmith.bases.quiet import bars_only_on_terminals, quiet
from tunesmith.core.errors import BaseError
from tunesmith.core.packages import cache_dir

CONVERSION = 1
"""Raised when the conversion changes, so that folders made by an older one are not taken."""

_MAGIC = b"GGUF"
_DIGIT_BY_DIGIT = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
"""Pre-tokenizers of llama.cpp that split every digit off before GPT-2's pattern; transformers knows only the pattern."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a GGUF file says of itself. pre: how text is split before merging, "" if unsaid."""

    architecture: str
    pre: str


def convert(file: Path) -> Path:
    """The folder that holds a GGUF file's model and tokenizer as transformers saves them; made at the first call.

    Raises BaseError where the file is no GGUF, is cut short, or is of an architecture that transformers cannot read.
    """
    check_magic(file)
    target = converted(file)
    if target.is_dir():
        return target
    header = read_header(file)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _convert_locked(file, header, target)
    except OSError as cause:
        hints = ["Free some space, or choose another place:  export TUNESMITH_CACHE=FOLDER"]
        raise BaseError(
            f"the converted model cannot be written: {cause.strerror or cause}.", where=str(target.parent), hints=hints
        ) from None
    return target


def _convert_locked(file: Path, header: Header, target: Path) -> None:
    """Convert beside and rename, so that a kill at any moment leaves nothing that looks converted."""
    with FileLock(str(target.parent / f".{target.name}.lock")):
        if target.is_dir():
            return  # another process was faster
        for left_over in target.parent.glob(f".{target.name}~*"):  # by a process that was killed: nobody else holds the lock
            shutil.rmtree(left_over, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}~"))
        try:
            _convert_into(file, header, scratch)
            scratch.chmod(0o755)
            os.replace(scratch, target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def converted(file: Path) -> Path:
    """Where the conversion of a GGUF file with this content lies, or will."""
    return cache_dir() / "bases" / f"gguf-{remembered_sha256(file)[:24]}-{CONVERSION}"


def notes(folder: Path) -> list[str]:
    """What the conversion decided, for a folder made by `convert`; empty for any other."""
    with contextlib.suppress(OSError, ValueError):
        return [str(note) for note in json.loads((folder / "gguf.json").read_text("utf-8"))["notes"]]
    return []


def check_magic(file: Path) -> None:
    """Refuse a file that does not begin as GGUF files do."""
    try:
        with file.open("rb") as stream:
            start = stream.read(4)
    except OSError as cause:
        raise BaseError(f"the file cannot be read: {cause.strerror}.", where=str(file)) from None
    if start != _MAGIC:
        raise BaseError(f"this is no GGUF file: it begins with {start!r} instead of {_MAGIC!r}.", where=str(file), hints=[_AGAIN])


_AGAIN = "Download it again, and compare its size or sha256 with the publisher's."


def read_header(file: Path) -> Header:
    """Read the metadata and see that every tensor's data lies within the file."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise BaseError("reading GGUF files needs the package gguf.", where=str(file), hints=["Install it:  pip install gguf"]) from None
    size = file.stat().st_size
    try:
        reader = GGUFReader(file)
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError, MemoryError) as cause:
        raise BaseError(
            f"the GGUF file is cut short or damaged ({size:,} bytes are there): {cause}.", where=str(file), hints=[_AGAIN]
        ) from None
    end = max((int(tensor.data_offset) + int(tensor.n_bytes) for tensor in reader.tensors), default=0)
    if end == 0:
        raise BaseError("the GGUF file holds no tensors (a vocabulary only?).", where=str(file))
    if end > size:
        raise BaseError(
            f"the GGUF file is cut short: its tensors need {end:,} bytes and {size:,} are there.", where=str(file), hints=[_AGAIN]
        )
    return Header(_text(reader, "general.architecture"), _text(reader, "tokenizer.ggml.pre"))


def _text(reader: Any, key: str) -> str:
    field = reader.get_field(key)
    return str(field.contents()) if field is not None else ""


def _convert_into(file: Path, header: Header, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet(), bars_only_on_terminals():
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
            loader: Any = AutoModelForCausalLM
            model, info = loader.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32, output_loading_info=True)
        except (ValueError, KeyError, TypeError, NotImplementedError, RuntimeError, ImportError) as cause:
            raise _unreadable(file, header, cause) from None
        if info["missing_keys"]:
            some = ", ".join(sorted(info["missing_keys"])[:3])
            raise BaseError(
                f"the GGUF file lacks {len(info['missing_keys'])} tensors of its architecture '{header.architecture}' ({some}).",
                where=str(file),
            )
        said = _mend_tokenizer(tokenizer, header)
        _save_plain(model, folder)
        tokenizer.save_pretrained(folder)
    (folder / "gguf.json").write_text(json.dumps({"file": file.name, "conversion": CONVERSION, "notes": said}, indent=1), "utf-8")


def _save_plain(model: Any, folder: Path) -> None:
    """Save the de-quantised values under a configuration that does not call them quantised."""
    import torch
    from transformers import AutoModelForCausalLM

    settings = model.config.to_dict()
    settings.pop("quantization_config", None)
    settings.pop("_name_or_path", None)
    config = type(model.config).from_dict(settings)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict(), strict=True, assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    plain.save_pretrained(folder)


def _mend_tokenizer(tokenizer: Any, header: Header) -> list[str]:
    """Split text as the file says where transformers does not know how (it would fall back to GPT-2's pattern)."""
    from tokenizers import pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    backend = tokenizer.backend_tokenizer
    plain = isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel)
    if not plain or header.pre in ("", "default", "gpt-2") or header.pre in GGUF_PRE_TOKENIZER_SPLITS:
        return []
    if header.pre in _DIGIT_BY_DIGIT:
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer])
        return []
    return [
        f"tokenizer: the file names the text splitting '{header.pre}', which is not known here; GPT-2's is used, so token ids may differ"
    ]


def _unreadable(file: Path, header: Header, cause: Exception) -> BaseError:
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    first = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
    what = f"transformers cannot read this GGUF file of architecture '{header.architecture}': {first}"
    hints = ["Take the model's safetensors folder or hub id instead."]
    if header.architecture not in GGUF_SUPPORTED_ARCHITECTURES:
        hints.append(f"GGUF architectures that work: {', '.join(sorted(GGUF_SUPPORTED_ARCHITECTURES))}")
    return BaseError(what, where=str(file), hints=hints)


def short_name(file: Path) -> str:
    """`SmolLM2-135M-Instruct.Q4_1.gguf` without its ending and quantisation."""
    return re.sub(r"[.-](I?Q\d\w*|BF16|F16|F32|FP16|FP32)$", "", file.stem, flags=re.IGNORECASE)
