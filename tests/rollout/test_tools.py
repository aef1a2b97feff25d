"""Answers in several turns: calls are carried out, their results are read and not learned from, and budgets end an answer."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tunesmith.core.errors import RenderError, SpecError
from tunesmith.engine.rundir import read_metrics
from tunesmith.engine.sampler import Completion
from tunesmith.engine.train import Trainer
from tunesmith.rollout import playing
from tunesmith.rollout.answers import Answer, Prompt
from tunesmith.rollout.sample import ToolCall
from tunesmith.rollout.sampling import answer_prompts, sampling_of
from tunesmith.rollout.scoring import Rewarded, samples_of
from tunesmith.rollout.tools import calls_in, carried_out, load_tools
from tunesmith.spec import Spec

Make = Callable[..., Trainer]
SpecOf = Callable[..., Spec]

TOOLS = '''
from typing import Literal

def add(a: int, b: int = 1, unit: Literal["m", "s"] = "m") -> str:
    """Add two numbers.

    Args:
        a: the first
        b (int): the second
    """
    return f"{a + b} {unit}"

def find(query):
    return {"query": query, "found": ["one", "two"]}

def broken(query: str) -> str:
    raise KeyError(query)

def slow(query: str) -> str:
    import time
    time.sleep(30)
    return query

def leaves(query: str) -> str:
    raise SystemExit(3)

async def later(query: str) -> str:
    return query
'''
ADD = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of tools."""
    (tmp_path / "tools.py").write_text(TOOLS)
    return tmp_path / "tools.py"


@pytest.fixture
def run(make_run: Make, tmp_path: Path, tiny_tokenizer: Any) -> Make:
    """A trainer on a base whose template shows tools."""
    block = "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    (tmp_path / "tools.jinja").write_text(block + tiny_tokenizer.chat_template)
    return partial(make_run, template=tmp_path / "tools.jinja")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[Sequence[str]]], list[list[list[int]]]]:
    """Let the policy say what is written: of each turn, what the answers say that go on. What it was given to read comes back."""

    def put(turns: Sequence[Sequence[str]]) -> list[list[list[int]]]:
        said: Iterator[Sequence[str]] = iter(turns)
        read: list[list[list[int]]] = []

        def scripted(forward: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], sampling: Any, **given: Any) -> list[Completion]:
            rows = [list(prompt) for prompt in prompts for _ in range(given["samples"])]
            read.append(rows)
            out = []
            rooms = given["budgets"] or [sampling.max_new_tokens] * len(rows)
            for text, room in zip(next(said), rooms, strict=True):
                ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id][:room]
                ended = ids[-1] == tokenizer.eos_token_id
                out.append(Completion(ids, text, "end" if ended else "length", [-1.5] * len(ids)))
            return out

        monkeypatch.setattr(playing, "generate", scripted)
        return read

    return put


def by_calls(prompts: Sequence[Prompt], answers: Sequence[Sequence[Answer]]) -> Rewarded:
    """1 where a call succeeded, less for each token."""
    return Rewarded([float(any(not c.failed for c in one.calls)) - 0.001 * one.tokens for group in answers for one in group])


# Tools


def test_a_tools_schema_follows_from_its_signature_and_docstring(file: Path) -> None:
    tools = load_tools([f"{file}:add", f"{file}:find"])
    assert json.loads(json.dumps(tools["add"].schema)) == {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two numbers.",
            "parameters": {
                "type": "object",
                "properties": {
                    "a": {"type": "integer", "description": "the first"},
                    "b": {"type": "integer", "description": "the second"},
                    "unit": {"type": "string", "enum": ["m", "s"]},
                },
                "required": ["a"],
            },
        },
    }
    assert tools["find"].schema["function"]["parameters"]["properties"] == {"query": {"type": "string"}}


@pytest.mark.parametrize(
    ("written", "said"),
    [("nothing", "names no tool"), ("FILE:later", "called by names"), ("FILE:none", "no function 'none'"), ("x.py:add", "does not exist")],
)
def test_a_tool_that_cannot_be_called_is_refused(written: str, said: str, file: Path) -> None:
    with pytest.raises(SpecError, match=said):
        load_tools([written.replace("FILE", str(file))])


