"""`spin-ray probe`: what a run would meet, before it is paid for. Short tries over a grid of learning rate and beta from the same weights.

The opponent answers a few hundred prompts once; then the main player, which is not started anew, trains a short iteration for each point of
the grid, is measured on held-out prompts, and takes up the first weights again.

A try has fewer steps than the run that it stands for, so its rate is raised: by the square root of how many times fewer. Raised by the
ratio itself, so that the rates of all steps have the same sum, it overstates the harm by far: large steps do more than many small ones.
docs/study.md has what became of its forecasts.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import ray

from spin_ray.chatter import captured_output
from spin_ray.config import Config, at, load_config
from spin_ray.data.progress import duration
from spin_ray.errors import BadInput
from spin_ray.exchange.pairs import Given, stored_prompts
from spin_ray.heldout import advantage, as_pairs, divergence
from spin_ray.interrupt import Interrupts
from spin_ray.learner.group import Learner
from spin_ray.learner.messages import Restore, Save, Score, StepRecord, Train
from spin_ray.lengths import Lengths
from spin_ray.losses import PairObjective
from spin_ray.manifest import RunDir
from spin_ray.methods import Method, method_of
from spin_ray.model import inspect_model, longest_sequence
from spin_ray.players import start_players
from spin_ray.preflight import Proof, proof_pairs, refuse_sampler
from spin_ray.prepared import prepare
from spin_ray.records import Pair, Prompt, Version
from spin_ray.sampler.pool import PLAY, sampling_settings
from spin_ray.system import ray_cluster
from spin_ray.terminal import Terminal
from spin_ray.theta import make_base, thetas_of

NUM_TRAIN, NUM_HELDOUT = 512, 256
NUM_EPOCHS = 2
"""Of a try, at most."""
LR_FACTORS, BETA_FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0), (0.1, 1.0, 10.0)
SAFE_NLL_RISE, COLLAPSE_NLL_RISE = 0.05, 0.5
"""Held-out NLL of the real answers, in nats per token: up to here nothing is lost; from here the model is."""
VISIBLE = 2.7
"""Standard errors by which the advantage must exceed chance to count as one; in 19 of 20 probes no try of 15 does by luck."""
START, REPORT = "start", "probe.json"
"""In the probe's folder: the weights that every try begins with, and what was found."""
HARMFUL = ("log p(y) falls", "collapses")


@dataclass(frozen=True)
class Try:
    """One point of the grid."""

    lr: float
    """Of the whole iteration that it stands for."""
    beta: float
    advantage_accuracy: float
    advantage_accuracy_se: float
    nll_change_nats_per_token: float
    """Held-out, of the real answers; above 0 log p(y) has fallen."""
    kl_nats_per_token: float
    train_accuracy: float
    diverged: bool
    """A number went bad before the last step."""

    @property
    def verdict(self) -> str:
        if self.diverged or not self.nll_change_nats_per_token < COLLAPSE_NLL_RISE:
            return "collapses"
        if self.nll_change_nats_per_token > SAFE_NLL_RISE:
            return "log p(y) falls"
        return "learns" if self.told_apart else "too weak"

    @property
    def told_apart(self) -> bool:
        """Whether the trained model tells held-out real answers from the opponent's."""
        return self.advantage_accuracy - VISIBLE * self.advantage_accuracy_se > 0.5


def probe(config_path: str, overrides: Sequence[str], *, quiet: bool = False) -> None:
    """Print what a run of this config would meet, and write it to runs/<name>-probe/probe.json."""
    config, _ = load_config(config_path, overrides)
    if config.method != "spin":
        raise BadInput(f"method={config.method}: probe forecasts self-play; give a config with method=spin")
    wanted = NUM_TRAIN + (0 if config.data.eval else NUM_HELDOUT)
    data = dataclasses.replace(config.data, max_prompts=min(wanted, config.data.max_prompts or wanted), max_eval_prompts=NUM_HELDOUT)
    small = dataclasses.replace(config, run=dataclasses.replace(config.run, name=f"{config.run.name}-probe"), data=data)
    run = RunDir.open(small)
    with run.locked(), captured_output(run.logs / "driver.log") as to_user:
        for left in ("manifest.jsonl", run.prepared().name, START, REPORT):  # by a probe of data that may have changed
            run.storage.remove(run.path / left)
        with Terminal(to_user, quiet=quiet) as terminal:
            _probe(config, small, run, terminal)


