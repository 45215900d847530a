"""The browser interface in a real browser, with a real server and real jobs, end to end.

It needs Playwright and a Chromium of the system; without them it is skipped, and says why.
`MMDIT_SCREENSHOTS=FOLDER` keeps a picture of each page."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from mmdit.scripts import report
from tests.helpers.tiny import CONFIG

ROOT = Path(__file__).resolve().parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>"
TOKEN = "a token of many letters"
SECONDS = 60  # for what a page waits for; other work may share the cores

pytestmark = pytest.mark.slow
pytest.importorskip("starlette")
playwright = pytest.importorskip(
    "playwright.sync_api", reason='no Playwright: pip install -e ".[dev]"'
)


@pytest.fixture(scope="module")
def chromium():
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"no browser of the system: none of {', '.join(BROWSERS)} is installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


class Server:
    """`mmdit ui` as a process of its own, in `folder`."""

    def __init__(self, folder: Path, **environment: str):
        words = [sys.executable, "-m", "mmdit", "ui", "--runs", "runs", "--port", "0"]
        paths = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'VTP'}", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            words, cwd=folder, env=os.environ | paths | environment, stdout=subprocess.PIPE
        )
        line = self.process.stdout.readline().decode()
        self.address = re.search(r"http://\S+", line)[0].rstrip("/")

    def end(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)
        self.process.wait(20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny config whose training would take hours."""
    folder = tmp_path_factory.mktemp("browser")
    text = CONFIG.replace("{folder}/", "").replace("{{", "{").replace("}}", "}")
    text = text.replace("max_steps: 3", "max_steps: 1000000").replace(
        "save_every_steps: 2", "save_every_steps: 5000\n  sample_every_steps: 40"
    )
    text = text.replace("[a large red star on a navy background]", f"[a red star, '{HOSTILE}']")
    (folder / "tiny.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def server(folder):
    server = Server(folder)
    yield server
    end_jobs(folder)
    server.end()


def end_jobs(folder):
    for path in folder.glob("runs/.jobs/*/status.json"):
        status = json.loads(path.read_text())
        for process in (status["runner"], status.get("child")):
            if process and not status.get("ended"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process[0], signal.SIGKILL)


@pytest.fixture
def page(chromium, server, folder):
    yield from opened(chromium, server.address)
    end_jobs(folder)  # of a test that failed: the next ones would wait for them


def opened(chromium, address):
    """A page on which no script may fail, no dialog open and no request leave for elsewhere."""
    context = chromium.new_context(base_url=address, viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(1000 * SECONDS)
    problems, own = [], (address, "data:")
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))
    page.on("console", lambda line: problems.append(line.text) if line.type == "error" else None)
    page.on(
        "request",
        lambda asked: None if asked.url.startswith(own) else problems.append(asked.url),
    )
    page.problems = problems
    yield page
    context.close()
    assert not problems


def keep(page, name):
    """Keep a picture of the page, where somebody asked for it."""
    folder = os.environ.get("MMDIT_SCREENSHOTS")
    if folder:
        page.screenshot(path=f"{folder}/{name}.png")


def until(page, expression):
    """Wait until a script's expression holds: `wait_for_function` evaluates a text in the page,
    which the policy of the pages forbids."""
    end = time.monotonic() + SECONDS
    while not page.evaluate(expression):
        assert time.monotonic() < end, expression
        time.sleep(0.05)


def submit(page, action):
    page.locator(f"button[value={action}]").first.click()


def state(page, *words):
    page.locator("#state .state", has_text=re.compile(f"^({'|'.join(words)})$")).wait_for()


@pytest.fixture(scope="module")
def cache(chromium, server):
    """Task 1: a caching job, from the choice of a config to its end."""
    for page in opened(chromium, server.address):
        page.goto("/jobs")
        page.click("a.new >> text=cache-moving-shapes")
        page.fill("input[name=config]", "tiny.yaml")
        page.click("text=Open")
        page.fill("#o-out_dir", "cache")
        page.fill("#o-count", "16")
        submit(page, "start")
        state(page, "finished")
        assert "16 samples made" in page.text_content("#log")
    return "cache"


def train(page, name, *settings):
    page.goto("/new/train?config=tiny.yaml")
    page.fill("#o-train_cache_dir", "cache")
    page.fill("[name='set:experiment_name']", name)
    for section, key, value in settings:
        page.click(f"summary:has(code:text-is('{section}'))")
        page.fill(f"[name='set:{section}.{key}']", value)
    submit(page, "start")
    state(page, "running")
    job = page.url.rpartition("/")[2]
    page.locator("#run:not([hidden]) a").click()
    page.locator("#curves[data-ready]").wait_for()
    return job


