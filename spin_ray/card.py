"""The model card: README.md in every exported folder, with Hugging Face's metadata and the run's table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from spin_ray.config import Config
from spin_ray.manifest import CARD, RunDir
from spin_ray.theta import Thetas

SHOWN = (
    ("exact_match_t1_share", "right, T=1"), ("exact_match_greedy_share", "right, greedy"), ("real_nll_nats_per_token", "NLL per token"),
    ("advantage_accuracy", "y told from y'"), ("generated_tokens", "tokens per answer"),
)
TITLES = {"spin": "self-play fine-tuning (SPIN)", "sft": "supervised fine-tuning", "dpo": "direct preference optimisation (DPO)"}


def write_cards(config: Config, run: RunDir, thetas: Thetas, version: int) -> None:
    """Put theta_version's card into every folder that it was exported to; the same again when more is known of it."""
    for folder in thetas.folders(version - 1):
        is_adapter = folder == run.adapter(version - 1)
        run.storage.put(folder / CARD, card(config, run, thetas, version, is_adapter=is_adapter).encode())


def card(config: Config, run: RunDir, thetas: Thetas, version: int, *, is_adapter: bool) -> str:
    base, made = config.model.path, next(mark for mark in run.marks("iteration") if mark["iteration"] == version - 1)
    metadata = {
        "library_name": "peft" if is_adapter else "transformers", "pipeline_tag": "text-generation",
        "tags": ["spin_ray", *([config.method] if config.method != "spin" else ["spin", "self-play"])],
        **({} if base.startswith("demo:") else {"base_model": base}),
    }
    head = "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in metadata.items())  # JSON is YAML
    load = (
        f'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "this folder")' if is_adapter
        else 'AutoModelForCausalLM.from_pretrained("this folder")'
    )
    return (
        f"---\n{head}---\n\n# {config.run.name}, theta_{version}\n\n"
        f"Made from `{base}` by {TITLES[config.method]} with spin_ray: run `{config.run.name}`, iteration {version - 1}.\n\n"
        f"```python\n{load}\n```\n\n## How it was made\n\n{_facts(config, run, made)}\n{_table(config, run, version)}"
        "\nLimits: the model can say no more than what its base and its data contain. It was not checked for safety.\n"
    )


def _facts(config: Config, run: RunDir, made: Mapping[str, Any]) -> str:
    session = (run.marks("session") or [{}])[-1]
    prepared, first = ((run.marks(stage) or [{}])[-1] for stage in ("prepared", "theta_0"))
    pairs, objective, sampling = made.get("pairs", {}), made.get("objective", {}), made.get("sampling") or {}
    rows = {
        "opponent": f"theta_{made['iteration']}", "data": config.data.train, "prompts (SHA-256)": prepared.get("sha256"),
        "chat template (SHA-256)": session.get("template"), "theta_0 (SHA-256)": first.get("sha256"),
        "pairs": pairs and f"{pairs['new']:,} new ones, SHA-256 {pairs['sha256']}",
        "objective": ", ".join(f"{key} {value}" for key, value in objective.items() if value not in (None, 0, 0.0, "")),
        "learning rate": made.get("lr"), "epochs": made.get("num_epochs"), "optimizer steps": made.get("report", {}).get("num_steps"),
        "sampling": ", ".join(f"{key} {sampling[key]:g}" for key in ("temperature", "top_p", "max_new_tokens") if key in sampling),
        "seed": made.get("seed"), "software": ", ".join(f"{name} {version}" for name, version in session.get("packages", {}).items()),
        "revision of spin_ray": session.get("revision"),
    }
    lines = [f"| {key} | {_cell(value)} |" for key, value in rows.items() if value not in (None, "", {})]
    return "\n".join(["| | |", "|---|---|", *lines]) + "\n"


def _table(config: Config, run: RunDir, version: int) -> str:
    evaluations = {v: metrics for v, metrics in sorted(run.evaluations().items()) if v <= version}
    shown = [(key, title) for key, title in SHOWN if any(key in metrics for metrics in evaluations.values())]
    if not shown:
        return ""
    rows = [
        f"| theta_{v} | " + " | ".join(_number(metrics, key) for key, _ in shown) + " |" for v, metrics in evaluations.items()
    ]
    heads = "| version | " + " | ".join(title for _, title in shown) + " |"
    return "\n".join(["## Held-out numbers", "", f"On `{_cell(config.data.eval)}`, ± one standard error.", "", heads,
                      "|---" * (1 + len(shown)) + "|", *rows, ""])


def _number(metrics: Mapping[str, float], key: str) -> str:
    if key not in metrics:
        return "–"
    error = metrics.get(f"{key}_se")
    return f"{metrics[key]:.3f}" + (f" ± {error:.3f}" if error is not None else "")


def _cell(value: Any) -> str:
    """Text for a cell of a table."""
    return str(value).replace("|", "\\|").replace("\n", " ")
