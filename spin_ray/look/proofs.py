"""The proof at the door for a config that is not run: model, template and the first rows of its data. Nothing of the run is written."""

from __future__ import annotations

from collections.abc import Iterator

from spin_ray.look.checks import OK, WARNING, Found, Subject

FEW_ROWS = 64
"""Of each source."""


def surroundings(subject: Subject) -> Iterator[Found]:
    """Where metrics go, and that W&B takes the key where it is to be used online."""
    from spin_ray.tracking import check_wandb, wandb_mode

    check_wandb(subject.config)
    mode = wandb_mode(subject.config)
    yield Found(OK, {"online": "online: its server takes the key", "offline": "offline: `wandb sync` uploads later"}.get(mode, mode))


def model(subject: Subject) -> Iterator[Found]:
    """Tokenizer, template, that the model is of a known family and can be saved."""
    from spin_ray.model import inspect_model
    from spin_ray.preflight import Proof

    facts, notes = inspect_model(subject.config), []
    Proof().end(subject.config, facts, notes.append)
    end = facts.chat.tokenizer.convert_ids_to_tokens(facts.chat.end_id)
    longest = f"{facts.max_positions} tokens at most" if facts.max_positions else "of any length"
    yield Found(OK, f"{facts.path}: a {facts.model.model_type}, {longest}; answers end with {end}")
    for note in filter(None, [facts.tokenizer_line, *notes]):
        yield Found(WARNING, note, "nothing, if that is as you want it")


def data(subject: Subject) -> Iterator[Found]:
    """The first rows of each source: read, tokenised, and their tokens proved."""
    from spin_ray.data import counted, load_prompts
    from spin_ray.lengths import Lengths
    from spin_ray.model import inspect_model, longest_sequence
    from spin_ray.preflight import Proof

    config, facts = subject.config, inspect_model(subject.config)
    split = config.data.eval_split or config.data.split
    for source, own_split in ((config.data.train, config.data.split), (config.data.eval, split)):
        if source:
            Proof().tokens(source, own_split, config, facts.chat)
            preferences = config.method == "dpo" and source == config.data.train
            prompts, counts = load_prompts(
                source, config.data, facts.chat, seed=config.run.seed, split=own_split, preferences=preferences, first=FEW_ROWS
            )
            longest_sequence(Lengths.of(prompts), config.sampler.max_new_tokens, facts)
            line = counted(f"{source}: of its first {FEW_ROWS} rows", counts)
            yield Found(WARNING if "warning:" in line else OK, line)


def room(subject: Subject) -> Iterator[Found]:
    """Whether the config's players fit on this machine, if no cluster is to be joined."""
    from spin_ray.look.works import this_machine
    from spin_ray.methods import method_of
    from spin_ray.placement import choose_hardware

    if subject.joins:
        yield Found(OK, "the cluster in RAY_ADDRESS is asked when the run starts")
        return
    samplers = method_of(subject.config).plays or bool(subject.config.data.eval or subject.config.eval.tasks)
    hardware = choose_hardware(subject.config, [this_machine()], samplers=samplers)
    yield Found(OK, f"{', '.join(map(str, hardware.actors))} fit on this machine: {hardware.device}, {hardware.dtype}")