def points(page):
    """The number of points of the first curve."""
    return int(page.locator(".panel polyline").first.get_attribute("data-count") or 0)


@pytest.fixture(scope="module")
def trained(chromium, server, cache):
    """Tasks 2 to 5: a training is started, its curve grows, another preview is shown, it is stopped
    and saves, and goes on."""
    for page in opened(chromium, server.address):
        job = train(page, "grown", ("train", "batch_size", "2"))
        page.wait_for_selector(".panel polyline")
        before = points(page)
        until(page, f"Number(document.querySelector('.panel polyline').dataset.count) > {before}")
        until(page, "Number(document.getElementById('slider').max) >= 2")
        newest = page.text_content("#shown-step")
        page.locator("#slider").focus()
        page.keyboard.press("Home")
        assert page.text_content("#shown-step") == "40" != newest
        picture = page.locator("#grid")
        assert "step_00000040/grid.png" in picture.get_attribute("src")
        until(page, "document.getElementById('grid').naturalWidth > 0")
        page.click("#prompts >> xpath=..")
        assert HOSTILE in page.locator("#prompts").text_content()
        keep(page, "run")
        page.click("#actions a >> nth=0")
        page.click("#stop button")
        state(page, "stopped")
        assert "continue with --resume" in page.text_content("#log")
        yield {"job": job, "page": page}


def test_stopping_saves_and_running_again_goes_on(trained, folder):
    page = trained["page"]
    saved = sorted((folder / "runs/grown/checkpoints").glob("step_*"))
    assert saved
    step = int(saved[-1].name[5:])
    page.click("#again button")
    state(page, "running")
    assert "--resume" in page.text_content("#command")
    page.locator("#run:not([hidden]) a").click()
    until(page, f"Number(document.getElementById('step').textContent) > {step}")
    page.click("#actions button >> text=Stop")
    state(page, "stopped")


def test_two_runs_lie_over_each_other(trained, page):
    train(page, "other", ("train", "lr", "1e-3"))
    page.wait_for_selector(".panel polyline")
    page.goto("/")
    for name in ("grown", "other"):
        page.check(f"input[value={name}]")
    page.click("text=Show the chosen")
    page.wait_for_selector("#curves[data-ready]")
    strokes = page.locator(".panel >> nth=0 >> polyline").evaluate_all(
        "lines => new Set(lines.map(line => line.getAttribute('stroke'))).size"
    )
    assert strokes == 2
    assert "train.lr: 0.001 → 0.01" in page.text_content("main")
    keep(page, "compare")
    page.goto("/run/other")
    page.click("#actions button >> text=Stop")
    state(page, "stopped")


def test_the_server_may_end_and_the_job_goes_on(chromium, cache, folder):
    first = Server(folder)
    for page in opened(chromium, first.address):
        job = train(page, "outlives")
    first.end(signal.SIGKILL)
    second = Server(folder)
    for page in opened(chromium, second.address):
        page.goto(f"/job/{job}")
        state(page, "running")
        page.click("#stop button")
        state(page, "stopped")
    second.end()


def test_jobs_of_a_device_queue(page, cache):
    first = train(page, "first")
    page.goto("/new/train?config=tiny.yaml")
    page.fill("#o-train_cache_dir", "cache")
    page.fill("[name='set:experiment_name']", "second")
    submit(page, "start")
    state(page, "queued")
    page.locator("#state", has_text="waits for earlier jobs on cpu").wait_for()
    second = page.url
    page.goto(f"/job/{first}")
    page.click("#stop button")
    state(page, "stopped")
    page.goto(second)
    state(page, "running")
    page.click("#stop button")
    state(page, "stopped")


def test_the_playground_draws_side_by_side(trained, page):
    page.goto("/playground")
    page.fill("#o-checkpoint", "runs/grown")
    page.fill("#other_checkpoint", "runs/grown")
    page.fill("#o-prompts", f"a blue star\n{HOSTILE}")
    page.fill("#o-steps", "2")
    page.fill("#o-seed", "7")
    submit(page, "check")
    assert page.locator("pre.command").count() == 2
    submit(page, "start")
    page.locator("#results .state.finished").nth(1).wait_for()
    page.locator("#results img[alt='0001.png']").nth(1).wait_for()
    assert "--seed=7" in page.locator("#results pre.command").first.text_content()
    keep(page, "playground")


def test_a_form_shows_the_keys_of_a_type_and_says_what_is_wrong(page, cache):
    page.goto("/new/train?config=tiny.yaml")
    page.fill("#o-train_cache_dir", "cache")
    page.click("summary:has(code:text-is('posttrain'))")
    page.select_option("[name='type:posttrain']", "given")
    submit(page, "check")
    assert "train.init_from" in page.text_content("#problem")
    assert page.locator("[name='set:posttrain.algorithm']").count() == 1
    keep(page, "form")
    page.problems.clear()  # the browser reports the status 400 as an error


