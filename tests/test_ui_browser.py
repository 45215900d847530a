"""The browser interface in a real browser, with a real server and real jobs, end to end:

 1. a caching job starts from a form and ends; its page leads to buckets, captions, decoded samples
 2. a training starts from a form that was made from the configuration
 3. its curve grows while the page is open
 4. another step's preview is shown by the slider, and a video plays
 5. stop saves a checkpoint
 6. run again goes on from there
 7. two runs lie over each other, with the difference of their configurations
 8. a job of two processes (torchrun) outlives page and server, and another server finds it; jobs of
    one device wait for each other
 9. the playground draws before and after side by side, and shows both commands
10. a form shows the keys of another type and says what is wrong; a memory plan and what an adapter
    does to its base are told
11. the token is missing, wrong, right; a hostile caption shows as text; another site starts nothing
12. a run of 10,000 steps with 500 previews opens in 2 seconds

It needs Playwright and a Chromium of the system; without them it is skipped, and says why.
`MMDIT_SCREENSHOTS=FOLDER` keeps a picture of each page as `ui_<page>.png`."""

import contextlib
import io
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
from mmdit.ui.processes import is_alive
from tests.helpers.tiny import CONFIG

ROOT = Path(__file__).resolve().parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>"
TOKEN = "a token of many letters"
SECONDS = 300  # for what a page waits for; other work may share the cores
TRIES = 5  # of what is timed: other work may come between

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

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.end()

    def end(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)
        self.process.wait(SECONDS)
        self.process.stdout.close()


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
    with Server(folder) as server:
        yield server
        end_jobs(folder)


def end_jobs(folder):
    for path in folder.glob("runs/.jobs/*/status.json"):
        status = json.loads(path.read_text())
        for process in (status["runner"], status.get("child")):
            if is_alive(process):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process[0], signal.SIGKILL)


@pytest.fixture
def page(chromium, server):
    with opened(chromium, server.address) as page:
        yield page


@pytest.fixture(autouse=True)
def no_job_is_left(folder):
    """End the jobs of a test that failed: those of the next ones would wait for them."""
    yield
    end_jobs(folder)


@contextlib.contextmanager
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
    try:
        yield page
    finally:
        context.close()
    assert not problems


def keep(page, name):
    """Keep a picture of the page, in few colours, where somebody asked for it."""
    folder = os.environ.get("MMDIT_SCREENSHOTS")
    if folder:
        picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(48)
        picture.save(f"{folder}/ui_{name}.png", optimize=True)


def until(page, expression):
    """Wait until a script's expression holds: `wait_for_function` evaluates a text in the page,
    which the policy of the pages forbids."""
    end = time.monotonic() + SECONDS
    while not page.evaluate(expression):
        assert time.monotonic() < end, expression
        time.sleep(0.2)


def submit(page, action):
    page.locator(f"button[value={action}]").first.click()


def state(page, *words):
    page.locator("#state .state", has_text=re.compile(f"^({'|'.join(words)})$")).wait_for()


@pytest.fixture(scope="module")
def cache(chromium, server):
    """Task 1: a caching job, from the choice of a config to what is in the cache."""
    with opened(chromium, server.address) as page:
        page.goto("/jobs")
        page.click("a.new >> text=cache-moving-shapes")
        page.fill("input[name=config]", "tiny.yaml")
        page.click("text=Open")
        page.fill("#o-out_dir", "cache")
        page.fill("#o-count", "16")
        submit(page, "start")
        state(page, "finished")
        assert "16 samples made" in page.text_content("#log")
        page.click("#cache")
        assert page.locator("#groups tbody td").all_text_contents() == ["48x32", "1", "16"]
    return "cache"


def choose(page, key, value):
    """Fill in a key of the configuration, in a section that is closed or not."""
    section = key.rpartition(".")[0]
    field = page.locator(f"[name='set:{key}']")
    if section and not field.is_visible():
        page.click(f"summary:has(code:text-is('{section}'))")
    if field.evaluate("field => field.tagName") == "SELECT":
        field.select_option(value)
    else:
        field.fill(value)


def begin(page, name, *settings, processes=""):
    """Start a training from its form; return the address of its job."""
    page.goto("/new/train?config=tiny.yaml")
    page.fill("#o-train_cache_dir", "cache")
    page.fill("#nproc_per_node", processes)
    for key, value in (("experiment_name", name), *settings):
        choose(page, key, value)
    submit(page, "start")
    page.wait_for_selector("#log")
    return page.url


def train(page, name, *settings, processes=""):
    """Start a training and open the page of its run; return the address of its job."""
    job = begin(page, name, *settings, processes=processes)
    state(page, "running")
    page.locator("#run:not([hidden]) a").click()
    page.locator("#curves[data-ready]").wait_for()
    return job


LAST = "Number(document.querySelector('.panel polyline')?.dataset.last)"  # step of the first curve


@pytest.fixture(scope="module")
def trained(chromium, server, cache):
    """Tasks 2 to 5: a training is started, its curve grows, another preview is shown, it is stopped
    and saves. The page of its job."""
    with opened(chromium, server.address) as page:
        train(page, "grown", ("train.batch_size", "2"))
        page.wait_for_selector(".panel polyline")
        until(page, f"{LAST} > {page.evaluate(LAST)}")
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
        assert "16 items" in page.text_content("#data")
        assert (
            "experiment_name=grown train.batch_size=2 --train_cache_dir=cache"
            in page.text_content("#typed")
        )
        page.click("#prompts >> xpath=..")
        keep(page, "run")
        page.click("#actions a >> nth=0")
        page.click("#stop button")
        state(page, "stopped")
        assert "continue with --resume" in page.text_content("#log")
        yield page


