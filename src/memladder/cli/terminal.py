"""What commands show on a terminal: text as it is, and how long work goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from memladder.cli.console import plain_console
from memladder.cli.ending import say
from memladder.core.text import shown
from memladder.meter.outside.runner import Event

if TYPE_CHECKING:
    from memladder.engine.packed.packing import Progress

_LONG_S = 30.0


class PlainConsole(Console):
    """Prints text as it is: `memladder[pytorch]` is no markup, an escape sequence no command."""

    def render_str(self, text: str, **options: Any) -> Text:
        """What every cell and every line comes by."""
        return super().render_str("\n".join(map(shown, text.split("\n"))), **options)


@contextmanager
def telling(name: str, console: Console) -> Iterator[Callable[[Event], None]]:
    """Tells on a console how the measuring of `name` goes: a live line on a terminal, elsewhere a
    line for each phase, and for each half minute of a long one."""
    began = told_at = time.monotonic()
    last: tuple[int, str] | None = None
    with console.status("starting") as status:

        def tell(event: Event) -> None:
            nonlocal last, told_at
            now = time.monotonic()
            line = f"{name}: {event}, {now - began:.0f} s"
            if console.is_terminal:
                status.update(line)
            elif (event.repeat, event.phase) != last or now - told_at > _LONG_S:
                last, told_at = (event.repeat, event.phase), now
                say(line)

        yield tell


@contextmanager
def progress_bar(what: str) -> Iterator[Progress]:
    """A bar with the time that is left, where stderr is a terminal; it goes away afterwards."""
    from rich.progress import Progress as Bar

    console = plain_console(stderr=True)
    with Bar(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what)
        yield lambda done, total: bar.update(task, completed=done, total=total)
