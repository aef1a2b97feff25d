"""Rewards that somebody else says: reward models, and scorers at a URL."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from tunesmith.core.errors import SpecError
from tunesmith.rollout.rewarding import RewardError, Scoring, reward
from tunesmith.rollout.sample import Sample

LONGEST_PAUSE = 10.0
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})


@reward("model")
def model(*, source: str, reads: str = "", device: str = "auto", dtype: str = "auto", tokens: int = 4096) -> Scoring:
    """What a reward model says: one of our runs whose head says a choice or a value, or any sequence classifier with one output.

    source: the run's folder, or a model as base.model. The texts are tokenised with the reward model's own tokenizer and template,
    whatever the policy's are. reads: "dialogue" (prompt and answer, the default; without a chat template the two joined), "pair" (as
    two texts) or "answer" (by itself); a run reads what it was trained on. tokens: of a batch.
    """
    from tunesmith.rollout.rewardmodel import READS, RewardModel

    if reads and reads not in READS:
        raise SpecError(f"a reward model reads no '{reads}'.", hints=[f"Known: {', '.join(READS)}"])
    if tokens < 1:
        raise SpecError(f"a batch of {tokens} tokens holds nothing.")
    return RewardModel(source, reads, device, dtype, tokens)


@reward("http")
def http(*, url: str, timeout: float = 60.0, retries: int = 3) -> Scoring:
    """What a scorer at a URL says: it is sent {prompts, completions, answers, fields}, lists of one length, and returns {"rewards": [..]}.

    timeout: seconds of one request. retries: further attempts where there is no connection, no timely answer, or a status that may
    pass (408, 425, 429, 5xx). Redirects are refused: nothing is sent anywhere but to the URL.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SpecError(f"'{url}' is no address of a scorer.", hints=["Form:  http(url=http://127.0.0.1:8000/score)"])
    if not timeout > 0 or retries < 0:
        raise SpecError("http's timeout is above 0, and its retries are at least 0.")

    async def score(samples: Sequence[Sample]) -> list[Any]:
        sent = {
            "prompts": [list(map(dict, sample.prompt)) for sample in samples],
            "completions": [sample.completion for sample in samples],
            "answers": [sample.answer for sample in samples],
            "fields": [dict(sample.fields) for sample in samples],
        }
        body = json.dumps(sent, default=str).encode()
        for attempt in range(retries + 1):
            try:
                return _rewards(await asyncio.to_thread(_post, url, body, timeout), url, len(samples))
            except _Passing as cause:
                if attempt == retries:
                    what = f"the scorer does not answer: {cause} ({attempt + 1} attempts)."
                    hints = [f"Is it running?  {url}", "More patience:  http(url=..., timeout=120, retries=10)"]
                    raise RewardError(what, where=url, hints=hints) from None
                await asyncio.sleep(min(0.25 * 2**attempt, LONGEST_PAUSE))
        raise AssertionError("unreachable")

    return score


class _Passing(Exception):
    """A failure that may pass."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def _post(url: str, body: bytes, timeout: float) -> bytes:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"}, method="POST")
    handlers: list[Any] = [_NoRedirect()]
    if _loopback(urlsplit(url).hostname or ""):
        handlers.append(urllib.request.ProxyHandler({}))
    try:
        with urllib.request.build_opener(*handlers).open(request, timeout=timeout) as answer:
            read: bytes = answer.read()
            return read
    except urllib.error.HTTPError as cause:
        if cause.code in _PASSING:
            raise _Passing(f"status {cause.code}") from None
        said = cause.read(300).decode("utf-8", "replace")
        raise RewardError(f"the scorer refuses: status {cause.code}. {said}".strip(), where=url) from None
    except (urllib.error.URLError, OSError, HTTPException) as cause:
        raise _Passing(str(getattr(cause, "reason", cause)) or type(cause).__name__) from None


def _loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _rewards(answer: bytes, url: str, count: int) -> list[Any]:
    try:
        found = json.loads(answer)["rewards"]
        fits = isinstance(found, list) and len(found) == count
    except (ValueError, KeyError, TypeError):
        fits = False
    if not fits:
        shown = answer[:120].decode("utf-8", "replace")
        hints = ['Form:  {"rewards": [0.5, null, ...]}']
        raise RewardError(f"the scorer does not return {count} rewards (returned: {shown}).", where=url, hints=hints)
    return list(found)
