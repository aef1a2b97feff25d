"""What a report says, as data: `report.json` is this, and the HTML page and the Markdown are drawn from it.

The schema is versioned: a reader may rely on every field here within one major version.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION = "1.1"

VerdictWord = Literal["better", "worse", "equivalent", "undecided"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Versus(_Part):
    """A paired comparison on the same questions: this rung against another."""

    rung: str = Field(description="name of the other rung")
    wins: int = Field(description="questions that only this rung answers rightly")
    losses: int = Field(description="questions that only the other rung answers rightly")
    difference: float = Field(description="accuracy of this rung minus the other's")
    difference_low: float
    difference_high: float
    p_value: float = Field(description="two-sided exact McNemar")
    p_adjusted: float = Field(description="the same after Holm over all comparisons of the report")
    verdict: VerdictWord
    questions_needed: int | None = Field(default=None, description="if undecided: further questions for 80 % power at the observed effect")


class ClassScore(_Part):
    label: str
    precision: float
    recall: float
    f1: float
    support: int


class Confusion(_Part):
    labels: list[str] = Field(description="columns; the last may be '(unparseable)'")
    gold: list[str] = Field(description="rows")
    counts: list[list[int]]


class CurvePoint(_Part):
    step: int
    loss: float | None = None
    dev_metric: float | None = None
    lr: float | None = None


class Rung(_Part):
    name: str = Field(description="short, unique: 'zero-shot', 'lora'")
    title: str
    description: str = Field(description="one sentence: what this rung does")
    accuracy: float
    ci_low: float = Field(description="Wilson 95 %")
    ci_high: float
    macro_f1: float
    unparseable: int = Field(description="answers that name no label; counted as wrong, never dropped")
    prompt_tokens_per_answer: float
    completion_tokens_per_answer: float
    seconds_per_answer: float
    train_seconds: float
    peak_memory_mb: float
    trainable_parameters: int
    versus_previous: Versus | None = None
    versus_best_before: Versus | None = None
    classes: list[ClassScore] = Field(default_factory=list)
    confusion: Confusion | None = None
    curve: list[CurvePoint] = Field(default_factory=list)
    prompt: str = Field(default="", description="the exact text the model read for the first question")
    settings: dict[str, Any] = Field(default_factory=dict)


class Answer(_Part):
    text: str = Field(description="what the model said, or the label it scored highest")
    label: str | None = Field(description="as parsed; None if unparseable")
    correct: bool
    score: float | None = Field(default=None, description="for graded metrics: this answer's score, 0 to 1")


class Question(_Part):
    id: str
    text: str
    gold: str
    answers: dict[str, Answer] = Field(description="by rung name")


class Recommendation(_Part):
    rung: str
    reason: str


class Judge(_Part):
    """A judge that scored the answers, or that rewarded them while a run was trained."""

    role: str = Field(description="what it did")
    name: str = Field(description="the model, and how it was asked")
    rubric: str = Field(description="the first line of what it judged by")
    checked: str = Field(description="its agreement with human labels at its last check, or that there was none")

    def line(self) -> str:
        """In one line."""
        return f"{self.name} {self.role}, by the rubric “{self.rubric}”; {self.checked}"


class Report(_Part):
    schema_version: str = SCHEMA_VERSION
    title: str
    created: str = Field(description="ISO 8601, UTC")
    task: str
    base: str
    n_questions: int
    labels: list[str] = Field(default_factory=list)
    metric: str = "accuracy"
    interval_method: str = Field(default="Wilson", description="how the rungs' 95 % intervals were computed")
    paired_test: str = Field(default="exact McNemar", description="the two-sided test behind every verdict")
    command: str = Field(default="", description="the command that makes this report again")
    judges: list[Judge] = Field(default_factory=list, description="who judged the answers, and who rewarded them in training")
    rungs: list[Rung]
    recommendation: Recommendation
    questions: list[Question] = Field(default_factory=list, description="twenty, wins and losses first")
    settings: dict[str, Any] = Field(default_factory=dict, description="the spec as resolved")
    environment: dict[str, Any] = Field(default_factory=dict, description="versions, hardware, dtype and why")
    notes: list[str] = Field(default_factory=list, description="what a reader must know: rows dropped, decisions, warnings")
