"""What the study compares: every arm is a few keys of the config beside conf/study.yaml, every part a question and its arms.

Steps are optimizer steps of `learner.batch_pairs` pairs: with 1,600 prompts and 32 pairs a SPIN iteration has 50, and 100 with the replayed
pairs of the one before. So theta_1 to theta_6 of `spin` have seen 50, 150, 250, 350, 450 and 550; the baselines get as many.
"""

from __future__ import annotations

from dataclasses import dataclass

RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
"""Learning rates that a search may try. It begins with the middle three and goes on past an end that is the best."""


@dataclass(frozen=True)
class Arm:
    """Runs with the same settings and several seeds, at every one of `points`."""

    name: str
    says: str
    """In tables."""
    settings: tuple[str, ...] = ()
    """key=value, beside the study's config."""
    rate: str = "spin.lr"
    """The key that is searched on prompts which no table is made of; empty: none is."""
    searched_with: tuple[str, ...] = ()
    """Settings that only the search has: shorter runs."""
    rate_of: str = ""
    """The arm whose rate it takes instead of searching."""
    points: tuple[tuple[str, ...], ...] = ((),)
    config: str = "conf/study.yaml"
    data: str = ""
    """What data.train is, where that is a file that the study makes."""
    forecasts: str = ""
    """It is no run but a probe, of what the runs of that arm will do."""
    curve: str = ""
    """In the picture arms of the same curve are one line."""
    judged: bool = False
    """Whether a judge that nobody trained compares its answers with the human ones."""


@dataclass(frozen=True)
class Part:
    name: str
    question: str
    arms: tuple[str, ...]
    """In the order of the table."""
    kind: str = "curve"
    """curve: a version a row; grid: an arm a row, a point a column; forecast: a probe beside the runs that it forecasts."""


SHORT = ("spin.num_iterations=3",)
SFT = ("method=sft",)
DPO = ("method=dpo", "dpo.beta=0.1")
ONE = "one iteration, more epochs"

GRID = tuple((f"spin.lr={rate:g}", f"spin.beta={beta:g}") for rate, beta in ((1e-4, 0.1), (3e-4, 0.1), (1e-3, 0.1), (3e-4, 1.0)))
CURES = {
    "plain": ("plain SPIN", ()),
    "nll": ("`nll_weight=1`", ("spin.nll_weight=1.0",)),
    "smoothing": ("`label_smoothing=0.1`", ("spin.label_smoothing=0.1",)),
    "mean": ("`length=mean`", ("spin.length=mean",)),
    "desensitised": ("`length=desensitised`", ("spin.length=desensitised",)),
    "positive": ("`positive_weight=5`", ("spin.positive_weight=5.0",)),
    "hinge": ("`loss=hinge`", ("spin.loss=hinge",)),
    "space": ("`loss=space`", ("spin.loss=space",)),
    "triplet": ("`loss=triplet`", ("spin.loss=triplet",)),
    "mixture": ("`base_share=0.5`", ("spin.base_share=0.5",)),
    "replay_2": ("`replay=2`", ("spin.replay=2",)),
}
"""Name -> in words, settings."""


def _spin(name: str, says: str, *settings: str, **more: object) -> Arm:
    return Arm(name, says, settings, **more)


ARMS: dict[str, Arm] = {arm.name: arm for arm in (
    _spin("spin", "SPIN", "spin.num_iterations=6", searched_with=SHORT),
    _spin("spin_nll", "SPIN, `nll_weight=1`", "spin.num_iterations=6", "spin.nll_weight=1.0", searched_with=SHORT),
    Arm("sft_5", "SFT, 5 epochs", (*SFT, "sft.num_epochs=5"), rate="sft.lr", curve="SFT"),
    *(Arm(f"sft_{n}", f"SFT, {n} epoch{'s' * (n > 1)}", (*SFT, f"sft.num_epochs={n}"), rate="sft.lr", rate_of="sft_5", curve="SFT")
      for n in (1, 3, 7, 11)),
    _spin("epochs_7", "one iteration, 7 epochs", "spin.num_iterations=1", "spin.num_epochs=7", curve=ONE),
    *(_spin(f"epochs_{n}", f"one iteration, {n} epochs", "spin.num_iterations=1", f"spin.num_epochs={n}", rate_of="epochs_7", curve=ONE)
      for n in (3, 11)),
    Arm("dpo_1600", "DPO, 1,600 pairs, 7 epochs", (*DPO, "dpo.num_epochs=7"), rate="dpo.lr", data="preferences"),
    Arm("dpo_400", "DPO, 400 pairs, 27 epochs", (*DPO, "data.max_prompts=400", "dpo.num_epochs=27", "run.max_steps=350"), rate="dpo.lr",
        rate_of="dpo_1600", data="preferences"),
    Arm("dpo_6400", "DPO, 6,400 pairs, 1.75 epochs", (*DPO, "data.max_prompts=6400", "dpo.num_epochs=2", "run.max_steps=350"),
        rate="dpo.lr", rate_of="dpo_1600", data="preferences"),
    Arm("sft_6400", "SFT on the 6,400 chosen answers, 1.75 epochs",
        (*SFT, "data.max_prompts=6400", "sft.num_epochs=2", "run.max_steps=350"), rate="sft.lr", rate_of="sft_5", data="chosen"),
    *(_spin(f"cure_{name}", says, *settings, "spin.num_iterations=2", rate="", points=GRID) for name, (says, settings) in CURES.items()),
    *(_spin(f"probe_{name}", f"probe of {CURES[name][0]}", *CURES[name][1], "spin.num_iterations=2", rate="", forecasts=f"cure_{name}")
      for name in ("plain", "nll")),
    _spin("no_replay", "SPIN, no replay", "spin.replay=0", "spin.num_epochs=[1,2,2,2]", searched_with=(*SHORT, "spin.num_epochs=[1,2,2]")),
    _spin("lookahead", "SPIN, `overlap.mode=lookahead`", "overlap.mode=lookahead", rate_of="spin"),
    *(Arm(f"smollm2_{name}", says, (*settings, "data.max_prompts=128"), rate="", config="conf/smollm2.yaml", judged=True)
      for name, says, settings in (("spin", "SPIN", ()), ("spin_nll", "SPIN, `nll_weight=1`", CURES["nll"][1]), ("sft", "SFT", SFT))),
)}

PARTS: dict[str, Part] = {part.name: part for part in (
    Part("sft", "SPIN's iterations against more epochs of SFT", ("spin", "spin_nll", "sft_1", "sft_3", "sft_5", "sft_7", "sft_11")),
    Part("epochs", "Iterations against more epochs of iteration 0; is it maintained?", ("spin", "epochs_3", "epochs_7", "epochs_11")),
    Part("dpo", "SPIN against DPO with extra preference pairs", ("spin", "spin_nll", "dpo_400", "dpo_1600", "dpo_6400", "sft_6400")),
    Part("cures", "Where plain SPIN collapses, and what each cure saves", tuple(f"cure_{name}" for name in CURES), kind="grid"),
    Part("forecast", "Is the probe right?", ("probe_plain", "probe_nll"), kind="forecast"),
    Part("replay", "Replay on and off; does staleness cost quality?", ("spin", "no_replay", "lookahead")),
    Part("real", "A real model and human dialogues", ("smollm2_spin", "smollm2_spin_nll", "smollm2_sft")),
)}
