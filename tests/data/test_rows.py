"""Records to rows, rows that fit, rows that share, rows kept on disk."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.core.errors import DataError, RenderError, SpecError
from tunesmith.core.record import Message, Record
from tunesmith.core.row import ROOT, Row, Segment, segment, single
from tunesmith.data.rendering import Renderer, options, prompt, render
from tunesmith.data.rows import RowCache, TextRow, drop_oldest_turns, fit, iter_rows, notes_of, share_prefix, to_rows

Make = Callable[..., Any]


def said(*turns: str) -> tuple[Message, ...]:
    return tuple({"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(turns))


def record(*turns: str, where: str = "x.jsonl, line 1") -> Record:
    return Record("messages", messages=said(*turns), where=where)


def ask(record: Record) -> list[Message]:
    return [{"role": "user", "content": f"{record.text}\npositive or negative?"}]


def trained(tok: Any, row: Row) -> str:
    part = row.segments[0]
    return str(tok.decode(part.ids[part.supervised].tolist()))


def test_each_shape_becomes_the_row_it_should(tokenizer: Make) -> None:
    tok = tokenizer("bytes", "chatml")
    rows = to_rows(
        tok,
        [
            record("the", "fox", "over", "dog", where="line 1"),
            Record("prompt", messages=said("the film is", " positive"), where="line 2"),
            Record("label", text="I love it", label="positive", where="line 3"),
            Record("text", text="the lazy dog", where="line 4"),
        ],
        label_prompt=ask,
    )
    assert [row.where for row in rows] == ["line 1", "line 2", "line 3", "line 4"]
    assert [trained(tok, row) for row in rows[:3]] == ["fox<|im_end|>dog<|im_end|>", " positive<|im_end|>", "positive<|im_end|>"]
    assert "I love it\npositive or negative?" in tok.decode(rows[2].segments[0].ids.tolist())
    text = rows[3].segments[0]
    assert tok.decode(text.ids.tolist()) == "the lazy dog</s>" and text.supervised.tolist() == [False] + [True] * (len(text) - 1)


def test_nothing_after_the_last_trained_token_is_kept(tokenizer: Make) -> None:
    tok = tokenizer("bytes", "chatml")
    (row,) = to_rows(tok, [record("the", "fox", "and a question left open")])
    assert row.segments[0].supervised[-1] and tok.decode(row.segments[0].ids.tolist()).endswith("fox<|im_end|>")


def test_a_text_starts_and_ends_as_the_tokenizer_has_it(tokenizer: Make) -> None:
    texts = [Record("text", text="the </s> dog")]
    decoded = []
    for kind in ("bytes-bos", "wordpiece"):
        tok = tokenizer(kind)
        decoded.append(tok.decode(to_rows(tok, texts)[0].segments[0].ids.tolist()))
    assert decoded[0] == "<s>the </s> dog</s>" and decoded[1].startswith("[CLS] the <") and decoded[1].endswith("dog [SEP]")
    tok = tokenizer("bytes-bos")
    assert to_rows(tok, texts)[0].segments[0].ids.tolist().count(tok.eos_token_id) == 1, "special-token text in the data is text"


def test_where_a_template_alters_history_each_turn_is_a_row_and_the_notes_say_so(tokenizer: Make) -> None:
    tok = tokenizer("bytes", "qwen3")
    rows = to_rows(tok, [record("the", "fox", "over", "dog", where="line 7")])
    assert [trained(tok, row) for row in rows] == ["<think>\n\n</think>\n\nfox<|im_end|>", "<think>\n\n</think>\n\ndog<|im_end|>"]
    assert {row.where for row in rows} == {"line 7"}
    assert notes_of(rows) == {"the template alters earlier turns as a dialogue goes on: each assistant turn is a row of its own": 2}
    assert len(to_rows(tok, [record("the", "fox", "over", "dog")], supervise="last")) == 1


def test_rows_are_what_rendering_one_by_one_gives(tokenizer: Make) -> None:
    for kind in ("bytes", "sentencepiece-first", "sentencepiece-legacy"):
        tok = tokenizer(kind, "smollm2")
        records = [record(f"the {n}", f"fox {n}", "a", "b") for n in range(7)]
        for row, one in zip(to_rows(tok, records), records, strict=True):
            alone = render(tok, one.messages)
            length = len(row.segments[0])
            assert row.segments[0].ids.tolist() == alone.ids[:length] and row.segments[0].supervised.tolist() == alone.supervised[:length]
            assert sum(alone.supervised) == row.supervised_tokens


def test_records_with_tools_and_without_keep_their_order(tokenizer: Make) -> None:
    tok = tokenizer("bytes", "tools")
    tools = ({"type": "function", "function": {"name": "add"}},)
    records = [Record("messages", messages=said("the", str(n)), tools=tools if n % 2 else (), where=str(n)) for n in range(6)]
    rows = to_rows(tok, records)
    assert [row.where for row in rows] == [str(n) for n in range(6)]
    assert ['"add"' in tok.decode(row.segments[0].ids.tolist()) for row in rows] == [False, True] * 3


def test_what_cannot_be_learned_from_is_an_error_that_names_the_record(tokenizer: Make) -> None:
    tok = tokenizer("bytes", "chatml")
    for bad, message in (
        (Record("messages", messages=said("the"), where="a.jsonl, line 9"), "no assistant turn"),
        (Record("label", text="the", label=None, where="a.jsonl, line 9"), "no label"),
        (Record("text", text=" \n", where="a.jsonl, line 9"), "the text is empty"),
    ):
        with pytest.raises(DataError, match=rf"a\.jsonl, line 9: .*{message}"):
            to_rows(tok, [record("the", "fox"), bad], label_prompt=ask)
    with pytest.raises(DataError, match="needs a prompt"):
        to_rows(tok, [Record("label", text="the", label="x")])
    unmarked = "{% for m in messages %}{{ m.content + '</s>' }}{% generation %}{% endgeneration %}{% endfor %}"
    with pytest.raises(DataError, match=r"line 9: no token of the row is trained on"):
        to_rows(tok, [record("the", "fox", where="line 9")], template=unmarked)
    with pytest.raises(RenderError, match=r"line 9: .*System role not supported"):
        to_rows(tok, [Record("messages", messages=({"role": "system", "content": "x"}, *said("a", "b")), where="line 9")],
                template=tokenizer("bytes", "gemma").chat_template)  # fmt: skip
    with pytest.raises(SpecError, match="'lst'"):
        to_rows(tok, [], supervise="lst")  # type: ignore[arg-type]


def test_records_are_read_as_rows_are_asked_for(tokenizer: Make) -> None:
    read = 0

    def records() -> Any:
        nonlocal read
        for read in range(1, 10_001):
            yield record("the", f"fox {read}")

    next(iter(iter_rows(tokenizer("bytes", "chatml"), records())))
    assert read < 2_000


def test_rows_within_the_limit_are_left_alone_and_over_long_ones_are_counted_refused_or_dropped(tokenizer: Make) -> None:
    tok = tokenizer("bytes", "chatml")
    rows = to_rows(tok, [record("the " * n, "fox", where=f"line {n}") for n in (1, 50, 2, 60)])
    limit = len(rows[2].segments[0])
    kept, report = fit(rows, limit, "drop")
    assert kept == [rows[0], rows[2]] and (report.dropped, report.kept, report.rows) == (2, 2, 4)
    assert report.examples == ("line 50", "line 60") and "2 dropped" in str(report) and report.longest == len(rows[3].segments[0])
    with pytest.raises(DataError, match=r"line 50: 2 of 4 rows are longer"):
        fit(rows, limit, "error")
    with pytest.raises(DataError, match="all 1 rows"):
        fit(rows[1:2], limit, "drop")
    with pytest.raises(SpecError, match="length policy"):
        fit(rows, limit, "cut")  # type: ignore[arg-type]
    same, quiet = fit(rows, 10_000)
    assert same == rows and "the longest" in str(quiet)


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=3), limit=st.integers(20, 140), system=st.booleans())
def test_shortening_cuts_contents_only_oldest_first_and_keeps_answers_headers_and_the_frame(
    tokenizer: Make, lengths: list[int], limit: int, system: bool
) -> None:
    tok = tokenizer("bytes", "chatml")
    turns = [text for n in lengths for text in ("the dog " * n + "end", "fox jumps")]
    messages = [*([{"role": "system", "content": "be kind to the quick dog"}] if system else []), *said(*turns)]
    (row,) = to_rows(tok, [Record("messages", messages=tuple(messages), where="line 3")])
    frame = len(row.segments[0]) - sum(end - start for start, end in row.cuttable)
    if frame > limit:
        with pytest.raises(DataError, match=r"line 3: .*cannot bring it"):
            fit([row], limit, "truncate-left-of-prompt", tok)
        return
    ((short,), report) = fit([row], limit, "truncate-left-of-prompt", tok)
    assert len(short.segments[0]) == min(limit, len(row.segments[0]))
    assert report.tokens_cut == len(row.segments[0]) - len(short.segments[0])
    assert trained(tok, short) == trained(tok, row)
    text = tok.decode(short.segments[0].ids.tolist())
    assert text.count("<|im_start|>assistant\nfox jumps<|im_end|>") == len(lengths)
    assert text.count("<|im_start|>user\n") == len(lengths)
    if system and "be kind to the quick dog" not in text:
        assert len(short.cuttable) <= 1, "system text goes last"
    again, _ = fit([short], max(frame, len(short.segments[0]) - 1), "truncate-left-of-prompt", tok)
    assert trained(tok, again[0]) == trained(tok, row), "a shortened row still knows what may be cut"


def test_shortening_never_leaves_half_a_character(tokenizer: Make) -> None:
    tok = tokenizer("bytes", "chatml")
    (row,) = to_rows(tok, [record("🙂中é" * 9, "fox")])
    for limit in range(len(row.segments[0]) - 20, len(row.segments[0])):
        ((short,), _) = fit([row], limit, "truncate-left-of-prompt", tok)
        assert "\ufffd" not in tok.decode(short.segments[0].ids.tolist()) and len(short.segments[0]) <= limit


def test_rows_with_several_answers_are_measured_by_their_longest_path() -> None:
    row = Row((segment(range(10)), segment([1] * 5, True, 0), segment([1] * 9, True, 0)))
    assert fit([row], 19)[0] == [row]
    with pytest.raises(DataError):
        fit([row], 18)
    with pytest.raises(DataError, match="cannot bring it"):
        fit([row], 18, "truncate-left-of-prompt")


def test_the_prompt_of_several_answers_is_shortened_for_all(tokenizer: Make) -> None:
    tok = tokenizer("bytes", "chatml")
    row = options(tok, said("the " * 30 + "dog"), ["positive", "I love it"])
    longest = len(row.segments[0]) + max(map(len, row.segments[1:]))
    ((short,), report) = fit([row], longest - 10, "truncate-left-of-prompt", tok)
    assert report.tokens_cut == 10 and len(short.segments[0]) == len(row.segments[0]) - 10
    assert [part.ids.tolist() for part in short.segments[1:]] == [part.ids.tolist() for part in row.segments[1:]]
    assert tok.decode(short.segments[0].ids.tolist()).endswith("dog<|im_end|>\n<|im_start|>assistant\n")


def test_over_long_history_loses_whole_oldest_exchanges_and_never_system_or_the_last_question(tokenizer: Make) -> None:
    tok = tokenizer("bytes", "chatml")
    messages: list[Message] = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "the quick"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {}}}]},
        {"role": "tool", "content": "three"},
        {"role": "assistant", "content": "fox"},
        {"role": "user", "content": "over what?"},
        {"role": "assistant", "content": "dog"},
        {"role": "user", "content": "why?"},
    ]
    make = Renderer(tok, template=tokenizer("bytes", "tools").chat_template)

    def fitted(limit: int) -> tuple[Sequence[Message], int]:
        return drop_oldest_turns(tok, messages, limit, renderer=make)

    lengths = [len(make.prompt([messages[0], *messages[start:]]).ids) for start in (1, 5, 7)]
    assert fitted(lengths[0]) == (messages, 0)
    assert fitted(lengths[0] - 1) == ([messages[0], *messages[5:]], 4)
    assert fitted(lengths[1] - 1) == ([messages[0], messages[7]], 6)
    with pytest.raises(DataError, match="last exchange alone"):
        fitted(lengths[2] - 1)


def paths(row: Row) -> list[tuple[list[int], list[bool]]]:
    return [path(row, leaf) for leaf in row.leaves()]


def path(row: Row, leaf: int) -> tuple[list[int], list[bool]]:
    parts = [row.segments[index] for index in row.path(leaf)]
    return np.concatenate([p.ids for p in parts]).tolist(), np.concatenate([p.supervised for p in parts]).tolist()


@st.composite
def trees(draw: st.DrawFn) -> Row:
    """Rows over two tokens, so that prefixes meet by chance; some with continuations, some with supervised prompts."""
    ids = draw(st.lists(st.integers(0, 1), min_size=1, max_size=8))
    mask = [False, *draw(st.lists(st.booleans() | st.just(False), min_size=len(ids) - 1, max_size=len(ids) - 1))]
    parts = [Segment(np.asarray(ids, np.int32), np.asarray(mask, np.bool_), ROOT, "prompt")]
    for number in range(draw(st.integers(0, 3))):
        length = draw(st.integers(1, 3))
        parts.append(segment([draw(st.integers(0, 1))] * length, True, draw(st.integers(0, number)), f"answer {number}"))
    return Row(tuple(parts), f"line {draw(st.integers(1, 9))}")


@settings(max_examples=300, deadline=None)
@given(rows=st.lists(trees(), max_size=8), min_tokens=st.integers(1, 4), max_tokens=st.none() | st.integers(1, 30))
def test_every_path_of_a_merged_row_is_the_path_of_its_original(rows: list[Row], min_tokens: int, max_tokens: int | None) -> None:
    merged = share_prefix(rows, min_tokens, max_tokens)
    assert sorted(member.index for shared in merged for member in shared.members) == list(range(len(rows)))
    assert [shared.members[0].index for shared in merged] == sorted(shared.members[0].index for shared in merged)
    for shared in merged:
        for member in shared.members:
            assert [path(shared.row, leaf) for leaf in member.leaves] == paths(rows[member.index])
        assert sorted(leaf for member in shared.members for leaf in member.leaves) == shared.row.leaves()
        assert shared.row.supervised_tokens == sum(rows[member.index].supervised_tokens for member in shared.members)
        if max_tokens is not None and len(shared.members) > 1:
            assert shared.row.tokens <= max_tokens


def test_few_shot_questions_store_their_examples_once(tokenizer: Make) -> None:
    tok = tokenizer("bytes", "smollm2")
    shots = said("the quick brown", "fox", "over the lazy", "dog")
    rows = [options(tok, [*shots, {"role": "user", "content": f"{n}?"}], ["positive", "negative"], where=f"line {n}") for n in range(5)]
    (shared,) = share_prefix(rows)
    prompts = [len(row.segments[0]) for row in rows]
    assert shared.row.segments[0].name == "shared" and shared.row.tokens < sum(row.tokens for row in rows) - 4 * (min(prompts) - 20)
    assert [shared.row.segments[leaf].name for leaf in shared.members[3].leaves] == ["positive", "negative"]
    assert shared.row.where == "line 0 and 4 more"
    apart = share_prefix([single([1, 2, 3], [False, True, True]), single([1, 2, 4], [False, True, True])], min_tokens=2)
    assert len(apart) == 2, "a supervised token counts once for each row, so it is not shared"
    with pytest.raises(ValueError, match="min_tokens"):
        share_prefix(rows, 0)


def same(first: Sequence[TextRow], second: Sequence[TextRow]) -> bool:
    def content(row: TextRow) -> Any:
        return row.segments[0].ids.tolist(), row.segments[0].supervised.tolist(), row.where, row.cuttable, row.notes

    return [content(row) for row in first] == [content(row) for row in second]


def test_kept_rows_are_the_rows_and_are_found_by_content_alone(tokenizer: Make, tmp_path: Path) -> None:
    tok = tokenizer("bytes", "qwen3")
    records = [record("the", f"fox </s> {n}", "a", "b", where=f"line {n}") for n in range(600)]
    fresh = to_rows(tok, records)
    cache = RowCache(tmp_path)
    assert same(to_rows(tok, records, cache=cache), fresh) and (cache.hits, cache.misses) == (0, 2)
    assert same(to_rows(tok, records, cache=cache), fresh) and cache.hits == 2
    moved = [Record("messages", messages=one.messages, where=f"other, {one.where}") for one in records]
    again = to_rows(tok, moved, cache=cache)
    assert cache.hits == 4 and again[0].where == "other, line 0", "where is not part of the content"
    for change in ({"supervise": "last"}, {"template": tokenizer("bytes", "llama3").chat_template}):
        before = cache.misses
        to_rows(tok, records, cache=cache, **change)  # type: ignore[arg-type]
        assert cache.misses == before + 2


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "text"])
def test_a_damaged_entry_is_made_anew(tokenizer: Make, tmp_path: Path, damage: str) -> None:
    tok = tokenizer("bytes", "chatml")
    records = [record("the", f"fox {n}") for n in range(20)]
    fresh = to_rows(tok, records, cache=RowCache(tmp_path))
    (entry,) = tmp_path.glob("*.safetensors")
    data = bytearray(entry.read_bytes())
    if damage == "flip":
        data[-40] ^= 1
    entry.write_bytes({"flip": bytes(data), "cut": bytes(data[:-9]), "empty": b"", "text": b"hello" * 99}[damage])
    cache = RowCache(tmp_path)
    assert same(to_rows(tok, records, cache=cache), fresh) and cache.misses == 1
    assert same(to_rows(tok, records, cache=cache), fresh) and cache.hits == 1, "and kept again"


def test_a_full_disk_costs_the_cache_and_not_the_rows(tokenizer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    tok = tokenizer("bytes", "chatml")
    monkeypatch.setattr("tunesmith.data.rowcache.os.replace", full)
    cache = RowCache(tmp_path)
    assert len(to_rows(tok, [record("the", "fox")], cache=cache)) == 1
    assert cache.problem and "No space left" in cache.problem and list(tmp_path.iterdir()) == []


def test_an_answer_with_nothing_before_it_starts_with_a_token_that_is_not_trained_on(tokenizer: Make) -> None:
    tok = tokenizer("bytes")
    (row,) = to_rows(tok, [Record("prompt", messages=said("", "the fox"))])
    assert trained(tok, row).endswith("fox</s>") and not row.segments[0].supervised[0]
    assert any("first token of a row" in note for note in row.notes)
    assert prompt(tok, said("x")).ids == tok("x", add_special_tokens=False)["input_ids"]
