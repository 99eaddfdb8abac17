"""The page of `miniclip serve`, used in a real browser; what it asks for, and what it answers."""

import base64
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import skimage.data
from PIL import Image

from miniclip import ZeroShotClassifier, load
from miniclip.cli import main
from miniclip.lens.heat import head_map, overlay, seen, text_maps
from miniclip.page.serve import FIRST_PORT, MAX_BYTES, listen, read_picture, write_picture

# Writes down what a process does to the network and to files, and then runs the command line.
AUDITED = """
import os, sys
log = os.open(sys.argv.pop(1), os.O_WRONLY | os.O_APPEND)
def note(event, args):
    writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
    made = event in ("os.mkdir", "os.rename", "os.remove", "subprocess.Popen", "os.exec")
    if writes or made or event in ("socket.connect", "socket.getaddrinfo", "socket.bind"):
        os.write(log, f"{event} {args}\\n".encode())
sys.addaudithook(note)
"""
SERVE = AUDITED + "from miniclip.cli import main\nsys.exit(main())"


class Server:
    """`miniclip serve` in a process of its own."""

    def __init__(self, log, *options):
        self.log = log
        log.touch()
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(log), "serve", "--port", "0", "--json", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"},
        )
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(self.end()[1])
        self.url = json.loads(line)["url"]
        log.write_text("")  # until here torch was imported, which tries out the temporary folder

    def post(self, path, question, **headers):
        """(status, the answer)"""
        data = question if isinstance(question, bytes) else json.dumps(question).encode()
        request = urllib.request.Request(f"{self.url}/{path}", data, headers)
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def end(self):
        """By Ctrl-C: (exit status, stderr)"""
        self.process.send_signal(signal.SIGINT)
        _, err = self.process.communicate(timeout=60)
        return self.process.returncode, err


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("serve") / "log", "--model", "cifar10", "shapes")
    yield server
    if server.process.poll() is None:
        server.end()


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = os.environ.get("MINICLIP_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if not path:
        pytest.skip("no Chromium here: install one, or name it in MINICLIP_CHROMIUM")
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=sandbox)
        yield browser
        browser.close()


@pytest.fixture
def page(server, chromium):
    page = chromium.new_page(viewport={"width": 1280, "height": 900})
    page.requests, page.complaints = [], []
    page.on("request", lambda request: page.requests.append(request.url))
    page.on("websocket", lambda ws: page.requests.append(ws.url))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on(
        "console",
        lambda m: page.complaints.append(m.text) if m.type in ("error", "warning") else None,
    )
    page.goto(server.url)
    settle(page)
    yield page
    page.close()


def settle(page):
    """Wait until the newest questions have been answered."""
    page.wait_for_load_state("networkidle")
    page.wait_for_selector("#heat[src][aria-busy=false]", timeout=20_000)


def bars(page):
    """(label, percent) of each, in order."""
    return [tuple(text.split("\n")) for text in page.locator("#bars button").all_inner_texts()]


def shown(page, selector):
    """The pixels of an image on the page."""
    url = page.locator(selector).get_attribute("src")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


@pytest.fixture(scope="module")
def coffee(tmp_path_factory):
    path = tmp_path_factory.mktemp("upload") / "coffee.jpg"
    picture = Image.fromarray(skimage.data.coffee())
    exif = Image.Exif()
    exif[274] = 6  # lies on its side
    picture.save(path, exif=exif)
    return path


def test_it_opens_with_an_example_and_asks_nobody_else(page, server):
    labels, shares = zip(*bars(page))
    assert labels[0] == "cat" and len(labels) == 10
    assert sum(float(share.split()[0]) for share in shares) == pytest.approx(100, abs=0.5)
    assert shown(page, "#heat").std() > 10
    assert page.complaints == []
    asked = [url for url in page.requests if not url.startswith("data:")]
    assert len(asked) == 4 and all(url.startswith(server.url + "/") for url in asked)


def test_the_browser_may_ask_nobody_else(page):
    """And if the page tried, the test above would see it."""
    failed = page.evaluate(
        "fetch('http://127.0.0.1:9/other').then(() => 'answered', () => 'refused')"
    )
    assert failed == "refused" and "Content Security Policy" in page.complaints[0]
    page.complaints.clear()
    page.evaluate("document.body.append(Object.assign(new Image(), {src: '/other.png'}))")
    page.wait_for_timeout(100)
    assert page.complaints


