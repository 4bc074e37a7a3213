"""The heads that kinds of tasks have, and models that are loaded with the one that they have."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcli.errors import InputError
from kdcli.models.heads import BASE, SENTENCE_EMBEDDING, Head, head_of
from kdcli.recipe.schema import TaskSection
from kdcli.tasks import registry
from kdcli.tasks.kind import TaskKind

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def heads() -> list[Head]:
    """Return the heads of all kinds that work, and that of the folders of sentence-transformers."""
    return list(dict.fromkeys([*(kind.head for kind in registry.usable()[0]), SENTENCE_EMBEDDING]))


def head_named(name: str) -> Head:
    """Return a head by its name. Raises InputError for one that no kind has."""
    known = {head.name: head for head in (*heads(), BASE)}
    if name not in known:
        raise InputError(f"unknown head {name!r}; known are {', '.join(known)}")
    return known[name]


def check_head(model: Any, head: Head, name: object, where: str) -> None:
    """Raise InputError where a model (or a session) has another head. name: the model's. where: what names it."""
    found = head_of(model, heads())
    if found != head:
        raise InputError(f"{name} has no trained head for {head.purpose} ({_words(found)})", where=where)


def kind_of_model(
    model: Any,
    name: object,
    where: str,
    *,
    processor: Any = None,
    wanted: str | None = None,
    usual: str | None = None,
    scored: bool = True,
) -> TaskKind:
    """Return the kind that a trained model is for, by its head, its configuration and the processor beside it.

    scored: by answers to rows.

    wanted: the one that a user names. usual: the one that is taken where it and others fit, such as that of its run.
    Raises InputError where none fits, where several do, and where the one that is wanted does not.
    """
    found, config = head_of(model, heads()), model.config
    kinds = registry.usable()[0]
    fitting = [
        kind for kind in kinds if kind.head == found and not (scored and kind.scored_by_loss) and kind.fits(config)
    ]
    asked = registry.get(wanted) if wanted is not None else None
    if asked is None and all(kind.name != usual for kind in fitting):
        fitting = [kind for kind in fitting if kind.claims(processor)] or fitting
    for kind in fitting:
        if kind == asked or (asked is None and (len(fitting) == 1 or kind.name == usual)):
            return kind
    if fitting:
        types = " or ".join(kind.name for kind in fitting)
        said = f"is not one for {asked.name}" if asked is not None else "may be one for several types of tasks"
        raise InputError(f"{name} {said}", where="--type", hint=f"give --type {types}")
    if found is None or found == BASE:
        raise InputError(f"{name} has no trained head ({_words(found)})", where=where)
    raise InputError(
        f"{name} fits no type of task: it is {found.title} with {config.num_labels} outputs, and its config.json says "
        f"problem_type {config.problem_type!r}",
        where=where,
        hint="if that is wrong, correct it",
    )


def typed_for(section: TaskSection, model: Any) -> TaskSection:
    """Return `[task]` with the type that a model is for, where it names a set that is read as several types.

    A set of its own type stays so for every model with the head for that.
    """
    found, named = head_of(model, heads()), registry.set_of(section)
    if named is None or section.type is not None or registry.get(named.kind).head == found:
        return section
    fitting = [kind.name for kind in registry.usable()[0] if kind.head == found and kind.reads(named)]
    return section.model_copy(update={"type": fitting[0]}) if len(fitting) == 1 else section


def _words(head: Head | None) -> str:
    return f"it is {head.title}" if head is not None else "no type of task has the head that it has"


def load_model(
    name: str | Path,
    head: str | None = None,
    *,
    new_head: Mapping[str, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> "PreTrainedModel":
    """Load a model in eval mode and fp32: a hub name, a folder, a low-rank or an over-parameterised one.

    head: its name, such as "sequence-classification", "masked-lm" or "base" (none); None takes the one that the
    checkpoint has. new_head: put a randomly initialised one on the body, with these settings of its configuration,
    such as {"num_labels": 3}.
    Raises InputError when there is no such model, its files are broken or do not hold each of its weights, its family
    is unknown, or it has no such head and none was asked for.
    """
    from kdcli.models import load

    options: Any = {"revision": revision, "trust_remote_code": trust_remote_code}
    if head is None:
        if new_head is not None:
            raise ValueError("which head is the new one? Give head, too")
        return load.load_any(name, heads(), **options)
    return load.load_model(name, head_named(head), new_head=new_head, **options)
