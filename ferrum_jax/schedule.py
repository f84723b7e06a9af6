"""Who is on the device: a queue, slots, pages, and who gives way where pages run out. On the host, without a model."""

from __future__ import annotations

import collections
import dataclasses

from ferrum_jax.errors import CapacityError
from ferrum_jax.pages import PageAllocator
from ferrum_jax.requests import Answer
from ferrum_jax.sampling import SamplerPlan, SamplingParams


@dataclasses.dataclass(eq=False, slots=True)
class Sequence:
    """A request: in the queue, or on the device with a slot and pages.

    Attributes:
      id: its number, and its place in the order of arrival.
      sampling: as asked for, with a seed.
      plan: stages of sampling it needs.
      answer: its text so far.
      tokens: the prompt, and what has been sampled and seen by the host.
      prompt_tokens: how many of them are the prompt.
      began: clock at submission.
      compiled_before: seconds of compilation until then.
      slot: its row of the device's state, -1 in the queue.
      held: tokens in the cache, or on their way there.
      target: tokens it reads before it samples.
      ahead: tokens sampled on the device that the host has not seen.
      turn: how often it has been on the device; results of an earlier turn are stale.
      first: seconds from submission to its first token, 0.0 before.
    """

    id: int
    sampling: SamplingParams
    plan: SamplerPlan
    answer: Answer
    tokens: list[int]
    prompt_tokens: int
    began: float = 0.0
    compiled_before: float = 0.0
    slot: int = -1
    held: int = 0
    target: int = 0
    ahead: int = 0
    turn: int = 0
    first: float = 0.0

    @property
    def generated(self) -> int:
        """Tokens of its answer that the host has seen."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def reading(self) -> bool:
        """Whether it is still reading what it will continue."""
        return self.held < self.target

    @property
    def longest(self) -> int:
        """Most tokens it will ever hold: the last one of its answer is given out and never read."""
        return self.prompt_tokens + self.answer.limit - 1

    @property
    def remaining(self) -> int:
        """Tokens to read before it samples."""
        return self.target - self.held


class Schedule:
    """First come, first served; the newest gives way, so the oldest always ends and everyone's turn comes.

    Attributes:
      queue: not on the device, by arrival.
      running: on the device, by arrival.
      pages: who owns which page.
      preemptions: how often a sequence gave way.
    """

    def __init__(self, slots: int, pages: int, page: int) -> None:
        """Nobody is there.

        Args:
          slots: sequences on the device together.
          pages: of the pool.
          page: tokens of a page.
        """
        self.page, self.slots = page, slots
        self.queue: collections.deque[Sequence] = collections.deque()
        self.running: list[Sequence] = []
        self.pages = PageAllocator(pages)
        self.preemptions = 0
        self._free_slots = list(range(slots))[::-1]

    def pages_for(self, tokens: int) -> int:
        """Pages that so many tokens fill."""
        return -(-tokens // self.page)

    def add(self, sequence: Sequence) -> None:
        """Put a request into the queue.

        Raises:
          CapacityError: all pages together could not hold it.
        """
        if (needed := self.pages_for(sequence.longest)) > self.pages.pages:
            raise CapacityError(
                f"a prompt of {sequence.prompt_tokens} tokens and an answer of up to {sequence.answer.limit} need "
                f"{needed} pages of {self.page}; this engine has {self.pages.pages}. Ask for fewer tokens, or make the "
                f"engine with more pages."
            )
        self.queue.append(sequence)

    def let_in(self) -> list[Sequence]:
        """Give slots and pages to the front of the queue as long as there are both; returns who got in."""
        came = []
        while self.queue and self._free_slots:
            sequence = self.queue[0]
            # All it has to read and a token more, so that it is not thrown out before it says something.
            wanted = min(len(sequence.tokens) + 1, sequence.longest)
            if not self.pages.grow(sequence.id, self.pages_for(wanted)):
                break
            self.queue.popleft()
            sequence.slot, sequence.held, sequence.target = self._free_slots.pop(), 0, len(sequence.tokens)
            sequence.ahead, sequence.turn = 0, sequence.turn + 1
            self.running.append(sequence)
            came.append(sequence)
        return came

    def readers(self) -> list[Sequence]:
        """Who has something to read, by arrival."""
        return [sequence for sequence in self.running if sequence.reading]

    def decoders(self) -> list[Sequence]:
        """Who goes on by a token, each with a page for it; where pages run out, the newest go back to the queue."""
        rows: list[Sequence] = []
        for sequence in list(self.running):
            ended = sequence.answer.count + sequence.ahead >= sequence.answer.limit
            if sequence.slot < 0 or sequence.reading or ended:
                continue
            while sequence.slot >= 0 and not self.pages.grow(sequence.id, self.pages_for(sequence.held + 1)):
                self._preempt(self.running[-1])
            if sequence.slot >= 0:
                rows.append(sequence)
        return rows

    def leave(self, sequence: Sequence) -> None:
        """Take a sequence off the device. Programs under way may still write its pages; later ones run after them."""
        self.pages.release(sequence.id)
        self.running.remove(sequence)
        self._free_slots.append(sequence.slot)
        sequence.slot = -1

    def cancel(self, id: int) -> bool:
        """Forget a request; False when it is neither in the queue nor on the device."""
        for sequence in self.running:
            if sequence.id == id:
                self.leave(sequence)
                return True
        for sequence in self.queue:
            if sequence.id == id:
                self.queue.remove(sequence)
                return True
        return False

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the front of the queue: what it said is read again, what the host has not seen is drawn again."""
        self.leave(sequence)
        self.queue.appendleft(sequence)
        self.preemptions += 1