def test_upload_labels_templates_bars_and_heat(page, coffee):
    page.set_input_files("#file", coffee)
    page.fill("#labels", "a cup\n\n  a ship \na <b>frog</b>")
    page.fill("#templates", "a photo of {}.\n{}")
    page.wait_for_selector("text=a <b>frog</b>")
    settle(page)
    loaded = load("cifar10")
    labels = ["a cup", "a ship", "a <b>frog</b>"]
    templates = ["a photo of {}.", "{}"]
    classifier = ZeroShotClassifier(loaded.model, loaded.tokenizer, labels, templates)
    (scores,) = classifier.rank(loaded.transform([coffee]))
    assert bars(page) == [(s.label, f"{s.probability * 100:.1f} %") for s in scores]
    best = f"a photo of {scores[0].label}."
    assert page.inner_text("#text") == f"“{best}”"
    heat = text_maps(coffee, [best], loaded)[0]
    expected = overlay(seen(coffee, loaded.transform, 14), heat)
    assert np.array_equal(shown(page, "#heat"), np.asarray(expected))
    assert np.array_equal(shown(page, "#seen"), np.asarray(seen(coffee, loaded.transform, 14)))
    assert page.complaints == []


def test_one_head_of_one_layer(page):
    assert not page.is_visible("#layer")
    page.select_option("#method", "head")
    page.select_option("#layer", "2")
    page.select_option("#head", "1")
    page.wait_for_timeout(50)
    settle(page)
    loaded, picture = load("cifar10"), Image.fromarray(skimage.data.chelsea())
    heat = head_map(loaded.model, loaded.transform([picture]), layer=2, head=1)[0]
    expected = overlay(seen(picture, loaded.transform, 14), heat)
    assert np.array_equal(shown(page, "#heat"), np.asarray(expected))
    assert page.inner_text("#text") == "the same for every text"
    assert page.complaints == []


def test_by_keyboard_alone(page):
    """The second example, which brings its model, and of its labels the second."""

    def tab_to(selector):
        for _ in range(40):
            if page.evaluate(f"document.activeElement.matches({json.dumps(selector)})"):
                return
            page.keyboard.press("Tab")
        raise AssertionError(f"Tab never comes to {selector}")

    tab_to("#examples button:last-child")
    page.keyboard.press("Enter")
    page.wait_for_selector("#bars button:has-text('circle')")
    settle(page)
    assert page.input_value("#model") == "shapes" and len(bars(page)) == 6
    first = page.inner_text("#text")
    tab_to("#bars li:nth-child(2) button")
    page.keyboard.press("Enter")
    settle(page)
    assert page.get_attribute("#bars li:nth-child(2) button", "aria-pressed") == "true"
    assert page.inner_text("#text") == f"“{bars(page)[1][0]}”" != first
    assert page.complaints == []


