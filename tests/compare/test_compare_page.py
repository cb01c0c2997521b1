"""The comparison's page: as text, and as a reader meets it in Chromium, with a mouse, a keyboard and a phone."""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd
import pytest
from compared import compared, report
from selenium import webdriver
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from hf_lowrank.compare.charts import charts
from hf_lowrank.compare.page import render_page
from hf_lowrank.compare.scatter import scatter
from hf_lowrank.compare.table import Comparison, compare

HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><!-- {{ 7*7 }}"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")

needs_browser = pytest.mark.skipif(
    BROWSER is None or DRIVER is None, reason="no Chromium with its driver: apt-get install chromium chromium-driver"
)


def comparison() -> Comparison:
    other = report("other", "sltrain", seed=2, loss=5.0, tokens_seen=99)
    made = []
    for one in (report("base", "fullrank", loss=4.0), report(HOSTILE, "<b>galore</b>", loss=3.0), other):
        loss = one["metrics"][-4]["value"]
        training = pd.DataFrame({"step": [10, 100, 1000], "loss": [loss + 2, loss + 1, loss]})
        layers = [(step, layer) for step in (0, 150, 300) for layer in range(4)]
        spectral = pd.DataFrame(layers, columns=["step", "layer"]).assign(space="dense", name="w", module="w")
        spectral["spectral/weight/stable_rank"] = loss + spectral["step"] / 100 + spectral["layer"]
        tables = {"training": training, "spectral": spectral}
        made.append(compared(one["run"]["name"], one, tables, repo="user/run@step-3"))
    return compare(made, baseline=0)


@pytest.fixture(scope="module")
def page() -> str:
    found = comparison()
    return render_page(found, charts(found))


# ---- as text ----


def test_it_loads_nothing_and_admits_its_own_script_alone(page: str) -> None:
    assert re.findall(r'(?:src|href)="([^"#][^"]*)"', page) == ["https://huggingface.co/user/run/tree/step-3"] * 3
    assert not re.search(
        r"@import|url\(|<link|<iframe|fetch\(|XMLHttpRequest|innerHTML|insertAdjacentHTML|eval\(", page
    )
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert page.count("<script") == 2
    assert " style=" not in page


def test_what_reports_say_stays_text(page: str) -> None:
    assert "<img" not in page
    assert "<b>galore" not in page
    assert "<!--" not in page
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    assert data["rows"][1]["label"] == HOSTILE


def test_equal_comparisons_give_equal_pages(page: str) -> None:
    found = comparison()
    assert render_page(found, charts(found)) == page


def test_a_page_without_curves_or_baseline() -> None:
    made = report("only")
    made["metrics"], made["evaluations"] = [], []
    found = compare([compared("only", made)])
    assert "1 pre-training run compared" in render_page(found, charts(found))


def test_the_scatter_plot_has_every_number_of_every_run_and_seed() -> None:
    made = [
        report(name, seed=seed, loss=loss, **more)
        for name, seed, loss, more in (("a1", 1, 4.0, {}), ("a2", 2, 4.2, {}), ("b", 1, 3.4, {"method": "fira"}))
    ]
    for each in made:
        each["evaluations"][0]["about"] = {"higher_is_better": True}
    found = compare([compared(one["run"]["name"], one) for one in made])
    data = scatter(found)
    assert [(run["row"], run["kin"], run["shade"]) for run in data["runs"]] == [(0, 0, 0), (1, 0, 1), (2, 2, 0)]
    of = {one["name"]: one for one in data["quantities"]}
    steps = data["steps"].index([150, 300])
    assert of["validation_loss"]["of"] == [[0, steps, [5.0, 4.0]], [1, steps, [5.2, 4.2]], [2, steps, [4.4, 3.4]]]
    assert [of[name]["better"] for name in ("validation_loss", "brackets/acc", "landscape/random/sharpness")] == [
        "smaller", "larger", "",
    ]  # fmt: skip
    assert of["parameters"]["of"] == [[run, -1, [1.8405]] for run in range(3)]
    assert of["parameters"]["unit"] == "millions"
    # taken between two checkpoints a run has a point of its own, on the line between theirs
    data = scatter(compare([compared(one["run"]["name"], one) for one in made], at="matched"))
    of = {one["name"]: one for one in data["quantities"]}
    steps = data["steps"].index([150, 300])
    assert data["runs"][1]["step"] == 300
    assert (data["runs"][0]["step"], data["runs"][0]["place"][:7]) == (pytest.approx(270), "between")
    assert of["validation_loss"]["of"][0] == [0, steps, [5.0, 4.0], 4.2]
    assert of["landscape/random/sharpness"]["of"][2] == [2, steps, [0.034, 0.034], 0.034]
    # seeds in one row are still points of their own
    grouped = scatter(compare([compared(one["run"]["name"], one) for one in made], group_seeds=True))
    assert [(run["row"], run["kin"], run["shade"]) for run in grouped["runs"]] == [(0, 0, 0), (0, 0, 1), (1, 1, 0)]


