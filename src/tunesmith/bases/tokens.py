"""A base's tokenizer: loading it, replacing its chat template, adding tokens to it and rows to the embeddings."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.bases.kinds import first_line
from tunesmith.core.errors import BaseError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logging.getLogger(__name__)

_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "*.tiktoken",
    "tekken.json",
)


def load_tokenizer(folder: Path, where: str, *, remote_code: bool) -> Any:
    """The tokenizer of a model folder. Raises BaseError where its files are absent or unreadable.

    A tokenizer without a padding token pads with its end token: padding is always masked, so any id would do.
    """
    from transformers import AutoTokenizer

    if not any(next(folder.glob(pattern), None) for pattern in _VOCABULARIES):
        hints = ["Copy the tokenizer's files (tokenizer.json, tokenizer_config.json) of the original model into the folder."]
        raise BaseError("the folder has weights but no tokenizer.", where=where, hints=hints)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=remote_code, local_files_only=True)
    except Exception as cause:  # tokenizer files break in many ways, and the libraries raise plain Exceptions
        raise BaseError(f"the tokenizer cannot be loaded: {first_line(cause)}", where=where) from None
    if len(tokenizer) == 0:
        raise BaseError("the tokenizer's vocabulary is empty.", where=where)
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def read_template(template: str | Path) -> str:
    """A chat template's text, from the text itself (it holds Jinja marks) or from a file. BaseError where it cannot be read."""
    text = str(template)
    if isinstance(template, str) and ("{%" in text or "{{" in text):
        where, source = "chat template", text
    else:
        where = text
        path = Path(text).expanduser()
        try:
            source = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as cause:
            siblings = [item.name for item in path.parent.glob("*")] if path.parent.is_dir() else []
            close = [str(path.parent / name) for name in nearest(path.name, siblings)]
            hints = [f"Nearest:  {'  ·  '.join(close)}"] if close else ["Give a file with a Jinja template, or its text."]
            reason = cause.strerror if isinstance(cause, OSError) else "it is not UTF-8 text"
            raise BaseError(f"the chat template cannot be read: {reason}.", where=where, hints=hints) from None
    _check_template(source, where)
    return source


def _check_template(source: str, where: str) -> None:
    """Refuse a template that is not valid Jinja. What it does with messages is seen when they are rendered."""
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        render_jinja_template([[{"role": "user", "content": "x"}]], chat_template=source)
    except jinja2.exceptions.TemplateSyntaxError as cause:
        raise BaseError(f"the chat template is not valid Jinja: {cause.message}.", where=f"{where}, line {cause.lineno}") from None
    except Exception as cause:  # it compiled, and refuses this one message, as templates may
        _log.debug("the chat template refuses a lone user message: %s", cause)


def add_tokens(model: PreTrainedModel, tokenizer: Any, tokens: Sequence[str]) -> list[int]:
    """Add special tokens, give each an embedding row, and return the ids of those that were not known before.

    A new row is the mean of the rows in use, in the input and the output embedding: the start that transformers chooses,
    without its random noise of 1e-9, so that every process and every resumed run begins with the same numbers. Spare rows
    beyond the vocabulary (padding of the matrix) are used first; only then is it enlarged, to exactly what is needed.
    """
    import torch

    for token in tokens:
        if not isinstance(token, str) or not token.strip():
            raise BaseError(f"'{token}' cannot be a token: it is empty.", where="new_tokens")
    known = tokenizer.get_vocab()
    fresh = [token for token in dict.fromkeys(tokens) if token not in known]
    if not fresh:
        return []
    used = max(known.values()) + 1
    tokenizer.add_special_tokens({"additional_special_tokens": fresh}, replace_extra_special_tokens=False)
    ids: list[int] = tokenizer.convert_tokens_to_ids(fresh)
    before = _rows(model)
    if max(ids) >= before:
        with torch.random.fork_rng(devices=[]):  # its random rows are overwritten below; the caller's numbers stay as they are
            model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    with torch.no_grad():
        for table in _tables(model):
            table[ids] = table[: min(used, before)].float().mean(dim=0).to(table.dtype)
    return ids


def _rows(model: PreTrainedModel) -> int:
    return int(_tables(model)[0].shape[0])


def _tables(model: PreTrainedModel) -> list[Any]:
    """Parameters with one row a token: input embedding, output embedding if it is another, and its bias."""
    tables = [model.get_input_embeddings().weight]
    head = model.get_output_embeddings()
    if head is not None:
        if head.weight is not tables[0]:
            tables.append(head.weight)
        if getattr(head, "bias", None) is not None:
            tables.append(head.bias)
    return tables