def _probe(config: Config, small: Config, run: RunDir, terminal: Terminal) -> None:
    interrupts, method, begun = Interrupts(), method_of(config), time.monotonic()
    interrupts.listen()
    facts, proof = inspect_model(small), Proof()
    proof.end(small, facts, terminal.say)
    prepared = prepare(small, run, facts, proof, terminal)
    prompts, heldout = _parts(list(stored_prompts(run, prepared.block_sizes)), prepared.heldout, config)
    num_prompts = _num_prompts(config, run)
    thetas, steps = thetas_of(small, run, facts), config.num_steps(num_prompts, at(config.spin, 0).num_epochs)
    max_model_len = longest_sequence(Lengths.of([*prompts, *heldout]), small.sampler.max_new_tokens, facts)
    with ray_cluster(small, say=terminal.say) as hardware:
        interrupts.listen()
        refuse_sampler(facts, hardware)
        make_base(small, run, facts, hardware.dtype)
        with start_players(small, thetas, hardware, max_model_len, proof_pairs(prompts)) as players:
            settings = sampling_settings(small, facts.chat)
            players.pool.release.remote(Version(0))
            pairs, play_s = _played(players.pool, [*prompts, *heldout], settings)
            players.opponent_is_done()
            train, held = _as_the_learner_sees_them(players.learner, pairs[: len(prompts)]), pairs[len(prompts) :]
            held = _as_the_learner_sees_them(players.learner, held)
            terminal.say(f"{len(pairs)} answers in {play_s:.0f} s; trying {len(LR_FACTORS) * len(BETA_FACTORS)} settings")
            tries, rate, memory = _tries(players.learner, run, method, small, train, held, steps, terminal)
    report = {
        "signs": signs(train, held), "tries": [{**asdict(one), "told_apart": one.told_apart, "verdict": one.verdict} for one in tries],
        "prompts_per_s": len(pairs) / play_s, "pairs_per_s": rate, "peak_memory_gib": memory,
    }
    with run.storage.written(run.path / REPORT) as temporary:
        temporary.write_text(json.dumps(report, indent=2) + "\n")
    for line in in_words(report, config, num_prompts, time.monotonic() - begun):
        terminal.conclude(line)


def _parts(train: Sequence[Prompt], heldout: Sequence[Prompt], config: Config) -> tuple[Sequence[Prompt], Sequence[Prompt]]:
    """Prompts to train on and to measure on."""
    if len(train) < 2 and not heldout:
        raise BadInput(f"{config.data.train}: one prompt; a probe trains on some and measures on others: give more, or data.eval")
    if heldout:
        return train[:NUM_TRAIN], heldout[:NUM_HELDOUT]
    kept = max(1, round(len(train) * NUM_TRAIN / (NUM_TRAIN + NUM_HELDOUT)))
    return train[:kept], train[kept:]


def _num_prompts(config: Config, run: RunDir) -> int:
    """Of the real run."""
    counts = run.marks("prepared")[-1]["train"]
    every = counts["kept"] + counts.get("left_out_by_limit", 0)
    return min(every, config.data.max_prompts or every)


def _played(pool: Any, prompts: Sequence[Any], settings: Any) -> tuple[list[Pair], float]:
    questions = [p.prompt_ids for p in prompts]
    ray.get(pool.sample.remote(Version(0), questions[:4], settings, PLAY, 0))  # an engine's first answers take what compiling takes
    begun = time.monotonic()
    drawn = ray.get(pool.sample.remote(Version(0), questions, settings, PLAY, 0))
    seconds = time.monotonic() - begun
    return as_pairs(0, prompts, drawn, [np.zeros(len(p.real_ids), np.float32) for p in prompts]), seconds


def _as_the_learner_sees_them(learner: Learner, pairs: Sequence[Pair]) -> list[Pair]:
    """With the learner's own log-probs for references: exact, whatever the engines differ by."""
    logps = learner.run(Score(tuple(pairs)))
    return [
        dataclasses.replace(pair, opponent_real_logps=real, opponent_generated_logps=generated)
        for pair, real, generated in zip(pairs, logps[::2], logps[1::2], strict=True)
    ]


