"""Which tokens of one image two models have in common: those of its patches, and the class token before them."""

from kdcli.errors import InputError
from kdcli.models.shape import ModelShape, both_sides

Tokens = tuple[list[int], list[int]]
"""Places in a row of tokens: of the first model, and of the second."""


def patch_grid(shape: ModelShape) -> tuple[int, int]:
    """Return how many patches an image of the model's size has, from top to bottom and from left to right."""
    assert shape.image is not None and shape.patch is not None
    sizes = zip(both_sides(shape.image), both_sides(shape.patch), strict=True)
    rows, columns = (side // part for side, part in sizes)
    return rows, columns


def shared_tokens(student: ModelShape, teacher: ModelShape) -> Tokens | None:
    """Return the tokens of an image that two models can be compared at; None where these are all, and for texts.

    A class token stands first and patches last, in every family; distillation and register tokens between them have no
    counterpart in other families, and are left out, as additional tokens are in Hao et al. 2022 (arXiv 2107.01378).
    Raises InputError where images are cut into other patches: a token of one is no token of the other then.
    """
    if student.tokens is None or teacher.tokens is None:
        return None
    grids = patch_grid(student), patch_grid(teacher)
    if grids[0] != grids[1]:
        ours, theirs = (f"{rows} x {columns}" for rows, columns in grids)
        raise InputError(
            f"tokens of the student's {ours} patches of an image have no counterpart among the teacher's {theirs}",
            where="student",
            hint="use a method that compares outputs alone, such as kd, or a student that cuts images into "
            f"{theirs} patches",
        )
    patches = grids[0][0] * grids[0][1]
    special = student.tokens - patches, teacher.tokens - patches
    if special[0] == special[1] and (special[0] <= 1 or student.family == teacher.family):
        return None
    first = [0] if min(special) else []
    own, other = ([*first, *range(before, before + patches)] for before in special)
    return own, other


def difference(student: ModelShape, teacher: ModelShape) -> str:
    """Return in words what `shared_tokens` leaves of two models whose patches are the same, and other tokens not."""
    assert student.tokens is not None and teacher.tokens is not None
    rows, columns = patch_grid(student)
    own, other = (tokens - rows * columns for tokens in (student.tokens, teacher.tokens))
    kept = "the class token and the patches" if min(own, other) > 0 else "the patches"
    return f"compared at {kept} alone: before the patches stand {own} of the student's and {other} of the teacher's"
