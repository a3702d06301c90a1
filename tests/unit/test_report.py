"""The report: what it says of a run, and the page itself in a real browser."""

import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_runs import made_run, tokenizer

from spin_ray.errors import BadInput
from spin_ray.look.report import compare
from spin_ray.look.report import costs as cost_table
from spin_ray.look.report.figures import Line, chart, thinned, ticks
from spin_ray.look.report.samples import Pieces, samples_of
from spin_ray.look.report.story import Story
from spin_ray.look.report.verdict import better, more_to_gain, verdict
from spin_ray.look.report.warnings import warnings
from spin_ray.look.report.write import report
from spin_ray.look.stored import Stored, open_stored
from spin_ray.tokenizer import as_text

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PLANTED = "<img src=x onerror=\"window.planted=1\"> </script><script>window.planted=2</script> <b>bold</b> & 'quotes' 你好 🙂"


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


def opened(browser, path, **context):
    """The page, and what it said or asked for that it should not have."""
    page, bad = browser.new_context(**context).new_page(), []
    page.on("console", lambda message: bad.append(message.text))
    page.on("pageerror", lambda error: bad.append(str(error)))
    page.on("request", lambda request: bad.append(request.url) if request.url != path.as_uri() else None)
    page.goto(path.as_uri())
    return page, bad


