"""A server in the place of a model: in the verbs of Python and of the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import tunesmith as ts
from tunesmith.core.errors import RunError, SpecError, TunesmithError
from tunesmith.core.record import Record
from tunesmith.engine.model import Model
from tunesmith.evaluation import answering
from tunesmith.evaluation.evaluate import evaluate_histories
from tunesmith.evaluation.prompting import zero_shot
from tunesmith.evaluation.task import Task

ROWS = [{"text": "I love it.", "label": "positive"}, {"text": "I hate it.", "label": "negative"}, {"text": "Fine.", "label": "positive"}]
LABELS = Task("mood", "label", ("negative", "positive"), scoring="generation")
TALK = Record(
    "messages",
    messages=tuple(
        {"role": role, "content": text} for role, text in [("user", "one?"), ("assistant", "1"), ("user", "two?"), ("assistant", "2")]
    ),
    where="talk, line 1",
)
WRITE = Task("write", "generate", metric="exact_match")


def feeling(question: str) -> str:
    return "Answer: negative" if "hate" in question else "positive"


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def tunesmith(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TUNESMITH_DTYPE", "fp32")

    def run(*words: object, stdin: str = "") -> Result:
        from tunesmith.cli.app import app

        return CliRunner().invoke(app, [str(word) for word in words], input=stdin)

    return run


def test_generate_asks_one_prompt_many_prompts_and_dialogues(fake) -> None:
    assert ts.generate(fake.url, "hello") == "echo hello"
    assert ts.generate(f"{fake.url}#named", ["a", "b"], temperature=0.5) == ["echo a", "echo b"]
    assert ts.generate(ts.connect(fake.url, concurrency=1), [{"role": "user", "content": "c"}], max_new_tokens=4) == "echo c"
    assert [request["model"] for request in fake.requests] == ["tiny", "named", "named", "tiny"]


def test_a_label_task_is_evaluated_by_what_the_server_says(fake, questions) -> None:
    fake.answer = feeling
    found = ts.evaluate(fake.url, questions, task={"scoring": "generation"})
    assert (found.score, found.unparseable, found.n) == (1.0, 0, 3)
    assert [one.label for one in found.judged] == ["positive", "negative", "positive"]
    assert found.completion_tokens == 2 and found.prompt_tokens > 2
    assert found.prompt.startswith("user: Classify the text.")
    assert found.peak_memory_mb == 0
    assert found.system == f"tiny at {fake.url}"


def test_scoring_by_likelihood_is_refused_before_the_first_question_with_what_works(fake, questions) -> None:
    with pytest.raises(SpecError, match="likelihood") as caught:
        ts.evaluate(f"{fake.url}#tiny", questions)
    assert "task.scoring=generation" in str(caught.value)
    assert fake.requests == []


def test_a_comparison_that_a_server_cannot_take_part_in_is_refused_before_any_system_is_asked(
    fake, questions, tiny_base_folder, monkeypatch
) -> None:
    monkeypatch.setattr(answering, "score_options", None)
    with pytest.raises(SpecError, match=r"task\.scoring=generation"):
        ts.compare(tiny_base_folder, f"{fake.url}#tiny", questions=questions)


def test_dialogues_are_continued_from_the_gold_and_from_the_servers_own_turns(fake) -> None:
    server = ts.connect(fake.url)
    found = evaluate_histories(answering.System("s", server, zero_shot(WRITE)), WRITE, [TALK])
    assert found["own"].judged[0].text == "echo one?\necho two?"
    histories = [[message["content"] for message in request["messages"]] for request in fake.requests]
    assert histories == [["one?"], ["one?", "1", "two?"], ["one?"], ["one?", "echo one?", "two?"]]


def test_an_evaluation_that_ended_at_a_failing_server_goes_on_where_it_ended(fake, questions) -> None:
    fake.answer = feeling
    server = ts.connect(fake.url, concurrency=1, attempts=1)
    fake.plans = ["ok", "ok", "500"]
    with pytest.raises(RunError, match="2 of 3 answers are kept"):
        ts.evaluate(server, questions, task={"scoring": "generation"})
    fake.requests.clear()
    found = ts.evaluate(server, questions, task={"scoring": "generation"})
    assert len(fake.requests) == 1
    assert found.score == 1.0
    assert any("2 of 3 answers were kept" in note for note in found.notes)


def test_a_metric_that_fails_costs_no_answers(fake, tmp_path) -> None:
    file = tmp_path / "metrics.py"
    file.write_text("def exact(prediction, reference):\n    return 1 / 0\n")
    task = Task("write", "generate", metric=f"{file}:exact")
    system = answering.System("s", ts.connect(fake.url), zero_shot(task))
    with pytest.raises(TunesmithError):
        ts.api.ask_and_judge(system, task, [TALK])
    file.write_text("def exact(prediction, reference):\n    return 1.0\n")
    assert ts.api.ask_and_judge(system, task, [TALK]).score == 1.0
    assert fake.asked() == ["one?", "two?"]


def test_earlier_turns_of_a_dialogue_are_kept_when_a_later_turn_fails(fake) -> None:
    server = ts.connect(fake.url, concurrency=1, attempts=1)
    system = answering.System("s", server, zero_shot(WRITE))
    fake.plans = ["ok", "500"]
    with pytest.raises(RunError):
        ts.api.ask_and_judge(system, WRITE, [TALK])
    ts.api.ask_and_judge(system, WRITE, [TALK])
    assert fake.asked() == ["one?", "two?", "two?"]


def test_a_model_in_process_and_a_server_that_says_the_same_score_the_same(fake, tiny_base_folder) -> None:
    """The server answers with what the model here says, so that every number but the tokens must agree."""
    here = ts.open(tiny_base_folder)
    assert isinstance(here, Model)
    fake.answer = lambda text: ts.generate(here, text, max_new_tokens=LABELS.max_new_tokens)
    records = [Record("label", text=row["text"], label=row["label"], where=f"line {n}") for n, row in enumerate(ROWS)]
    server = ts.connect(fake.url, concurrency=1)
    found = ts.compare(here, server, questions=records, task=LABELS)
    first, second = ([one.text for one in evaluation.judged] for evaluation in found.evaluations)
    assert first == second
    assert found.verdict.wins == found.verdict.losses == 0
    assert f"tiny at {fake.url}" in str(found)


def test_cli_generate_prints_what_the_server_says_in_order(fake, tunesmith) -> None:
    done = tunesmith("generate", fake.url, "-", "--temperature", "0.5", "--top-k", "5", stdin="one\ntwo\nthree\n")
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == ["echo one", "echo two", "echo three"]
    assert {request["top_k"] for request in fake.requests} == {5}


def test_cli_generate_refuses_raw_text_and_a_key_without_a_server(fake, tunesmith, tiny_base_folder) -> None:
    raw = tunesmith("generate", fake.url, "x", "--raw")
    assert raw.exit_code == SpecError.exit_code and "--raw continues text" in raw.stderr
    keyed = tunesmith("generate", tiny_base_folder, "x", "--key-env", "KEY")
    assert keyed.exit_code == SpecError.exit_code and "no server is asked" in keyed.stderr


def test_cli_evaluate_shows_the_score_of_a_server_and_sends_the_named_key(fake, tunesmith, questions, monkeypatch) -> None:
    fake.answer = feeling
    monkeypatch.setenv("MY_KEY", "sk-1")
    done = tunesmith("evaluate", f"{fake.url}#tiny", questions, "task.scoring=generation", "--key-env", "MY_KEY")
    assert done.exit_code == 0, done.output
    assert "accuracy 1.000" in done.stdout and "peak" not in done.stdout
    assert fake.headers[-1]["authorization"] == "Bearer sk-1"


def test_cli_compare_puts_two_servers_side_by_side(fake, other_fake, tunesmith, questions, tmp_path) -> None:
    fake.answer = feeling
    done = tunesmith(
        "compare", fake.url, other_fake.url, "task.scoring=generation", "--questions", questions, "--report", tmp_path / "report"
    )
    assert done.exit_code == 0, done.output
    assert f"other at {other_fake.url}" in done.stdout
    assert (tmp_path / "report" / "report.html").is_file()


def test_cli_chat_remembers_the_dialogue_and_survives_a_refusal(fake, tunesmith) -> None:
    done = tunesmith("chat", fake.url, stdin="hello\n!400\nagain\n")
    assert done.exit_code == 0, done.output
    assert done.stdout == "echo hello\necho again\n"
    assert "the server answers 400" in done.stderr
    roles: Any = [message["content"] for message in fake.requests[-1]["messages"]]
    assert roles == ["hello", "echo hello", "again"]
