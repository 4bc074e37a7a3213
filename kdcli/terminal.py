"""Words on their way to a terminal, a log or a pipe: whole, harmless, and never the reason why a run fails.

Names and texts are other people's: no escape sequence and no bidirectional control in them reaches a terminal, and
square brackets are no markup. What an encoding lacks is replaced. What has no reader any more is dropped.
"""

import contextlib
import os
import re
import sys
from collections.abc import Iterable, Iterator
from typing import IO, Any, cast

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

_UNSAFE = re.compile(
    "["
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 without tab and line feed, DEL, C1
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # bidirectional controls
    "\u200b\u2028\u2029\u2060-\u2064\ufeff"  # invisible: spaces without width, separators, byte order mark
    "\ud800-\udfff"  # halves of characters, such as bytes of a file's name that are no UTF-8
    "]"
)


def visible(text: str, encoding: str = "utf-8") -> str:
    r"""Return `text` with controls as escapes that can be seen (`\x1b`), and "?" for what `encoding` lacks."""
    text = _UNSAFE.sub(lambda found: _escape(found[0]), text)
    return text if _can(encoding, text) else "".join(c if _can(encoding, c) else "?" * cell_len(c) for c in text)


def _escape(character: str) -> str:
    return f"\\x{ord(character):02x}" if ord(character) < 256 else f"\\u{ord(character):04x}"


def _can(encoding: str, text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def json_for(text: str, encoding: str) -> str:
    r"""Return a JSON text with `\u` escapes for controls and for what `encoding` lacks; its meaning does not change."""

    def escape(character: str) -> str:
        units = character.encode("utf-16-be", "surrogatepass")
        return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))

    text = _UNSAFE.sub(lambda found: escape(found[0]), text)
    return text if _can(encoding, text) else "".join(c if _can(encoding, c) else escape(c) for c in text)


def tell(console: Console, message: str, *, mark: str = "") -> None:
    """Print a line of progress, or a note, for the user, as it stands. mark: a word before it that stands out."""
    marks = [Text(mark, style="bold red")] if mark else []
    console.print(*marks, message, highlight=False, soft_wrap=True)


def warn(console: Console, message: str) -> None:
    """Tell the user of something that needs attention."""
    tell(console, message, mark="WARNING:")


class Terminal(Console):
    """A console that makes harmless what it prints."""

    def __init__(self, file: IO[str] | None = None, *, quiet: bool = False) -> None:
        super().__init__(file=file, markup=False, emoji=False, quiet=quiet)

    def render_str(self, text: str, **options: Any) -> Text:  # type: ignore[override]
        """Return a string as text, made harmless before its width is measured."""
        return super().render_str(visible(text, self.encoding), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield segments; what came in as ready-made text is made harmless, too. rich's own controls stay."""
        encoding = self.encoding
        if isinstance(renderable, Text) and (words := visible(renderable.plain, encoding)) != renderable.plain:
            # Before it is wrapped: nothing of it may be cut.
            renderable = Text(words, renderable.style, justify=renderable.justify, overflow=renderable.overflow)
        for segment in super().render(renderable, options):
            words = segment.text if segment.control else visible(segment.text, encoding)
            yield segment if words == segment.text else Segment(words, segment.style)

    def on_broken_pipe(self) -> None:
        """Leave it to the caller: rich would end the program with the exit code of a gate."""
        raise BrokenPipeError


def wide(console: Console) -> Console:
    """Return a console, or, where it is no terminal, one as wide as COLUMNS says, else of 100 columns."""
    if console.is_terminal:
        return console
    # The width of a single print() can only be less than its console's.
    other, columns = Terminal(console.file, quiet=console.quiet), os.environ.get("COLUMNS", "")
    other.width = int(columns) if columns.isdecimal() and int(columns) > 0 else 100
    return other


class _Stderr:
    """The process's stderr of this moment; what cannot be written to it is dropped, and the work goes on."""

    def __getattr__(self, name: str) -> Any:
        # A live bar puts itself before stderr, and would call itself.
        return getattr(getattr(sys.stderr, "rich_proxied_file", sys.stderr), name)

    def write(self, text: str) -> int:
        with _droppable():
            self.__getattr__("write")(text)
        return len(text)

    def flush(self) -> None:
        with _droppable():
            self.__getattr__("flush")()


@contextlib.contextmanager
def _droppable() -> Iterator[None]:
    try:
        yield
    except (AttributeError, OSError, ValueError):  # none at all, full or gone, closed
        forget(sys.stderr)


def stderr(*, quiet: bool = False) -> Terminal:
    """Return a console on stderr. A full disk behind it, or a reader that has gone, ends no run."""
    return Terminal(cast(IO[str], _Stderr()), quiet=quiet)


def forget(stream: IO[str] | None) -> None:
    """Let what is still written to a stream of this process vanish."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        number = stream.fileno()  # type: ignore[union-attr]
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)
