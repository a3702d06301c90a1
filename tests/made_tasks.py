"""Made-up tasks of lm-evaluation-harness over the demo's vocabulary, with their data files: all three kinds of requests."""

import json
import random
from pathlib import Path

WORDS = "fig lemon banana mouse goat lion saw axe file white grey yellow".split()
CHOICE = """task: made_choice
dataset_path: json
dataset_kwargs: {data_files: {train: choice.jsonl, test: choice.jsonl}}
output_type: multiple_choice
training_split: train
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{right}}"
doc_to_choice: "{{choices}}"
target_delimiter: ""
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""
TEXTS = """task: made_texts
dataset_path: json
dataset_kwargs: {data_files: {test: texts.jsonl}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity}
  - {metric: bits_per_byte}
metadata: {version: 1.0}
"""
ANSWERS = """task: made_answers
dataset_path: json
dataset_kwargs: {data_files: {train: answers.jsonl, test: answers.jsonl}}
output_type: generate_until
training_split: train
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: [",", "\\n"], do_sample: false, max_gen_toks: 24}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""


def make_tasks(folder: Path, *, docs: int = 24) -> Path:
    """Three tasks of so many documents each: made_choice, made_texts, made_answers; and a group of the first and the last."""
    folder.mkdir(exist_ok=True)
    draw = random.Random(0)
    for name, task in (("choice", CHOICE), ("texts", TEXTS), ("answers", ANSWERS)):
        (folder / f"{name}.yaml").write_text(task)
        rows = [_document(name, draw) for _ in range(docs)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "group.yaml").write_text(
        "group: made\ntask: [made_choice, made_answers]\naggregate_metric_list:\n  - {metric: acc, weight_by_size: true}\nmetadata: {version: 1}\n"
    )
    return folder


def _document(kind: str, draw: random.Random) -> dict:
    words = draw.sample(WORDS, draw.randint(2, 5))
    listed, backwards = ", ".join(words), ", ".join(reversed(words))
    asked = f"<|user|>Write this list backwards: {listed}.<|end|><|assistant|>"
    match kind:
        case "choice":
            choices = [f"{backwards}.", f"{listed}.", f"{words[0]}."]
            draw.shuffle(choices)
            return {"question": asked, "choices": choices, "right": choices.index(f"{backwards}.")}
        case "texts":
            return {"text": f"Write this list backwards: {listed}. {backwards}. " * draw.randint(1, 6)}
        case _:
            return {"question": asked, "answer": words[-1]}
