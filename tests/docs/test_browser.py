"""Every page of the built site, looked at by a browser at two widths."""

import json
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
WIDTHS = (1280, 390)

pytestmark = pytest.mark.browser


def pages():
    """The paths of all pages on the site."""
    sources = [*DOCS.rglob("*.md"), *DOCS.rglob("*.ipynb")]
    found = set()
    for source in sources:
        path = source.relative_to(DOCS).with_suffix("").as_posix()
        path = path.removesuffix("index").rstrip("/")
        found.add(f"/{path}/" if path else "/")
    return sorted(found)


# What reaches out of the window, but for what scrolls by itself.
OUTSIDE = """
const found = [];
for (const element of document.querySelectorAll("body *")) {
  const style = getComputedStyle(element);
  const box = element.getBoundingClientRect();
  const seen = box.width > 1 && box.height > 1 && style.visibility !== "hidden";
  if (!seen || (box.right <= innerWidth + 1 && box.left >= -1)) continue;
  let parent = element, held = false;
  for (; parent && parent !== document.body; parent = parent.parentElement) {
    const own = getComputedStyle(parent);
    // Drawers and bars that wait outside of the window.
    if (["auto", "scroll", "hidden", "clip"].includes(own.overflowX) ||
        own.position === "fixed" || own.opacity === "0") {
      if (parent !== element || own.position === "fixed") { held = true; break; }
    }
  }
  if (!held) {
    const text = element.textContent.trim().slice(0, 40);
    found.push(`${element.tagName}.${element.className}: ${text}`);
  }
}
return found.slice(0, 5);
"""

# Boxes that hide what they can't show, with text in them.
CUT_OFF = """
const found = [];
for (const element of document.querySelectorAll(".md-content *")) {
  const style = getComputedStyle(element);
  const hides = ["hidden", "clip"].includes(style.overflowX);
  const cut = element.scrollWidth > element.clientWidth + 1 && element.clientWidth > 1;
  if (hides && cut && element.textContent.trim()) {
    found.push(`${element.tagName}.${element.className}`);
  }
}
return found.slice(0, 5);
"""


def set_width(browser, width):
    """Make the window so wide, and of a telephone where it is narrow."""
    metrics = {
        "width": width,
        "height": 900,
        "deviceScaleFactor": 1,
        "mobile": width < 600,
    }
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def requested(browser):
    """The addresses that were asked for since the last call."""
    found = []
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            found.append(message["params"]["request"]["url"])
    return found


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("path", pages())
def test_page(path, width, browser, address):
    """No error in the console, nothing from elsewhere, nothing outside of the page."""
    set_width(browser, width)
    browser.get_log("browser")
    requested(browser)
    browser.get(f"{address}{path}")
    assert "404" not in browser.title
    assert browser.execute_script("return innerWidth") == width
    # Pictures further down are loaded when they come near.
    browser.execute_script("scrollTo(0, document.body.scrollHeight)")
    errors = [e["message"] for e in browser.get_log("browser") if e["level"] == "SEVERE"]
    assert errors == []
    elsewhere = [
        url for url in requested(browser) if not url.startswith((address, "data:", "blob:"))
    ]
    assert elsewhere == []
    script = "return document.scrollingElement.scrollWidth"
    assert browser.execute_script(script) <= width, browser.execute_script(OUTSIDE)
    assert browser.execute_script(OUTSIDE) == []
    assert browser.execute_script(CUT_OFF) == []
    broken = """
    return [...document.images].filter(
        (image) => image.complete && image.naturalWidth === 0
    ).map((image) => image.src)
    """
    assert browser.execute_script(broken) == []


def test_formulas(browser, address):
    """Formulas are drawn: they have a size, and no dollar signs are left."""
    for paper in ("dmtrl", "drn", "mrn", "trn", "mtal"):
        browser.get(f"{address}/papers/{paper}/")
        sizes = browser.execute_script(
            "return [...document.querySelectorAll('math[display=block]')].map("
            "(m) => [m.getBoundingClientRect().width, m.getBoundingClientRect().height])"
        )
        assert sizes and all(width > 50 and height > 15 for width, height in sizes)
        text = browser.execute_script("""
            const copy = document.querySelector("article").cloneNode(true);
            copy.querySelectorAll("pre, code").forEach((code) => code.remove());
            return copy.textContent;
        """)
        assert "$" not in text


def test_search(browser, address):
    """The search finds a public name."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    set_width(browser, 1280)
    browser.get(f"{address}/")
    field = browser.find_element(By.CSS_SELECTOR, "input.md-search__input")
    field.click()
    field.send_keys("merge_similar_kernels")
    result = ".md-search-result__link"
    WebDriverWait(browser, 20).until(
        lambda driver: driver.find_elements(By.CSS_SELECTOR, result)
    )
