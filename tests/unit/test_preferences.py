"""Preference rows in the shapes people have them: both answers are read, to one and the same prompt, or the row is refused."""

import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from spin_ray.chat import ChatFormat
from spin_ray.config import Config, DataConfig, ModelConfig, load_config
from spin_ray.data import load_both, load_prompts
from spin_ray.data.choice import choose_preference
from spin_ray.data.rows import read_dialogue
from spin_ray.demo import resolve
from spin_ray.errors import BadInput
from spin_ray.methods import method_of
from spin_ray.records import PROMPT_SCHEMA, Prompt, from_table, to_table

PIRATE, USER = {"role": "system", "content": "Talk like a pirate."}, {"role": "user", "content": "Hi"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("Ahoy", "Hello there"))


@pytest.fixture(scope="module")
def chat():
    return ChatFormat(AutoTokenizer.from_pretrained(resolve("demo:base")))


SHAPES = {
    "text": {"prompt": "Hi", "chosen": "Ahoy", "rejected": "Hello there"},
    "answers as messages": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "whole dialogues": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "whole dialogues beside their prompt": {"prompt": "Hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "ultrafeedback": {"prompt": "Hi", "prompt_id": "a", "messages": [USER, GOOD], "chosen": [USER, GOOD], "rejected": [USER, BAD],
                      "score_chosen": 7.5, "score_rejected": 2.0},
    "a question": {"question": "Hi", "chosen": "Ahoy", "rejected": "Hello there"},
    "JSON text": {"chosen": json.dumps([USER, GOOD]), "rejected": json.dumps([USER, BAD])},
}


@pytest.mark.parametrize("row", SHAPES.values(), ids=SHAPES)
def test_every_shape_gives_both_answers(row):
    chosen = choose_preference(read_dialogue(row, preferences=True))
    assert list(chosen.requests()) == [([USER], "Ahoy", None), ([USER], "Hello there", None)]


def test_system_text_and_history_go_before_both():
    row = {"system": "Talk like a pirate.", "question": "Hi", "history": [["Bye", "Why?"]], "chosen": "Ahoy", "rejected": "Hello there"}
    better, worse = choose_preference(read_dialogue(row, preferences=True)).requests()
    assert better[0] == worse[0] == [PIRATE, {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "Why?"}, USER]


@pytest.mark.parametrize("row, says", [
    ({"prompt": "Hi", "response": "Ahoy"}, "no chosen and rejected beside the prompt; this row has prompt, response"),
    ({"messages": [USER, GOOD]}, "no chosen and rejected beside the prompt; this row has messages"),
    ({"prompt": "Hi", "chosen": "Ahoy"}, "no chosen and rejected beside the prompt; this row has prompt, chosen"),
    ({"prompt": "Hi", "chosen": "Ahoy", "rejected": ""}, "no chosen and rejected"),
    ({"prompt": "Hi", "chosen": "Ahoy", "rejected": "Ahoy"}, "chosen and rejected are the same answer"),
    ({"chosen": [USER, GOOD], "rejected": [PIRATE, BAD]}, "chosen and rejected do not answer the same prompt"),
    ({"chosen": [USER, GOOD], "rejected": [{"role": "user", "content": "Bye"}, BAD]}, "chosen and rejected do not answer the same prompt"),
    ({"prompt": "Hi", "chosen": [USER, GOOD], "rejected": [{"role": "user", "content": "Bye"}, BAD]}, "rejected is a dialogue that does not hold prompt"),
    ({"chosen": [USER, GOOD], "rejected": [USER]}, "no assistant answer"),
    ({"prompt": "Hi", "chosen": "Ahoy", "rejected": 3}, "rejected must be text, found int"),
    ({"prompt": "Hi", "chosen": "Ahoy", "rejected": "No", "notes": "x"}, "column notes"),
])
def test_what_is_no_preference_is_refused(row, says):
    with pytest.raises(ValueError, match=says):
        choose_preference(read_dialogue(row, preferences=True))


def load(tmp_path, chat, rows, **options):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_prompts(str(path), DataConfig(train=str(path), **options), chat, seed=0, preferences=True)


