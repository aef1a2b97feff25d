"""The page: what stands on it, that it is safe, and that it needs nothing from elsewhere."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser

import pytest

from tunesmith.core.errors import DataError
from tunesmith.report import Report, to_html
from tunesmith.report.schema import ClassScore, Confusion

VOID = {"meta", "link", "br", "hr", "img", "input", "line", "rect", "circle", "polyline"}
ATTACK = "</script></style><script>alert('x')</script><img src=x onerror=alert(1)>\"'><svg/onload=alert(2)>{{ 7*7 }}&amp;"


class Page(HTMLParser):
    """The page as a parser sees it: elements with their attributes, text, and whether all elements are closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.by_id: dict[str, str] = {}
        self.mismatched: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.mismatched.append(tag)

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"[\s\u00a0]+", " ", "".join(self.words))

    def count(self, tag: str, **attributes: str) -> int:
        return sum(
            name == tag and all(value in attrs.get(key, "").split() for key, value in attributes.items()) for name, attrs in self.elements
        )


@pytest.fixture(scope="module")
def page(sample: Report) -> Page:
    return Page(to_html(sample))


def test_the_headline_says_what_the_best_prompt_and_the_trained_rung_reach(page: Page) -> None:
    assert "LoRA reaches 83 % where the best prompt reaches 58 %." in page.text
    assert "+24.9 points" in page.text
    assert "p < 0.001 after correction for all comparisons" in page.text


def test_every_section_stands_on_the_page_and_every_link_of_the_navigation_leads_to_one(page: Page) -> None:
    ids = {attrs["id"] for _, attrs in page.elements if "id" in attrs}
    links = {attrs["href"].removeprefix("#") for tag, attrs in page.elements if tag == "a"}
    assert links <= ids
    assert {"accuracy", "cost", "figures", "training", "confusion", "classes", "questions", "prompts", "settings"} <= ids


def test_every_rung_has_its_score_interval_cost_and_verdict(page: Page, sample: Report) -> None:
    for rung in sample.rungs:
        assert f"{rung.accuracy * 100:.1f} %" in page.text
        assert f"{rung.ci_low * 100:.1f} to {rung.ci_high * 100:.1f}" in page.text
    assert page.count("circle", **{"class": "dot"}) == len(sample.rungs)
    assert "4 min 12 s" in page.text and "1.62 s" in page.text
    assert "? undecided" in page.text and "▼ worse" in page.text and "▲ better" in page.text
    assert "640 more" in page.text


def test_questions_show_wins_first_then_losses_with_every_rungs_answer_marked(sample: Report) -> None:
    page = Page(to_html(sample))
    kinds = [
        attrs["class"] for tag, attrs in page.elements if tag == "li" and attrs.get("class") in ("won", "lost", "mixed", "wrong", "right")
    ]
    assert len(kinds) == len(sample.questions) == 20
    assert kinds == sorted(kinds, key=["won", "lost", "mixed", "wrong", "right"].index)
    marks = Counter(attrs["aria-label"] for _, attrs in page.elements if attrs.get("class") == "mark")
    answers = [answer for question in sample.questions for answer in question.answers.values()]
    assert marks == Counter("right" if answer.correct else "wrong" for answer in answers)


def test_an_unparseable_answer_is_named_so_and_shows_what_was_said(page: Page) -> None:
    assert "(unparseable)" in page.text
    assert "The tweet mentions a show. Let me think about" in page.text


def test_prompts_show_special_tokens_line_ends_and_trailing_spaces_and_copy_as_the_exact_text(sample: Report) -> None:
    html = to_html(sample)
    assert '<span class="token">&lt;|im_start|&gt;</span>system<span class="end"></span>' in html
    assert '<span class="space"> </span><span class="end"></span>' in html
    pres = [Page(body).words for body in re.findall(r"<pre[^>]*>\n(.*?)</pre>", html, re.DOTALL)]
    assert ["".join(words) for words in pres][: len(sample.rungs)] == [rung.prompt for rung in sample.rungs]


def test_the_confusion_matrix_shows_the_best_prompt_beside_the_recommended_rung_and_the_others_folded(page: Page) -> None:
    assert page.count("figure", **{"class": "matrix"}) == 5
    assert "The other 3 rungs" in page.text


def test_text_of_the_report_never_becomes_markup(variant: Callable[..., Report], sample: Report) -> None:
    benign = Page(to_html(sample))
    question = sample.questions[0].model_dump()
    question |= {"text": ATTACK, "gold": ATTACK}
    question["answers"] = {name: {**answer, "text": ATTACK, "label": ATTACK} for name, answer in question["answers"].items()}
    rungs = [rung.model_dump() for rung in sample.rungs]
    for rung in rungs:
        rung |= {"title": f"{rung['title']} {ATTACK}", "description": ATTACK, "prompt": ATTACK, "settings": {ATTACK: ATTACK}}
        rung["confusion"]["labels"] = [f"{label}{ATTACK}" for label in rung["confusion"]["labels"]]
        for score in rung["classes"]:
            score["label"] += ATTACK
    report = variant(
        title=ATTACK,
        task=ATTACK,
        base=ATTACK,
        created=ATTACK,
        labels=[ATTACK, "b"],
        rungs=rungs,
        questions=[question, *[q.model_dump() for q in sample.questions[1:]]],
        recommendation={"rung": "lora", "reason": ATTACK},
        notes=[ATTACK],
        settings={"a": {"b": ATTACK}},
        environment={ATTACK: [ATTACK]},
        interval_method=ATTACK,
        paired_test=ATTACK,
        command=ATTACK,
        metric="accuracy",
    )
    page = Page(to_html(report))
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in benign.elements}
    assert "script" not in {tag for tag, _ in page.elements}
    assert not [key for _, attrs in page.elements for key in attrs if key.startswith("on")]
    assert "alert('x')" in page.text and "{{ 7*7 }}" in page.text, "it is shown as it was written"
    assert page.mismatched == [] and page.open == []


