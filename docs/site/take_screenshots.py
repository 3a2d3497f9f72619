"""Takes the pictures of the playground anew: `python -m docs.site.take_screenshots`."""

import shutil
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

from tests.deployments.local_server import serve_locally

ASSETS = Path(__file__).resolve().parents[1] / "assets"


def take(browser: Browser, url: str, scheme: str) -> None:
    """The chat and, under a load with a shared prefix, the engine."""
    size = {"width": 1440, "height": 900}
    page = browser.new_page(viewport=size, color_scheme=scheme)
    page.goto(f"{url}/#both")
    page.wait_for_selector("#engine-body:not([hidden])")
    page.click("#toggle-settings")
    page.check('#settings-form [name="thinking"]')
    page.fill('#settings-form [name="temperature"]', "0")
    page.click("#close-settings")
    for number, text in enumerate(("What is 17 + 25?", "Reverse these words: river stone apple")):
        page.fill("#input", text)
        page.keyboard.press("Enter")
        page.locator("footer.meta").nth(number).wait_for()
    page.click("details.reasoning summary")
    page.fill("#load-count", "120")
    page.fill("#load-tokens", "260")
    page.click("#load-start")
    page.evaluate("document.querySelector('#engine').scrollTop = 0")
    page.wait_for_timeout(9000)  # of the chart's 30 seconds
    page.screenshot(path=ASSETS / f"playground-{scheme}.png")
    page.context.close()


def main() -> None:
    pool = dict(num_blocks=440, block_size=16, max_num_seqs=13, max_num_batched_tokens=192)
    with serve_locally(**pool) as server, sync_playwright() as playwright:
        chromium = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            take(browser, server.url, scheme)
        browser.close()


if __name__ == "__main__":
    main()
