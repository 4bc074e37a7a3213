"""SQuAD v1.1 and v2.0, with the columns that the hub's `rajpurkar/squad` and `rajpurkar/squad_v2` have."""

from functools import partial

from kdcli.data.sets import VALIDATION, NamedSet, read_set


def _row(name: str, source: str) -> NamedSet:
    read = partial(read_set, name, name, f"rajpurkar/{name}", None, VALIDATION)
    return NamedSet(name, "question-answering", {}, ("f1", "exact_match"), source, read)


SQUAD = {row.name: row for row in (_row("squad", "SQuAD v1.1"), _row("squad_v2", "SQuAD v2.0"))}
