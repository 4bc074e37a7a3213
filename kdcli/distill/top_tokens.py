"""What `teacher.top_k` keeps: planned from a student's stages, refused where it cannot be kept, measured and told."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kdcli.distill.states import teacher_request
from kdcli.errors import InputError
from kdcli.methods.base import Stage, Term
from kdcli.recipe.schema import Recipe
from kdcli.training.schemes.base import Scheme
from kdcli.training.teacher_tokens import Cut, KnownTokens, keep_tokens, measure_cut
from kdcli.words import one

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from kdcli.tasks.kind import TaskKind


def check_cut(recipe: Recipe, kind: "TaskKind", stages: Sequence[Stage], vocabulary: int) -> None:
    """Raise InputError, with the reason, where `teacher.top_k` cannot be kept. vocabulary: the teacher's tokens."""
    if (k := recipe.teacher.top_k) is None:
        return
    name, requests = recipe.method.name, [teacher_request(stage.terms) for stage in stages]
    schemes = [stage.scheme for stage in stages if stage.scheme is not None]
    reasons = []
    if "vocabulary" not in kind.provides:
        reasons.append(f"{one(kind.name)} task predicts no tokens")
    if kind.inputs_change:
        reasons.append(f"on {one(kind.name)} task the inputs are drawn again in every epoch")
    if any(scheme.changes_batches for scheme in schemes):
        reasons.append(f"{name} trains on text that the student writes meanwhile")
    if not all(scheme.teacher_is_fixed for scheme in schemes):
        reasons.append(f"with {name} the teacher learns, too")
    if not any(request.logits for request in requests):
        reasons.append(f"{name} compares no predictions of the teacher here")
    if any(request.gradients or (request.logits and len(request.temperatures) != 1) for request in requests):
        reasons.append(f"{name} makes something else of the teacher's predictions than distributions")
    if reasons:
        raise InputError(
            f"the teacher's most probable tokens cannot be kept: {reasons[0]}",
            where="teacher.top_k",
            hint="leave it out",
        )
    if k >= vocabulary:
        raise InputError(
            f"top_k = {k:,} leaves nothing out of the teacher's {vocabulary:,} tokens",
            where="teacher.top_k",
            hint="use fewer, such as 64",
        )


def cut_of(top_k: int | None, terms: Sequence[Term]) -> Cut | None:
    """Return what a stage's terms need of each distribution; None where nothing is cut, or nothing compared."""
    request = teacher_request(terms)
    if top_k is None or not request.logits:
        return None
    (temperature,) = request.temperatures
    return Cut(top_k, temperature, request.all_positions)


def known_tokens(
    cut: Cut, scheme: Scheme, student: "PreTrainedModel", rows: "Dataset", held: "Dataset | None"
) -> tuple[KnownTokens, dict[str, Any]]:
    """Return the tokens of a stage's teacher, for its rows and the held-out ones, and what their cut costs.

    The second is told and recorded: the mean probability of all tokens that are left out, and on a few rows the KL
    divergence of the student, as it starts, from the teacher: over all tokens, and over the kept outcomes.
    """
    setting, teacher = scheme.setting, scheme.teacher()
    assert teacher is not None
    kind, loop, console = setting.task.kind, setting.loop, setting.console
    sets = [rows, *([held] if held is not None and kind.chosen_by_loss else [])]
    options: dict[str, Any] = {"kind": kind, "batch_size": loop.eval_batch_size, "device": loop.device}
    known = KnownTokens([keep_tokens(teacher, one, setting.collator, cut, console=console, **options) for one in sets])
    del options["batch_size"]
    whole, kept = measure_cut(teacher, student, rows, setting.collator, cut, distribution=kind.distribution, **options)
    return known, {"top_k": cut.k, "rest": known.tables[0].rest, "kl": whole, "kl_of_top_k": kept}


def told_cut(lost: dict[str, Any]) -> str:
    """Return what the cut costs as a line for the user."""
    return (
        f"teacher: the {lost['top_k']:,} most probable tokens are kept at each position; the others have "
        f"{lost['rest']:.2%} of the probability there, and the student's KL is {lost['kl_of_top_k']:.4g} with these as "
        f"one outcome, {lost['kl']:.4g} over all tokens"
    )