def test_rows_become_prompts_with_a_rejected_answer(tmp_path, chat):
    other = {"prompt": "Bye", "chosen": "So long", "rejected": "No"}
    prompts, counts = load(tmp_path, chat, [*SHAPES.values(), other, {**other, "rejected": "Why"}])
    assert (counts["rows"], counts["kept"], counts["duplicates"]) == (9, 3, 6)  # another rejected answer is another row
    found = {tuple(chat.decode(ids) for ids in (p.real_ids, p.rejected_ids)) for p in prompts}
    assert found == {("Ahoy", "Hello there"), ("So long", "No"), ("So long", "Why")}
    assert all(p.rejected_ids[-1] in chat.stop_ids for p in prompts)
    [again, *_] = from_table(to_table(prompts, PROMPT_SCHEMA), Prompt)
    assert np.array_equal(again.rejected_ids, prompts[0].rejected_ids)


def test_a_long_rejected_answer_is_dropped_and_counted_and_a_bad_one_named(tmp_path, chat):
    long, fine = {"prompt": "Hi", "chosen": "Ahoy", "rejected": "no " * 60}, SHAPES["text"]
    _, counts = load(tmp_path, chat, [long, fine], max_answer_tokens=40)
    assert counts["dropped_long_answer"] == 1 and counts["kept"] == 1
    with pytest.raises(BadInput, match=r"line 2: chosen and rejected are the same answer; data\.bad_rows=drop counts and drops"):
        load(tmp_path, chat, [fine, {**fine, "rejected": "Ahoy"}])
    assert load(tmp_path, chat, [fine, {**fine, "rejected": "Ahoy"}], bad_rows="drop")[1]["dropped_bad"] == 1


def test_dpo_reads_preferences_for_training_and_takes_the_chosen_answer_of_held_out_ones(tmp_path, chat):
    rows = tmp_path / "data.jsonl"
    rows.write_text(json.dumps(SHAPES["text"]) + "\n")
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text(json.dumps({"prompt": "Bye", "chosen": "So long", "rejected": "No"}) + "\n")
    config = Config(method="dpo", model=ModelConfig(path="m"), data=DataConfig(train=str(rows), eval=str(heldout)))
    loaded = load_both(config, chat, lambda line: None)
    assert chat.decode(loaded.train[0].rejected_ids) == "Hello there" and len(loaded.heldout[0].rejected_ids) == 0
    prompt = loaded.train[0]
    pair = method_of(config).pair(prompt)
    assert pair.generated_ids is prompt.rejected_ids and len(pair.opponent_real_logps) == len(pair.opponent_generated_logps) == 0


def test_methods_say_what_they_need():
    def method(*overrides):
        return method_of(load_config("conf/demo.yaml", overrides)[0])

    spin, sft, dpo = method(), method("method=sft"), method("method=dpo")
    assert (spin.plays, sft.plays, dpo.plays) == (True, False, False) and (spin.num_iterations, sft.num_iterations, dpo.num_iterations) == (3, 1, 1)
    assert (spin.scorer, sft.scorer, dpo.scorer) == ("opponent", "opponent", "learner")
    assert method("method=dpo", "reference.scorer=frozen").scorer == "frozen"
    assert list(spin.replayed(0)) == [] and list(spin.replayed(2)) == [1] and list(method("spin.replay=0").replayed(2)) == []
    history = method("spin.replay=9", "spin.loss=triplet")
    assert list(history.replayed(2)) == [1, 0] and history.needed(2) == {0, 1} and history.anchored
    assert method("spin.replay=0", "spin.loss=triplet").needed(2) == {0} and method("spin.loss=triplet").needed(0) == set()
    mixed = method("spin.base_share=0.5")
    assert [mixed.mixes_in_base(t) for t in range(3)] == [False, True, True] and not spin.mixes_in_base(2)
    scheduled = method("spin.beta=[0.1, 0.2, 0.3]", "spin.lr=[1e-3, 1e-4, 1e-5]", "spin.num_epochs=[3, 2, 1]", "spin.nll_weight=[1, 0, 0.5]")
    objectives = [scheduled.objective(t) for t in range(3)]
    assert [(o.beta, o.nll_weight) for o in objectives] == [(0.1, 1), (0.2, 0), (0.3, 0.5)]
    assert [(scheduled.lr(t), scheduled.num_epochs(t)) for t in range(3)] == [(1e-3, 3), (1e-4, 2), (1e-5, 1)]
