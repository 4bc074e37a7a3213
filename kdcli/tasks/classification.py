"""Classification: one class out of several for a text, or for a pair of texts."""

from typing import Any

from kdcli.data.columns import Columns, need_column
from kdcli.tasks.classes import ClassesKind, ClassFields
from kdcli.tasks.numbers import are_numbers, check_commas, different, note_of_numbers
from kdcli.tasks.text_inputs import TextFields, TextKind


class TextClassFields(ClassFields, TextFields):
    """The columns of own data, and the classes."""


class Classification(ClassesKind, TextKind):
    """One class out of several for a text, or for a pair of texts."""

    name = "classification"
    title = "one class out of several"
    fields = TextClassFields
    provides = frozenset({"labels", "classes", "one-per-example", "text"})

    def recognises(self, columns: Columns, fields: Any, source: str, notes: list[str]) -> bool:
        """True for all data but numbers with fractions. notes: takes a warning about scores that become classes.

        Raises InputError for numbers with commas, each of which would be a class.
        """
        if fields.labels is not None:
            return True
        labels = need_column(columns, fields.label or "label", "label", source)
        given = different(labels)
        if are_numbers(given):
            return all(float(value).is_integer() for value in given)
        check_commas(given, source)
        if note := note_of_numbers(labels):
            notes.append(f"{source}: {note}")
        return True


KIND = Classification()