def test_stopping_saves_and_running_again_goes_on(trained, folder):
    page = trained
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


@pytest.fixture(scope="module")
def adapted(chromium, server, trained):
    """A run that trains an adapter of the first one, and is stopped."""
    with opened(chromium, server.address) as page:
        settings = {"lora.enabled": "true", "train.init_from": "runs/grown", "train.lr": "1e-3"}
        train(page, "adapted", *settings.items())
        page.wait_for_selector(".panel polyline")
        page.click("#actions button >> text=Stop")
        state(page, "stopped")
    return "runs/adapted"


def test_two_runs_lie_over_each_other(adapted, page):
    page.goto("/")
    for name in ("grown", "adapted"):
        page.check(f"input[value={name}]")
    page.click("text=Show the chosen")
    page.wait_for_selector("#curves[data-ready]")
    strokes = page.locator(".panel >> nth=0 >> polyline").evaluate_all(
        "lines => new Set(lines.map(line => line.getAttribute('stroke'))).size"
    )
    assert strokes == 2
    assert "train.lr: 0.001 → 0.01" in page.text_content("main")
    keep(page, "compare")


def test_what_an_adapter_does_to_its_base_is_told(adapted, page):
    page.goto("/data")
    page.click("a.new >> text=inspect-adapter")
    page.fill("#o-base", adapted)
    submit(page, "start")
    state(page, "finished")
    assert "‖ΔW‖" in page.text_content("#log")


def test_a_job_of_two_processes_outlives_the_server_and_others_wait(chromium, cache, folder):
    with Server(folder) as server:
        with opened(chromium, server.address) as page:
            first = train(page, "outlives", processes="2")
        server.end(signal.SIGKILL)
    with opened_server(chromium, folder) as page:
        path = first.partition("/job/")[2]
        page.goto(f"/job/{path}")
        state(page, "running")
        assert "torchrun --standalone --nproc_per_node=2" in page.text_content("#command")
        second = begin(page, "second").partition("/job/")[2]
        state(page, "queued")
        page.locator("#state", has_text="waits for earlier jobs on cpu").wait_for()
        page.goto(f"/job/{path}")
        page.click("#stop button")
        state(page, "stopped")
        assert "continue with --resume" in page.text_content("#log")
        page.goto(f"/job/{second}")
        state(page, "running")
        page.click("#stop button")
        state(page, "stopped")


@contextlib.contextmanager
def opened_server(chromium, folder, **environment):
    """A server of its own, and a page of it."""
    with Server(folder, **environment) as server, opened(chromium, server.address) as page:
        yield page


def test_the_playground_draws_side_by_side(adapted, page):
    page.goto("/playground")
    page.fill("#o-checkpoint", "runs/grown")
    page.fill("#other_checkpoint", adapted)
    page.fill("#o-prompts", f"a blue star\n{HOSTILE}")
    page.fill("#o-steps", "2")
    page.fill("#o-seed", "7")
    submit(page, "check")
    assert page.locator("pre.command").count() == 2
    submit(page, "start")
    page.locator("#results .state.finished").nth(1).wait_for()
    page.locator("#results img[alt='0001.png']").nth(1).wait_for()
    assert "--seed=7" in page.locator("#results pre.command").first.text_content()
    page.locator("#results").evaluate("results => results.scrollIntoView()")
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


def test_a_memory_plan_is_shown(page):
    page.goto("/data")
    page.click("a.new >> text=plan-memory")
    page.fill("input[name=config]", "tiny.yaml")
    page.click("text=Open")
    submit(page, "start")
    state(page, "finished")
    assert "GB" in page.text_content("#log")


def test_a_cache_shows_what_training_will_make_of_it_and_decoded_samples(page, cache):
    page.goto("/data")
    page.click("#caches a >> text=cache")
    page.click("#report")
    page.fill("input[name=config]", "tiny.yaml")
    page.click("text=Open")
    submit(page, "start")
    state(page, "finished")
    page.locator("#pictures img[alt='sheet.png']").wait_for()
    page.goto("/data")
    page.click("#caches a >> text=cache")
    until(page, "document.querySelector('#pictures img')?.naturalWidth > 0")
    assert "batches of 4 an epoch" in page.text_content("main")
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
    shutil.copy(ROOT / "assets/clip.mp4", sample / "video.mp4")
    seconds = []
    for number in range(TRIES):
        page.goto("/jobs")  # no page asks for the run any more
        run = run.rename(run.with_name(f"long{number}"))  # of which the server has read nothing
        begin = time.perf_counter()
        page.goto(f"/run/{run.name}")
        page.wait_for_selector("#curves[data-ready]")
        until(page, "document.getElementById('grid').naturalWidth > 0")
        seconds.append(time.perf_counter() - begin)
        if seconds[-1] < 2:
            break
    print(f"a run of 10,000 steps and 500 previews opened in {min(seconds):.2f} s")
    assert min(seconds) < 2
    assert page.get_attribute("#slider", "max") == "499"
    until(page, "document.getElementById('video').videoWidth > 0")
    assert HOSTILE in page.locator("#prompts").text_content()
    assert page.locator("main img[src='x']").count() == 0


def test_the_token_missing_wrong_and_right(chromium, folder):
    with opened_server(chromium, folder, MMDIT_UI_TOKEN=TOKEN) as page:
        page.goto("/jobs")
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
    with opened(chromium, out.as_uri()) as page:
        page.goto(out.as_uri())
        assert HOSTILE in page.inner_text("body") and page.locator("svg").count() == 1
        assert page.evaluate("[...document.images].map(image => image.naturalWidth)") == [64]
