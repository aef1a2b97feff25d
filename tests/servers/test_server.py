"""Asking an OpenAI-compatible server: order, retries under a clock that does not run, what is kept, what is said at the end."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from tunesmith.core.errors import RunError, SpecError
from tunesmith.core.progress import Quiet
from tunesmith.engine.asking import Question
from tunesmith.engine.sampler import Sampling
from tunesmith.engine.server import LONGEST_PAUSE, Server, connect

SRC = Path(__file__).resolve().parents[2] / "src"


class Clock:
    """Takes note of pauses instead of pausing."""

    def __init__(self) -> None:
        self.pauses: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.pauses.append(seconds)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def server_of(fake: Any, clock: Clock | None = None, **options: Any) -> Server:
    return Server(fake.url, "tiny", pause=clock or Clock(), draw=lambda: 0.0, **options)


def question(text: str, **more: Any) -> Question:
    return Question([{"role": "user", "content": text}], **more)


def ask(server: Server, texts: list[str], sampling: Sampling | None = None, **options: Any) -> list[str]:
    with server.session():
        return [reply.text for reply in server.answer([question(t) for t in texts], sampling or Sampling(), **options).replies]


def journals(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "answers").glob("*"))


def test_answers_come_in_the_order_of_the_questions_however_the_server_is_done(fake) -> None:
    fake.plans = ["slow0.06", "slow0.001", "slow0.03", "slow0.001"]
    texts = [f"question {number}" for number in range(12)]
    assert ask(server_of(fake, concurrency=4), texts) == [f"echo {text}" for text in texts]


def test_no_more_questions_are_under_way_than_the_concurrency_allows(fake) -> None:
    fake.always = "slow0.02"
    ask(server_of(fake, concurrency=3), [f"question {number}" for number in range(9)])
    assert 2 <= fake.most_at_once <= 3


def test_progress_counts_every_answer_once(fake) -> None:
    done: list[int] = []
    ask(server_of(fake), ["a", "b", "c"], progress=done.append)
    assert sum(done) == 3


def test_token_counts_are_the_servers_and_a_server_without_counts_is_noted(fake) -> None:
    server = server_of(fake)
    with server.session():
        found = server.answer([question("two words")], Sampling())
    assert (found.replies[0].prompt_tokens, found.replies[0].completion_tokens, found.replies[0].finished) == (2, 2, "end")
    with server.session():
        assert "counted no tokens" in server.answer([question(" ")], Sampling()).notes[0]


@pytest.mark.parametrize("failure", ["500", "503", "408", "409", "429", "garbage", "cut json", "other json", "close"])
def test_what_may_pass_is_tried_again_after_growing_pauses(fake, clock, failure) -> None:
    fake.plans = [failure, failure]
    assert ask(server_of(fake, clock), ["hello"]) == ["echo hello"]
    assert clock.pauses == [0.5, 1.0]
    assert len(fake.requests) == 3


def test_pauses_are_shortened_by_chance_so_that_clients_do_not_come_back_together(fake, clock) -> None:
    fake.plans = ["500"]
    server = server_of(fake, clock)
    server.draw = lambda: 1.0
    ask(server, ["hello"])
    assert clock.pauses == [0.375]


def test_the_pause_that_a_server_asks_for_is_kept_to_up_to_a_minute(fake, clock) -> None:
    fake.plans = ["429 after 7", "503 after 100000", f"429 after {format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)}"]
    ask(server_of(fake, clock), ["hello"])
    assert clock.pauses[:2] == [7.0, LONGEST_PAUSE]
    assert 20 < clock.pauses[2] <= 30


@pytest.mark.parametrize("header", ["soon", "nan", "-3"])
def test_a_pause_that_cannot_be_read_is_replaced_by_our_own(fake, clock, header) -> None:
    fake.plans = [f"429 after {header}"]
    ask(server_of(fake, clock), ["hello"])
    assert clock.pauses == [0.5]


def test_a_retry_is_said_once_a_cause(fake, clock) -> None:
    said: list[str] = []

    class Told(Quiet):
        def line(self, topic: str, text: str) -> None:
            said.append(text)

    fake.plans = ["500", "500", "500"]
    ask(server_of(fake, clock, reporter=Told()), ["a", "b"])
    assert len(said) == 1
    assert "500" in said[0] and "attempt 2 of 5" in said[0]


def test_a_server_that_never_answers_ends_the_work_after_all_attempts(fake, clock) -> None:
    fake.always = "never"
    with pytest.raises(RunError, match=r"no whole answer came within 0\.1 s \(2 attempts\)") as caught:
        ask(server_of(fake, clock, timeout=0.1, attempts=2), ["hello"])
    assert caught.value.where == fake.url
    assert len(clock.pauses) == 1


def test_an_address_where_nobody_listens_says_so(clock) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
    with pytest.raises(RunError, match=r"no connection.*\(3 attempts\)") as caught:
        ask(Server(url, "tiny", attempts=3, pause=clock), ["hello"])
    assert "Is it running" in str(caught.value)


@pytest.mark.parametrize("status", ["400", "401", "404", "422"])
def test_a_refusal_is_not_tried_again_and_names_address_status_and_what_was_said(fake, clock, status) -> None:
    fake.always = status
    with pytest.raises(RunError) as caught:
        ask(server_of(fake, clock), ["hello"])
    assert clock.pauses == [] and len(fake.requests) == 1
    assert str(caught.value).startswith(f"{fake.url}: the server answers {status}: ")
    assert f"no, {status}" in str(caught.value)


def test_garbage_to_the_end_shows_its_beginning(fake, clock) -> None:
    fake.always = "garbage"
    with pytest.raises(RunError, match=r"answers 200 with what is no answer.*Welcome to the router.*\(5 attempts\)"):
        ask(server_of(fake, clock), ["hello"])


def test_questions_do_not_follow_a_redirection_to_another_server(fake, other_fake, clock) -> None:
    fake.always = f"redirect {other_fake.url}/chat/completions"
    with pytest.raises(RunError, match="the server answers 307"):
        ask(server_of(fake, clock), ["hello"])
    assert other_fake.requests == []


def test_the_error_names_the_record_that_could_not_be_answered(fake, clock) -> None:
    server = server_of(fake, clock, attempts=1)
    for fate in ("!500", "!400"):
        with server.session(), pytest.raises(RunError, match="It was to answer test, line 3"):
            server.answer([question(fate, where="test, line 3")], Sampling())


def test_after_a_failure_a_second_call_asks_only_what_was_not_answered(fake, clock, tmp_path) -> None:
    texts = ["a", "b", "c", "!400", "d"]
    with pytest.raises(RunError, match="3 of 5 answers are kept; the same call goes on there"):
        ask(server_of(fake, clock, concurrency=1), texts)
    assert fake.asked() == ["a", "b", "c", "!400"]
    assert len(journals(tmp_path)) == 1

    fake.requests.clear()
    fake.next_plan = lambda text: "ok"
    done: list[int] = []
    server = server_of(fake, clock, concurrency=1)
    with server.session():
        found = server.answer([question(text) for text in texts], Sampling(), progress=done.append)
    assert [reply.text for reply in found.replies] == [f"echo {text}" for text in texts]
    assert fake.asked() == ["!400", "d"]
    assert sum(done) == 5
    assert "3 of 5 answers were kept from an earlier call" in found.notes[0]


def test_what_is_under_way_when_another_question_fails_is_kept_too(fake, clock) -> None:
    texts = ["!slow0.1", "!400", "never asked"]
    with pytest.raises(RunError, match="1 of 3 answers are kept"):
        ask(server_of(fake, clock, concurrency=2), texts)
    assert "never asked" not in fake.asked()


def test_answers_outlive_an_interruption(fake) -> None:
    def interrupt(_: int) -> None:
        if len(fake.requests) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask(server_of(fake, concurrency=1), ["a", "b", "c"], progress=interrupt)
    ask(server_of(fake, concurrency=1), ["a", "b", "c"])
    assert fake.asked() == ["a", "b", "c"]


def test_work_that_ended_well_is_forgotten_so_that_a_changed_model_is_asked_anew(fake, tmp_path) -> None:
    ask(server_of(fake), ["a", "b"])
    assert journals(tmp_path) == []
    fake.answer = lambda text: "something else"
    assert ask(server_of(fake), ["a"]) == ["something else"]


def test_finished_work_leaves_the_kept_answers_of_other_work_alone(fake, clock) -> None:
    with pytest.raises(RunError):
        ask(server_of(fake, clock, concurrency=1), ["a", "!400"])
    ask(server_of(fake, clock), ["b"])
    fake.requests.clear()
    fake.next_plan = lambda text: "ok"
    ask(server_of(fake, clock), ["a", "!400"])
    assert fake.asked() == ["!400"]


@pytest.mark.parametrize("change", ["sampling", "model", "messages"])
def test_a_kept_answer_serves_only_the_same_request(fake, clock, change) -> None:
    with pytest.raises(RunError):
        ask(server_of(fake, clock, concurrency=1), ["a", "!400"])
    fake.requests.clear()
    server = server_of(fake, clock)
    server.model = "other" if change == "model" else "tiny"
    sampling = Sampling(max_new_tokens=7) if change == "sampling" else Sampling()
    ask(server, ["A" if change == "messages" else "a"], sampling)
    assert len(fake.requests) == 1


def test_a_journal_that_was_cut_short_keeps_its_whole_lines(fake, clock, tmp_path) -> None:
    with pytest.raises(RunError):
        ask(server_of(fake, clock, concurrency=1), ["a", "b", "!400"])
    [journal] = journals(tmp_path)
    journal.write_text(journal.read_text()[:-20])
    with pytest.raises(RunError):
        ask(server_of(fake, clock, concurrency=1), ["a", "b", "!400"])
    assert fake.asked() == ["a", "b", "!400", "b", "!400"]
    fake.requests.clear()
    fake.next_plan = lambda text: "ok"
    ask(server_of(fake, clock), ["a", "b", "!400"])
    assert fake.asked() == ["!400"]


def test_a_greedy_request_says_only_what_every_server_knows(fake) -> None:
    ask(server_of(fake), ["hello"], Sampling(max_new_tokens=9))
    assert fake.requests == [
        {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 9, "temperature": 0.0},
    ]


def test_sampling_options_reach_the_server_and_each_question_has_its_own_seed(fake) -> None:
    sampling = Sampling(9, temperature=0.7, top_p=0.9, top_k=20, min_p=0.05, stop=("\n",), seed=3)
    ask(server_of(fake, concurrency=1), ["a", "b"], sampling)
    first, second = fake.requests
    assert {name: first[name] for name in ("temperature", "top_p", "top_k", "min_p", "stop")} == {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 20,
        "min_p": 0.05,
        "stop": ["\n"],
    }
    assert first["seed"] != second["seed"]
    ask(server_of(fake, concurrency=1), ["a"], sampling)
    assert fake.requests[-1]["seed"] == first["seed"]


def test_tools_and_calls_are_sent_in_the_form_that_servers_read(fake) -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "clock"}}}
    messages = [
        {"role": "user", "content": "time?"},
        {"role": "assistant", "content": "", "tool_calls": [call], "weight": 1},
        {"role": "tool", "content": "noon", "tool_call_id": "call_0"},
    ]
    tools = ({"type": "function", "function": {"name": "look"}},)
    server = server_of(fake)
    with server.session():
        server.answer([Question(messages, tools)], Sampling())
    [request] = fake.requests
    assert request["tools"] == list(tools)
    sent = {"id": "call_0", "type": "function", "function": {"name": "look", "arguments": '{"at": "clock"}'}}
    assert request["messages"][1] == {"role": "assistant", "content": "", "tool_calls": [sent]}


def test_text_is_streamed_as_it_comes(fake) -> None:
    pieces: list[tuple[int, str]] = []
    assert ask(server_of(fake), ["hi"], on_text=lambda place, piece: pieces.append((place, piece))) == ["echo hi"]
    assert pieces == [(0, "ec"), (0, "ho hi")]


@pytest.mark.parametrize("failure", ["500", "close", "garbage"])
def test_a_stream_that_fails_before_its_first_word_is_tried_again(fake, clock, failure) -> None:
    fake.plans = [failure]
    assert ask(server_of(fake, clock), ["hi"], on_text=lambda place, piece: None) == ["echo hi"]
    assert len(clock.pauses) == 1


def test_the_name_of_the_only_model_is_asked_for(fake) -> None:
    server = connect(fake.url + "/")
    assert (server.model, server.name) == ("tiny", f"tiny at {fake.url}")
    assert fake.paths == ["/v1/models"]


def test_a_named_model_needs_no_list(fake) -> None:
    assert connect(f"{fake.url}#org/big-one").model == "org/big-one"
    assert fake.paths == []


def test_among_several_models_one_has_to_be_named(fake) -> None:
    fake.models = ["one", "two"]
    with pytest.raises(SpecError, match=r"the server has 2 models") as caught:
        connect(fake.url)
    assert f"{fake.url}#one" in str(caught.value)
    fake.models = []
    with pytest.raises(RunError, match="the server has no model"):
        connect(fake.url)


def test_the_key_comes_from_the_named_variable_and_is_shown_nowhere(fake, clock, monkeypatch, caplog) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    server = connect(f"{fake.url}#tiny", key_env="MY_KEY")
    server.pause = clock
    ask(server, ["hello"])
    assert fake.headers[-1]["authorization"] == "Bearer sk-very-secret"
    fake.always = "401"
    with pytest.raises(RunError) as caught:
        ask(server, ["hello"])
    assert "sk-very-secret" not in f"{caught.value} {server!r} {caplog.text}"


def test_without_a_key_the_word_none_is_sent_and_a_named_variable_has_to_be_set(fake) -> None:
    ask(connect(f"{fake.url}#tiny"), ["hello"])
    assert fake.headers[-1]["authorization"] == "Bearer none"
    with pytest.raises(SpecError, match="'MY_KEY'"):
        connect(f"{fake.url}#tiny", key_env="MY_KEY")


@pytest.mark.parametrize("url", ["http://", "http://ann:secret@host/v1", "https://host/v1?version=2"])
def test_an_address_that_is_no_plain_one_is_refused_without_repeating_it(url) -> None:
    with pytest.raises(SpecError, match="plain") as caught:
        connect(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("options", [{"concurrency": 0}, {"attempts": 0}, {"timeout": 0.0}, {"timeout": float("nan")}])
def test_options_out_of_range_are_refused(fake, options) -> None:
    with pytest.raises(SpecError):
        connect(f"{fake.url}#tiny", **options)


def test_a_server_answers_from_within_a_running_loop_as_in_a_notebook(fake) -> None:
    async def cell() -> list[str]:
        return ask(server_of(fake), ["hello"])

    assert asyncio.run(cell()) == ["echo hello"]


def test_the_client_library_is_loaded_only_when_a_server_is_asked() -> None:
    code = "import sys, tunesmith.api, tunesmith.cli.generate; sys.exit('openai' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(SRC)}).returncode == 0
