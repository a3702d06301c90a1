"""Rows from human dialogues: consecutive texts of a speaker are one turn, the fourth turn is the answer, nothing is in both files or half."""

import json

import pytest

from spin_ray.demo.real import NUM_HELDOUT, _make, _row, _turns, _write_rows


def dialogue(*turns):
    return {"messages": [[{"text": text, "sender": "a"} for text in texts] for texts in turns]}


def row(*turns):
    return _row(_turns(dialogue(*turns)))


def test_texts_of_a_speaker_are_one_turn_and_the_first_four_turns_are_a_row():
    found = row(["Hello ", " how are\nyou?"], ["fine"], ["and what now?"], ["we go out", "", "and dance"], ["yes"])
    assert found["messages"] == [
        {"role": "user", "content": "Hello how are you?"}, {"role": "assistant", "content": "fine"},
        {"role": "user", "content": "and what now?"}, {"role": "assistant", "content": "we go out and dance"},
    ]


def test_too_short_too_long_or_empty_is_no_row():
    answer = ["we go out and dance"]
    assert row(["a"], ["b"], ["c"], answer) and not row(["a"], ["b"], ["c"]) and not row(["a"], [" "], ["c"], answer)
    assert not row(["a"], ["b"], ["c"], ["only three words"]) and not row(["word " * 41], ["b"], ["c"], answer)


def test_no_dialogue_is_in_both_files(tmp_path):
    dialogues = {str(n): dialogue([f"question {n % 700}"], ["b"], ["c"], [f"answer number {n} is here"]) for n in range(1400)}
    (tmp_path / "dataset.json").write_text(json.dumps(dialogues))
    _write_rows(tmp_path / "dataset.json", tmp_path)
    train, heldout = ([json.loads(line)["messages"] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()] for name in ("train", "heldout"))
    asked = [{str(messages[:-1]) for messages in rows} for rows in (train, heldout)]
    assert len(heldout) == NUM_HELDOUT and len(train) == len(asked[0]) and not asked[0] & asked[1] and len(asked[0] | asked[1]) == 700


def test_what_was_interrupted_is_made_anew_and_what_is_whole_is_left(tmp_path):
    def half(folder):
        folder.mkdir()
        (folder / "a").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _make(tmp_path / "minilm", half)
    assert not (tmp_path / "minilm").exists()
    _make(tmp_path / "minilm", lambda folder: folder.mkdir())
    assert (tmp_path / "minilm").is_dir() and not list((tmp_path / "minilm").iterdir())
    _make(tmp_path / "minilm", half)
