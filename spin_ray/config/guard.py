"""What is checked while a run goes on, and what is done about bad numbers."""

from __future__ import annotations

from dataclasses import dataclass

from spin_ray.config.keys import at_least, one_of, within


@dataclass
class AuditConfig:
    num_prompts: int = at_least(1, 16)
    """Prompts on which sampler and learner are compared after every weight sync."""
    tolerance: float = at_least(0, 0.0)
    """Largest mean |difference| of log-probs per token, in nats, before the run stops; 0: by dtype."""


@dataclass
class GuardConfig:
    """What is done about bad numbers."""

    on_divergence: str = one_of("stop", choices=("stop", "rollback"))
    """At a loss or gradient that is not a number: stop the run, or rollback: the iteration's training starts over from theta_t."""
    max_rollbacks: int = at_least(0, 2)
    """Rollbacks in a run that are put up with; one more stops it."""
    rollback_lr_factor: float = within("(0, 1)", 0.5)
    """What each rollback multiplies the learning rate by, from there to the end of the run."""
    num_answers: int = at_least(1, 256)
    """Answers of an iteration after which the opponent is judged by them; an iteration with fewer is not judged."""
    max_empty_share: float = at_least(0, 0.99)
    """Share of empty ones among them past which the run stops; 1: never."""
    max_truncated_share: float = at_least(0, 0.99)
    """Share of truncated ones, among as many whose real answer fits into `sampler.max_new_tokens`, past which it stops; 1: never."""
    max_nll_rise_nats: float = at_least(0, 3.0)
    """How far the held-out negative log-likelihood may rise above the SFT model's, in nats per token, before it stops; 0: any."""
