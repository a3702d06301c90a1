"""Bad numbers: what is checked while a run goes on, and what is done about them.

| bad number | seen by | answer |
|---|---|---|
| a loss or gradient that is none | the learner's workers, at every step | `guard.on_divergence`: stop, or roll the iteration back |
| opponent's log-probs that are none | exchange/pairs.py, in every block | stop: a rollback starts from the weights that wrote them |
| only empty or only truncated answers | `FirstAnswers`, per iteration | stop: the same |
| a held-out NLL that explodes | `check_nll`, per version | stop: theta_{t+1} is finished, and maybe trained on already |
| sampler and learner disagree | exchange/audit.py, and `FirstLosses` per iteration | stop: no training mends it |
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pyarrow as pa

from spin_ray.chat import ChatFormat
from spin_ray.config import Config
from spin_ray.errors import Diverged
from spin_ray.exchange.audit import Audit, check_first_loss, pair_mismatch
from spin_ray.learner.messages import Divergence
from spin_ray.manifest import RunDir
from spin_ray.methods import Method
from spin_ray.overlap import Overlap
from spin_ray.terminal import Terminal
from spin_ray.tracking import Tracker


class Rollbacks:
    """Training that diverges starts over from theta_t with a smaller learning rate, if that is wanted and can help."""

    def __init__(self, config: Config, run: RunDir, learner: Any, tracker: Tracker, terminal: Terminal):
        self._guard, self._run, self._learner = config.guard, run, learner
        self._tracker, self._terminal = tracker, terminal

    def answer(self, divergence: Divergence, *, played_ahead: bool = False) -> None:
        """Roll back, or raise Diverged. `played_ahead`: a snapshot of the spoilt training may have written pairs by now."""
        guard, t, step = self._guard, divergence.iteration, divergence.step
        number = len(self._run.marks("rollback")) + 1
        if guard.on_divergence == "stop":
            raise divergence.error
        for hopeless, why in (
            (step == 0, "the first step's numbers do not depend on the learning rate: look at the model and the pairs"),
            (played_ahead, "a snapshot of this training has played pairs of the next iteration"),
            (number > guard.max_rollbacks, f"guard.max_rollbacks={guard.max_rollbacks} of this run are used up"),
        ):
            if hopeless:
                raise Diverged(f"{divergence.error}; not rolled back: {why}")
        if not self._learner.roll_back(divergence.group):
            return  # a worker died meanwhile: the new group is on its way already
        scale = guard.rollback_lr_factor**number
        self._run.mark("rollback", iteration=t, step=step, lr_scale=scale, error=str(divergence.error))
        self._tracker.log("guard", {"num_rollbacks": number, "lr_scale": scale}, iteration=t, step=step)
        self._terminal.say(
            f"{divergence.error}; rollback {number} of {guard.max_rollbacks}: "
            f"iteration {t} starts over from theta_{t} with {scale:g} times the learning rate"
        )


NOTABLE_MISMATCH = 0.1
"""A margin that the engines' difference alone may move this far gets a warning; a margin of 0.1 moves the loss by 0.05."""