@pytest.mark.parametrize(
    "text",
    [
        ADD,
        f"I add them.\n{ADD}",
        '<tool_call>[{"name": "add", "arguments": {"a": 2, "b": 3}}]</tool_call>',
        '{"name": "add", "parameters": {"a": 2, "b": 3}}',
        '[TOOL_CALLS] [{"name": "add", "arguments": "{\\"a\\": 2, \\"b\\": 3}"}]',
    ],
)
def test_calls_are_read_as_models_write_them(text: str, file: Path) -> None:
    (call,) = calls_in(text)
    assert carried_out(call, load_tools([f"{file}:add"])) == ToolCall("add", '{"a": 2, "b": 3}', False, "5 m")


def test_words_are_no_calls() -> None:
    assert calls_in("The answer is 5.") == calls_in('{"name": 5 is') == calls_in('{"answer": 5}') == []


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ('<tool_call>{"name": "add"</tool_call>', "no JSON"),
        ("<tool_call>[3]</tool_call>", "a call is"),
        ('<tool_call>{"name": "sub", "arguments": {}}</tool_call>', "no tool 'sub'; there are: add, broken"),
        ('<tool_call>{"name": "add", "arguments": {"b": 1}}</tool_call>', "needs the argument 'a'"),
        ('<tool_call>{"name": "add", "arguments": {"a": 1, "c": 1}}</tool_call>', "no argument 'c'"),
        ('<tool_call>{"name": "add", "arguments": {"a": "x"}}</tool_call>', "valid integer"),
        ('<tool_call>{"name": "broken", "arguments": {"query": "x"}}</tool_call>', "KeyError"),
    ],
)
def test_what_goes_wrong_in_a_call_is_its_result_for_the_policy_to_read(call: str, said: str, file: Path) -> None:
    done = carried_out(calls_in(call)[0], load_tools([f"{file}:add", f"{file}:broken"]))
    assert done.failed and done.result.startswith("Error: ") and said in done.result


def test_a_call_that_takes_too_long_or_exits_has_failed_and_the_run_goes_on(file: Path) -> None:
    tools, began = load_tools([f"{file}:slow", f"{file}:leaves", f"{file}:add"]), time.monotonic()
    done = [carried_out(ToolCall(name, '{"query": "x"}'), tools, 0.2) for name in ("slow", "leaves")]
    assert time.monotonic() - began < 5
    assert [call.failed for call in done] == [True, True]
    assert done[0].result == "Error: slow did not return within 0.2 seconds" and "SystemExit" in done[1].result
    assert carried_out(ToolCall("add", '{"a": 2}'), tools, 5.0).result == "3 m"


# Turns


def test_an_answer_goes_on_after_a_call_that_took_too_long(run: Make, spec_of: SpecOf, file: Path, script: Callable[..., Any]) -> None:
    script([['<tool_call>{"name": "slow", "arguments": {"query": "x"}}</tool_call>', "No."], ["It is late."]])
    spec = spec_of("grpo", prompts=1, samples=2, tools=[f"{file}:slow"], tool_seconds=0.1, max_new_tokens=250, train={"steps": 1})
    trainer = run(spec, score=by_calls)
    trainer.run()
    first = next(one for one in trainer.feed._held if not one.chosen.all())  # type: ignore[attr-defined]
    words = trainer.model.base.tokenizer.decode(first.ids)
    assert "Error: slow did not return within 0.1 seconds" in words and words.endswith("It is late.<|im_end|>")


