"""Who owns which page of a cache: a free list on the host."""

from __future__ import annotations

from collections.abc import Hashable

from ferrum_jax.errors import CapacityError


class PageAllocator:
    """Hands out pages 0 to P - 1; a page has one owner at a time.

    >>> pages = PageAllocator(4)
    >>> pages.grow("a", 3), pages.grow("b", 2), pages.grow("a", 4)
    (True, False, True)
    >>> pages.owned("a"), pages.release("a"), pages.free
    ([0, 1, 2, 3], 4, 4)
    """

    def __init__(self, pages: int) -> None:
        """All pages are free.

        Args:
          pages: P.

        Raises:
          CapacityError: there is no page.
        """
        if pages < 1:
            raise CapacityError(f"a pool of {pages} pages holds nothing; it needs at least 1.")
        self.pages = pages
        # The last given back is the first given out: what is warm in a cache stays in use.
        self._free = list(range(pages))[::-1]
        self._owned: dict[Hashable, list[int]] = {}

    @property
    def free(self) -> int:
        """Pages without an owner."""
        return len(self._free)

    def owned(self, owner: Hashable) -> list[int]:
        """The pages of an owner in the order in which they were given; not a copy, to be read only."""
        return self._owned.get(owner, [])

    def grow(self, owner: Hashable, pages: int) -> bool:
        """Let an owner have `pages` pages in all; False, and nothing changed, when too few are free.

        Args:
          owner: any key.
          pages: how many it shall own; one that owns more keeps them.
        """
        held = self._owned.get(owner, [])
        missing = pages - len(held)
        if missing > len(self._free):
            return False
        if missing > 0:
            self._owned[owner] = held + [self._free.pop() for _ in range(missing)]
        return True

    def release(self, owner: Hashable) -> int:
        """Take all pages of an owner back; returns how many they were."""
        pages = self._owned.pop(owner, [])
        self._free += reversed(pages)
        return len(pages)
