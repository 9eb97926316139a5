"""The page in a real headless Chromium: it works by mouse and by keyboard, and what it computes is what headprune computes."""

import os
import shutil

import pytest
import torch
from reported_run import LENGTH, write_run
from tiny_models import hidden, llama, tokens

import headprune as hp
from headprune.evaluation.cost import attention_flops, kv_cache_bytes_per_token
from headprune.models import attention_sites
from headprune.planning import Budget, PruningPlan, plan
from headprune.surgery import cut
from headprune.surgery.savings import count_parameters

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as running:
        places = (os.environ.get("HEADPRUNE_CHROMIUM"), *map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
        found = next((place for place in places if place), running.chromium.executable_path)
        if not os.path.exists(found):
            pytest.skip("no Chromium: install the distribution's, run `playwright install chromium`, or set HEADPRUNE_CHROMIUM")
        chromium = running.chromium.launch(executable_path=found)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, *write_run(folder), hp.report(folder)


@pytest.fixture
def page(browser, written):
    """The page just opened; the test fails if it logs an error or asks for anything beyond its own file."""
    opened, wrong = browser.new_page(), []
    opened.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("request", lambda request: wrong.append(request.url) if request.url != f"file://{written[3]}" else None)
    opened.goto(f"file://{written[3]}")
    yield opened
    opened.close()
    assert [one for one in wrong if not one.startswith(("data:", "blob:"))] == []


def kept_on(page) -> list[list[int]]:
    """The heads that the map shows as kept, by attention."""
    found = page.locator("#map td").evaluate_all(
        "cells => cells.map(c => [Number(c.dataset.row), Number(c.dataset.column), c.getAttribute('aria-selected') === 'true'])"
    )
    return [[head for row, head, kept in found if row == site and kept] for site in range(1 + max(row for row, _, _ in found))]


def move_slider(page, step: int) -> None:
    page.locator("#budget").evaluate(
        "(slider, step) => { slider.value = step; slider.dispatchEvent(new Event('input', { bubbles: true })); }", step
    )


def test_the_page_opens_with_the_runs_plan(page, written):
    assert kept_on(page) == [list(heads) for heads in written[2].values()]
    assert page.locator("#status").inner_text() == "the run's plan: 8 of 16 heads kept"
    for grid in ("map", "sensitivity", "agreement", "criteria"):
        assert page.locator(f"#{grid} td").count() > 0
    assert page.locator("#without").count() == 0


def test_the_slider_changes_the_map_to_the_plan_of_each_budget(page, written):
    steps = page.evaluate("JSON.parse(document.getElementById('data').textContent).steps.list.map(step => step.fraction)")
    for number, fraction in enumerate(steps):
        move_slider(page, number)
        assert kept_on(page) == [list(heads) for heads in plan(written[1]["fisher"], Budget(heads=fraction)).values()]
    move_slider(page, 0)
    assert page.locator("#status").inner_text() == "0.0 % of heads away: 16 of 16 heads kept"


def test_costs_are_those_of_the_cut_model(page, written):
    dense = llama()
    steps = page.evaluate("JSON.parse(document.getElementById('data').textContent).steps.list")
    for step in steps[:: len(steps) // 4]:
        found = page.evaluate("keep => Logic.cost(JSON.parse(document.getElementById('data').textContent), keep)", step["keep"])
        model = llama()
        kept = [[head for head, bit in enumerate(bits) if bit == "1"] for bits in step["keep"]]
        cut(model, {site.name: heads for site, heads in zip(attention_sites(model), kept)})
        assert found["parameters"] == count_parameters(model)
        assert found["flops"] == attention_flops(attention_sites(model), LENGTH)
        share = kv_cache_bytes_per_token(attention_sites(model)) / kv_cache_bytes_per_token(attention_sites(dense))
        assert found["cacheShare"] == pytest.approx(share)


def test_a_model_without_a_cache_has_no_share_of_it(page):
    shares = page.evaluate("""() => {
        const data = JSON.parse(document.getElementById("data").textContent);
        const keep = Logic.allKept(data.sites);
        const without = { ...data, counted: { ...data.counted, kv_cache_bytes_per_token: null } };
        return [data, without].map(found => Logic.cost(found, keep).cacheShare);
    }""")
    assert shares == [1, None]


def test_predictions_pass_through_what_was_measured(page):
    assert "12" in page.locator("#readout").inner_text()  # the run's own plan: perplexity 12, measured and predicted
    found = page.evaluate("""() => {
        const data = JSON.parse(document.getElementById("data").textContent);
        return data.measured.map(one => [one.quality.perplexity, Logic.interpolated(
            data.measured.map(other => [other.parameters, other.quality.perplexity]), one.parameters)]);
    }""")
    assert all(measured == pytest.approx(predicted) for measured, predicted in found)
    assert page.evaluate("Logic.interpolated([[0, 1], [2, 5]], 0.5)") == 2
    assert page.evaluate("Logic.interpolated([[0, 1], [2, 5]], 3)") is None


def test_a_measured_budget_is_named_on_the_slider(page, written):
    fractions = page.evaluate("JSON.parse(document.getElementById('data').textContent).steps.list.map(step => step.fraction)")
    move_slider(page, fractions.index(0.25))
    assert "measured (sweep)\nperplexity 10.5, latency 85.7 %" in page.locator("#readout").inner_text()
    move_slider(page, fractions.index(0.25) + 1)
    assert not any("measured" in one for one in page.locator("#readout dt").all_inner_texts())


def test_an_edited_plan_downloads_and_applies(page, written, tmp_path):
    cell = page.locator("#map td[data-row='0'][data-column='2']")
    before = cell.get_attribute("aria-selected")
    cell.click()
    assert cell.get_attribute("aria-selected") != before
    assert "changed by hand" in page.locator("#status").inner_text()
    with page.expect_download() as waiting:
        page.locator("#download").click()
    assert waiting.value.suggested_filename == "plan.json"
    waiting.value.save_as(tmp_path / "plan.json")
    edited = PruningPlan.load(tmp_path / "plan.json")
    assert [list(heads) for heads in edited.values()] == kept_on(page)
    assert edited.budget is None
    assert edited.criterion == "fisher"
    model = llama()
    with torch.no_grad(), hp.gated(model, dict(edited)):
        expected = hidden(model, input_ids=tokens())
    hp.prune(model, edited)
    torch.testing.assert_close(hidden(model, input_ids=tokens()), expected, rtol=1e-4, atol=1e-4)


def test_plans_of_the_slider_and_of_the_run_download_with_their_budget(page, written, tmp_path):
    def downloaded():
        with page.expect_download() as waiting:
            page.locator("#download").click()
        waiting.value.save_as(tmp_path / "plan.json")
        return PruningPlan.load(tmp_path / "plan.json")

    own = downloaded()
    assert (own.keep, own.budget) == (written[2].keep, Budget(heads=0.5))
    move_slider(page, 4)
    assert downloaded().budget == Budget(heads=0.25)
    page.locator("#reset").click()
    assert downloaded().keep == written[2].keep


def test_the_map_is_walked_and_changed_by_keyboard(page):
    for grid in page.locator("table[role=grid]").all():
        assert grid.locator("td[tabindex='0']").count() == 1
    page.locator("#map td[tabindex='0']").focus()
    where = "[document.activeElement.dataset.row, document.activeElement.dataset.column].join()"
    walk = {"ArrowRight": "0,1", "ArrowDown": "1,1", "End": "1,7", "ArrowRight ": "1,7", "Control+Home": "0,0", "ArrowUp": "0,0"}
    for key, place in walk.items():
        page.keyboard.press(key.strip())
        assert page.evaluate(where) == place
    before = kept_on(page)
    page.keyboard.press("Space")
    assert kept_on(page) != before
    assert "head 0" in page.locator("#head h3").inner_text()
    page.keyboard.press("Enter")
    assert kept_on(page) == before
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('#map')") is None


def test_every_cell_says_its_head_and_state(page):
    said = page.locator("#map td").evaluate_all("cells => cells.map(c => c.getAttribute('aria-label'))")
    assert len(set(said)) == 16
    assert all("self_attn head" in one and ("kept" in one or "removed" in one) and "fisher" in one for one in said)


def test_the_last_head_stays(page):
    for _ in range(8):
        page.locator("#map td[aria-selected='true']").first.click()
    (last,) = [heads for heads in kept_on(page) if heads]
    assert len(last) == 1
    assert "last head" in page.locator("#status").inner_text()


def test_details_show_every_criterion_and_the_portrait(page, written):
    page.locator("#map td[data-row='1'][data-column='3']").hover()
    shown = page.locator("#head").inner_text()
    assert "model.layers.1.self_attn, head 3" in shown
    for word in ("fisher", "magnitude_l1", "percentile", "attends to", "previous mass", "reads key/value head"):
        assert word in shown


def test_the_colours_follow_the_chosen_criterion(page, written):
    def levels():
        return page.locator("#map td").evaluate_all("cells => cells.map(c => c.style.getPropertyValue('--level'))")

    fisher = levels()
    page.locator("#criterion").select_option(label="magnitude_l1")
    everything = torch.cat(list(written[1]["magnitude_l1"].values()))
    expected = [f"{round(100 * float((everything < score).float().mean()) + 1e-6)}%" for score in everything]
    assert levels() == expected != fisher


def test_light_dark_and_print(page):
    def colours():
        return page.evaluate("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")

    page.emulate_media(color_scheme="light")
    light = colours()
    page.emulate_media(color_scheme="dark")
    assert colours() != light
    page.emulate_media(media="print", color_scheme="dark")
    assert colours() == ["rgb(255, 255, 255)", "rgb(0, 0, 0)"]
    assert not page.locator("#download").is_visible()
    assert page.locator("#map td").first.is_visible()


def test_the_chart_names_every_point_and_the_front(page):
    said = page.locator("#chart .point").evaluate_all("points => points.map(p => p.getAttribute('aria-label'))")
    assert len(said) == 4
    assert any(one.startswith("the run's plan (run): perplexity 12, latency 15 ms, 75.0 % of dense, no other") for one in said)
    found = page.evaluate("Logic.paretoFront([{cost: 1, quality: 1}, {cost: 2, quality: 1}, {cost: 2, quality: 3}], true)")
    assert found == [True, False, True]
    assert page.locator("#chart .sign").get_attribute("visibility") == "visible"
