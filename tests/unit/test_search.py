"""A search file is read, or refused in one line, before anything starts; the table and the picture of a search."""

import json

import pytest

from spin_ray.config import load_config, with_overrides
from spin_ray.errors import BadInput
from spin_ray.manifest import RunDir
from spin_ray.study.picture import draw_search
from spin_ray.study.search import Range, Search, read_search
from spin_ray.study.trials import collapsed
from spin_ray.study.tune import Result, _distribution, _table

CONF = "conf/demo.yaml"


def search(tmp_path, text):
    path = tmp_path / "search.yaml"
    path.write_text(text)
    return read_search(str(path), CONF, [])


def test_the_shipped_search_is_read():
    found = read_search("conf/search/lr_beta.yaml", CONF, [])
    assert found.trials == 12 and found.space["spin.lr"] == Range(5e-5, 5e-3, log=True) and found.metric == "auto"


def test_choices_ranges_and_fixed_values(tmp_path):
    found = search(tmp_path, "space:\n  spin.loss: [logistic, space]\n  spin.num_epochs: {low: 1, high: 3}\nfixed: [{spin.loss: space, spin.num_epochs: 2}]\n")
    assert found.space == {"spin.loss": ["logistic", "space"], "spin.num_epochs": Range(1, 3)} and found.fixed == [{"spin.loss": "space", "spin.num_epochs": 2}]
    assert _distribution(found.space["spin.num_epochs"]).__class__.__name__ == "IntDistribution"


@pytest.mark.parametrize("text, says", [
    ("trials: 3\n", "space must name at least one key"),
    ("space: {}\n", "space must name at least one key"),
    ("spaces: {spin.lr: [1]}\n", "unknown key spaces; a search has space, trials"),
    ("space: {spin.lrr: [1.0e-5]}\n", "unknown key spin.lrr; the nearest known key is spin.lr"),
    ("space: {spin.lr: 1.0e-5}\n", "spin.lr: give a list of choices, or low and high"),
    ("space: {spin.lr: {low: 2, high: 1}}\n", "with low below high"),
    ("space: {spin.lr: {low: 0, high: 1, log: true}}\n", "log needs low above 0"),
    ("space: {spin.lr: {low: 1.0e-5, hihg: 1}}\n", "give a list of choices"),
    ("space: {spin.lr: {low: -1, high: 1}}\n", "spin.lr=-1: must be a number above 0"),
    ("space: {spin.loss: [logistic, magic]}\n", "spin.loss=magic: choose one of"),
    ("space: {spin.lr: [1.0e-5]}\ntrials: 0\n", "trials=0: must be a whole number of at least 1"),
    ("space: {spin.lr: [1.0e-5]}\nconcurrent: two\n", "concurrent=two: must be a whole number"),
    ("space: {spin.lr: [1.0e-5]}\nmetric: bleu\n", "metric=bleu: choose one of auto"),
    ("space: {spin.lr: [1.0e-5]}\nfixed: [{spin.beta: 1}]\n", "must give a value to each of spin.lr"),
    ("- a\n", "this one holds a list"),
    ("space: {spin.lr: [1.0e-5]}\nfixed: 3\n", "fixed: give a list"),
    ("space: {spin.lr: [1.0e-5]}\nfixed: [3]\n", "must give a value to each of spin.lr"),
    ("space: {spin.lr: [1.0e-5]}\nfixed: [{spin.lr: 1.0e-4}]\n", "fixed: spin.lr=0.0001 is not in the space"),
    ("space: {spin.num_epochs: {low: 1, high: 3}}\nfixed: [{spin.num_epochs: 1.5}]\n", "fixed: spin.num_epochs=1.5 is not in the space"),
    ("space: {spin.lr: [1.0e-5]}\nseed: x\n", "seed=x: must be a whole number"),
    ("space: {spin.lr: [1.0e-5]}\nprune: 1\n", "prune=1: must be true or false"),
    ("space: {spin.lr: ['${nothing}']}\n", "nothing"),
    ("space: {spin.lr: [null]}\n", "spin.lr"),
    ("space: {spin.lr: {low: 1.0e-5, high: .inf}}\n", "give a list of choices"),
    ("space: {overlap.mode: [stream, lookahead], reference.scorer: [opponent, learner]}\n"
     "fixed: [{overlap.mode: lookahead, reference.scorer: learner}]\n", "lookahead does not go with"),
])
def test_what_is_no_search_is_refused_in_one_line(tmp_path, text, says):
    with pytest.raises(BadInput) as caught:
        search(tmp_path, text)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_the_best_config_is_one_that_run_takes(tmp_path):
    path = tmp_path / "best.yaml"
    path.write_text(with_overrides(CONF, ["spin.lr=1e-4", "spin.loss=space", "data.max_prompts=100"]))
    config, origin = load_config(path)
    assert (config.spin.lr, config.spin.loss, config.data.max_prompts, config.run.name) == (1e-4, "space", 100, "demo")
    assert origin["spin.loss"] == str(path)


RESULTS = [
    Result(1, {"spin.lr": 1e-4, "spin.beta": 0.1}, "finished", 0.5, 3, 2.0), Result(0, {"spin.lr": 1e-3, "spin.beta": 1.0}, "pruned", 0.4, 1, 1.0),
    Result(2, {"spin.lr": 1e-2, "spin.beta": 0.1}, "collapsed", None, None, 1.5),
]


def test_the_table_has_every_trial():
    lines = _table(RESULTS, "exact_match_t1_share").splitlines()
    assert lines[0].split() == ["trial", "spin.lr", "spin.beta", "exact_match_t1_share", "version", "state", "minutes"]
    assert lines[1].split() == ["1", "0.0001", "0.1", "0.5000", "theta_3", "finished", "2.0"] and lines[3].split()[3:6] == ["–", "–", "collapsed"]


@pytest.mark.parametrize("space", [
    {"spin.lr": Range(1e-5, 1e-1, log=True), "spin.beta": Range(0.01, 2)}, {"spin.lr": Range(1e-5, 1e-1)}, {"spin.lr": [1e-5, 1e-2]},
    {"spin.beta": [[0.1, 1.0], None, 0.1]}, {"spin.lr": Range(1e-5, 1e-1), "spin.beta": [True, 0.1]},
])
def test_the_picture_is_drawn_whatever_was_searched(tmp_path, space):
    draw_search([vars(result) for result in RESULTS], Search(space), "exact_match_t1_share", tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_collapsed_is_far_below_the_start(tmp_path):
    def after(name, nll, match=None, diverged=False):
        run, more = RunDir(tmp_path / name), [{} if share is None else {"exact_match_t1_share": share} for share in (match and 0.4, match)]
        run.path.mkdir()
        run.mark("evaluation", version=0, metrics={"real_nll_nats_per_token": 0.2, **more[0]})
        run.mark("evaluation", version=1, metrics={"real_nll_nats_per_token": nll, **more[1]})
        if diverged:
            run.mark("diverged", reason="a loss that is no number")
        return collapsed(run)

    assert not after("a", 0.3) and after("b", 1.3) and not after("c", 0.3, 0.3) and after("d", 0.3, 0.1) and after("e", 0.2, diverged=True)
    assert not collapsed(RunDir(tmp_path / "none"))
    assert json.dumps(vars(RESULTS[0]))
