"""The order in which the driver acts on what the learner's workers report. No Ray, no model.

The workers never wait for the driver between two commands, so their reports may come while it is anywhere: iteration t + 1 may have
begun, or gone bad, before theta_{t+1} is audited; a group of workers may die, and all that it did since the base was worth nothing.

    worker  train t ───────► publish, score, save ───► train t + 1: step 0, step 1, ... ─────────────────────────────►
                                   │                          │ held
    driver  reports of t handed on └► load, audit, move base ─┴► mark: theta_{t+1} STANDS ─► reports of t + 1 handed on

| report | handed on |
|---|---|
| Span, Saving, Grouped | at once: the time was spent, whatever became of the work |
| StepRecord, Divergence of iteration t | when theta_t stands: audited, on disk, marked, and the base of every later group |
| the same from a group that died, or was rolled back, before theta_t stood | never: its theta_t is lost, another group's stands |
| the same from a group that a newer one has been heard of | never |

So a first loss finds its audit, and a divergence is answered by a base from which its own iteration starts over. Within one group
the order stays. Only the main thread comes here.
"""

from __future__ import annotations

from collections.abc import Callable

from spin_ray.learner.messages import Divergence, Grouped, Proved, Saving, StepRecord
from spin_ray.records import Span


class Reports:
    """Holds back what must wait; `hand_on` gets the rest, each report once."""

    def __init__(self, hand_on: Callable[[StepRecord | Span | Saving | Grouped | Divergence | Proved], None]):
        self._hand_on = hand_on
        self._made_by: dict[int, int] = {}
        """Iteration t whose theta_t stands -> number of the group that made it."""
        self._held: list[StepRecord | Divergence] = []
        self._newest_group = 0

    def arrived(self, report: StepRecord | Span | Saving | Grouped | Divergence | Proved) -> None:
        if not isinstance(report, StepRecord | Divergence):
            self._hand_on(report)
        elif report.group >= self._newest_group:
            self._newest_group = report.group
            self._held.append(report)
            self._hand_on_what_may()

    def stands(self, t: int, *, group: int) -> None:
        """theta_t is audited, on disk, marked, and the base; `group` of workers made it, 0 for one of an earlier session."""
        self._made_by[t] = group
        self._hand_on_what_may()

    def _hand_on_what_may(self) -> None:
        held, self._held = self._held, []
        self._held = [report for report in held if report.iteration not in self._made_by]
        for report in held:
            if report.group >= self._made_by.get(report.iteration, report.group + 1):
                self._hand_on(report)