def test_a_narrow_screen_needs_no_sideways_scrolling(page):
    page.set_viewport_size({"width": 400, "height": 800})
    page.fill("#labels", "a label of " + 30 * "c")
    page.wait_for_selector("#bars button:has-text('cccc')")
    settle(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400


def test_what_is_no_picture_is_refused_in_words(page, tmp_path, coffee):
    uploads = {name: tmp_path / f"{name}.jpg" for name in ("text", "cut", "bomb", "large", "eps")}
    uploads["text"].write_text("no picture")
    uploads["cut"].write_bytes(coffee.read_bytes()[:2000])
    Image.new("1", (20_000, 20_000)).save(uploads["bomb"], "PNG")
    uploads["large"].touch()
    os.truncate(uploads["large"], MAX_BYTES + 1)
    Image.new("RGB", (8, 8)).save(uploads["eps"], "EPS")  # Pillow would start Ghostscript
    messages = {
        "text": "not an image",
        "cut": "cannot be read",
        "bomb": "decompression bomb",
        "large": "larger than 20 MB",
        "eps": "not an image",
    }
    for kind, message in messages.items():
        page.set_input_files("#file", uploads[kind])
        page.wait_for_selector(f"#error:visible:has-text('{message}')")
        assert bars(page)[0][0] == "cat"  # of the picture that is still there
    page.fill("#labels", "cat\ndog\nzebra")  # it goes on with the picture that it had
    page.wait_for_selector("#bars button:has-text('zebra')")
    settle(page)
    assert bars(page)[0][0] == "cat" and not page.is_visible("#error")


def test_words_that_are_refused(page):
    for box, text, message in (
        ("#labels", "word " * 500, "tokens"),
        ("#labels", " ", "label is empty"),
        ("#templates", "a photo", "{}"),
    ):
        before = page.input_value(box)
        page.fill(box, text)
        page.wait_for_selector(f"#error:visible:has-text({json.dumps(message)})")
        assert bars(page) == [] and page.get_attribute("#heat", "src") is None
        assert page.inner_text("#text") == page.inner_text("#warmest") == ""
        assert page.evaluate("document.documentElement.scrollWidth") <= 1280
        page.fill(box, before)
        page.wait_for_selector("#error", state="hidden")
        settle(page)
        assert bars(page)[0][0] == "cat"


@pytest.mark.parametrize(
    "path, question, message",
    [
        ("classify", b"\xff", "utf-8"),
        ("classify", b"[1, 2]", "not a question"),
        ("classify", {"model": "other"}, "not a question"),
        ("classify", b"x" * (MAX_BYTES * 3 // 2), "larger than 20 MB"),
        ("explain", {"method": "gradcam", "label": "a"}, "gradcam"),
        ("explain", {"method": "head", "label": "a", "layer": 99, "head": 0}, "no head 0"),
        ("search", {"text": "a cat"}, "--index"),
    ],
)
def test_what_the_page_would_never_ask(server, path, question, message):
    if path == "explain":
        picture = write_picture(Image.new("RGB", (9, 9)))
        question |= {"model": "shapes", "picture": picture, "templates": ["{}"]}
    status, answer = server.post(path, question)
    assert status == 400 and message in json.loads(answer)["error"]


def test_only_this_machine_is_answered(server):
    """The address that other machines would use."""
    port = int(server.url.rpartition(":")[2])
    with socket.socket() as other, pytest.raises(OSError):
        other.connect(("127.0.0.2", port))
    with socket.create_connection(("127.0.0.1", port)):
        pass


def test_another_site_cannot_pass_itself_off_as_this_one(server):
    status, answer = server.post("about", {}, Host="evil.example")
    assert status == 400 and "examples" not in answer


def test_pictures_come_back_as_they_went(coffee):
    upright = read_picture("data:;base64," + base64.b64encode(coffee.read_bytes()).decode())
    assert upright.size == (400, 600)
    assert np.array_equal(np.asarray(read_picture(write_picture(upright))), np.asarray(upright))


def test_search(tmp_path, chromium):
    for name in ("chelsea", "rocket", "coffee"):
        Image.fromarray(getattr(skimage.data, name)()).save(tmp_path / f"{name}.png")
    index = str(tmp_path / "index.safetensors")
    assert main(["embed", str(tmp_path), "--out", index, "--model", "cifar10"]) == 0
    server = Server(tmp_path / "log", "--model", "cifar10", "--index", index)
    page = chromium.new_page()
    page.goto(server.url)
    page.fill("#query", "a photo of a cat.")
    page.press("#query", "Enter")
    page.wait_for_selector("#found img")
    assert page.locator("#found li").count() == 3
    assert "chelsea.png" in page.inner_text("#found li:first-child")
    page.close()
    assert server.end()[1] == ""


def test_nothing_is_written_and_nobody_called(server, tmp_path):
    """The last test of the page: what its server did in all the others, by its own account."""
    done = server.log.read_text().splitlines()
    # torch's compiler, where something imports it, makes itself an empty temporary folder.
    known = ("/dev/null", "torchinductor_")
    assert [line for line in done if not any(name in line for name in known)] == []
    log = tmp_path / "log"
    log.touch()
    guilty = "import socket; open(sys.argv[1], 'w'); socket.socket().connect(('127.0.0.1', 9))"
    subprocess.run(
        [sys.executable, "-c", AUDITED + guilty, str(log), str(tmp_path / "file")],
        stderr=subprocess.DEVNULL,
    )
    assert [line.split()[0] for line in log.read_text().splitlines()] == ["open", "socket.connect"]


def test_control_c_ends_it_with_what_was_asked_before(server):
    picture = write_picture(Image.new("RGB", (9, 9)))
    slow = {"model": "shapes", "picture": picture, "templates": ["{}"], "label": "a star"}
    with ThreadPoolExecutor() as pool:
        answers = [
            pool.submit(server.post, "explain", slow | {"method": "occlusion"}) for _ in "ab"
        ]
        time.sleep(0.2)
        status, err = server.end()
        assert status in (0, 130) and err == ""
        assert [answer.result()[0] for answer in answers] == [200, 200]


def test_a_port_that_is_taken(capsys):
    with listen(None) as first, listen(None) as second:
        port = first.getsockname()[1]
        assert first.getsockname()[0] == "127.0.0.1"
        assert FIRST_PORT <= port < second.getsockname()[1]
        assert main(["serve", "--model", "nonsense", "--port", str(port)]) == 2
        assert main(["serve", "--model", "nonsense", "--port", "70000"]) == 2
    taken, impossible = capsys.readouterr().err.splitlines()
    assert taken.startswith(f"miniclip: error: port {port} of 127.0.0.1") and "Without" in taken
    assert impossible.startswith("miniclip: error: port is 70000")


def test_without_its_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "miniclip.serve")
    assert main(["serve", "--model", "shapes"]) == 2
    assert "miniclip[demo]" in capsys.readouterr().err