def test_a_run_s_page_in_a_browser(browser, tmp_path):
    path = report([str(made_run(tmp_path, "<i>run", texts=(f"apple {PLANTED}", f"pear {PLANTED}")).path)])
    page, bad = opened(browser, path, viewport={"width": 1280, "height": 900})
    assert bad == []
    for name in ("verdict", "versions", "training", "timeline", "cost", "samples", "settings", "provenance", "software"):
        assert page.locator(f"#{name}").is_visible(), name
    assert page.evaluate("window.planted") is None and page.locator("img, b, #rows script").count() == 0
    assert page.locator("h1").inner_text() == "<i>run"
    assert page.locator("#rows .sample").count() == 8 and PLANTED in page.locator("#rows").inner_text()
    page.fill("#search", "pear")
    assert page.locator("#count").inner_text() == "8 of 8"  # a prompt or an answer has it
    page.fill("#search", "nowhere")
    assert page.locator("#rows .sample").count() == 0
    page.fill("#search", "")
    page.select_option("#filter", "right")
    right = page.locator("#rows .sample").count()
    page.select_option("#filter", "wrong")
    assert right + page.locator("#rows .sample").count() == 8
    page.select_option("#filter", "all")
    page.uncheck("[data-version='0']")
    assert "SFT" not in page.locator("#rows .sample").first.inner_text()
    before = page.locator(".lane svg").get_attribute("viewBox")
    page.click("[data-zoom='2']")
    assert float(page.locator(".lane svg").get_attribute("viewBox").split()[2]) == pytest.approx(float(before.split()[2]) / 2)
    page.click("[data-zoom='0']")
    assert page.locator(".lane svg").get_attribute("viewBox").split()[0] == "0"
    assert bad == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone(browser, tmp_path, scheme):
    path = report([str(made_run(tmp_path, "a-rather-long-name-of-a-run-" * 3).path)])
    page, bad = opened(browser, path, viewport={"width": 390, "height": 844}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390 and bad == []
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", back)[:3])) > 400) == (scheme == "light")


def test_what_got_through_as_markup_would_not_run(browser, tmp_path):
    path = report([str(made_run(tmp_path).path)])
    path.write_text(path.read_text().replace("</main>", "<img src=x onerror='window.planted=1'><script>window.planted=2</script></main>"))
    page, bad = opened(browser, path)
    assert page.evaluate("window.planted") is None and any("Content Security Policy" in text for text in bad)


def test_a_search_has_a_map(browser, tmp_path):
    for k, (lr, beta) in enumerate([(1e-4, 0.1), (1e-3, 0.1), (1e-4, 0.5), (1e-3, 0.5)]):
        made_run(tmp_path / "trials", f"trial_{k:03d}", f"spin.lr={lr}", f"spin.beta={beta}", seed=k)
    path = report([str(tmp_path)])
    page, bad = opened(browser, path)
    assert bad == [] and page.locator("#map .place").count() == 4 and page.locator("#each details").count() == 4
    assert page.locator("#differences").inner_text().count("spin.lr") == 1
    assert path == tmp_path / "report.html"


def test_benchmarks_are_shown_where_versions_were_asked(browser, tmp_path):
    run = made_run(tmp_path)
    for version in range(3):
        run.mark("tasks", version=version, asked={}, heads=["arc<b>"], tasks={"arc<b>": {"acc_norm": 0.3 + version / 10, "acc_norm_se": 0.01, "num_docs": 9}, "one": {"acc": 1}})
    page, bad = opened(browser, report([str(run.path)]))
    assert bad == [] and "0.5 ± 0.01" in page.locator("#benchmarks").inner_text() and page.locator("#benchmarks circle").count() == 3
    assert "num_docs" not in page.locator("#benchmarks").inner_text()


def test_several_runs_go_where_they_are_asked_to(tmp_path):
    runs = [str(made_run(tmp_path, name, f"spin.lr={lr}").path) for name, lr in (("one", 1e-4), ("two", 3e-4))]
    path = report(runs, str(tmp_path / "both.html"))
    text = path.read_text()
    assert "spin.lr" in text and "one, theta_2" in text and "two, theta_2" in text and not (Path(runs[0]) / "report.html").exists()


@pytest.mark.parametrize(("versions", "heldout", "finished"), [(1, False, False), (1, True, False), (2, False, True), (3, True, False)])
def test_every_stage_of_a_run_has_a_page(tmp_path, versions, heldout, finished):
    run = made_run(tmp_path, versions=versions, heldout=heldout, finished=finished)
    assert Path(report([str(run.path)])).stat().st_size < 5e6
    (run.path / "metrics.jsonl").write_bytes((run.path / "metrics.jsonl").read_bytes() + b'{"time": 1, "tr')  # being written
    report([str(run.path)])


def test_no_run_is_told_in_one_line(tmp_path):
    with pytest.raises(BadInput, match="no run there"):
        report([str(tmp_path)])
    with pytest.raises(BadInput, match="no such folder"):
        report([str(tmp_path / "nowhere")])
    (tmp_path / "trials").mkdir()
    with pytest.raises(BadInput, match="none of whose trials"):
        report([str(tmp_path)])
    run = made_run(tmp_path)
    with pytest.raises(BadInput, match="cannot be written"):
        report([str(run.path)], str(tmp_path / "nowhere" / "x.html"))


def test_the_page_stays_small_however_much_there_is(tmp_path):
    run = made_run(tmp_path, texts=("word " * 30, "other words " * 30), versions=9, steps=3000)
    assert report([str(run.path)]).stat().st_size < 5e6


@pytest.mark.parametrize(("change", "error", "said"), [(0.1, 0.01, "is better than"), (0.1, 0.2, "is not measurably different"), (-0.1, 0.01, "is worse than")])
def test_the_verdict_believes_what_exceeds_two_standard_errors(tmp_path, change, error, said):
    run = made_run(tmp_path, versions=2)
    story = Story(Stored(run))
    story.evaluations[0]["exact_match_t1_share"] = 0.5
    story.evaluations[1] |= {"exact_match_t1_share": 0.5 + change, "exact_match_t1_change_share": change, "exact_match_t1_change_share_se": error}
    assert said in better(story) and f"{change:+.3f}" in better(story)
    story.evaluations[1] |= {"advantage_accuracy": 0.51, "advantage_accuracy_se": 0.02}
    assert "little left" in more_to_gain(story)


STANDS, TOLD = {"exact_match_t1_share": 0.5, "real_nll_nats_per_token": 1.0}, "advantage_accuracy"


def evaluated(tmp_path, *versions, **options):
    """A run whose theta_0 has STANDS, and the others what is given."""
    story = Story(Stored(made_run(tmp_path, versions=1 + len(versions), **options)))
    story.evaluations.clear()
    story.evaluations.update({0: STANDS, **{k + 1: {**STANDS, **metrics} for k, metrics in enumerate(versions)}})
    return story


def test_of_many_equal_versions_hardly_ever_one_is_called_better(tmp_path):
    """The best is picked among so many draws; by two errors alone one run in three of 20 equal versions would look better."""
    import numpy as np

    rng, error, called = np.random.default_rng(0), 0.01, 0
    story = evaluated(tmp_path, *[{}] * 20)
    for _ in range(400):
        for version in range(1, 21):
            gain = error * rng.standard_normal()
            story.evaluations[version] = {"exact_match_t1_share": 0.5 + gain, "exact_match_t1_change_share_se": error}
        called += "is better than" in better(story)
    assert called / 400 < 0.05


@pytest.mark.parametrize("name", ["exact_match_t1_share", "real_nll_nats_per_token"])
@given(value=st.sampled_from([math.nan, math.inf, -math.inf, None, 0.4, 0.6]), error=st.sampled_from([math.nan, math.inf, None, 0.0, 0.5]))
@settings(deadline=None, max_examples=40)
def test_no_number_makes_no_claim(name, value, error):
    """Better or worse is said of finite numbers with finite errors alone; where no error is known, that is said."""
    story = SimpleNamespace(iterations=[{"iteration": 0}], first_name="SFT", config={"data.eval": "x"}, tasks={}, series=lambda *_: ([], []))
    change = "exact_match_t1_change_share" if "match" in name else "real_nll_change_nats_per_token"
    story.evaluations = {0: {name: 0.5}, 1: {key: given for key, given in ((name, value), (f"{change}_se", error)) if given is not None}}
    said = better(story)
    if value is None or not math.isfinite(value):
        assert "no number of it is there yet" in said
    elif error is None:
        assert "looks" in said and "error is not known" in said
    else:
        assert ("is better than" in said or "is worse than" in said) == (error == 0.0)
        assert "is better than" not in said or (value > 0.5) == ("match" in name)


@pytest.mark.parametrize(("accuracy", "error", "more", "said"), [
    (0.7, 0.02, {}, "has something to learn from"), (0.7, 0.17, {}, "so few prompts do not say"), (0.3, 0.02, {}, "prefers the answers that it was to avoid"),
    (0.51, 0.02, {}, "little left"), (0.9, 0.02, {"same_as_real_share": 0.95}, "little left"), (math.nan, math.nan, {}, "cannot be said"), (0.5, math.inf, {}, "do not say"),
])
def test_whether_there_is_more_to_gain_is_said_where_the_numbers_say_it(tmp_path, accuracy, error, more, said):
    story = evaluated(tmp_path, {TOLD: accuracy, f"{TOLD}_se": error, **more})
    assert said in more_to_gain(story)


def test_a_run_that_went_on_did_not_end_there(tmp_path):
    run = made_run(tmp_path, finished=False)
    run.mark("diverged", reason="the loss is nan.")
    assert more_to_gain(Story(Stored(run))) == "The run ended because the loss is nan." and compare.collapsed(Story(Stored(run)))
    run.mark("iteration", iteration=2)
    run.mark("finished")
    story = Story(Stored(run))
    assert "ended because" not in more_to_gain(story) and not compare.collapsed(story) and story.state == "finished"


def test_numbers_that_are_none_are_warned_of(tmp_path):
    run = made_run(tmp_path)
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"opponent_version": 1, "audit/mean_abs_logp_difference_nats": NaN}\n')
    story = Story(Stored(run))
    story.evaluations[2] |= {"real_nll_change_nats_per_token": math.nan}
    said = warnings(story)
    assert any("differ by nan" in line for line in said) and any("less likely by nan" in line for line in said)