class FirstLosses:
    """Invariant 2: an iteration's first loss is l(0), or what it must be where policy == opponent, as far as the audit of the opponent
    does not explain it.

    The audit of theta_t comes first: what the learner reports of iteration t waits for it (learner/reports.py).
    """

    def __init__(self, method: Method, overlap: Overlap, tokens_per_answer: float, tracker: Tracker, terminal: Terminal):
        self._method, self._overlap, self._tokens_per_answer = method, overlap, tokens_per_answer
        self._tracker, self._terminal = tracker, terminal
        self._mismatch: dict[int, float] = {}
        """Iteration -> how far the engines' difference may move the loss of a pair."""
        self._judged: set[int] = set()

    def audited(self, t: int, audit: Audit | None) -> None:
        """The samplers, if there are any, hold theta_t as the learner does; a later audit of the same version replaces it."""
        sensitivity = self._method.objective(t).sensitivity(self._tokens_per_answer)
        difference = pair_mismatch(audit, 2 * self._tokens_per_answer) if audit else 0.0
        self._mismatch[t] = mismatch = sensitivity * difference
        if mismatch > NOTABLE_MISMATCH and self._method.scorer == "opponent":
            self._terminal.say(
                f"warning: iteration {t}: the engines' difference of {difference:.3g} nats per pair, times {sensitivity:g} (spin.beta and "
                f"what goes with it), moves the loss by up to {mismatch:.2g}; reference.scorer=frozen or learner has no such difference"
            )

    def judge(self, t: int, first: tuple[float, float | None]) -> None:
        """Raise FirstLossError if the first loss of iteration t is too far from what it is at policy == opponent; both are given."""
        self._judged.add(t)
        loss, expected = first
        if expected is None or (self._overlap.starts_stale(t) and self._method.scorer == "opponent"):
            return  # there is no reference; or the first pairs were played against a snapshot, not against theta_t
        deviation = check_first_loss(t, loss, expected=expected, mismatch=self._mismatch[t])
        self._tracker.log("audit", {"first_loss_deviation": deviation}, opponent_version=t)

    def judge_at_the_end(self, t: int, first: tuple[float, float | None]) -> None:
        """Iteration t is trained: no first loss stays unjudged, also where the first step was an earlier session's."""
        if t not in self._judged:
            self.judge(t, first)


class FirstAnswers:
    """Judges the opponent of an iteration by the first `guard.num_answers` that it writes.

    An answer is empty if no text is left without its special tokens. Truncated ones count only where the real answer would
    have fitted: with a short `sampler.max_new_tokens` all may be, and nothing is wrong.
    """

    def __init__(self, config: Config, chat: ChatFormat):
        self._guard, self._room, self._chat = config.guard, config.sampler.max_new_tokens, chat
        self._seen: dict[tuple[int, str], list[bool]] = defaultdict(list)

    def wanted(self, t: int) -> bool:
        """Whether the next block of iteration t is to be looked at."""
        return any(len(self._seen[t, kind]) < self._guard.num_answers for kind in ("empty", "truncated"))

    def look(self, t: int, table: pa.Table, where: str) -> dict[str, float]:
        """Take in a block of iteration t, at `where`; returns the shares that are known from it on. Raises Diverged past a limit."""
        guard, shares = self._guard, {}
        limits = {"empty": guard.max_empty_share, "truncated": guard.max_truncated_share}
        for kind, limit in limits.items():
            seen = self._seen[t, kind]
            if len(seen) >= guard.num_answers:
                continue
            seen += self._empty(table) if kind == "empty" else self._truncated(table)
            if len(seen) < guard.num_answers:
                continue
            shares[f"{kind}_share"] = share = float(np.mean(seen))
            if share > limit:
                of = " whose real answer fits into sampler.max_new_tokens" if kind == "truncated" else ""
                raise Diverged(
                    f"iteration {t}: {sum(seen)} of the opponent's first {len(seen)} answers{of} are {kind}, a share of {share:.3f} "
                    f"(guard.max_{kind}_share={limit:g}): nothing is to be learnt from them; see {where}, and theta_{t}, which wrote them"
                )
        return shares

    def _empty(self, table: pa.Table) -> list[bool]:
        return [not self._chat.decode(ids).strip() for ids in table.column("generated_ids").to_pylist()]

    def _truncated(self, table: pa.Table) -> list[bool]:
        rows = table.select(["real_ids", "finish_reason"]).to_pylist()
        return [row["finish_reason"] == "length" for row in rows if len(row["real_ids"]) <= self._room]


def check_nll(version: int, nll: float, sft_nll: float, config: Config, model: str) -> None:
    """Raise Diverged if the held-out NLL of theta_version, per token, has risen too far above the SFT model's."""
    limit = config.guard.max_nll_rise_nats
    if limit and not nll - sft_nll <= limit:
        raise Diverged(
            f"held-out NLL of theta_{version} is {nll:.3f} nats per token, {nll - sft_nll:.3f} above the SFT model's {sft_nll:.3f} "
            f"(guard.max_nll_rise_nats={limit:g}); see {model}, and eval/real_nll_nats_per_token in metrics.jsonl; "
            "start a new run with a smaller spin.lr, a larger spin.beta or a spin.nll_weight"
        )
