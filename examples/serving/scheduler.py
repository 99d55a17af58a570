"""Which requests run, and how many tokens of each a step computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Items
from dataclasses import dataclass

from .pool import ROOT, PagePool
from .requests import Request, check_pool


class Sequence:
    """A request's tokens, and how many of them have keys and values in the pool."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.tokens = list(request.prompt)
        self.times: list[float] = []  # of the written tokens
        self.num_pauses = 0
        self.num_reused = 0  # tokens whose pages were found when it was first admitted
        self.reset()

    def reset(self) -> None:
        """Forget what was computed, but no token."""
        self.pages: list[int] = []
        self.num_computed = 0
        self.node, self.num_published = ROOT, 0

    @property
    def num_left(self) -> int:
        """Known tokens without keys and values: 1 while it decodes."""
        return len(self.tokens) - self.num_computed

    @property
    def written(self) -> list[int]:
        """The tokens that continue the prompt."""
        return self.tokens[len(self.request.prompt) :]

    @property
    def is_done(self) -> bool:
        """Whether all that was asked for is written."""
        return len(self.times) == self.request.max_tokens


@dataclass(frozen=True)
class Part:
    """A sequence's share of a step: its next `num_tokens` tokens."""

    sequence: Sequence
    num_tokens: int


class Scheduler:
    """Continuous batching, first come, first served.

    Running sequences decode a token each step; what is left of `max_batch_tokens` goes to prompts,
    a chunk at a time, in the order of arrival. When a sequence needs a page and none is free, the
    one that came last is paused: it gives its pages back, waits at the head of the queue with the
    tokens that it has, and computes them again later (where their pages are gone).

    Parameters
    ----------
    requests
        In the order of their arrival.
    pool
        Large enough for each of them alone.
    max_requests, max_batch_tokens
        Most sequences that run, and most tokens of a step; the second is the larger.

    Raises
    ------
    DemoError
        When the pool cannot hold one of the requests, which would then wait for ever.
    """

    def __init__(
        self, requests: Items[Request], pool: PagePool, max_requests: int, max_batch_tokens: int
    ) -> None:
        check_pool(requests, pool.num_pages, pool.page_size)
        self.pool = pool
        self.max_requests, self.max_batch_tokens = max_requests, max_batch_tokens
        self.sequences = [Sequence(request) for request in requests]
        self.waiting = deque(self.sequences)
        self.running: list[Sequence] = []

    @property
    def is_done(self) -> bool:
        """Whether every request has what it asked for."""
        return not self.waiting and not self.running

    def num_waiting(self, now: float) -> int:
        """Return how many requests have arrived by `now` and do not run."""
        return sum(sequence.request.arrival <= now for sequence in self.waiting)

    def plan(self, now: float) -> list[Part]:
        """Pause and admit sequences, and return what the next step computes.

        The list is empty only when nothing runs and nothing has arrived.
        """
        self._grow()
        self._admit(now)
        room = self.max_batch_tokens - sum(sequence.num_left == 1 for sequence in self.running)
        parts = []
        for sequence in self.running:
            num_tokens = 1
            if sequence.num_left > 1:
                num_tokens = min(sequence.num_left, room)
                room -= num_tokens
            if num_tokens:
                parts.append(Part(sequence, num_tokens))
        return parts

    def _grow(self) -> None:
        """Give every running sequence the pages of its tokens, the oldest first."""
        for sequence in list(self.running):
            while sequence.pages and self._num_missing(sequence):
                if not self.pool.num_free:
                    self._pause(self.running.pop())
                else:
                    sequence.pages.append(self.pool.take())

    def _num_missing(self, sequence: Sequence) -> int:
        return -(-len(sequence.tokens) // self.pool.page_size) - len(sequence.pages)

    def _pause(self, sequence: Sequence) -> None:
        self.pool.release(sequence.pages)
        sequence.reset()
        sequence.num_pauses += 1
        self.waiting.appendleft(sequence)

    def _admit(self, now: float) -> None:
        """Start what has arrived and fits, in order, with the pages of its whole prompt.

        Why a page is left for every running sequence: without it, the next to grow would pause what
        has just been admitted.
        """
        while self.waiting and len(self.running) < self.max_requests:
            sequence = self.waiting[0]
            if sequence.request.arrival > now:
                return
            found, node = self.pool.find(sequence.tokens)
            num_new = self._num_missing(sequence) - len(found)
            needed = num_new + self.pool.num_unheld(found) + len(self.running)
            if needed > self.pool.num_free:
                return
            self.waiting.popleft()
            self.pool.hold(found)
            sequence.pages = found + [self.pool.take() for _ in range(num_new)]
            sequence.node, sequence.num_published = node, len(found)
            sequence.num_computed = len(found) * self.pool.page_size
            if not sequence.num_pauses:
                sequence.num_reused = sequence.num_computed
            self.running.append(sequence)

    def finish(self, parts: Items[Part], chosen: Items[int], now: float) -> list[Sequence]:
        """Record what a step computed.

        Parameters
        ----------
        parts
            What `plan` returned.
        chosen
            The token that follows each part; it counts where the part was the sequence's last.
        now
            When it was there.

        Returns
        -------
        list of Sequence
            Those with a new token.
        """
        grown = []
        for part, token in zip(parts, chosen, strict=True):
            sequence = part.sequence
            sequence.num_computed += part.num_tokens
            self._publish(sequence)
            if sequence.num_left:
                continue
            sequence.tokens.append(token)
            sequence.times.append(now)
            grown.append(sequence)
            if sequence.is_done:
                self.running.remove(sequence)
                self.pool.release(sequence.pages)
                sequence.reset()
        return grown

    def _publish(self, sequence: Sequence) -> None:
        """Make the pages that were filled known to requests with the same prefix."""
        size = self.pool.page_size
        while (sequence.num_published + 1) * size <= sequence.num_computed:
            place = sequence.num_published
            tokens = tuple(sequence.tokens[place * size : (place + 1) * size])
            sequence.node = self.pool.publish(sequence.node, tokens, sequence.pages[place])
            sequence.num_published += 1
