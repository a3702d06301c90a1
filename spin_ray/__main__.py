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
from typing import TYPE_CHECKING, Any, NamedTuple

from spin_ray.address import check_ray_address
from spin_ray.bench import BENCHES
from spin_ray.config import Config, flatten, load_config, repeat_config
from spin_ray.errors import BadInput
from spin_ray.exits import ends_in_one_line
from spin_ray.imports import without_gc
from spin_ray.places import check_run_folder, nothing_left_if_refused, stand_in_for_home

if TYPE_CHECKING:
    from spin_ray.provenance import Origin


class Command(NamedTuple):
    """A word after `spin-ray`."""

    work: Callable[[argparse.Namespace], int | None]
    """Carries it out; its exit code, None for 0."""
    help: str
    arguments: tuple[tuple[str, dict[str, Any]], ...]
    """Name or flag, and what argparse is told of it."""


def main(argv: Sequence[str] | None = None) -> int:
    atexit.register(gc.freeze)  # the interpreter's last collection would walk through all libraries once more
    args = parsed(argv)
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # a thread that outlives the run must not start a new Ray
    os.environ.setdefault("RAY_py_gcs_connect_timeout_s", "10")  # Ray reads it when it is imported
    if os.environ.get("RAY_ADDRESS") == "local":  # Ray's word for none
        del os.environ["RAY_ADDRESS"]
    if not os.environ.get("RAY_ADDRESS"):
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # Ray's switch for "no cluster": all its ports are on 127.0.0.1
    return ends_in_one_line("spin-ray", lambda: _work(args), only_prints=args.command in ONLY_PRINT)


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """A command line; one that is wrong ends the process with what argparse says."""
    parser = argparse.ArgumentParser(prog="spin-ray", description="Self-play fine-tuning (SPIN) as one Ray job.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, command in COMMANDS.items():
        text, more = command.help, {}
        if name == "bench":
            text, more = "\n".join([text, *_bench_lines()]), {"formatter_class": argparse.RawDescriptionHelpFormatter}
        one = commands.add_parser(name, help=command.help, description=text, **more)
        for argument, told in command.arguments:
            one.add_argument(argument, **told)
    args, rest = parser.parse_known_args(argv)  # a list of words that goes on after a flag is unknown to argparse
    goes_on = next((name for name in ("words", "overrides") if name in args), None)
    if rest and (goes_on is None or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        getattr(args, goes_on).extend(rest)
    return args


def _work(args: argparse.Namespace) -> int:
    if args.command not in ("config", "doctor"):  # doctor looks itself
        stand_in_for_home()
        if args.command not in ("chat", "show") and os.environ.get("RAY_ADDRESS", "auto") not in ("auto", ""):
            check_ray_address(os.environ["RAY_ADDRESS"], "RAY_ADDRESS")
    code = COMMANDS[args.command].work(args)
    sys.stdout.flush()  # an error comes here, not at the interpreter's end
    return code or 0


def _check_surroundings(config: Config) -> None:
    from spin_ray.tracking import check_wandb  # not at the top: it loads pyarrow

    check_wandb(config)
    check_run_folder(config)


def _run(args: argparse.Namespace) -> None:
    config, origin = _config_to_run(args)
    with nothing_left_if_refused(config.run_path):
        _check_surroundings(config)
        with without_gc():
            from spin_ray.selfplay import run_method

        run_method(config, origin, quiet=args.quiet)


def _config_to_run(args: argparse.Namespace) -> tuple[Config, Origin | None]:
    """The config of a file, or that of an earlier run's manifest, with what it was made from."""
    if args.command == "sft":
        return load_config(_given(args.config), [*args.overrides, "method=sft"])[0], None
    if not args.from_manifest:
        return load_config(_given(args.config), args.overrides)[0], None
    with without_gc():
        from spin_ray.provenance import Origin

    origin = Origin.read(Path(args.from_manifest))
    config = repeat_config(origin.path, origin.config, [*([args.config] if args.config else []), *args.overrides])
    if (config.run_path / "manifest.jsonl").resolve() == origin.path.resolve():
        raise BadInput(f"--from-manifest {origin.path}: that is the run itself; give the one that repeats it a name: run.name=...")
    return config, origin


def _given(config: str | None) -> str:
    if config is None:
        raise BadInput("which config? give a YAML file, for example conf/demo.yaml, or --from-manifest FILE")
    return config


def _eval(args: argparse.Namespace) -> None:
    config, _ = load_config(args.config, args.overrides)
    with nothing_left_if_refused(config.run_path):
        check_run_folder(config)
        with without_gc():
            from spin_ray.evaluation import run_eval

        run_eval(config)


def _config(args: argparse.Namespace) -> None:
    config, origin = load_config(args.config, args.overrides)
    values = flatten(config)
    width = max(map(len, values))
    for key, value in values.items():
        print(f"{key:<{width}}  {value!s:<24}  {origin[key]}")


def _tune(args: argparse.Namespace) -> None:
    from spin_ray.study.tune import tune

    tune(args.config, args.search, args.overrides)


def _probe(args: argparse.Namespace) -> None:
    from spin_ray.study.probe import probe

    probe(args.config, args.overrides, quiet=args.quiet)


def _plan(args: argparse.Namespace) -> None:
    with without_gc():
        from spin_ray.look.plan.command import plan
        from spin_ray.look.plan.inputs import Asked

    asked = Asked(**{name: getattr(args, name) for name in Asked.names()})
    plan(args.config, args.overrides, asked, as_json=args.json)


def _report(args: argparse.Namespace) -> None:
    with without_gc():
        from spin_ray.look.report.write import report

    print(report(args.runs, args.out))


def _study(args: argparse.Namespace) -> None:
    from spin_ray.study.study import Size, run_study

    run_study(args.words, Path(args.out), Size(args.seeds, args.concurrent))


def _chat(args: argparse.Namespace) -> None:
    from spin_ray.look.chat import chat

    chat(
        args.run, iteration=args.iteration, compare=args.compare, max_new_tokens=args.max_new_tokens, temperature=args.temperature,
        system=args.system, seed=args.seed,
    )


def _doctor(args: argparse.Namespace) -> int:
    from spin_ray.look.doctor import doctor

    return doctor(args.words, as_json=args.json)


def _show(args: argparse.Namespace) -> None:
    from spin_ray.look.show import show

    show(args.run, args.key, follow=args.follow, as_json=args.json)


def _bench(args: argparse.Namespace) -> int:
    return importlib.import_module(f"spin_ray.bench.{args.name}").main(args.options)


def _bench_lines() -> list[str]:
    return [f"{name:<10} {help_text}" for name, help_text in BENCHES.items()]


_CONFIG = ("config", {"help": "YAML file, for example conf/demo.yaml"})
_ITS_CONFIG = ("config", {"nargs": "?", "help": "YAML file, for example conf/demo.yaml"})
_FROM_MANIFEST = ("--from-manifest", {
    "metavar": "FILE", "help": "repeat the run that wrote this manifest.jsonl, in place of a config: the same settings, model and data",
})
_OVERRIDES = ("overrides", {"nargs": "*", "metavar": "key=value", "help": "settings that replace the file's, such as spin.beta=0.1"})
_JSON = ("--json", {"action": "store_true", "help": "the same facts as one JSON object on standard output"})
_QUIET = ("--quiet", {"action": "store_true", "help": "say nothing but how it ends"})
_SEARCH = ("search", {"help": "YAML file of what to try, for example conf/search/lr_beta.yaml"})

COMMANDS = {
    "run": Command(
        _run, "Train by the config's method, SPIN if it names none: all iterations, or what is left of them.",
        (_ITS_CONFIG, _OVERRIDES, _FROM_MANIFEST, _QUIET)),
    "sft": Command(
        _run, "Supervised fine-tuning of a base model on the same data, what SPIN starts from: run with method=sft.",
        (_CONFIG, _OVERRIDES, _QUIET)),
    "eval": Command(_eval, "Evaluate the model of the config on its held-out data.", (_CONFIG, _OVERRIDES)),
    "config": Command(_config, "Print the resolved config and where each value came from.", (_CONFIG, _OVERRIDES)),
    "show": Command(
        _show, "What a run is doing or how it ended, from its folder or URL, on any machine; it is not disturbed.",
        (
            ("run", {"metavar": "RUN|URL", "help": "a run's folder, such as runs/demo, or its URL; or a search's or a study's folder"}),
            ("key", {"nargs": "?", "default": "", "help": "print this fact alone, such as state, best or progress.left_s"}),
            ("--follow", {"action": "store_true", "help": "look again every few seconds until the run has ended"}),
            _JSON,
        )),
    "doctor": Command(
        _doctor, "Is this machine, or the cluster in RAY_ADDRESS, ready for a run; with a config, for this one. Exit code 1 if not.",
        (
            ("words", {"nargs": "*", "metavar": "CONFIG|key=value", "help": "YAML file of a run, and settings that replace the file's"}),
            _JSON,
        )),
    "chat": Command(
        _chat, "Talk to a run's model in the terminal, by plain transformers; lines from a pipe are answered one by one.",
        (
            ("run", {"metavar": "RUN", "help": "a run's folder, such as runs/demo, or its URL; or any model's folder"}),
            ("--iteration", {"type": int, "metavar": "k", "help": "theta_k; 0: where it began (default: the best, else the last one)"}),
            ("--compare", {"action": "store_true", "help": "theta_0's answers beside the other one's"}),
            ("--max-new-tokens", {"type": int, "default": 512, "metavar": "n", "help": "longest answer, in tokens (default 512)"}),
            ("--temperature", {"type": float, "default": 0.0, "metavar": "t", "help": "0 (default): greedy; 1: as the model is"}),
            ("--system", {"default": "", "metavar": "text", "help": "system text"}),
            ("--seed", {"type": int, "metavar": "n", "help": "draw the same answers each time"}),
        )),
    "tune": Command(
        _tune, "Search over keys of the config, such as learning rate and beta: every trial is a run of its own; the same command goes on.",
        (_CONFIG, _SEARCH, _OVERRIDES)),
    "probe": Command(
        _probe, "What a run would meet, before it is paid for: short tries over learning rate and beta, in words.",
        (_CONFIG, _OVERRIDES, _QUIET)),
    "plan": Command(
        _plan, "What a run needs, whether it fits, how long it takes and what it costs, by arithmetic: nothing is started.",
        (
            _CONFIG, _OVERRIDES,
            ("--gpu-memory-gib", {"type": float, "metavar": "N", "help": "memory of a GPU (default: of the one here, else 24, 40 and 80)"}),
            ("--sampler-tokens-per-s", {"type": float, "metavar": "R", "help": "generated tokens per second of one replica"}),
            ("--learner-tokens-per-s", {"type": float, "metavar": "R", "help": "tokens per second of all the learner's workers together"}),
            ("--price-per-gpu-hour", {"type": float, "metavar": "P", "help": "in whatever currency"}),
            ("--prompt-tokens", {"type": int, "metavar": "N", "help": "mean tokens of a prompt; with the next two in place of the data"}),
            ("--answer-tokens", {"type": int, "metavar": "N", "help": "mean tokens of an answer"}),
            ("--num-prompts", {"type": int, "metavar": "N", "help": "number of prompts"}),
            ("--json", {"action": "store_true", "help": "print one JSON object instead"}),
        )),
    "report": Command(
        _report, "One page about a run, or about several side by side, a search's folder among them: a file that needs nothing else.",
        (
            ("runs", {"nargs": "+", "metavar": "RUN", "help": "folder or URL of a run, or of a search"}),
            ("--out", {
                "default": "", "metavar": "FILE",
                "help": "where to write it (default: report.html in the run's folder; of a URL in this one)",
            }),
        )),
    "study": Command(
        _study, "What the paper claims, tried: arms side by side, several seeds, rates searched for each; the same command goes on. Hours.",
        (
            ("words", {"nargs": "*", "metavar": "PART|key=value", "help": "which parts, all if none is named; settings of every run"}),
            ("--seeds", {"type": int, "default": 3, "help": "runs of an arm that differ by their seed (default 3)"}),
            ("--concurrent", {"type": int, "default": 1, "help": "arms at a time (default 1)"}),
            ("--out", {"default": "docs/study", "help": "folder of the lines and pictures; the tables go to a .md file beside it"}),
        )),
    "bench": Command(
        _bench, "Measure; the last line is one JSON object.",
        (
            ("name", {"choices": BENCHES, "metavar": "name"}),
            ("options", {"nargs": argparse.REMAINDER, "help": "the bench's own; see spin-ray bench NAME --help"}),
        )),
}

ONLY_PRINT = ("config", "plan", "show")
"""Commands that are done when nobody reads on."""


if __name__ == "__main__":
    sys.exit(main())
