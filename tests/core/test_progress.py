"""Progress: lines for logs, bars for terminals."""

from __future__ import annotations

import io
import time

from rich.console import Console

from tunesmith.core.progress import Quiet, Terminal


def reporter(*, terminal: bool) -> tuple[Terminal, io.StringIO]:
    out = io.StringIO()
    return Terminal(Console(file=out, force_terminal=terminal, width=100, highlight=False)), out


def test_a_line_keeps_brackets_that_look_like_markup():
    told, out = reporter(terminal=False)
    told.line("[few]", "adapter lora(sites=[q, v]) [/]")
    assert out.getvalue() == "[few]     adapter lora(sites=[q, v]) [/]\n"


def test_in_a_log_work_is_a_line_at_its_end_and_not_one_a_step():
    told, out = reporter(terminal=False)
    with told.work("train", 50, done=10) as work:
        for step in range(40):
            work.advance(note=f"loss {step}")
    assert out.getvalue() == "train     50/50 loss 39\n"


def test_on_a_terminal_work_within_work_is_shown_below_it_and_brackets_stay():
    told, out = reporter(terminal=True)
    with told.work("[climb]", 2) as outer, told.work("dev", 3) as inner:
        inner.advance(2, "[a note]")
        outer.advance()
        time.sleep(0.25)  # bars are drawn ten times a second
        told.line("data", "in between")
    text = out.getvalue()
    assert "[climb]" in text and "[a note]" in text and "2/3" in text and "in between" in text
    with told.work("again", 1) as work:  # the bars of before are gone
        work.advance()
    assert "again" in out.getvalue()


def test_an_error_within_work_leaves_the_reporter_usable():
    told, _ = reporter(terminal=True)
    for _ in range(2):
        try:
            with told.work("x", 1), told.work("y", 1):
                raise KeyError
        except KeyError:
            pass


def test_quiet_says_nothing_and_has_the_same_shape(capsys):
    quiet = Quiet()
    quiet.line("a", "b")
    with quiet.work("a", 3) as work:
        work.advance(1, "note")
    assert capsys.readouterr() == ("", "")
