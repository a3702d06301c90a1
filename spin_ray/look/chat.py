"""`spin-ray chat`: talk to a run's model in the terminal. Plain transformers: no Ray, no vLLM. A pipe's lines are answered one by one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spin_ray.errors import BadInput
from spin_ray.imports import without_gc
from spin_ray.look.printable import one_line, printable
from spin_ray.look.quiet import quietly
from spin_ray.look.screens import Beside, Lines, Screen
from spin_ray.look.versions import Chosen, choose

if TYPE_CHECKING:
    from spin_ray.look.answers import Drawing, Talker

HELP = "/reset forgets the dialogue, /system TEXT gives a system text, /quit or Ctrl-D ends, Ctrl-C stops an answer"


def chat(
    where: str, *, iteration: int | None, compare: bool, max_new_tokens: int, temperature: float, system: str, seed: int | None
) -> None:
    """The command. Raises BadInput for what is not there, or does not fit; from a pipe also for a line that cannot be answered."""
    if max_new_tokens < 1:
        raise BadInput(f"--max-new-tokens {max_new_tokens}: must be at least 1")
    if not 0 <= temperature < float("inf"):
        raise BadInput(f"--temperature {temperature:g}: must be 0 (greedy) or more")
    chosen = choose(where, iteration=iteration, compare=compare)
    by_hand, on_terminal = sys.stdin.isatty(), sys.stdout.isatty()
    _say(f"{', '.join(f'{one.name} ({one.where})' if one.name != one.where else one.name for one in chosen)}: loading")
    with quietly("chat"), without_gc():
        from spin_ray.look.answers import Drawing

        talkers = _loaded(chosen)
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(errors="replace")
    screen = Beside(talkers) if compare and on_terminal else Lines(talkers)
    dialogue = Dialogue(talkers, screen, Drawing(max_new_tokens, temperature, seed), system)
    if by_hand:
        _say(HELP)
    for line in _typed() if by_hand else sys.stdin:
        try:
            if not dialogue.hear(line.strip()):
                break
        except BadInput as error:
            if not by_hand:
                raise
            _say(one_line(str(error)))


def _loaded(chosen: list[Chosen]) -> list[Talker]:
    from transformers.utils import logging

    from spin_ray.look.answers import load

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return [load(one) for one in chosen]


@dataclass
class Dialogue:
    """One person, and one model or two that do not hear each other."""

    talkers: list[Talker]
    screen: Screen
    drawing: Drawing
    system: str
    say: Callable[[str], None] = lambda text: _say(text)

    def hear(self, line: str) -> bool:
        """Answer a line, or do what it commands; False: it ends the dialogue. Raises BadInput for a dialogue that cannot be answered."""
        word, _, rest = line.partition(" ")
        match word:
            case "/quit":
                return False
            case "/reset":
                self._forget("the dialogue is forgotten")
            case "/system":
                self.system = rest.strip()
                self._forget(f"system text: {self.system or 'none'}; the dialogue is forgotten")
            case "/help":
                self.say(HELP)
            case "":
                pass
            case _:
                self._answer(line)
        return True

    def _forget(self, told: str) -> None:
        for talker in self.talkers:
            talker.history.clear()
        self.say(told)

    def _answer(self, line: str) -> None:
        """Ctrl-C stops the answer, and those of models that have not begun."""
        with self.screen.answering() as hear:
            try:
                for place, talker in enumerate(self.talkers):
                    talker.answer(line, self.system, self.drawing, lambda new, place=place: hear(place, new))
            except KeyboardInterrupt:
                self.say("stopped")


def _typed() -> Iterator[str]:
    """What is typed, until Ctrl-D; Ctrl-C drops the line."""
    import readline  # noqa: F401  (`input` edits lines with it)

    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return


def _say(text: str) -> None:
    """Beside the answers, which alone are standard output."""
    print(f"spin-ray: {printable(text)}", file=sys.stderr, flush=True)