def test_benchmarks_asked_in_different_ways_are_warned_of(tmp_path):
    run = made_run(tmp_path)
    ask = lambda version, **more: run.mark("tasks", version=version, heads=["arc"], tasks={"arc": {"acc": 0.5}}, **more)  # noqa: E731
    ask(0, asked={"limit": None}, num_truncated=0)
    ask(1, asked={"limit": 10})
    assert any("not all versions were asked in the same way (asked differ)" in line for line in warnings(Story(Stored(run))))
    ask(1, asked={"limit": None}, num_truncated=7)
    said = warnings(Story(Stored(run)))
    assert not any("same way" in line for line in said) and any("7 requests" in line for line in said)


def test_only_theta_0_is_measured_so_far(tmp_path):
    story = evaluated(tmp_path, {})
    del story.evaluations[1]
    assert "no number of it is there yet" in better(story) and "not set" not in better(story)


def test_warnings_name_the_metric_and_its_place(tmp_path):
    run = made_run(tmp_path)
    assert warnings(Story(Stored(run))) == ["data.train: dropped bad: 1"]
    with (run.path / "metrics.jsonl").open("a") as file:
        for value in (0.01, 0.4):
            file.write(json.dumps({"opponent_version": 1, "audit/mean_abs_logp_difference_nats": value}) + "\n")
        file.write(json.dumps({"opponent_version": 2, "iteration": 1, "sampler/num_restarts": 3}) + "\n")
    said = warnings(Story(Stored(run)))
    assert any("differ by 0.400 nats a token at theta_1" in line for line in said) and any("3 sampler(s)" in line for line in said)


