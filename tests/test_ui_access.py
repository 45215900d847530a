"""Who gets an answer from the browser interface: tokens, names, other sites, hostile
text, paths."""

import re

import pytest

pytest.importorskip("starlette")
from mmdit.scripts import ui
from mmdit.ui.access import COOKIE, Guard, check_token, guard_for
from tests.helpers.browser import browser as client
from tests.helpers.browser import secret_of
from tests.helpers.tiny import refused

TOKEN = "a token of many letters"
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"


@pytest.fixture
def runs(tmp_path):
    """A run whose every text is hostile, and a secret beside the runs."""
    run = tmp_path / "runs" / "one"
    sample = run / "samples" / "step_00000010"
    sample.mkdir(parents=True)
    (run / "config.yaml").write_text(
        f"experiment_name: one\ntrain:\n  max_steps: 20\n  sample_prompts:\n  - {HOSTILE!r}\n",
    )
    (run / "metrics.jsonl").write_text('{"step": 10, "loss_ema_100": 0.5}\n')
    (sample / "grid.png").write_bytes(b"\x89PNG")
    (sample / "page.html").write_text(HOSTILE)
    (tmp_path / "runs" / HOSTILE.replace("/", "")).mkdir()
    (tmp_path / "runs" / HOSTILE.replace("/", "") / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "secret.png").write_bytes(b"secret")
    return tmp_path / "runs"


def signed_in(runs):
    browser = client(runs, TOKEN)
    browser.post("/sign-in", data={"token": TOKEN})
    return browser


# ── the token ──
def test_an_address_of_others_needs_a_token_of_some_length():
    check_token("", "127.0.0.1")
    check_token("", "::1")
    check_token(TOKEN, "0.0.0.0")
    for token, host in (("", "0.0.0.0"), ("", "192.0.2.1"), ("short", "127.0.0.1")):
        with pytest.raises(ValueError, match="MMDIT_UI_TOKEN"):
            check_token(token, host)


@pytest.mark.parametrize(
    "option, named",
    [
        ("--port=99999", "cannot listen on 127.0.0.1, port 99999: .* choose another with --port"),
        ("--runs=a.yaml", "a.yaml is no folder; name one with --runs"),
        ("--allow=ring", "ring is no folder"),
    ],
)
def test_a_server_that_cannot_start_says_why(tmp_path, monkeypatch, capsys, option, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").touch()
    (tmp_path / "ring").symlink_to("ring")
    assert re.search(named, refused(capsys, ui.main, [option]))


@pytest.mark.parametrize("path", ["/", "/run/one", "/compare?run=one", "/nothing"])
def test_without_the_token_every_page_leads_to_the_sign_in(runs, path):
    answer = client(runs, TOKEN).get(path)
    assert answer.status_code == 303 and answer.headers["location"] == "/sign-in"
    assert client(runs, TOKEN).get(f"/?token={TOKEN}").status_code == 303


@pytest.mark.parametrize(
    "path",
    ["/api/curves?run=one", "/api/runs?run=one", "/files/one/samples/step_00000010/grid.png"],
)
def test_without_the_token_no_data_is_sent(runs, path):
    assert client(runs, TOKEN).get(path).status_code == 401
    assert signed_in(runs).get(path).status_code == 200


@pytest.mark.parametrize("wrong", ["", "a", TOKEN + "x", TOKEN[:-1], "é" * 20])
def test_a_wrong_token_sets_no_cookie(runs, wrong, monkeypatch):
    monkeypatch.setattr("mmdit.ui.access.REFUSAL_SECONDS", 0)
    browser = client(runs, TOKEN)
    answer = browser.post("/sign-in", data={"token": wrong})
    assert answer.status_code == 401 and "set-cookie" not in answer.headers
    assert (
        browser.get("/", headers={"authorization": f"Bearer {wrong}x".encode()}).status_code == 303
    )


def test_the_right_token_gives_a_cookie_that_holds_it_from_nobody(runs):
    browser = client(runs, TOKEN)
    answer = browser.post("/sign-in", data={"token": TOKEN})
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie and "samesite=strict" in cookie.lower()
    assert TOKEN not in cookie and TOKEN not in answer.headers["location"]
    assert browser.get("/").status_code == 200
    assert TOKEN not in browser.get("/").text
    stranger = client(runs, TOKEN)
    stranger.cookies.set(COOKIE, "0" * 64)
    assert stranger.get("/").status_code == 303
    headers = {"authorization": f"Bearer {TOKEN}"}
    assert client(runs, TOKEN).get("/", headers=headers).status_code == 200


def test_signing_out_forgets_the_cookie(runs):
    browser = signed_in(runs)
    secret = secret_of(browser.get("/").text)
    browser.post("/sign-out", data={"form_secret": secret})
    assert browser.get("/").status_code == 303


# ── other sites ──
@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "192.0.2.7", "", "[x"])
def test_a_name_that_was_pointed_at_this_machine_gets_nothing(runs, host):
    answer = client(runs).get("/", headers={"host": host})
    assert answer.status_code == 421 and "one" not in answer.text