def test_the_page_needs_nothing_from_elsewhere_and_runs_no_script(sample: Report, page: Page) -> None:
    html = to_html(sample)
    assert not [attrs for _, attrs in page.elements if {"src", "srcset", "data", "poster", "xlink:href", "action"} & attrs.keys()]
    assert all(attrs["href"].startswith("#") for _, attrs in page.elements if "href" in attrs)
    assert not re.search(r"url\(|@import|https?://|<script|<link|<iframe|<base", html)
    policy = next(
        attrs["content"] for tag, attrs in page.elements if tag == "meta" and attrs.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none'") and "script-src" not in policy


def test_a_page_of_five_rungs_is_lighter_than_a_quarter_of_a_megabyte(sample: Report) -> None:
    assert len(to_html(sample).encode()) < 250_000


def test_pictures_have_words_for_those_who_do_not_see_them(page: Page) -> None:
    plots = [attrs for tag, attrs in page.elements if tag == "svg" and "plot" in attrs.get("class", "")]
    assert plots and all(attrs["role"] == "img" and "step" in attrs["aria-label"] for attrs in plots)
    unnamed = [attrs for tag, attrs in page.elements if tag == "svg" and attrs.get("class") == "plot" and not attrs.get("aria-label")]
    assert not unnamed
    headers = [attrs for tag, attrs in page.elements if tag == "th"]
    assert all(attrs.get("scope") in ("col", "row") for attrs in headers)


def test_all_elements_are_closed_in_order_and_ids_are_unique(page: Page) -> None:
    assert page.mismatched == [] and page.open == []
    ids = Counter(attrs["id"] for _, attrs in page.elements if "id" in attrs)
    assert max(ids.values()) == 1


@pytest.mark.parametrize("number", [1, 2, 3, 12])
def test_a_ladder_of_any_length_is_drawn(number: int, variant: Callable[..., Report], sample: Report) -> None:
    rungs = [
        sample.rungs[i % 5].model_copy(update={"name": f"r{i}", "title": f"Rung {i}", "versus_previous": None, "versus_best_before": None})
        for i in range(number)
    ]
    report = variant(rungs=[rung.model_dump() for rung in rungs], recommendation={"rung": f"r{number - 1}", "reason": "It is the last."})
    page = Page(to_html(report))
    assert page.count("circle", **{"class": "dot"}) == number
    assert f"Rung {number - 1} reaches" in page.text
    assert page.mismatched == [] and page.open == []


def test_a_generative_task_has_no_confusions_no_classes_and_no_percent(variant: Callable[..., Report], sample: Report) -> None:
    rungs = [rung.model_copy(update={"confusion": None, "classes": [], "curve": [], "prompt": ""}).model_dump() for rung in sample.rungs]
    question = {
        "id": "1",
        "text": "请概括通知。",
        "gold": "航班延误",
        "answers": {"lora": {"text": "航班延误两小时 " * 90, "label": None, "correct": True, "score": 0.71}},
    }
    page = Page(to_html(variant(metric="rouge-l", labels=[], rungs=rungs, questions=[question], paired_test="paired bootstrap")))
    ids = {attrs["id"] for _, attrs in page.elements if "id" in attrs}
    assert not ids & {"confusion", "classes", "training", "prompts"}
    assert "LoRA reaches 0.829 where the best prompt reaches 0.580." in page.text
    assert "ROUGE-L by rung" in page.text and "航班延误" in page.text and "0.71" in page.text
    assert "(unparseable)" not in page.text and "largest class" not in page.text and "Macro F1" not in page.text


def test_many_labels_show_the_most_frequent_confusions_in_words(variant: Callable[..., Report], sample: Report) -> None:
    labels = [f"intent {i}" for i in range(30)]
    counts = [[9 if i == j else 0 for j in range(30)] for i in range(30)]
    counts[4][7] = 5
    wide = {
        "confusion": Confusion(labels=labels, gold=labels, counts=counts),
        "classes": [ClassScore(label=label, precision=0.5, recall=0.5, f1=0.5, support=9) for label in labels],
    }
    page = Page(to_html(variant(labels=labels, rungs=[rung.model_copy(update=wide).model_dump() for rung in sample.rungs])))
    assert "5 intent 4 → intent 7" in page.text


def test_a_recommendation_of_no_rung_and_a_ladder_without_rungs_are_refused(variant: Callable[..., Report]) -> None:
    with pytest.raises(DataError, match="none of its rungs"):
        to_html(variant(recommendation={"rung": "qlora", "reason": ""}))
    with pytest.raises(DataError, match="no rung"):
        to_html(variant(rungs=[]))