def test_a_report_is_shown(page):
    page.goto("/data")
    page.click("a.new >> text=plan-memory")
    page.fill("input[name=config]", "tiny.yaml")
    page.click("text=Open")
    submit(page, "start")
    state(page, "finished")
    assert "GB" in page.text_content("#log")


def test_a_sheet_of_decoded_samples_is_shown(page, cache):
    page.goto("/new/inspect-cache?config=tiny.yaml")
    page.fill("#o-cache_dir", "cache")
    submit(page, "start")
    state(page, "finished")
    page.locator("#pictures img[alt='sheet.png']").wait_for()
    until(page, "document.querySelector('#pictures img').naturalWidth > 0")
    keep(page, "data")


def test_a_long_run_opens_in_two_seconds(page, folder):
    run = folder / "runs/long"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(
        f"experiment_name: {HOSTILE!r}\ntrain: {{max_steps: 10000, sample_prompts: [{HOSTILE!r}]}}"
    )
    names = [f"loss_level_{i}" for i in range(4)] + [f"value_{i}" for i in range(40)]
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(1, 10_001):
            values = {name: 1 / (step + i) for i, name in enumerate(names)}
            file.write(json.dumps({"step": step, "loss_ema_100": 1 / step} | values) + "\n")
    for step in range(20, 10_001, 20):
        sample = run / "samples" / f"step_{step:08d}"
        sample.mkdir(parents=True)
        Image.new("RGB", (64, 32), (step % 256, 60, 90)).save(sample / "grid.png")
    begin = time.perf_counter()
    page.goto("/run/long")
    page.wait_for_selector("#curves[data-ready]")
    until(page, "document.getElementById('grid').naturalWidth > 0")
    seconds = time.perf_counter() - begin
    print(f"a run of 10,000 steps and 500 previews opened in {seconds:.2f} s")
    assert seconds < 2
    assert page.get_attribute("#slider", "max") == "499"
    assert HOSTILE in page.locator("#prompts").text_content()
    assert page.locator("main img[src='x']").count() == 0


def test_the_token_missing_wrong_and_right(chromium, folder):
    server = Server(folder, MMDIT_UI_TOKEN=TOKEN)
    for page in opened(chromium, server.address):
        page.goto("/run/long")
        assert page.url.endswith("/sign-in")
        page.fill("[name=token]", "a wrong token")
        page.click("button >> text=Sign in")
        assert "not the token" in page.text_content("#problem")
        page.problems.clear()  # the browser reports the status 401 as an error
        page.fill("[name=token]", TOKEN)
        page.click("button >> text=Sign in")
        page.wait_for_selector("h1 >> text=Runs in")
        assert TOKEN not in page.url and TOKEN not in page.content()
        assert page.evaluate("document.cookie") == ""  # no script reads it
        page.click("text=Sign out")
        assert page.url.endswith("/sign-in")
    server.end()


def test_a_page_of_another_site_cannot_start_or_read(chromium, server, page):
    """The attacker's page is one of another port: another origin on the same machine."""
    context = chromium.new_context()
    foreign = context.new_page()
    foreign.route("http://evil.example/", lambda route: route.fulfill(body="<p>hello</p>"))
    foreign.goto("http://evil.example/")
    with foreign.expect_navigation():
        foreign.evaluate(
            """address => {
                const form = document.createElement('form');
                form.method = 'post'; form.action = address + '/new/plan-memory';
                document.body.append(form); form.submit();
            }""",
            server.address,
        )
    assert "Refused: the request comes from another site" in foreign.content()
    context.close()


def test_a_report_is_a_file_that_asks_for_nothing(chromium, tmp_path):
    run = tmp_path / HOSTILE.replace("/", "")
    place = run / "samples/step_00000002"
    place.mkdir(parents=True)
    Image.new("RGB", (64, 64), "red").save(place / "grid.png")
    config = {"experiment_name": HOSTILE, "train": {"sample_prompts": [HOSTILE], "max_steps": 2}}
    (run / "config.yaml").write_text(json.dumps(config))
    rows = [{"step": step, "loss_ema_100": 1 / step, "lr": 0.1} for step in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "report.html"
    assert report.main([str(run), "--out", str(out)]) == 0
    for page in opened(chromium, out.as_uri()):
        page.goto(out.as_uri())
        assert HOSTILE in page.inner_text("body") and page.locator("svg").count() == 1
        assert page.evaluate("[...document.images].map(image => image.naturalWidth)") == [64]
