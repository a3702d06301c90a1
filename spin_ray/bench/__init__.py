"""Measurements, each a command: `spin-ray bench NAME`. Importing this imports none of them."""

BENCHES = {
    "learner": "the learner's step beside TRL's DPOTrainer and a naive loop: speed, memory, loss",
    "gpu": "every path that only a GPU takes, on whatever is installed: make gpu-check",
    "models": "every model family of transformers, tiny and random, through the learner and through transformers: docs/models.md",
    "plan": "the learner's memory as `spin-ray plan` predicts it, beside what a step takes, over settings that change it",
    "memory": "how the step's peak memory grows with vocabulary, tokens and pairs",
    "overlap": "the same job in sequential, stream and lookahead: who waits, and is the result the same",
    "scale": "the real orchestration with simulated players, 1 to 64 sampler replicas and 1 to 8 learner workers",
    "saturation": "what an event costs pool, driver and coordinator, and a simulated day: at which size they do not keep up",
    "slope": "what every process keeps over 20 iterations, with simulated players",
    "start": "from a file of up to a million rows to the first step and through an iteration, with simulated players: seconds, memory",
    "sampler": "an opponent's engine alone: every prompt computed once against twice, pairs per second",
    "samplers": "which model families vLLM loads and reloads on this machine, each against transformers",
    "sync": "a publish-load cycle of 1 GiB of weights against the machine's memcpy",
    "scripts": "the whole job against a fresh vLLM and a fresh TRL process per iteration",
    "turns": "what of an iteration is lost where the players take turns on one GPU, with simulated players",
    "shards": "a learner's rank under ZeRO-3, alone and as one of several: memory while it loads, exports and checkpoints",
    "rows": "a million short rows read, tokenised and written: the driver's memory and time",
    "chaos": "a job whose processes are killed at random moments: is anything lost, done twice or wrong",
}
"""Name, of a file here -> what it measures."""
