"""Which pages of the KV pool are free, who holds the others, and which hold a known prefix."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

#: A prefix is a chain of nodes, one for each full page; this is the node of the empty prefix.
ROOT = 0


class PagePool:
    """Page numbers 0 to `num_pages` - 1, each free or held by one or more sequences.

    A full page is published under the prefix that it ends. Sequences that begin with that prefix
    hold the same page instead of computing it. A page that its last holder releases is free, but
    keeps its contents, and can be found, until it is taken for something else.

    >>> pool = PagePool(num_pages=3, page_size=2)
    >>> page = pool.take()
    >>> node = pool.publish(ROOT, (5, 6), page)
    >>> pool.find([5, 6, 7]) == ([page], node), pool.find([5, 7, 7]) == ([], ROOT)
    (True, True)
    >>> pool.release([page])
    >>> pool.num_free, pool.find([5, 6, 7]) == ([page], node)
    (3, True)
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages, self.page_size = num_pages, page_size
        self._num_fresh = num_pages  # never taken: the last page numbers
        # Taken from the front: pages without a known prefix first, then the longest released.
        self._free: OrderedDict[int, None] = OrderedDict()
        self._num_holders: dict[int, int] = {}
        self._published: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}
        self._key_of_page: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._num_nodes = ROOT

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return self._num_fresh + len(self._free)

    @property
    def num_used(self) -> int:
        """Pages that somebody holds."""
        return self.num_pages - self.num_free

    @property
    def num_shared(self) -> int:
        """Pages that two or more sequences hold."""
        return sum(num_holders > 1 for num_holders in self._num_holders.values())

    def find(self, tokens: Sequence[int]) -> tuple[list[int], int]:
        """Return the pages of the longest known prefix of `tokens`, and its node.

        At least one token is left over, for a sequence needs its last token's logits.
        """
        pages, node = [], ROOT
        for begin in range(0, len(tokens) - self.page_size, self.page_size):
            key = node, tuple(tokens[begin : begin + self.page_size])
            if key not in self._published:
                break
            page, node = self._published[key]
            pages.append(page)
        return pages, node

    def num_unheld(self, pages: Sequence[int]) -> int:
        """Return how many of `pages` are free: those that holding takes from the free list."""
        return sum(page not in self._num_holders for page in pages)

    def hold(self, pages: Sequence[int]) -> None:
        """Hold found pages, which may be free or have other holders."""
        for page in pages:
            self._free.pop(page, None)
            self._num_holders[page] = self._num_holders.get(page, 0) + 1

    def take(self) -> int:
        """Hold a free page for new contents; there must be one."""
        if self._num_fresh:
            page = self.num_pages - self._num_fresh
            self._num_fresh -= 1
        else:
            page, _ = self._free.popitem(last=False)
        key = self._key_of_page.pop(page, None)
        if key is not None:
            del self._published[key]
        self._num_holders[page] = 1
        return page

    def publish(self, node: int, tokens: tuple[int, ...], page: int) -> int:
        """Make a full page known as what follows the prefix `node`; return the longer prefix.

        Where another page is known for it already, that one stays.
        """
        key = node, tokens
        if key not in self._published:
            self._num_nodes += 1
            self._published[key] = page, self._num_nodes
            self._key_of_page[page] = key
        return self._published[key][1]

    def release(self, pages: Sequence[int]) -> None:
        """Let go of a sequence's pages; the end of a prefix is reused before its beginning."""
        for page in reversed(pages):
            self._num_holders[page] -= 1
            if self._num_holders[page] == 0:
                del self._num_holders[page]
                self._free[page] = None
                if page not in self._key_of_page:
                    self._free.move_to_end(page, last=False)