@pytest.mark.parametrize("host", ["127.0.0.1:7861", "localhost:1", "[::1]:7861", "127.0.0.1"])
def test_names_of_loopback_are_known(runs, host):
    assert client(runs).get("/", headers={"host": host}).status_code == 200


def test_with_a_token_digits_and_given_names_are_known():
    guard = guard_for(TOKEN, ["Node7"])
    assert guard.knows_host("192.0.2.7:7861") and guard.knows_host("node7:7861")
    assert not guard.knows_host("evil.example")
    assert not Guard().knows_host("192.0.2.7")


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:9999"},
        {"origin": "http://127.0.0.1:7861.evil.example"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
@pytest.mark.parametrize("path", ["/sign-in", "/sign-out"])
def test_a_form_of_another_site_is_refused(runs, headers, path):
    browser = signed_in(runs)
    secret = secret_of(browser.get("/").text)
    fields = {"token": TOKEN, "form_secret": secret}
    assert browser.post(path, data=fields, headers=headers).status_code == 403
    assert browser.post(path, data=fields, headers={"origin": "http://127.0.0.1:7861"}).is_redirect


def test_a_form_needs_the_secret_of_this_server(runs):
    browser = signed_in(runs)
    assert browser.post("/sign-out", data={"other": "x"}).status_code == 403
    assert browser.post("/sign-out", data={"form_secret": "wrong"}).status_code == 403
    assert browser.post("/sign-out", json={"form_secret": "x"}).status_code == 415
    assert browser.put("/sign-out", data={"form_secret": "x"}).status_code == 405


def test_a_picture_is_not_embedded_by_another_site(runs):
    path = "/files/one/samples/step_00000010/grid.png"
    headers = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}
    assert client(runs).get(path, headers=headers).status_code == 403
    headers = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert client(runs).get("/", headers=headers | {"sec-fetch-dest": "iframe"}).status_code == 403
    assert client(runs).get("/", headers=headers | {"sec-fetch-dest": "document"}).is_success


def test_a_form_is_bounded(runs):
    browser = client(runs, TOKEN)
    assert browser.post("/sign-in", data={"token": "x" * (1 << 21)}).status_code == 413
    assert browser.post("/sign-in", data={f"k{i}": "" for i in range(6000)}).status_code == 400


# ── hostile text and paths ──
@pytest.mark.parametrize("path", ["/", "/run/one", "/compare?run=one"])
def test_hostile_text_shows_as_text(runs, path):
    answer = client(runs).get(path)
    assert "<script>alert" not in answer.text and "<img src=x" not in answer.text
    assert "alert(1)" in answer.text or path.startswith("/compare")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-store"


def test_no_page_needs_what_the_policy_forbids(runs):
    """Scripts and styles lie in files of their own: nothing is inline, nothing is elsewhere."""
    for path in ("/", "/run/one", "/compare?run=one"):
        text = client(runs).get(path).text
        assert not re.search(
            r"<script(?! src=\"/static/)|<style|\sstyle=|\son\w+=\"|https?://", text
        )


@pytest.mark.parametrize(
    "path",
    [
        "/run/one%2f..",
        "/run/%2e%2e/runs/one",
        "/run/one%2f..%2f..",
        "/run//etc",
        "/run/%00",
        "/files/one/samples/../../../secret.png",
        "/files/one/samples/%2e%2e/%2e%2e/%2e%2e/secret.png",
        "/files/%2e%2e/samples/secret.png",
        "/files/one/samples/step_00000010/page.html",
        "/files/one/samples//etc/passwd",
        "/files/one/samples/%00",
        "/static/%2e%2e/server.py",
        "/api/curves?run=..",
        "/api/curves",
    ],
)
def test_nothing_outside_of_the_runs_is_read(runs, path):
    answer = client(runs).get(path)
    assert answer.status_code == 404
    assert "secret" not in answer.text and "import" not in answer.text


def test_a_link_out_of_the_runs_is_not_followed(runs):
    (runs / "one/samples/step_00000010/link.png").symlink_to(runs.parent / "secret.png")
    (runs / "away").symlink_to(runs.parent)
    (runs.parent / "metrics.jsonl").write_text('{"step": 1}\n')
    assert client(runs).get("/files/one/samples/step_00000010/link.png").status_code == 404
    (runs / "ring").symlink_to("ring")
    assert client(runs).get(f"/run/{'a' * 5000}").status_code == 404
    assert (
        client(runs).get("/run/away").status_code
        == client(runs).get("/run/ring").status_code
        == 404
    )
    assert "away" not in client(runs).get("/").text