def test_a_result_follows_the_turn_as_the_template_writes_it_and_is_not_learned_from(
    run: Make, spec_of: SpecOf, file: Path, script: Callable[..., Any]
) -> None:
    seen = script([[ADD, "No."], ["It is 5."]])
    spec = spec_of("grpo", prompts=1, samples=2, tools=[f"{file}:add"], max_new_tokens=100, train={"steps": 1})
    trainer = run(spec, score=by_calls)
    trainer.run()
    feed: Any = trainer.feed
    first, second = feed._held
    tokenizer = trainer.model.base.tokenizer
    words = tokenizer.decode(first.ids)
    assert words == f"{ADD}<|im_end|>\n<|im_start|>tool\n5 m<|im_end|>\n<|im_start|>assistant\nIt is 5.<|im_end|>"
    assert tokenizer.decode(first.ids[~first.chosen]) == "\n<|im_start|>tool\n5 m<|im_end|>\n<|im_start|>assistant\n"
    assert second.chosen.all() and tokenizer.decode(second.ids) == "No.<|im_end|>"
    prompt = feed.prompts[first.prompt].ids
    assert seen[0] == [prompt, prompt] and seen[1] == [[*prompt, *first.ids[: len(first.ids) - first.chosen[::-1].argmin()].tolist()]]
    assert float(first.given["advantage"][0]) > 0 > float(second.given["advantage"][0])
    assert not first.given["advantage"][~first.chosen].any()
    (row,) = [row for row in feed._rows([first], type("P", (), {"first": True})())]
    assert np.array_equal(row.segments[1].supervised, first.chosen)
    line = read_metrics(trainer.folder.path / "metrics.jsonl")[0]
    assert (line["turns"], line["truncated"], line["sampled_entropy"]) == (1.5, 0.0, 1.5)
    told = json.loads((trainer.folder.path / "samples.jsonl").read_text())["answers"][0]
    assert told["text"] == "It is 5." and [message["role"] for message in told["messages"]] == ["assistant", "tool", "assistant"]


@pytest.mark.parametrize(
    ("rollout", "turns"),
    [({"turns": 2}, [[ADD, ADD], [ADD, ADD]]), ({"turns": 9, "max_new_tokens": 60}, [[ADD, ADD], [ADD, ADD]])],
)
def test_budgets_of_turns_and_tokens_end_an_answer_and_it_counts_as_cut_off(
    rollout: dict[str, Any], turns: list[list[str]], run: Make, spec_of: SpecOf, file: Path, script: Callable[..., Any]
) -> None:
    script(turns)
    spec = spec_of("grpo", prompts=1, samples=2, tools=[f"{file}:add"], **{"max_new_tokens": 150, "train": {"steps": 1}, **rollout})
    trainer = run(spec, score=by_calls)
    trainer.run()
    for one in trainer.feed._held:  # type: ignore[attr-defined]
        assert one.chosen[-1] and int(one.chosen.sum()) <= spec.rollout.max_new_tokens
    assert read_metrics(trainer.folder.path / "metrics.jsonl")[0]["truncated"] == 1.0


def test_long_results_are_cut_and_rewards_see_the_calls(run: Make, spec_of: SpecOf, file: Path, script: Callable[..., Any]) -> None:
    call = '<tool_call>{"name": "find", "arguments": {"query": "' + "many words " * 6 + '"}}</tool_call>'
    script([[call, "No."], ["Done."]])
    seen: list[Any] = []

    def score(prompts: Sequence[Prompt], answers: Sequence[Sequence[Answer]]) -> Rewarded:
        seen.extend(sample for pair in zip(prompts, answers, strict=True) for sample in samples_of(*pair, 0))
        return by_calls(prompts, answers)

    spec = spec_of("grpo", prompts=1, samples=2, tools=[f"{file}:find"], max_new_tokens=150, result_tokens=8, train={"steps": 1})
    trainer = run(spec, score=score)
    trainer.run()
    (done,) = seen[0].calls
    assert (done.name, done.failed, done.result[-1]) == ("find", False, "…") and seen[1].calls == ()
    assert len(trainer.model.base.tokenizer(done.result[:-1])["input_ids"]) <= 9
    assert seen[0].completion == "Done." and seen[0].finished == "end"


def test_without_calls_an_answer_with_tools_is_the_one_without(make_run: Make, spec_of: SpecOf, file: Path) -> None:
    spec = spec_of("grpo")  # the policy is random and calls nothing
    trainer = make_run(spec)
    prompts = trainer.feed.prompts[:3]  # type: ignore[attr-defined]
    asking: dict[str, Any] = {"samples": 3, "seeds": [5, 6, 7], "batch": 8}
    plain = answer_prompts(trainer.model, prompts, sampling_of(spec.rollout, 1), **asking)
    player = playing.Player(trainer.model, load_tools([f"{file}:add"]), spec.rollout)
    played = player.play(prompts, sampling_of(spec.rollout, 1), **asking)
    assert [[replace(one, messages=[]) for one in group] for group in played] == plain


def test_a_template_that_shows_no_tools_is_refused(make_run: Make, spec_of: SpecOf, file: Path) -> None:
    with pytest.raises(RenderError, match=r"does not write tools(.|\n)*base.template"):
        make_run(spec_of("grpo", tools=[f"{file}:add"]))
