"""The report: what it says of a run, and the page itself in a real browser."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_runs import made_run, tokenizer

from spin_ray.errors import BadInput
from spin_ray.look.report import costs as cost_table
from spin_ray.look.report.figures import Line, chart, thinned, ticks
from spin_ray.look.report.samples import Pieces, samples_of
from spin_ray.look.report.story import Story
from spin_ray.look.report.verdict import better, more_to_gain
from spin_ray.look.report.warnings import warnings
from spin_ray.look.report.write import report
from spin_ray.look.stored import Stored
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


def test_warnings_name_the_metric_and_its_place(tmp_path):
    run = made_run(tmp_path)
    assert warnings(Story(Stored(run))) == ["data.train: dropped bad: 1"]
    with (run.path / "metrics.jsonl").open("a") as file:
        for value in (0.01, 0.4):
            file.write(json.dumps({"opponent_version": 1, "audit/mean_abs_logp_difference_nats": value}) + "\n")
        file.write(json.dumps({"opponent_version": 2, "iteration": 1, "sampler/num_restarts": 3}) + "\n")
    said = warnings(Story(Stored(run)))
    assert any("differ by 0.400 nats a token at theta_1" in line for line in said) and any("3 sampler(s)" in line for line in said)


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
    made = ticks(low, low + width)
    assert 1 <= len(made) <= 8 and all(low - width * 1e-6 <= tick <= low + width * (1 + 1e-6) for tick in made)


@given(st.lists(st.one_of(st.floats(-1e30, 1e30), st.sampled_from([math.nan, math.inf, None])), max_size=40))
def test_any_numbers_make_a_picture_or_none(values):
    picture = chart("<b>", [Line("<i>", list(range(len(values))), values)], "&", marks=True)
    assert "nan" not in picture and "inf" not in picture and "<b>" not in picture and "<i>" not in picture
    assert bool(picture) == any(value is not None and math.isfinite(value) for value in values)


def test_a_long_line_keeps_its_mean():
    line = thinned(Line("", list(range(10_000)), [float(k % 7) for k in range(10_000)]))
    assert len(line.xs) <= 240 and sum(line.ys) / len(line.ys) == pytest.approx(3, abs=0.01)
