"""A search with made-up runs: what counts, what is refused, what a killed search goes on with."""

import json

import pytest

from spin_ray.config import load_config
from spin_ray.errors import BadInput
from spin_ray.exits import EXIT_BAD_INPUT
from spin_ray.manifest import RunDir
from spin_ray.study import tune as module
from spin_ray.study.trials import Outcome
from spin_ray.study.tune import tune

CONF = "conf/demo.yaml"


class Runs:
    """Plays a trial's run by writing its manifest; `right(config, version)` is its exact match, None where it is not measured."""

    def __init__(self, right=lambda config, version: 0.4 + 0.01 * version, refused=lambda config: ""):
        self.right, self.refused, self.played, self.told = right, refused, [], []

    def __call__(self, path, overrides, log, heard):
        config, _ = load_config(path, overrides)
        self.played.append(config)
        if line := self.refused(config):
            return Outcome(EXIT_BAD_INPUT, line, {}, 1.0)
        run = RunDir(config.run_path)
        run.path.mkdir(parents=True)
        for version in range(config.spin.num_iterations + 1):
            right = self.right(config, version)
            metrics = {"real_nll_nats_per_token": 0.5} | ({} if right is None else {"exact_match_t1_share": right})
            run.mark("evaluation", version=version, metrics=metrics)
            heard(version, metrics, run)
            self.told.append((config.run.name, version))
            if run.stop_file.exists():
                break
        return Outcome(0, "", run.evaluations(), 60.0)


@pytest.fixture
def search(tmp_path, monkeypatch):
    """search(runs, text, *overrides): search by that file, with made-up runs; returns the table's rows by trial."""

    def go(runs, text, *overrides, name="search"):
        path = tmp_path / "search.yaml"
        path.write_text(text)
        monkeypatch.setattr(module, "play", runs)
        tune(CONF, str(path), [f"run.dir={tmp_path}", f"run.name={name}", "spin.num_iterations=2", *overrides])
        rows = [line.split() for line in (tmp_path / name / "table.txt").read_text().splitlines()]
        return {int(row[0]): row for row in rows[1:]}

    return go


RATES = "trials: 4\nspace: {spin.lr: {low: 1.0e-5, high: 1.0e-3, log: true}}\n"


def test_values_that_do_not_go_together_are_refused_and_the_search_goes_on(search, tmp_path):
    rows = search(Runs(), "trials: 12\nspace: {overlap.mode: [stream, lookahead], reference.scorer: [opponent, learner]}\n")
    assert len(rows) == 12 and {row[5] for row in rows.values()} == {"finished", "refused"}
    for row in rows.values():
        assert (row[5] == "refused") == (row[1:3] == ["lookahead", "learner"])
    assert load_config(tmp_path / "search/best.yaml")[0].reference.scorer


def test_what_the_first_run_refuses_ends_the_search_and_later_it_is_that_trial_s_own(search):
    few = Runs(refused=lambda config: "too few prompts" if len(few.played) > 1 else "")
    rows = search(few, RATES)
    assert [rows[number][4] for number in range(4)] == ["finished", "refused", "refused", "refused"]
    with pytest.raises(BadInput, match="trial_000: no such model"):
        search(Runs(refused=lambda config: "no such model"), RATES, name="other")


def test_theta_0_is_everyone_s_and_neither_counts_nor_saves_a_bad_trial(search):
    def right(config, version):
        return 0.5 if version == 0 else 0.4 if config.run.name < "trial_003" else 0.3

    runs = Runs(right)
    rows = search(runs, RATES)
    assert [rows[number][2:5] for number in range(4)] == [["0.4000", "theta_1", "finished"]] * 3 + [["0.3000", "theta_1", "pruned"]]
    assert ("trial_003", 2) not in runs.told and ("trial_002", 2) in runs.told


def test_a_search_goes_on_only_with_the_config_that_it_was_begun_with(search):
    search(Runs(), RATES)
    for change in ("spin.beta=0.3", "data.max_prompts=99"):
        with pytest.raises(BadInput, match=rf"begun otherwise \({change.split('=')[0]}: .* -> {change.split('=')[1]}\)"):
            search(Runs(), RATES, change)
    with pytest.raises(BadInput, match=r"begun otherwise \(seed: 0 -> 1\)"):
        search(Runs(), RATES + "seed: 1\n")
    runs = Runs()
    assert len(search(runs, RATES.replace("4", "6"), "learner.pack_tokens=4096")) == 6 and len(runs.played) == 2


def test_a_trial_that_was_killed_before_its_values_were_drawn_is_drawn_anew(search, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(self, space):
        module.Trial(self, self._storage.create_new_trial(self._study_id))
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(module.optuna.Study, "ask", killed)
        with pytest.raises(Killed):
            search(Runs(), RATES)
    rows = search(Runs(), RATES)
    assert sorted(rows) == [1, 2, 3, 4] and {row[4] for row in rows.values()} == {"finished"}


def test_a_trial_that_was_killed_goes_on_with_its_values(search):
    class Killed(BaseException):
        pass

    def dies(config, version):
        if version == 2:
            raise Killed
        return 0.5

    first, second = Runs(dies), Runs()
    with pytest.raises(Killed):
        search(first, RATES)
    assert len(first.played) == 1
    module.RunDir(first.played[0].run_path).path.rename(first.played[0].run_path.with_name("gone"))
    search(second, RATES)
    assert second.played[0].spin.lr == first.played[0].spin.lr and second.played[0].run.name == "trial_000"


def test_a_metric_that_is_not_measured_is_named(search):
    with pytest.raises(BadInput, match=r"metric=exact_match_t1_share: not measured on demo:heldout.* known are real_nll_nats_per_token"):
        search(Runs(right=lambda *_: None), RATES + "metric: exact_match_t1_share\n")
    rows = search(Runs(right=lambda *_: None), RATES, name="auto")
    assert rows[0][2] == "0.5000"


def test_a_choice_may_be_a_list_or_nothing(search, tmp_path):
    rows = search(Runs(), "trials: 5\nspace: {spin.num_epochs: [[1, 2], 1], learner.gpus_per_worker: [null, 0]}\n")
    assert len(rows) == 5
    best, _ = load_config(tmp_path / "search/best.yaml")
    assert best.spin.num_epochs in (1, [1, 2]) and best.learner.gpus_per_worker in (None, 0)
    assert json.loads((tmp_path / "search/search.json").read_text())["search"]["space"]["spin.num_epochs"] == [[1, 2], 1]


def test_a_folder_that_cannot_be_written_is_refused(search, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"run\.dir: .*file.* cannot be written"):
        search(Runs(), RATES, f"run.dir={tmp_path}/file")