# ---- in Chromium ----


class Page:
    """The page in a browser: what is on it, in words."""

    def __init__(self, driver: webdriver.Chrome, address: str) -> None:
        self.driver, self.address = driver, address

    def open(self, width: int = 1280, height: int = 900, scheme: str = "light", view: str = "") -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        # another fragment alone would not load it again
        self.driver.get("about:blank")
        self.driver.get(self.address + view)

    def js(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def one(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        return self.js("return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", selector)

    def runs(self) -> list[str]:
        return self.texts("#table tbody .name")

    def header(self, label: str) -> WebElement:
        return next(e for e in self.all("#table thead th") if label in e.get_attribute("textContent"))

    def choose(self, selector: str, label: str) -> None:
        """Choose the first option with these words, as a user would."""
        options = self.all(f"{selector} option")
        next(option for option in options if label in option.get_attribute("textContent")).click()

    def choose_curve(self, title: str) -> None:
        option = next(e for e in self.all("#chart-choice option") if title in e.get_attribute("textContent"))
        option.click()


@pytest.fixture(scope="module")
def browser(page: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    path = tmp_path_factory.mktemp("page") / "index.html"
    path.write_text(page, encoding="utf-8")
    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield Page(driver, path.as_uri())
    driver.quit()


@pytest.fixture
def at(browser: Page) -> Page:
    """The page, freshly opened at a desk, with a line for each run."""
    browser.open()
    browser.one("#turned").click()
    return browser


BASE, OTHER = "base", "other"


@needs_browser
def test_it_says_what_is_not_comparable_before_anything_else(at: Page) -> None:
    assert at.one("main > section").get_attribute("class") == "alert"
    assert "Tokens seen" in at.one(".alert").text
    assert at.one("#table .differs").text == "≠ tokens seen"
    assert at.driver.title.startswith("3 pre-training runs compared")
    assert at.one("html").get_attribute("lang") == "en"


@needs_browser
def test_hostile_names_come_out_as_text(at: Page) -> None:
    assert HOSTILE in at.runs()
    assert at.all("img, b") == []
    assert "owned" not in at.driver.title.replace(HOSTILE, "")
    assert HOSTILE in at.one("#legend").text


@needs_browser
def test_sorting_by_click(at: Page) -> None:
    assert at.runs() == [BASE, HOSTILE, OTHER]
    at.header("Validation loss").find_element(By.TAG_NAME, "button").click()
    assert at.runs() == [HOSTILE, BASE, OTHER]
    assert at.header("Validation loss").get_attribute("aria-sort") == "ascending"
    at.header("Validation loss").find_element(By.TAG_NAME, "button").click()
    assert at.runs() == [OTHER, BASE, HOSTILE]
    assert at.header("Validation loss").get_attribute("aria-sort") == "descending"
    assert [e.get_attribute("aria-sort") for e in at.all("#table thead th")].count("none") > 2
    assert "by Validation loss, descending" in at.one("#status").text


@needs_browser
def test_sorting_and_choosing_by_keyboard_alone(at: Page) -> None:
    for _ in range(40):
        ActionChains(at.driver).send_keys(Keys.TAB).perform()
        if at.js("return document.activeElement.textContent") == "Validation loss":
            break
    focused = at.driver.switch_to.active_element
    assert focused.text == "Validation loss"
    assert at.js("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    focused.send_keys(Keys.ENTER)
    assert at.runs() == [HOSTILE, BASE, OTHER]
    at.driver.switch_to.active_element.send_keys(Keys.SPACE)
    assert at.runs() == [OTHER, BASE, HOSTILE], "focus stays on the column's button"


@needs_browser
def test_few_runs_are_columns_and_metrics_lines_by_family(browser: Page) -> None:
    browser.open()
    assert browser.texts("#table thead .name") == [BASE, HOSTILE, OTHER]
    families = browser.texts("#table .family th")
    assert families == ["Loss", "Loss landscape", "Spectra", "Downstream tasks", "Cost"]
    names = browser.texts("#table tbody th button")
    assert names[:3] == ["Validation loss", "H1 Expected sharpness, random directions", "H9 Stable rank of W"]
    line = browser.one("#table tbody tr:nth-child(2)")
    assert [cell.text.split("\n")[0] for cell in line.find_elements(By.TAG_NAME, "td")] == [
        "4.00 ± 0.10", "3.00 ± 0.10", "5.00 ± 0.10",
    ]  # fmt: skip
    assert len(browser.all("#table .base")) == len(names) + 1
    line.find_element(By.TAG_NAME, "button").click()
    assert browser.texts("#table thead .name") == [HOSTILE, BASE, OTHER]
    assert browser.js("return document.activeElement.textContent") == "Validation loss", "focus stays"
    assert browser.one("#table tbody th[aria-sort=ascending]").text == "Validation loss"


@needs_browser
def test_heat_maps_of_runs_and_of_steps_by_layer(at: Page) -> None:
    plot, said = at.one("#heat"), at.one("#heat-readout")
    assert "H9 Stable rank of W" in at.one("#heat-title").text
    fills = "return [...document.querySelectorAll('#heat .cell')].map((e) => e.getAttribute('fill'))"
    assert len(set(at.js(fills))) > 4
    assert len(at.all("#heat .cell")) == 3 * 4, "three runs, four layers"
    plot.send_keys(Keys.HOME)
    assert said.text == "base, layer 0: 7", "loss + 300 / 100"
    plot.send_keys(Keys.ARROW_DOWN, Keys.END)
    assert said.text == f"{HOSTILE}, layer 3: 9"
    at.all("#legend input")[1].send_keys(Keys.SPACE)
    assert len(at.all("#heat .cell")) == 2 * 4
    at.choose("#heat-view", "Steps × layers: other")
    assert at.texts("#heat text")[:3] == ["step 0", "step 150", "step 300"]
    ActionChains(at.driver).move_to_element(at.all("#heat .cell")[5]).perform()
    assert said.text == "step 150, layer 1: 7.5"
    at.one("#heat-data summary").click()
    rows = WebDriverWait(at.driver, 10).until(lambda _: at.texts("#heat-data tbody tr"), "toggle comes later")
    assert rows == ["step 05678", "step 1506.57.58.59.5", "step 300891011"]


SHOWN = """
return [document.querySelector("#table").textContent, document.querySelector("#status").textContent,
  ...["#chart", "#scatter", "#heat"].map((id) => document.querySelector(id).getAttribute("aria-label")),
  ...[...document.querySelectorAll("input, select")].map((e) => e.type === "checkbox" ? e.checked : e.value)];
"""


@needs_browser
def test_a_link_restores_the_view(at: Page) -> None:
    before = at.js(SHOWN)
    assert "columns" not in at.js("return location.hash")
    at.header("Validation loss").find_element(By.TAG_NAME, "button").click()
    at.all("#legend input")[2].send_keys(Keys.SPACE)
    at.one("#filter").send_keys("a")
    at.all("details.chooser > summary")[1].click()
    at.one("#metric-choice input:not(:checked)").click()
    at.choose("#chart-choice", "Stable rank")
    at.choose("#scatter-x", "Peak memory")
    at.choose("#scatter-front", "none")
    at.one("#scatter-log-y").click()
    at.choose("#heat-view", "Steps × layers: base")
    chosen, link = at.js(SHOWN), at.js("return document.querySelector('#view-link').href")
    assert chosen != before
    assert link == at.js("return location.href")
    at.open(view=link.removeprefix(at.address))
    assert at.js(SHOWN) == chosen
    # what is no view of this page changes nothing
    for strange in ("#view=1-2-3-4-5&runs=0", "#metrics", "#view=%zz&sort=x"):
        at.open(view=strange)
        at.one("#turned").click()
        assert at.js(SHOWN) == before
    mark = link.split("view=")[1].split("&")[0]
    at.open(view=f"#view={mark}&sort=999&runs=7.x&columns=-1.1e9&chart-choice=99&filter=%3Cb%3E&turned=0")
    assert at.all("b") == []
    assert at.one("#filter").get_attribute("value") == "<b>"
    assert at.runs() == []


@needs_browser
def test_filtering(at: Page) -> None:
    at.one("#filter").send_keys("SLTRAIN")
    assert at.runs() == [OTHER]
    assert at.one("#status").text.startswith("1 of 3 runs")
    at.one("#filter").send_keys(" nothing")
    assert at.runs() == []


@needs_browser
def test_choosing_runs_changes_table_and_curves_alike(at: Page) -> None:
    legend = at.all("#legend input")
    legend[1].send_keys(Keys.SPACE)
    assert at.runs() == [BASE, OTHER]
    assert len(at.all("#chart .stroke")) == 2
    at.all("details.chooser > summary")[0].click()
    box = at.all("#run-choice input")[1]
    assert not box.is_selected()
    box.click()
    assert at.runs() == [BASE, HOSTILE, OTHER]
    assert len(at.all("#chart .stroke")) == 3


@needs_browser
def test_choosing_metrics(at: Page) -> None:
    columns = len(at.all("#table thead th"))
    at.all("details.chooser > summary")[1].click()
    at.one("#metric-choice input:not(:checked)").click()
    assert len(at.all("#table thead th")) == columns + 1
    buttons = {button.text: button for button in at.all("#metric-choice button")}
    buttons["None"].click()
    assert at.texts("#table thead button") == ["Run"]
    buttons["All"].click()
    assert len(at.all("#table thead th")) > columns + 1
    buttons["Usual metrics"].click()
    assert len(at.all("#table thead th")) == columns


@needs_browser
def test_differences_with_their_p_can_be_hidden(at: Page) -> None:
    cells = at.texts("#table tbody tr:nth-child(2) td")
    assert cells[0] == "3.00 ± 0.10−1.00 ± 0.14, p < 0.001, q < 0.001 *** †"
    at.one("#differences").click()
    assert at.texts("#table tbody tr:nth-child(2) td")[0] == "3.00 ± 0.10"


@needs_browser
def test_curves_give_their_values_to_pointer_and_keyboard(at: Page) -> None:
    at.choose_curve("Training loss")
    chart = at.one("#chart")
    chart.send_keys(Keys.HOME)
    assert at.texts("#legend .at") == ["6", "5", "7"]
    assert at.one("#readout").get_attribute("textContent").startswith("optimizer step 10: base 6, ")
    chart.send_keys(Keys.ARROW_RIGHT)
    assert at.texts("#legend .at") == ["5", "4", "6"]
    chart.send_keys(Keys.ESCAPE)
    assert at.texts("#legend .at") == ["", "", ""]
    ActionChains(at.driver).move_to_element_with_offset(chart, chart.size["width"] // 2 - 20, 0).perform()
    assert at.texts("#legend .at") == ["4", "3", "5"]
    at.choose_curve("Validation loss")
    at.one("#chart").send_keys(Keys.END)
    assert at.texts("#legend .at") == ["4 ± 0.1", "3 ± 0.1", "5 ± 0.1"]
    assert len(at.all("#chart .band")) == 3
    at.one("#chart-data summary").click()
    rows = WebDriverWait(at.driver, 10).until(lambda _: at.texts("#chart-data tbody tr"), "toggle comes later")
    assert rows[1] == "3004 ± 0.13 ± 0.15 ± 0.1"


@needs_browser
def test_logarithmic_axes(at: Page) -> None:
    at.choose_curve("Training loss")
    middle = "return document.querySelectorAll('#chart .k0 .mark')[1].getAttribute('cx')"
    before = float(at.js(middle))
    at.one("#log-x").click()
    after = float(at.js(middle))
    ends = [float(at.js(middle.replace("[1]", f"[{i}]"))) for i in (0, 2)]
    assert before < after == pytest.approx(sum(ends) / 2, abs=0.5), "10, 100 and 1000 are evenly spaced"
    at.one("#log-y").click()
    assert len(at.all("#chart .stroke")) == 3


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_every_text_has_contrast_and_fits_the_width(browser: Page, scheme: str, width: int) -> None:
    browser.open(width, 740, scheme)
    browser.js("document.querySelectorAll('details').forEach((one) => (one.open = true))")
    browser.one("#chart").send_keys(Keys.HOME)
    browser.one("#scatter").send_keys(Keys.HOME)
    browser.one("#heat").send_keys(Keys.HOME)
    assert browser.js("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert browser.js("return matchMedia('(prefers-color-scheme: dark)').matches") is (scheme == "dark")
    weak = browser.js(CONTRAST)
    assert weak == []
    if width == 360:
        small = "return [...document.querySelectorAll('.check, summary, select, input[type=search], th button')]"
        assert min(browser.js(f"{small}.map((e) => e.getBoundingClientRect().height)")) >= 24


CONTRAST = """
const parse = (text) => { const p = text.match(/[\\d.]+/g).map(Number); return [p[0], p[1], p[2], p[3] ?? 1]; };
const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
  .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const behind = (node) => {
  for (let at = node; at; at = at.parentElement) {
    const colour = parse(getComputedStyle(at).backgroundColor);
    if (colour[3] > 0) return colour;
  }
  return [255, 255, 255, 1];
};
const weak = [];
let seen = 0;
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const holder = walker.currentNode.parentElement;
  const hidden = !holder.getClientRects().length || holder.closest("script, noscript");
  if (hidden || !walker.currentNode.textContent.trim()) continue;
  const style = getComputedStyle(holder);
  const [a, b] = [light(parse(holder.closest("svg") ? style.fill : style.color)), light(behind(holder))];
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  seen += 1;
  if (ratio < 4.5) weak.push([holder.tagName, holder.textContent.slice(0, 40), ratio]);
}
if (seen < 50) weak.push(["nothing", "was looked at", seen]);
return weak;
"""


@needs_browser
def test_lines_can_be_told_from_the_background(browser: Page) -> None:
    colour = "return getComputedStyle(arguments[0]).stroke.match(/[\\d.]+/g).slice(0, 3).map(Number)"
    for scheme, ground in (("light", 255), ("dark", 26)):
        browser.open(scheme=scheme)
        strokes = [browser.js(colour, stroke) for stroke in browser.all("#chart .stroke")]
        for stroke in strokes:
            a, b = relative(stroke), relative([ground] * 3)
            assert (max(a, b) + 0.05) / (min(a, b) + 0.05) >= 3
        assert len({tuple(stroke) for stroke in strokes}) == 3
        shapes = browser.js("return [...document.querySelectorAll('#chart .mark')].map((e) => e.tagName)")
        assert len(set(shapes)) > 1, "marks differ as well as colours"


@needs_browser
def test_any_two_numbers_stand_against_each_other(at: Page) -> None:
    at.choose("#scatter-x", "Validation loss")
    at.choose("#scatter-y", "H1 Expected sharpness")
    assert len(at.all("#scatter .stroke")) == 3, "a line joins the checkpoints of a run"
    assert [len(at.all(f"#scatter .mark{kind}")) for kind in ("", ".on")] == [6, 3]
    plot, said = at.one("#scatter"), at.one("#scatter-readout")
    assert "H1 Expected sharpness, random directions (dense weights) against Validation loss. 6 points of 3 runs" in (
        plot.get_attribute("aria-label")
    )
    plot.send_keys(Keys.HOME)
    sharpness = "H1 Expected sharpness, random directions (dense weights)"
    read = said.get_attribute("textContent")
    assert read == f"{HOSTILE}, seed 1, step 300: Validation loss 3, {sharpness} 0.03"
    assert at.texts("#scatter .tip tspan")[1:] == ["seed 1, step 300", "x 3", "y 0.03"]
    plot.send_keys(Keys.END)
    assert said.get_attribute("textContent").startswith("other, seed 2, step 150: Validation loss 6, ")
    plot.send_keys(Keys.ESCAPE)
    assert (at.all("#scatter .tip"), said.get_attribute("textContent")) == ([], "")
    mark = at.all("#scatter .mark.on")[0]
    ActionChains(at.driver).move_to_element(mark).perform()
    assert said.get_attribute("textContent").startswith("base, seed 1, step 300: Validation loss 4, ")
    at.one("#scatter-way").click()
    assert len(at.all("#scatter .mark")) == 3
    at.all("#legend input")[1].send_keys(Keys.SPACE)
    assert len(at.all("#scatter .mark")) == 2
    at.one("#scatter-data summary").click()
    rows = WebDriverWait(at.driver, 10).until(lambda _: at.texts("#scatter-data tbody tr"), "toggle comes later")
    assert rows == ["basestep 30040.04", "otherstep 30050.05"]


@needs_browser
def test_the_pareto_front_is_what_no_run_beats(at: Page) -> None:
    at.choose("#scatter-x", "Validation loss")
    at.choose("#scatter-y", "brackets (acc)")
    assert at.one("#scatter-front").get_attribute("value") == "", "whether the accuracy is to be high is not known"
    at.choose("#scatter-front", "small x, large y")
    # losses of 4, 3 and 5 with accuracies of 0.54, 0.53 and 0.55: all are best at something
    path = at.one("#scatter .front").get_attribute("d")
    assert path.count("L") == 2
    assert "3 on the Pareto front" in at.one("#scatter").get_attribute("aria-label")
    at.choose("#scatter-front", "small x, small y")
    assert at.all("#scatter .front") == []
    at.one("#scatter").send_keys(Keys.HOME)
    assert at.one("#scatter-readout").get_attribute("textContent").endswith("0.53, on the Pareto front")
    at.choose("#scatter-y", "Peak memory")
    assert at.one("#scatter-front").get_attribute("value") == "smaller smaller"
    assert "Peak memory (GiB)" in at.texts("#scatter text")
    assert len(at.all("#scatter .mark")) == 6


@needs_browser
def test_the_scatter_plots_axes_can_be_logarithmic(at: Page) -> None:
    at.choose("#scatter-x", "Validation loss")
    where = "return [0, 1].map((k) => document.querySelectorAll(`#scatter .k${k} .mark`))"
    where += ".map((marks) => [...marks].map((e) => e.getBoundingClientRect()).map((box) => box.left + box.width / 2))"
    for box, wanted in ((None, 1), ("#scatter-log-x", math.log(5 / 4) / math.log(4 / 3))):
        if box:
            at.one(box).click()
        # from a loss of 5 to one of 4, and from 4 to 3
        (five, four), (other_four, three) = at.js(where)
        assert four == pytest.approx(other_four, abs=0.01)
        assert (five - four) / (four - three) == pytest.approx(wanted, rel=1e-3)
    at.one("#scatter-log-y").click()
    assert len(at.all("#scatter .stroke")) == 3


@needs_browser
def test_shades_of_seeds_can_be_told_from_the_background(browser: Page) -> None:
    script = """
    const holder = document.querySelector("#scatter svg"), seen = [];
    for (let k = 0; k < 7; k++) for (let s = 0; s < 3; s++) {
      const line = drawnBy(`k${k} s${s}`);
      seen.push(getComputedStyle(line).stroke);
    }
    function drawnBy(name) {
      const group = document.createElementNS("http://www.w3.org/2000/svg", "g");
      const line = document.createElementNS("http://www.w3.org/2000/svg", "path");
      group.setAttribute("class", name);
      line.setAttribute("class", "stroke");
      group.append(line);
      holder.append(group);
      return line;
    }
    return seen;
    """
    for scheme, ground in (("light", 255), ("dark", 26)):
        browser.open(scheme=scheme)
        strokes = browser.js(script)
        assert len(set(strokes)) >= 19
        for stroke in strokes:
            parts = [float(part) for part in re.findall(r"[\d.]+", stroke.replace("srgb", ""))[:3]]
            colour = [255 * part for part in parts] if stroke.startswith("color(") else parts
            a, b = relative(colour), relative([ground] * 3)
            assert (max(a, b) + 0.05) / (min(a, b) + 0.05) >= 3, stroke


def relative(colour: list[float]) -> float:
    linear: Callable[[float], float] = lambda v: v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4  # noqa: E731
    return sum(weight * linear(v / 255) for weight, v in zip((0.2126, 0.7152, 0.0722), colour, strict=True))


@needs_browser
def test_on_paper_each_run_lists_its_numbers_without_controls(browser: Page) -> None:
    browser.open(700, 900, "dark")
    for _ in range(2):
        # both ways fit the paper; the last one lists what a run has
        browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
        assert browser.js("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
        if browser.one("#turned").is_selected():
            browser.one("#turned").click()
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert not browser.one("#filter").is_displayed()
    assert browser.js("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert browser.js("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    label = "return getComputedStyle(document.querySelector('#table td'), '::before').content"
    assert browser.js(label) == '"Validation loss"'
    printed = browser.driver.execute_cdp_cmd("Page.printToPDF", {})["data"]
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert len(printed) > 10_000


@needs_browser
def test_no_error_and_no_request_in_all_of_this(at: Page) -> None:
    assert [entry for entry in at.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    sent = [json.loads(entry["message"])["message"] for entry in at.driver.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in sent if m["method"] == "Network.requestWillBeSent"]
    assert asked, "the page itself is among them"
    assert {url for url in asked if not url.startswith(("data:", "about:"))} == {at.address}
