"""What a reader of a report should know before he believes its numbers: rules over a run's metrics, and what else is unusual."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spin_ray.look.report.story import Story
from spin_ray.look.report.verdict import NEARLY_ALL, SURE


@dataclass(frozen=True)
class Rule:
    """A metric beyond what is healthy (docs/metrics.md)."""

    key: str
    beyond: Callable[[float], bool]
    says: str
    """With {value} and {at}."""
    by: str = "opponent_version"


RULES = (
    Rule("audit/mean_abs_logp_difference_nats", lambda v: v > 0.05, "sampler and learner differ by {value:.3f} nats a token at theta_{at}"),
    Rule("eval/truncated_share", lambda v: v > 0.1, "{value:.0%} of theta_{at}'s held-out answers were cut off: raise "
         "sampler.max_new_tokens"),
    Rule("sampler/truncated_share", lambda v: v > 0.1, "{value:.0%} of theta_{at}'s first answers were cut off: raise "
         "sampler.max_new_tokens"),
    Rule("sampler/empty_share", lambda v: v > 0.05, "{value:.0%} of theta_{at}'s first answers are empty"),
    Rule("eval/same_as_real_share", lambda v: v > NEARLY_ALL, "{value:.0%} of theta_{at}'s answers are the real ones: little is left to "
         "learn"),
    Rule("eval/kl_from_opponent_nats_per_token", lambda v: v > 1, "theta_{at} is {value:.2f} nats per token from the version before: the "
         "iteration went very far (lower spin.lr)"),
    Rule("iteration/last_epoch_displaced_share", lambda v: v > 0.5, "in the training that made theta_{at}, log p(y) fell for {value:.0%} "
         "of the pairs that were told apart: use spin.nll_weight"),
    Rule("sampler/num_restarts", lambda v: v > 0, "{value:.0f} sampler(s) had died and were replaced by iteration {at}"),
    Rule("sync/from_run_dir", lambda v: v > 0, "theta_{at}'s weights did not come from the learner in time; they were read from the "
         "run's folder"),
    Rule("sync/num_failed_transfers", lambda v: v > 0, "{value:.0f} transfer(s) of theta_{at}'s weights failed and were repeated"),
    Rule("guard/num_rollbacks", lambda v: v > 0, "numbers went bad {value:.0f} time(s), and iteration {at} began again", "iteration"),
)


def warnings(story: Story) -> list[str]:
    """What a reader should know before he believes the numbers; each with what to do where something can be done."""
    found = [line for rule in RULES for line in _broken(story, rule)]
    return [*found, *_about_rows(story), *_about_nll(story), *_about_tasks(story), *_about_sessions(story)]


def _broken(story: Story, rule: Rule) -> Iterator[str]:
    group, name = rule.key.split("/")
    latest = dict(zip(*story.series(group, name, rule.by), strict=True))
    bad = {at: value for at, value in latest.items() if value is not None and (rule.beyond(value) or math.isnan(value))}
    if bad:
        at = max(bad, key=lambda key: (math.isnan(bad[key]), bad[key]))
        more = f" ({len(bad)} times in all)" if len(bad) > 1 else ""
        yield f"{rule.key}: {rule.says.format(value=bad[at], at=at)}{more}"


def _about_rows(story: Story) -> Iterator[str]:
    """Rows that were left out."""
    for prepared in story.marks("prepared")[-1:]:
        for part in ("train", "heldout"):
            counts: dict[str, Any] = prepared.get(part) or {}
            for name, count in counts.items():
                if isinstance(count, int) and count and name not in ("rows", "kept", "left_out_by_limit"):
                    yield f"data.{'train' if part == 'train' else 'eval'}: {name.replace('_', ' ')}: {count:,}"


def _about_nll(story: Story) -> Iterator[str]:
    """Where the metric that counts is another one, the NLL may still tell of harm."""
    last = max(story.evaluations, default=0)
    found = story.evaluations.get(last, {})
    rise, error = (found.get(f"real_nll_change_nats_per_token{end}") for end in ("", "_se"))
    if rise is not None and not rise <= max(0.05, SURE * error):  # what is no number counts as harm
        how = f"{rise:.3f} nats per token (± {error:.3f}) at theta_{last}"
        yield f"eval/real_nll_nats_per_token: real answers have become less likely by {how}"


def _about_tasks(story: Story) -> Iterator[str]:
    """Numbers that were asked for in different ways are not to be compared."""
    latest = {mark["version"]: mark for mark in story.marks("tasks")}
    how = [{name: json.dumps(mark.get(name), sort_keys=True) for name in ("asked", "harness", "versions")} for mark in latest.values()]
    if other := _differing(how):
        yield f"benchmarks: not all versions were asked in the same way ({', '.join(other)} differ): do not compare them"
    if cut := {version: mark["num_truncated"] for version, mark in latest.items() if mark.get("num_truncated")}:
        yield f"benchmarks: {max(cut.values()):,} requests to a version were cut off at their begin: raise eval.max_length"


def _about_sessions(story: Story) -> Iterator[str]:
    sessions = story.marks("session")
    if len(sessions) > 1:
        yield f"the run was resumed {len(sessions) - 1} time(s)"
        packages = [{**one.get("packages", {}), "revision of spin_ray": one.get("revision")} for one in sessions]
        if other := _differing(packages):
            yield f"its sessions ran with different versions of {', '.join(other)}"
        if other := _differing([{name: one.get("hardware", {}).get(name) for name in ("device", "dtype", "machine")} for one in sessions]):
            yield f"its sessions ran on different hardware: {', '.join(other)}"


def _differing(sets: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys that do not have the same value in all of them."""
    names = {name for one in sets for name in one}
    return sorted(name for name in names if len({one.get(name) for one in sets}) > 1)


