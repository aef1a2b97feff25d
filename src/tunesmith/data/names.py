"""The column names that are understood without being told."""

from __future__ import annotations

from collections.abc import Mapping

NAMES: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages", "conversations", "conversation", "dialogue", "dialog", "chat"),
    "prompt": ("prompt", "question", "query", "input", "instruction"),
    "completion": ("completion", "answer", "response", "output", "target"),
    "text": ("text", "content", "sentence"),
    "label": ("label", "class", "category", "sentiment", "intent"),
    "text_pair": ("text_pair",),
    "value": ("value", "score", "rating"),
    "tokens": ("tokens", "words"),
    "tags": ("tags", "ner_tags", "pos_tags", "labels"),
    "choices": ("choices", "options", "candidates", "endings"),
    "answer": ("answer", "label", "target", "completion", "answerkey"),
    "instruction": ("instruction",),
    "input": ("input", "context"),
    "history": ("history",),
    "system": ("system", "system_prompt"),
    "reasoning": ("reasoning", "rationale"),
    "tools": ("tools",),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "answers": ("answers", "responses", "completions"),
    "scores": ("scores",),
    "margin": ("margin",),
    "probability": ("probability",),
    "good": ("good", "desirable", "label"),
    "group": (),
}
"""By role: the usual names, compared without case. A group is never guessed, since a wrong one would spoil the splits."""

KNOWN_NAMES = frozenset(name for names in NAMES.values() for name in names) - {"good", "desirable", "rejected"}
"""Names that show that a table's first line is its header: none of those that may as well be a label."""