def rewritten(run, **config):
    """With other values, or without a key where None is given, in its config.json."""
    path = run.path / "config.json"
    saved = {**json.loads(path.read_text()), **config}
    path.write_text(json.dumps({key: value for key, value in saved.items() if value is not None}))
    return run


def test_a_run_of_an_earlier_version_has_a_page_and_differs_in_nothing_it_did_not_have(tmp_path):
    new, old = made_run(tmp_path, "new"), rewritten(made_run(tmp_path, "old"), method=None, eval=None, guard=None)
    manifest = old.path / "manifest.jsonl"
    kept = ("prepared", "iteration", "evaluation", "finished")
    manifest.write_text("".join(line + "\n" for line in manifest.read_text().splitlines() if json.loads(line)["stage"] in kept))
    report([str(old.path)])
    assert "All settings are the same" in report([str(new.path), str(old.path)], str(tmp_path / "both.html")).read_text()


def test_a_model_s_folder_is_no_run(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(BadInput, match="no run's folder"):
        report([str(tmp_path)])


def test_runs_of_one_name_are_told_apart_and_ordered_by_their_own_numbers(tmp_path):
    runs = [made_run(tmp_path / folder, "demo", f"spin.lr={lr}", finished=False) for folder, lr in (("a", 1e-4), ("b", 1e-3), ("c", 1e-2))]
    for run, share in zip(runs, (0.2, 0.9, 0.5), strict=True):
        run.mark("evaluation", version=2, metrics={"exact_match_t1_share": share, "real_nll_nats_per_token": 1.0})
        run.mark("evaluation", version=1, metrics={"exact_match_t1_share": 0.1, "real_nll_nats_per_token": 1.0})
    text = report([str(run.path) for run in runs], str(tmp_path / "all.html")).read_text()
    rows = text[text.index('id="runs"') : text.index("</section>")]
    assert re.findall(r"<td>(./demo)</td>", rows) == ["b/demo", "c/demo", "a/demo"]


def test_one_run_whose_answers_cannot_be_read_does_not_hide_the_others(tmp_path):
    good, bad = made_run(tmp_path, "good"), made_run(tmp_path, "bad")
    rewritten(bad, model={**json.loads((bad.path / "config.json").read_text())["model"], "path": str(tmp_path / "gone")})
    text = report([str(good.path), str(bad.path)], str(tmp_path / "both.html")).read_text()
    assert "answers of bad cannot be shown" in text and 'id="samples-data"' in text


def test_a_run_on_an_object_store_is_reported_here(object_store, tmp_path, monkeypatch):
    """Nothing is written there, and the page is no file of a cache that may have no folder for it."""
    monkeypatch.setattr("spin_ray.look.stored.SCRATCH", str(tmp_path / "scratch"))
    run, url = made_run(tmp_path / "local", heldout=False), object_store % "reported"
    run.path.rename(tmp_path / "reported")
    there = open_stored(url).run
    for file in (tmp_path / "reported").iterdir():
        if file.is_file():
            there.storage.put(there.path / file.name, file.read_bytes())
    shutil.rmtree(tmp_path / "scratch", ignore_errors=True)
    monkeypatch.chdir(tmp_path)
    assert report([url]) == Path("report.html") and "<h1>reported</h1>" in (tmp_path / "report.html").read_text()
    assert not there.storage.exists(there.path / "report.html")


@pytest.mark.parametrize("damage", [lambda data: data[:100], lambda data: b"", lambda data: data[:200] + bytes(len(data) - 200)])
def test_damaged_answers_do_not_hide_the_rest(tmp_path, damage):
    run = made_run(tmp_path)
    file = run.heldout_answers(1)
    file.write_bytes(damage(file.read_bytes()))
    text = report([str(run.path)]).read_text()
    assert "theta_001.parquet: damaged" in text and "is better than" in text


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_where_nothing_is_played_no_player_is_the_slower_one(tmp_path, method):
    story = Story(Stored(made_run(tmp_path, "made", f"method={method}", versions=2)))
    assert "slower" not in " ".join(verdict(story)) and "another iteration" not in " ".join(verdict(story))


def test_what_is_no_number_is_still_json(tmp_path):
    import numpy as np

    pieces = Pieces(as_text(tokenizer()))(np.array(tokenizer()("1 2 3")["input_ids"]), np.array([math.nan, -math.inf, *[0.5] * 20])[: len(tokenizer()("1 2 3")["input_ids"])])
    json.dumps(pieces, allow_nan=False)


def test_opponents_that_were_not_there_did_not_wait(tmp_path):
    from spin_ray.records import Span
    from spin_ray.timeline import Timeline

    run = made_run(tmp_path, versions=2)
    Timeline(run.path).add([
        *(Span(f"opponent {k}", "play", 0, 0.0, 60.0) for k in range(8)), Span("main player", "train", 0, 20.0, 90.0), Span("main player", "dream", 0, 90.0, 99.0),
    ])
    Timeline(run.path).add([Span("opponent 0", "play", 1, 0.0, 100.0), Span("main player", "train", 1, 50.0, 100.0)])
    assert cost_table.costs(Story(Stored(run)))[-1].opponents["play"] == pytest.approx(1, abs=0.2)
    report([str(run.path)])  # also with an activity that nobody knows


def test_an_error_that_is_not_known_is_not_drawn_as_none():
    picture = chart("", [Line("", [0, 1], [1.0, 2.0], [math.inf, 0.1])], "", marks=True)
    assert picture.count('class="error') == 1 and "± 0<" not in picture and "± inf" in picture


def test_where_the_time_went_adds_up(tmp_path):
    for one in cost_table.costs(Story(Stored(made_run(tmp_path)))):
        assert sum(one.main_player.values()) == pytest.approx(1) and sum(one.opponents.values()) == pytest.approx(1)
        assert one.opponents["play"] == pytest.approx(60 / one.seconds, rel=0.01)


def test_samples_of_pairs_where_nothing_is_held_out(tmp_path):
    from spin_ray.exchange.pairs import read_pairs, write_table

    run = made_run(tmp_path)
    for t in range(2):
        write_table(run.pairs(t, "block", 0), read_pairs(run.heldout_answers(t)))
    write_table(run.pairs(1, "replay", 0), read_pairs(run.heldout_answers(0)))
    story = Story(Stored(run))
    story.evaluations.clear()
    found = samples_of(story, as_text(tokenizer()))
    assert found.source == "prompts that were trained on" and found.versions == ["SFT", "theta_1"]
    assert all(len(piece) == 2 for row in found.rows for piece in row["answers"][0]) and len(found.rows[0]["answers"][1][0]) == 1


@given(st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_pieces_are_the_text_and_ratios_are_kept(text):
    import numpy as np

    encode, decode = tokenizer(), as_text(tokenizer())
    ids = np.array(encode(text, add_special_tokens=False)["input_ids"], np.int32)
    ratios = np.arange(len(ids)) / 4
    pieces = Pieces(decode)(ids, ratios)
    assert "".join(piece[0] for piece in pieces) == decode(ids)
    assert sum(piece[1] for piece in pieces) == pytest.approx(ratios.sum())


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_round_and_inside(low, width):
    made, room = ticks(low, low + width), width * 1e-6 + 4 * math.ulp(abs(low) + width)
    assert 1 <= len(made) <= 8 and all(low - room <= tick <= low + width + room for tick in made)


@given(st.lists(st.one_of(st.floats(-1e30, 1e30), st.sampled_from([math.nan, math.inf, None])), max_size=40))
def test_any_numbers_make_a_picture_or_none(values):
    picture = chart("<b>", [Line("<i>", list(range(len(values))), values)], "&", marks=True)
    assert "nan" not in picture and "inf" not in picture and "<b>" not in picture and "<i>" not in picture
    assert bool(picture) == any(value is not None and math.isfinite(value) for value in values)


def test_a_long_line_keeps_its_mean():
    line = thinned(Line("", list(range(10_000)), [float(k % 7) for k in range(10_000)]))
    assert len(line.xs) <= 240 and sum(line.ys) / len(line.ys) == pytest.approx(3, abs=0.01)
