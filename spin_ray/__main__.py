"""The command line: parse, then import what the command needs. `--help` loads neither torch nor ray."""

from __future__ import annotations

import argparse
import atexit
import gc
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from spin_ray.address import check_ray_address
from spin_ray.config import Config, flatten, load_config
from spin_ray.exits import ends_in_one_line
from spin_ray.imports import without_gc
from spin_ray.places import check_run_folder, stand_in_for_home


def main(argv: Sequence[str] | None = None) -> int:
    atexit.register(gc.freeze)  # the interpreter's last collection would walk through all libraries once more
    parser = argparse.ArgumentParser(prog="spin-ray", description="Self-play fine-tuning (SPIN) as one Ray job.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (function, help_text) in COMMANDS.items():
        command = commands.add_parser(name, help=help_text, description=help_text)
        command.add_argument("config", help="YAML file, for example conf/demo.yaml")
        command.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the file's, such as spin.beta=0.1")
        command.set_defaults(function=function)
    tune = commands.add_parser("tune", help=TUNE, description=TUNE)
    tune.add_argument("config", help="YAML file, as for run")
    tune.add_argument("search", help="YAML file of what to try, for example conf/search/lr_beta.yaml")
    tune.add_argument("overrides", nargs="*", metavar="key=value", help="settings of every trial, such as spin.num_iterations=2")
    probe = commands.add_parser("probe", help=PROBE, description=PROBE)
    probe.add_argument("config", help="YAML file, as for run")
    probe.add_argument("overrides", nargs="*", metavar="key=value", help="settings, as for run")
    study = commands.add_parser("study", help=STUDY, description=STUDY)
    study.add_argument("words", nargs="*", metavar="PART|key=value", help="which parts, all if none is named; settings of every run")
    study.add_argument("--seeds", type=int, default=3, help="runs of an arm that differ by their seed (default 3)")
    study.add_argument("--concurrent", type=int, default=1, help="arms at a time (default 1)")
    study.add_argument("--out", default="docs/study", help="folder of the lines and pictures; the tables go to a .md file beside it")
    bench = commands.add_parser("bench", help="Measure; the last line is one JSON object.", description="\n".join(_bench_lines()),
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    bench.add_argument("name", choices=BENCHES, metavar="name")
    bench.add_argument("options", nargs=argparse.REMAINDER, help="the bench's own; see spin-ray bench NAME --help")
    args = parser.parse_args(argv)
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # a thread that outlives the run must not start a new Ray
    os.environ.setdefault("RAY_py_gcs_connect_timeout_s", "10")  # Ray reads it when it is imported
    if os.environ.get("RAY_ADDRESS") == "local":  # Ray's word for none
        del os.environ["RAY_ADDRESS"]
    if not os.environ.get("RAY_ADDRESS"):
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # Ray's switch for "no cluster": all its ports are on 127.0.0.1
    return ends_in_one_line("spin-ray", lambda: _work(args))


def _work(args: argparse.Namespace) -> int:
    if args.command != "config":
        stand_in_for_home()
        if os.environ.get("RAY_ADDRESS", "auto") not in ("auto", ""):
            check_ray_address(os.environ["RAY_ADDRESS"], "RAY_ADDRESS")
    if args.command == "bench":
        return importlib.import_module(f"spin_ray.bench.{args.name}").main(args.options)
    if args.command == "tune":
        from spin_ray.study.tune import tune

        tune(args.config, args.search, args.overrides)
        return 0
    if args.command == "probe":
        from spin_ray.study.probe import probe

        probe(args.config, args.overrides)
        return 0
    if args.command == "study":
        from spin_ray.study.study import Size, run_study

        run_study(args.words, Path(args.out), Size(args.seeds, args.concurrent))
        return 0
    config, origin = load_config(args.config, [*args.overrides, *METHODS.get(args.command, ())])
    args.function(config, origin)
    sys.stdout.flush()  # an error comes here, not at the interpreter's end
    return 0


def _check_surroundings(config: Config) -> None:
    from spin_ray.tracking import check_wandb  # not at the top: it loads pyarrow

    check_wandb(config)
    check_run_folder(config)


def _run(config: Config, origin: dict[str, str]) -> None:
    _check_surroundings(config)
    with without_gc():
        from spin_ray.selfplay import run_method

    run_method(config)


def _eval(config: Config, origin: dict[str, str]) -> None:
    check_run_folder(config)
    with without_gc():
        from spin_ray.evaluation import run_eval

    run_eval(config)


def _config(config: Config, origin: dict[str, str]) -> None:
    values = flatten(config)
    width = max(map(len, values))
    for key, value in values.items():
        print(f"{key:<{width}}  {value!s:<24}  {origin[key]}")


COMMANDS: dict[str, tuple[Callable[[Config, dict[str, str]], None], str]] = {
    "run": (_run, "Train by the config's method, SPIN if it names none: all iterations, or what is left of them."),
    "sft": (_run, "Supervised fine-tuning of a base model on the same data, what SPIN starts from: run with method=sft."),
    "eval": (_eval, "Evaluate the model of the config on its held-out data."),
    "config": (_config, "Print the resolved config and where each value came from."),
}

TUNE = "Search over keys of the config, such as learning rate and beta: every trial is a run of its own; the same command goes on."
PROBE = "What a run would meet, before it is paid for: short tries over learning rate and beta, in words."
STUDY = "What the paper claims, tried: arms side by side, several seeds, rates searched for each; the same command goes on. Hours."
METHODS = {"sft": ("method=sft",)}
"""What a command adds to the command line."""

BENCHES = {
    "learner": "the learner's step beside TRL's DPOTrainer and a naive loop: speed, memory, loss",
    "models": "every model family of transformers, tiny and random, through the learner and through transformers: docs/models.md",
    "memory": "how the step's peak memory grows with vocabulary, tokens and pairs",
    "overlap": "the same job in sequential, stream and lookahead: who waits, and is the result the same",
    "scale": "the real orchestration with simulated players, 1 to 64 sampler replicas and 1 to 8 learner workers",
    "slope": "what every process keeps over 20 iterations, with simulated players",
    "samplers": "which model families vLLM loads and reloads on this machine, each against transformers",
    "sync": "a publish-load cycle of 1 GiB of weights against the machine's memcpy",
    "scripts": "the whole job against a fresh vLLM and a fresh TRL process per iteration",
    "rows": "a million short rows read, tokenised and written: the driver's memory and time",
    "chaos": "a job whose processes are killed at random moments: is anything lost, done twice or wrong",
}


def _bench_lines() -> list[str]:
    return [f"{name:<9} {help_text}" for name, help_text in BENCHES.items()]


if __name__ == "__main__":
    sys.exit(main())
