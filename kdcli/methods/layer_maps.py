"""Which teacher layer a student layer follows (Udagawa et al. 2023, HS transfer). All numbers count blocks from 1."""

import math
import random as random_module

from kdcli.errors import InputError
from kdcli.words import counted

Pairs = list[tuple[int, int]]
"""(student block, teacher block); teacher 0 is the embedding output."""


def last(student: int, teacher: int) -> Pairs:
    """Only the last block follows the last."""
    return [(student, teacher)]


def uniform(student: int, teacher: int) -> Pairs:
    """Block i follows block round(i N / n), but never the embeddings: 12 -> 4 gives 3, 6, 9, 12."""
    return [(i, max(1, math.floor(i * teacher / student + 0.5))) for i in range(1, student + 1)]


def last_k(student: int, teacher: int) -> Pairs:
    """The student follows the teacher's top n blocks."""
    return [(i, teacher - student + i) for i in range(1, student + 1)]


def every(student: int, teacher: int) -> Pairs:
    """Block i follows block i; depths must be equal."""
    if student != teacher:
        raise InputError(
            f'the layer map "all" needs equal depths, not {student} and {teacher}',
            where="method.layer_map",
            hint='use "uniform"',
        )
    return [(i, i) for i in range(1, student + 1)]


def uniform_consecutive(student: int, teacher: int, *, half_open: bool = False) -> Pairs:
    """Block i follows blocks k(i-1) to k i, with k = ceil(N / n), clipped to the teacher's depth.

    The interval is closed, so that it starts at the embedding output; `half_open` leaves out k(i-1).
    """
    k = math.ceil(teacher / student)
    first = 1 if half_open else 0
    return [(i, j) for i in range(1, student + 1) for j in range(k * (i - 1) + first, min(k * i, teacher) + 1)]


def uniform_last(student: int, teacher: int) -> Pairs:
    """Block i follows both its uniform and its last-k block."""
    both = zip(uniform(student, teacher), last_k(student, teacher), strict=True)
    return [pair for pairs in both for pair in dict.fromkeys(pairs)]


def random(student: int, teacher: int, seed: int = 0, epoch: int = 0) -> Pairs:
    """The student follows a random sorted choice of n teacher blocks, another one in every epoch (RAIL-KD)."""
    chosen = sorted(random_module.Random(f"{seed}, {epoch}").sample(range(1, teacher + 1), student))
    return list(enumerate(chosen, 1))


MAPS = {
    "last": last,
    "uniform": uniform,
    "skip": uniform,
    "last-k": last_k,
    "all": every,
    "uniform-consecutive": uniform_consecutive,
    "uniform+last": uniform_last,
    "random": random,
}


def layer_map(
    name: str | list[list[int]], student: int, teacher: int, *, half_open: bool = False, seed: int = 0, epoch: int = 0
) -> Pairs:
    """Return the pairs of a map's name, or of an explicit list [[student, teacher], ...].

    half_open: for "uniform-consecutive"; seed and epoch: for "random".

    Raises InputError for an unknown name and for layers that are not there.
    """
    if isinstance(name, str):
        if name not in MAPS:
            raise InputError(f"unknown layer map {name!r}; known are {', '.join(MAPS)}", where="method.layer_map")
        if name in ("last-k", "uniform+last", "random") and student > teacher:
            raise InputError(
                f"the layer map {name!r} needs a student no deeper than the teacher, not "
                f"{counted(student, 'block')} of {teacher}",
                where="method.layer_map",
                hint=f'use student.layers = {teacher} or less, or the layer map "uniform"',
            )
        if name == "uniform-consecutive":
            return uniform_consecutive(student, teacher, half_open=half_open)
        return random(student, teacher, seed, epoch) if name == "random" else MAPS[name](student, teacher)
    if not name:
        raise InputError(
            "a layer map needs at least one pair",
            where="method.layer_map",
            hint=f"use [[{student}, {teacher}]], the last blocks, or a name: {', '.join(MAPS)}",
        )
    for pair in name:
        if len(pair) != 2:
            raise InputError(
                f"{list(pair)} is not a pair [student block, teacher block]",
                where="method.layer_map",
                hint=f"write pairs such as [[{student}, {teacher}]]",
            )
        s, t = pair
        if not (0 <= s <= student and 0 <= t <= teacher):
            raise InputError(
                f"the pair [{s}, {t}] is not within the student's {student} and the teacher's "
                f"{counted(teacher, 'block')}",
                where="method.layer_map",
                hint=f"blocks count from 1, 0 is the embeddings; did you mean "
                f"[{min(max(s, 0), student)}, {min(max(t, 0), teacher)}]?",
            )
    return [(s, t) for s, t in name]
