"""The PTX loop of the Mosaic GPU kernel for few rows, followed one instruction after the other on names for numbers."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferrum_kernels.mosaic_cut import Ring, Statics
from ferrum_kernels.mosaic_loop import INPUTS, PLANES, text_of, turns_of

BASES = {name: (i + 1) * 10**7 for i, name in enumerate(("words", "x0", "x1", "scales", "full", "empty"))}
OPERATORS = {
    **{"add.s32": lambda a, b: a + b, "sub.s32": lambda a, b: a - b, "xor.b32": lambda a, b: a ^ b},
    **{"setp.gt.s32": lambda a, b: a > b, "setp.ge.s32": lambda a, b: a >= b, "setp.eq.u32": lambda a, b: a == b},
    **{"and.pred": lambda a, b: a and b, "not.pred": lambda a: not a, "mad.lo.s32": lambda a, b, c: a * b + c},
}


def statics(ring: Ring, groups: int) -> Statics:
    """Of gate and up."""
    return Statics(ring, 8, False, True, 128, groups, 6 * ring.warpgroups * ring.parts * 32, 132)


class Followed:
    """What a thread does: the slots and parities it waits for, those it tells of, and what its sums are made of.

    What is loaded is stood for by the number of the load; what is computed, by those that went into it.
    """

    def __init__(self, s: Statics, columns: int, slot: int, odd: int, groups: int, every: int, lane: int = 0) -> None:
        self.s, self.lane, self.loads = s, lane, 0
        self.waits: list[tuple[int, int]] = []
        self.told: list[int] = []
        count = columns // 8 * s.ring.parts * 4
        self.sums = [f"${i}" for i in range(count)]
        numbers = {"slot": slot, "odd": odd, "turns": turns_of(groups, columns), "every": every, **BASES}
        self.values: dict[str, Any] = {f"${count + i}": numbers[name] for i, name in enumerate(INPUTS)}
        statements = [part.strip() for part in text_of(s, columns, "f16").split(";")]
        self.statements = [re.sub(r"^[{}\s]+", "", part) for part in statements]
        at = 0
        while at < len(self.statements):
            at = self.run(at)

    def run(self, at: int) -> int:
        """One statement; the place of the next."""
        statement = re.sub(r"^\S+:\s*[{}]?\s*", "", self.statements[at]).strip()
        predicate, statement = re.match(r"(?:@(!?\w+)\s+)?(.*)", statement, re.DOTALL).groups()  # pyright: ignore[reportOptionalMemberAccess]
        if not statement or statement.startswith((".reg", "}")):
            return at + 1
        if predicate and bool(self.values[predicate.lstrip("!")]) is predicate.startswith("!"):
            return at + 1
        name, _, rest = statement.partition(" ")
        operands = re.findall(r"[$%\w.+-]+", rest)
        if name == "bra":
            # The nearest of that name: a label holds for what is in braces with it.
            places = (i for i, other in enumerate(self.statements) if other.startswith(f"{rest.strip()}:"))
            return min(places, key=lambda i: abs(i - at))
        self.execute(name, operands)
        return at + 1

    def execute(self, name: str, operands: list[str]) -> None:
        if name.startswith("mbarrier.try_wait"):
            done, address, odd, _ = operands
            self.waits.append((self.slot(address, "full", 8), self.value(odd)))
            self.values[done] = True
            self.loads += 1
        elif name.startswith("mbarrier.arrive"):
            _, address, every = operands
            self.told += [self.slot(address, "empty", 8)] * self.value(every)
        elif name.startswith(("ldmatrix", "ld.shared")):
            *into, address = operands
            # What is read is of the slot that was waited for.
            base, size = next((b, z) for b, z in self.rings() if b <= self.value(address.split("+")[0]) < b + 10**7)
            assert (self.value(address.split("+")[0]) - base) // size == self.waits[-1][0]
            self.values |= {register: Counter([self.loads]) for register in into}
        elif name.startswith("mma"):
            sums, left, right, before = operands[:4], operands[4:8], operands[8:10], operands[10:]
            [load] = {tuple(self.value(operand)) for operand in left + right}
            for i, into in enumerate(sums):
                self.values[into] = (self.value(before[i]) or Counter()) + Counter(load)
        elif name.startswith("fma.rn.f32"):
            into, product, scale, before = operands
            assert set(self.value(product)) == set(self.value(scale)), "products of one group by another's scale"
            self.values[into] = (self.value(before) or Counter()) + self.value(product)
        elif name.startswith(("fma.rn.bf16x2", "lop3", "and.b32", "shr", "cvt")):
            self.values[operands[0]] = self.value(operands[1])
        elif name.startswith("mov"):
            self.values[operands[0]] = self.value(operands[1])
        elif not name.startswith("bar.warp.sync"):
            self.values[operands[0]] = OPERATORS[name](*map(self.value, operands[1:]))

    def rings(self) -> list[tuple[int, int]]:
        ring = self.s.ring
        sizes = {"words": ring.outputs * 64, "x0": ring.block * 256, "x1": ring.block * 256, "scales": ring.outputs * 2}
        return [(BASES[name], size) for name, size in sizes.items()]

    def slot(self, address: str, base: str, size: int) -> int:
        return (self.value(address) - BASES[base]) // size

    def value(self, operand: str) -> Any:
        if operand == "%laneid":
            return self.lane
        if re.fullmatch(r"-?\d+|0x[0-9a-f]+", operand):
            return int(operand, 0)
        return None if operand == "0f00000000" else self.values[operand]


RINGS = st.builds(
    lambda columns, parts, stages: Ring(columns, parts, stages, alone=True, warpgroups=2 if parts == 2 else 4),
    st.sampled_from([(8, 16, 32), (8, 24), (16,)]),
    st.sampled_from([1, 2]),
    st.integers(2, 5),
)


@settings(deadline=None)
@given(RINGS, st.integers(1, 9), st.integers(0, 30), st.data())
def test_each_group_is_waited_for_multiplied_once_and_told_of_once(ring, groups, step, data):
    columns = data.draw(st.sampled_from(ring.columns))
    found = Followed(statics(ring, groups), columns, step % ring.stages, step // ring.stages % 2, groups, 1)
    steps = range(step, step + groups)
    assert found.waits == [(k % ring.stages, k // ring.stages % 2) for k in steps]
    assert found.told == [k % ring.stages for k in steps]
    # Eight products of 16 inputs each, of every group.
    assert all(found.values[i] == Counter(dict.fromkeys(range(1, groups + 1), 2 * PLANES)) for i in found.sums)


@settings(deadline=None)
@given(st.integers(3, 5), st.sampled_from([4, 8, 12]), st.integers(0, 30), st.sampled_from([8, 16, 32]), st.booleans())
def test_of_a_shared_turn_every_other_group(stages, groups, step, columns, second):
    ring = Ring((8, 16, 32), stages=stages, alone=True, shared=True)
    step += second
    found = Followed(statics(ring, groups), columns, step % stages, step // stages % 2, groups // 2, 2)
    steps = range(step, step + groups, 2)
    assert found.waits == [(k % stages, k // stages % 2) for k in steps]
    assert found.told == [k % stages for k in steps for _ in range(2)]  # for the other warpgroup as well
    assert all(set(found.values[i]) == set(range(1, groups // 2 + 1)) for i in found.sums)


def test_one_lane_of_a_warp_tells():
    ring = Ring((8, 16, 32), alone=True)
    assert Followed(statics(ring, 4), 8, 0, 0, 4, 1, lane=1).told == []


@pytest.mark.parametrize("columns", [8, 16, 32])
@pytest.mark.parametrize(("scales", "instruction"), [("f16", "cvt.f32.f16 scale0, as0;"), ("bf16", "{none, as0};")])
def test_scales_of_both_types_are_widened(columns, scales, instruction):
    assert instruction in text_of(statics(Ring((8, 16, 32), alone=True), 4), columns, scales)