def _tries(
    learner: Learner, run: RunDir, method: Method, small: Config, train: Sequence[Pair], held: Sequence[Pair], steps: int,
    terminal: Terminal,
) -> tuple[list[Try], float, float]:
    """All points of the grid, and what the learner's step takes: pairs per second (0 if no try made one) and peak GiB."""
    start = run.path / START
    learner.run(Save(None, str(start)))
    run.storage.commit(start)
    learner.put_block(0, 0, Given(tuple(train)))
    own = min(steps, NUM_EPOCHS * -(-len(train) // small.learner.batch_pairs))
    objective, lr = method.objective(0), method.lr(0)
    found, rates, memory = [], [], 0.0
    for beta in BETA_FACTORS:
        for factor in LR_FACTORS:
            learner.run(Restore(str(start)))
            tried = dataclasses.replace(objective, beta=objective.beta * beta)
            rate = lr * factor * raised(own, steps)
            report = learner.run(Train(
                iteration=0, block_sizes=(len(train),), num_epochs=NUM_EPOCHS, num_steps=own, objective=tried, lr=rate, is_a_try=True,
            ))
            last = [record.metrics for record in learner.drain() if isinstance(record, StepRecord)]
            logps = learner.run(Score(tuple(held)))
            found.append(_measured(lr * factor, tried, held, logps, last, report.num_steps < own))
            rates += [report.num_pairs / report.wall_s] if report.num_pairs else []
            memory = max(memory, report.peak_memory_gib)
            terminal.status(f"{len(found)} of {len(LR_FACTORS) * len(BETA_FACTORS)} settings tried")
    terminal.status("")
    run.storage.remove(start)
    return found, float(np.median(rates)) if rates else 0.0, memory


def raised(own: int, steps: int) -> float:
    """What a try of `own` steps multiplies the rate by, which stands for a training of `steps`."""
    return math.sqrt(steps / own)


def _measured(
    lr: float, objective: PairObjective, held: Sequence[Pair], logps: Sequence[np.ndarray], steps: Sequence[dict[str, Any]],
    diverged: bool,
) -> Try:
    real, generated = logps[::2], logps[1::2]
    told = advantage(held, real, generated, objective)
    before = np.concatenate([pair.opponent_real_logps for pair in held])
    return Try(
        lr, objective.beta, told["advantage_accuracy"], told["advantage_accuracy_se"], float((before - np.concatenate(real)).mean()),
        divergence(held, generated), steps[-1]["accuracy"] if steps else 0.0, diverged,
    )


def signs(train: Sequence[Pair], held: Sequence[Pair]) -> dict[str, float]:
    """By what y and y' could be told apart without learning the task, each a share of held-out pairs (0.5 is chance).

    length: y is the longer one, or the shorter, whichever is more common in `train`; ending: y' was cut off; words: naive Bayes over
    single tokens, learnt on `train`; likelihood: the opponent finds y less likely per token than its own y'.
    """
    longer = np.mean([np.sign(len(p.real_ids) - len(p.generated_ids)) for p in train]) >= 0
    counts = [Counter(int(token) for pair in train for token in getattr(pair, name)) for name in ("real_ids", "generated_ids")]
    totals = [sum(count.values()) + len(counts[0] | counts[1]) + 1 for count in counts]

    def odds(ids: np.ndarray) -> float:
        real, generated = (
            sum(np.log((count[int(token)] + 1) / total) for token in ids) for count, total in zip(counts, totals, strict=True)
        )
        return float(real - generated) / max(1, len(ids))

    def share(differences: list[float]) -> float:
        return float(np.mean([(d > 0) + 0.5 * (d == 0) for d in differences]))

    return {
        "length": share([(len(p.real_ids) - len(p.generated_ids)) * (1 if longer else -1) for p in held]),
        "ending": share([float(p.finish_reason == "length") for p in held]),
        "words": share([odds(p.real_ids) - odds(p.generated_ids) for p in held]),
        "likelihood": share([float(p.opponent_generated_logps.mean() - p.opponent_real_logps.mean()) for p in held]),
        "real_tokens": float(np.mean([len(p.real_ids) for p in held])),
        "generated_tokens": float(np.mean([len(p.generated_ids) for p in held])),
        "same_as_real_share": float(np.mean([np.array_equal(p.real_ids, p.generated_ids) for p in held])),
    }


def in_words(report: dict[str, Any], config: Config, num_prompts: int, seconds: float) -> list[str]:
    """The report for the user."""
    found, tries = report["signs"], report["tries"]
    best = max(tries, key=lambda one: (one["verdict"] == "learns", one["advantage_accuracy"]))
    lines = [
        "Can the players be told apart?",
        f"  After a short iteration with lr {best['lr']:.2g} and beta {best['beta']:.2g} the main player tells a held-out real answer from "
        f"the opponent's in {best['advantage_accuracy']:.2f} of cases (± {best['advantage_accuracy_se']:.2f}; 0.5 is chance).",
        f"  Without learning anything: by length {found['length']:.2f} (real {found['real_tokens']:.1f} tokens, generated "
        f"{found['generated_tokens']:.1f}), by a cut-off end {found['ending']:.2f}, by single words {found['words']:.2f}, by what the "
        f"opponent finds unlikely {found['likelihood']:.2f}; {found['same_as_real_share']:.2f} of its answers are the real ones.",
        "Which settings are safe?", f"  {'lr':>9} {'beta':>7} {'told apart':>11} {'NLL change':>11} {'KL/token':>9}  verdict",
    ]
    lines += [
        f"  {one['lr']:>9.2g} {one['beta']:>7.2g} {one['advantage_accuracy']:>11.2f} {one['nll_change_nats_per_token']:>+11.3f} "
        f"{one['kl_nats_per_token']:>9.3f}  {one['verdict']}" for one in tries
    ]
    lines.append(f"  {_advice(config, tries)}")
    spin = at(config.spin, 0)
    play, train = num_prompts / report["prompts_per_s"], report["pairs_per_s"] and num_prompts * spin.num_epochs / report["pairs_per_s"]
    replayed = f", up to {1 + config.spin.replay} times that from iteration 1 on" if config.spin.replay else ""
    training = f"{duration(train)} of training{replayed}" if train else "training that did not get as far as one step"
    lines += [
        "What does an iteration cost?",
        f"  {num_prompts} prompts: {duration(play)} of play beside {training}; the learner's peak is "
        f"{report['peak_memory_gib']:.1f} GiB a worker.",
        f"(probed in {duration(seconds)})",
    ]
    return lines


def _advice(config: Config, tries: Sequence[dict[str, Any]]) -> str:
    spin = at(config.spin, 0)
    own = min(tries, key=lambda one: abs(math.log(one["lr"] / spin.lr)) + abs(math.log(one["beta"] / spin.beta)))
    yours = f"The config's own lr {own['lr']:.2g} and beta {own['beta']:.2g}: {own['verdict']}."
    safe = {beta: _safe([one for one in tries if one["beta"] == beta]) for beta in sorted({one["beta"] for one in tries})}
    if learning := [one for those in safe.values() for one in those]:
        best = max(learning, key=lambda one: one["advantage_accuracy"] - one["nll_change_nats_per_token"])
        at_beta = [f"with beta {beta:.2g} {_range(those)}" for beta, those in safe.items() if those]
        return f"{yours} Safe here: {'; '.join(at_beta)}. The best of them: lr {best['lr']:.2g} with beta {best['beta']:.2g}."
    if any(one["told_apart"] for one in tries):
        return f"{yours} No setting here learns without harm; spin.nll_weight holds log p(y) up."
    if all(one["verdict"] == "too weak" for one in tries):
        return f"{yours} No setting here does harm, and none learns: try higher rates; if they do not learn, nothing is left to learn."
    return f"{yours} No setting here tells real answers from the opponent's, not even one that ruins the model: is there anything to learn?"


def _safe(tries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of one beta: the tries that learn at a rate below the first that does harm."""
    found = []
    for one in sorted(tries, key=lambda one: one["lr"]):
        if one["verdict"] in HARMFUL:
            break
        found += [one] if one["verdict"] == "learns" else []
    return found


def _range(tries: Sequence[dict[str, Any]]) -> str:
    low, high = tries[0]["lr"], tries[-1]["lr"]
    return f"lr {low:.2g}" if low == high else f"lr from {low:.2g} to {high:.2g}"
