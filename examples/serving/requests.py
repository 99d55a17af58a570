"""The requests to serve, read from a file of JSON lines."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ridgeline.demo.generate import GREEDY, Sampler, wrong_setting
from ridgeline.demo.model_folder import DemoError

FORMAT = '{"arrival": 0.5, "prompt": "It was", "max_tokens": 40}'
SETTINGS = ("temperature", "top_k", "top_p", "min_p", "seed")
KEYS = ("arrival", "prompt", "max_tokens", "id", *SETTINGS)


@dataclass(frozen=True)
class Request:
    """A prompt that arrives `arrival` seconds after the start and asks for `max_tokens` bytes.

    `sampler` is how each of these is chosen; its default is greedy.
    """

    name: str
    arrival: float
    prompt: bytes
    max_tokens: int
    sampler: Sampler = GREEDY

    @property
    def num_cached(self) -> int:
        """Most tokens whose keys and values the request ever needs: all but the last."""
        return len(self.prompt) + self.max_tokens - 1

    def __str__(self) -> str:
        return (
            f"request {self.name}: a prompt of {len(self.prompt)} bytes and max_tokens "
            f"{self.max_tokens}"
        )


def read_requests(path: Path) -> list[Request]:
    """Read a file of requests, and sort them by arrival.

    Raises
    ------
    DemoError
        When the file cannot be read, or a line is no request; the message names the line.
    """
    if not path.is_file():
        what = "is no file" if path.exists() else "does not exist"
        raise DemoError(f"--requests {path}: {what}; pass a file with lines such as {FORMAT}")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DemoError(f"--requests {path} cannot be read: {error}") from None
    requests: list[Request] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            requests.append(_parse(f"{path}, line {number}", line, len(requests) + 1))
    if not requests:
        raise DemoError(f"--requests {path} holds no request; a line is such as {FORMAT}")
    names = [request.name for request in requests]
    for name in names:
        if names.count(name) > 1:
            raise DemoError(f"{path}: {names.count(name)} requests have the id {name!r}")
    return sorted(requests, key=lambda request: request.arrival)


def _parse(place: str, line: str, number: int) -> Request:
    try:
        raw = json.loads(line)
    except ValueError as error:
        raise DemoError(f"{place} is not JSON ({error}); a line is such as {FORMAT}") from None
    if not isinstance(raw, dict):
        raise DemoError(f"{place} is not a JSON object; a line is such as {FORMAT}")
    unknown = [key for key in raw if key not in KEYS]
    if unknown:
        raise DemoError(f"{place}: unknown key {unknown[0]!r}; known are {', '.join(KEYS)}")
    arrival = _take(place, raw, "arrival", (int, float), "a number of seconds")
    if not (math.isfinite(arrival) and arrival >= 0):
        raise DemoError(f"{place}: arrival is {arrival}; expected 0 seconds or more")
    prompt = _take(place, raw, "prompt", (str,), "a text")
    if not prompt:
        raise DemoError(f"{place}: prompt is empty; give it at least one character")
    max_tokens = _take(place, raw, "max_tokens", (int,), "a whole number")
    if max_tokens < 1:
        raise DemoError(f"{place}: max_tokens is {max_tokens}; expected at least 1")
    name = _take(place, {"id": f"r{number:02}"} | raw, "id", (str,), "a text")
    encoded = prompt.encode("utf-8", errors="replace")
    return Request(name, float(arrival), encoded, max_tokens, _sampler(place, raw, number))


def _sampler(place: str, raw: dict[str, Any], default_seed: int) -> Sampler:
    settings = {"seed": default_seed}
    for name in SETTINGS:
        is_whole = name in ("top_k", "seed")
        if name in raw:
            types, what = ((int,), "a whole number") if is_whole else ((int, float), "a number")
            settings[name] = _take(place, raw, name, types, what)
    sampler = Sampler(**settings)
    if wrong := wrong_setting(sampler):
        name, value, expected = wrong
        raise DemoError(f"{place}: {name} is {value}; expected {expected}")
    return sampler


def _take(place: str, raw: dict[str, Any], key: str, types: tuple[type, ...], what: str) -> Any:
    if key not in raw:
        raise DemoError(f"{place} has no {key!r}; a line is such as {FORMAT}")
    if not isinstance(raw[key], types) or isinstance(raw[key], bool):
        raise DemoError(f"{place}: {key} is {raw[key]!r}; expected {what}")
    return raw[key]


def check_context(requests: Sequence[Request], context: int) -> None:
    """Raise a `DemoError` for a request that is longer than the model's context."""
    for request in requests:
        if len(request.prompt) + request.max_tokens > context:
            raise DemoError(f"{request} are more than the model's context of {context}; shorten it")


def check_pool(requests: Sequence[Request], num_pages: int, page_size: int) -> None:
    """Raise a `DemoError` for a request that the pool cannot hold even alone."""
    for request in requests:
        needed = -(-request.num_cached // page_size)
        if needed > num_pages:
            raise DemoError(
                f"{request} need {needed} pages of {page_size} tokens, and the pool has "
                f"{num_pages}; pass --pages {needed} or more"
            )
