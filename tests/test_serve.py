"""Test the server of `miniclip serve`, and its page in a real browser.

The expected scores and heat maps are computed from transformers' attention patterns, gradients and
embeddings. NumPy draws the expected heat maps.
"""

import asyncio
import base64
import http.client
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import skimage.data
import torch
import uvicorn
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer

from miniclip.commands.main import main
from miniclip.errors import ImageError
from miniclip.files.hub import EMBEDDED
from miniclip.page import serve
from miniclip.page.serve import create_app, listen, open_index, read_picture, write_picture

# A script that logs what its process does to files and to the network.
AUDITED = """
import os, sys, tempfile
tempfile.gettempdir()  # tries to write there, and torch asks for it sooner or later
log = os.open(sys.argv.pop(1), os.O_WRONLY | os.O_APPEND)
def note(event, args):
    writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
    made = event in ("os.mkdir", "os.rename", "os.remove", "subprocess.Popen", "os.exec")
    if writes or made or event in ("socket.connect", "socket.getaddrinfo", "socket.bind"):
        os.write(log, f"{event} {args}\\n".encode())
sys.addaudithook(note)
"""
SERVE = AUDITED + "from miniclip.commands.main import main\nsys.exit(main())"


class Server:
    """`miniclip serve` in a separate process."""

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
        self.port = json.loads(line or "{}").get("url", "").rpartition(":")[2]
        if not line:
            raise RuntimeError(self.end()[1])
        self.url = json.loads(line)["url"]
        log.write_text("")  # clear the log, because the start itself binds a socket

    def post(self, path, question, **headers):
        """Ask a question. Returns (status, answer)."""
        data = question if isinstance(question, bytes) else json.dumps(question).encode()
        headers = {"Content-Type": "application/json"} | headers
        request = urllib.request.Request(f"{self.url}/{path}", data, headers)
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def end(self):
        """End the server by Ctrl-C. Returns (exit status, stderr)."""
        self.process.send_signal(signal.SIGINT)
        _, err = self.process.communicate(timeout=60)
        return self.process.returncode, err


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """An index of three images."""
    folder = tmp_path_factory.mktemp("photographs")
    for name in ("chelsea", "rocket", "coffee"):
        Image.fromarray(getattr(skimage.data, name)()).save(folder / f"{name}.png")
    out = str(folder / "index.safetensors")
    assert main(["embed", str(folder), "--out", out, "--model", "everyday"]) == 0
    return out


@pytest.fixture(scope="module")
def servers():
    """A list that holds the running server. After the last test, the server is ended."""
    running = []
    yield running
    for server in running:
        server.end()


@pytest.fixture
def server(servers, index, tmp_path_factory):
    if not servers:
        log = tmp_path_factory.mktemp("serve") / "log"
        servers.append(Server(log, "--model", "everyday", "shapes", "--index", index))
    return servers[0]


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
    page.set_default_timeout(300_000)  # the machine may be busy
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
    """Wait until the server has answered the newest questions."""
    page.wait_for_load_state("networkidle")
    page.wait_for_selector("#heat[src][aria-busy=false]")


def bars(page):
    """Return (label, percent) of each bar, in the order of the page."""
    return [tuple(text.split("\n")) for text in page.locator("#bars button").all_inner_texts()]


def shown(page, selector):
    """Return an image on the page as a data URL, which contains the image itself."""
    return page.locator(selector).get_attribute("src")


# ------------------------------------------------------------------------------------------------
# The expected values


class Theirs:
    """A checkpoint that runs in transformers."""

    def __init__(self, name):
        how = {"dtype": torch.float32, "attn_implementation": "eager"}
        self.model = CLIPModel.from_pretrained(EMBEDDED / name, **how).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED / name)
        self.settings = json.loads((EMBEDDED / name / "preprocessor_config.json").read_text())

    def pixels(self, picture):
        """Compute the pixels (1, 3, S, S) with Pillow and the checkpoint's mean and std."""
        mean, std = (self.settings[f"image_{key}"] for key in ("mean", "std"))
        x = np.asarray(crop(picture, self.model.config.vision_config.image_size)) / 255
        return torch.tensor((x - mean) / std, dtype=torch.float32).permute(2, 0, 1)[None]

    def output(self, picture, texts):
        ids = self.tokenizer(texts, padding=True, return_tensors="pt").input_ids
        return self.model(input_ids=ids, pixel_values=self.pixels(picture), output_attentions=True)

    @torch.no_grad()
    def scores(self, picture, labels, templates):
        """{label: (logit, probability)}"""
        prompts = [t.replace("{}", label) for label in labels for t in templates]
        output = self.output(picture, prompts)
        means = output.text_embeds.view(len(labels), len(templates), -1).mean(1)
        cosines = torch.cosine_similarity(output.image_embeds, means)
        logits = cosines * self.model.logit_scale.exp()
        rows = zip(logits.tolist(), logits.softmax(0).tolist(), strict=True)
        return dict(zip(labels, rows, strict=True))

    def relevance(self, picture, text):
        """Compute the patches' relevance (Chefer et al. 2021, arXiv 2103.15679, eq. 5 and 6)."""
        output = self.output(picture, [text])
        patterns = output.vision_model_output.attentions
        slopes = torch.autograd.grad(output.logits_per_image[0, 0], patterns)
        total = torch.eye(patterns[0].shape[-1])
        for pattern, slope in zip(patterns, slopes, strict=True):
            total = total + (slope * pattern).clamp(min=0).mean(1)[0] @ total
        return self.patches(total[0])

    @torch.no_grad()
    def attention(self, picture, layer, head=slice(None)):
        """Return the class token's attention to the patches, averaged over heads."""
        pattern = self.output(picture, ["a"]).vision_model_output.attentions[layer][0]
        return self.patches(pattern[head].reshape(-1, *pattern.shape[1:]).mean(0)[0])

    def patches(self, tokens):
        side = round(len(tokens[1:]) ** 0.5)
        return tokens[1:].view(side, side)


def crop(picture, size):
    """Resize the short side to `size` pixels, and crop the middle square."""
    long = int(size * max(picture.size) / min(picture.size))
    wide = picture.width > picture.height
    picture = picture.resize((long, size) if wide else (size, long), Image.Resampling.BICUBIC)
    margin = (long - size) // 2
    left, top = (margin, 0) if wide else (0, margin)
    return picture.crop((left, top, left + size, top + size))


def drawn(picture, heat):
    """Draw the positive heat in three colours over the grey image, at 448 x 448 pixels."""
    picture = crop(picture, 448)
    levels = (heat.clamp(min=0) / heat.max() * 255).to(torch.uint8).numpy()
    smooth = np.asarray(Image.fromarray(levels).resize((448, 448), Image.Resampling.BILINEAR))
    colours = [[0x00, 0x00, 0x04], [0xBC, 0x37, 0x54], [0xFC, 0xFF, 0xA4]]
    shown = np.stack([np.interp(smooth, [0, 127, 255], c) for c in zip(*colours)], axis=-1)
    opaque = ((90 + smooth // 2) / 255)[:, :, None]
    return opaque * shown + (1 - opaque) * np.asarray(picture.convert("L"))[:, :, None]


def pixels_in(url):
    """Return the pixels of the image in a data URL."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


def assert_drawn(url, picture, heat):
    found, expected = pixels_in(url), drawn(picture, heat)
    assert found.shape == (448, 448, 3)
    # The heat is rounded to levels, so one different bit may change the level of a patch.
    assert np.abs(found - expected).max() <= 4 and np.abs(found - expected).mean() < 1


@pytest.fixture(scope="module")
def theirs():
    return {name: Theirs(name) for name in ("everyday", "shapes")}


@pytest.fixture(scope="module")
def example():
    return Image.fromarray(skimage.data.coffee())


@pytest.fixture(scope="module")
def coffee(tmp_path_factory):
    path = tmp_path_factory.mktemp("upload") / "coffee.jpg"
    picture = Image.fromarray(skimage.data.coffee())
    exif = Image.Exif()
    exif[274] = 6  # the camera was turned by 90 degrees
    picture.save(path, exif=exif)
    return path


@pytest.mark.slow
def test_the_page_opens_with_an_example_and_sends_requests_only_to_its_server(page, server):
    labels, shares = zip(*bars(page))
    assert labels[0] == "cup of coffee" and len(labels) == 8
    assert sum(float(share.split()[0]) for share in shares) == pytest.approx(100, abs=0.5)
    assert pixels_in(shown(page, "#heat")).std() > 10
    assert page.complaints == []
    asked = [url for url in page.requests if not url.startswith("data:")]
    assert len(asked) == 4 and all(url.startswith(server.url + "/") for url in asked)


@pytest.mark.slow
def test_the_browser_blocks_requests_that_the_content_security_policy_forbids(page):
    """A blocked request appears in `page.complaints`, which must be empty in the test above."""
    failed = page.evaluate(
        "fetch('http://127.0.0.1:9/other').then(() => 'answered', () => 'refused')"
    )
    assert failed == "refused" and "Content Security Policy" in page.complaints[0]
    page.complaints.clear()
    with page.expect_console_message(lambda message: "other.png" in message.text):
        page.evaluate("document.body.append(Object.assign(new Image(), {src: '/other.png'}))")


@pytest.mark.slow
def test_an_uploaded_image_gets_the_scores_and_heat_map_of_transformers(page, coffee, theirs):
    page.set_input_files("#file", coffee)
    page.fill("#labels", "a cup\n\n  a ship \na <b>frog</b>")
    page.fill("#templates", "a photo of {}.\n{}")
    page.wait_for_selector("text=a <b>frog</b>")
    settle(page)
    labels = ["a cup", "a ship", "a <b>frog</b>"]
    upright = Image.fromarray(np.rot90(np.asarray(Image.open(coffee)), -1))
    scores = theirs["everyday"].scores(upright, labels, ["a photo of {}.", "{}"])
    best, *_ = ranking = sorted(labels, key=lambda label: -scores[label][0])
    assert [label for label, _ in bars(page)] == ranking
    for label, share in bars(page):
        assert share.endswith(" %")
        assert float(share[:-2]) == pytest.approx(100 * scores[label][1], abs=0.051)
    titles = page.locator("#bars button").evaluate_all("all => all.map(one => one.title)")
    assert titles == [f"logit {scores[label][0]:.2f}" for label in ranking]
    widths = page.locator("#bars i").evaluate_all("all => all.map(one => one.style.width)")
    assert [float(w[:-1]) for w in widths] == [float(share[:-2]) for _, share in bars(page)]
    text = f"a photo of {best}."
    assert page.inner_text("#text") == f"“{text}”"
    heat = theirs["everyday"].relevance(upright, text)
    assert_drawn(shown(page, "#heat"), upright, heat)
    assert page.inner_text("#warmest").startswith(f"{heat.max():.2g}")
    expected = np.asarray(crop(upright, 448))
    assert np.array_equal(pixels_in(shown(page, "#seen")), expected)
    assert page.complaints == []


@pytest.mark.slow
def test_the_page_shows_the_attention_of_the_chosen_layer_and_head(page, theirs, example):
    assert not page.is_visible("#layer")
    page.select_option("#method", "head")
    page.select_option("#layer", "2")
    page.select_option("#head", "1")
    page.wait_for_selector("#text:has-text('the same for every text')")
    settle(page)
    assert_drawn(shown(page, "#heat"), example, theirs["everyday"].attention(example, 2, 1))
    assert page.complaints == []


@pytest.mark.slow
def test_the_page_can_be_used_with_only_the_keyboard(page):
    """Keys choose the second example and then the second label. Each example has its own model."""

    def tab_to(selector):
        for _ in range(40):
            if page.evaluate(f"document.activeElement.matches({json.dumps(selector)})"):
                return
            page.keyboard.press("Tab")
        raise AssertionError(f"Tab never reaches {selector}")

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


@pytest.mark.slow
def test_the_page_needs_no_sideways_scrolling_on_a_phone(page):
    page.set_viewport_size({"width": 320, "height": 640})
    search(page, "a cat")
    page.fill("#labels", "a label of " + 30 * "c")
    page.wait_for_selector("#bars button:has-text('cccc')")
    settle(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 320


@pytest.mark.slow
def test_the_page_says_why_it_refuses_an_upload(page, tmp_path, coffee):
    uploads = {name: tmp_path / f"{name}.jpg" for name in ("text", "cut", "bomb", "large", "eps")}
    uploads["text"].write_text("no picture")
    uploads["cut"].write_bytes(coffee.read_bytes()[:2000])
    Image.new("1", (20_000, 20_000)).save(uploads["bomb"], "PNG")
    uploads["large"].touch()
    os.truncate(uploads["large"], 20_000_001)
    Image.new("RGB", (8, 8)).save(uploads["eps"], "EPS")  # Pillow would run Ghostscript for EPS
    messages = {
        "text": "not an image",
        "cut": "cannot be read",
        "bomb": "more than 50,000,000 pixels: make it smaller",
        "large": "larger than 20 MB",
        "eps": "not an image",
    }
    for kind, message in messages.items():
        page.set_input_files("#file", uploads[kind])
        page.wait_for_selector(f"#error:visible:has-text('{message}')")
        assert bars(page)[0][0] == "cup of coffee"  # the page still shows the old image
    page.fill("#labels", "cup of coffee\ndog\nzebra")
    page.wait_for_selector("#bars button:has-text('zebra')")
    settle(page)
    assert bars(page)[0][0] == "cup of coffee" and not page.is_visible("#error")


@pytest.mark.slow
def test_the_page_says_why_it_refuses_labels_or_templates(page):
    for box, text, message in (
        ("#labels", "word " * 150, "77 fit. Shorten the text. "),
        ("#labels", " ", "write at least one"),
        ("#templates", "a photo", "write {} where the label goes"),
        ("#templates", "", "no sentence is given"),
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
        assert bars(page)[0][0] == "cup of coffee"


@pytest.mark.slow
def test_a_new_image_gets_the_heat_map_of_its_best_label(page, tmp_path):
    assert "cup of coffee" in page.inner_text("#text")
    Image.fromarray(skimage.data.rocket()).save(tmp_path / "rocket.png")
    page.fill("#labels", "cup of coffee\nrocket")
    # The page sends its question to the server after a short wait.
    page.wait_for_selector("#bars li:nth-child(2):last-child")
    settle(page)
    page.set_input_files("#file", tmp_path / "rocket.png")
    page.wait_for_selector("#bars li:first-child:has-text('rocket')")
    settle(page)
    assert page.inner_text("#text") == "“a photo of a rocket.”"
    page.click("#bars li:nth-child(2) button")
    page.fill("#labels", "dog\ncup of coffee\nrocket")  # the clicked label stays selected
    page.wait_for_selector("#bars button:has-text('dog')")
    settle(page)
    assert page.inner_text("#text") == "“a photo of a cup of coffee.”"


@pytest.mark.slow
def test_the_page_turns_a_photo_of_forty_megapixels_upright(page, coffee):
    small = Image.open(coffee)
    picture = small.resize((7744, 5184), Image.Resampling.NEAREST)
    exif = Image.Exif()
    exif[274] = 6
    picture.save(coffee.with_name("forty.jpg"), exif=exif)
    before = shown(page, "#seen")
    page.set_input_files("#file", coffee.with_name("forty.jpg"))
    page.wait_for_function("before => document.querySelector('#seen').src !== before", arg=before)
    settle(page)
    upright = Image.fromarray(np.rot90(np.asarray(small), -1))
    found, expected = pixels_in(shown(page, "#seen")), np.asarray(crop(upright, 448))
    assert not page.is_visible("#error")
    assert np.abs(found.astype(float) - expected).mean() < 10


@pytest.mark.slow
def test_two_browser_tabs_are_independent(page, server, chromium):
    with chromium.new_page() as other:
        other.set_default_timeout(300_000)
        other.goto(server.url)
        settle(other)
        page.select_option("#model", "shapes")
        other.fill("#labels", "dog\nzebra")
        other.wait_for_selector("#bars button:has-text('zebra')")
        settle(other)
        settle(page)
        assert len(bars(other)) == 2 and other.input_value("#model") == "everyday"
        assert len(bars(page)) == 8 and page.input_value("#model") == "shapes"


@pytest.mark.slow
def test_the_page_says_that_the_server_has_ended(page):
    page.route("**/classify", lambda route: route.abort())
    page.fill("#labels", "dog\nzebra")
    page.wait_for_selector("#error:visible:has-text('is miniclip serve still running?')")
    assert bars(page) == []


# Measure the contrast of visible texts, and of the borders of controls, against the background
# (WCAG 2.2, 1.4.3 and 1.4.11).
CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgba = colour => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const linear = c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) =>
    0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const ratio = (a, b) => {
    const [low, high] = [light(rgba(a)), light(rgba(b))].sort((x, y) => x - y);
    return (high + 0.05) / (low + 0.05);
  };
  const behind = element => {
    const colour = element ? getComputedStyle(element).backgroundColor : "Canvas";
    return rgba(colour)[3] ? colour : behind(element.parentElement);
  };
  const found = [];
  for (const element of document.querySelectorAll("body *:not(option)")) {
    if (!element.checkVisibility()) continue;
    const style = getComputedStyle(element), name = element.outerHTML.slice(0, 60);
    const is_control = element.matches("input, textarea, select, button");
    const bar = element.closest("#bars button")?.querySelector("i");
    if (is_control || [...element.childNodes].some(node => node.data?.trim()))
      for (const one of bar ? [element, bar] : [element])
        found.push(["text", name, ratio(style.color, behind(one))]);
    if (element.placeholder) {
      const colour = getComputedStyle(element, "::placeholder").color;
      found.push(["text", name + " placeholder", ratio(colour, behind(element))]);
    }
    if (is_control && rgba(style.borderTopColor)[3])
      found.push(["border", name, ratio(style.borderTopColor, behind(element.parentElement))]);
  }
  return found;
}"""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_controls_have_enough_contrast(page, scheme):
    page.emulate_media(color_scheme=scheme)
    search(page, "a cat")
    page.evaluate("show($('found'), () => { throw new Error('an error'); }, true)")
    found = page.evaluate(CONTRAST)
    assert {kind for kind, *_ in found} == {"text", "border"} and len(found) > 40
    least = {"text": 4.5, "border": 3}
    assert [row for row in found if row[2] < least[row[0]]] == []


# ------------------------------------------------------------------------------------------------
# The server, without a browser


@pytest.mark.slow
def test_the_server_sends_the_models_methods_colours_and_limits_to_the_page(server):
    status, about = server.post("about", {})
    scene, photograph = about.pop("examples")[::-1]
    assert status == 200 and about == {
        "models": {
            "everyday": {"size": 64, "heads": 9 * [3]},
            "shapes": {"size": 64, "heads": [3, 3, 3, 3]},
        },
        "methods": ["attention", "rollout", "relevance", "gradcam", "tokens", "occlusion", "head"],
        "blind": ["attention", "rollout", "head"],  # the maps of these methods ignore the text
        "colours": ["#000004", "#bc3754", "#fcffa4"],
        "searcher": "everyday",
        "max_bytes": 20_000_000,
    }
    assert (photograph["name"], photograph["model"]) == ("coffee", "everyday")
    assert photograph["templates"] == ["a photo of a {}."] and len(photograph["labels"]) == 8
    assert np.array_equal(pixels_in(photograph["picture"]), skimage.data.coffee())
    assert (scene["model"], scene["templates"], len(scene["labels"])) == ("shapes", ["{}"], 6)
    assert ask(create_app({}), "about", {})[1]["searcher"] == ""


@pytest.fixture(scope="module")
def asked(example):
    """A question as the page sends it, with an image, labels and templates."""
    return {
        "model": "everyday",
        "picture": write_picture(example),
        "labels": ["dog", "cat", "ship"],
        "templates": ["a photo of a {}.", "the {}"],
    }


@pytest.mark.slow
def test_the_scores_equal_those_of_transformers(server, theirs, asked, example):
    status, answer = server.post("classify", asked)
    assert status == 200
    expected = theirs["everyday"].scores(example, asked["labels"], asked["templates"])
    labels = [score["label"] for score in answer["scores"]]
    assert labels == sorted(expected, key=lambda label: -expected[label][0])
    for score in answer["scores"]:
        found = (score["logit"], score["probability"])
        assert found == pytest.approx(expected[score["label"]], abs=1e-4)
    assert np.array_equal(pixels_in(answer["seen"]), np.asarray(crop(example, 448)))


@pytest.mark.slow
def test_the_heat_map_uses_the_first_template_and_the_given_method(server, theirs, asked, example):
    text = "a photo of a cat."
    expected = {
        "relevance": theirs["everyday"].relevance(example, text),
        "attention": theirs["everyday"].attention(example, -1),
        "head": theirs["everyday"].attention(example, 2, 1),
    }
    for method, heat in expected.items():
        question = asked | {"label": "cat", "method": method, "layer": 2, "head": 1}
        status, answer = server.post("explain", question)
        assert (status, answer["text"]) == (200, text)
        assert answer["warmest"] == pytest.approx(heat.max().item(), rel=1e-4)
        assert_drawn(answer["heat"], example, heat)


def ask(app, path, *questions, then=(), **headers):
    """Ask an app directly, without a server. Returns (status, answer), or a list of such pairs."""

    async def answer(question):
        messages = [{"type": "http.request", "body": json.dumps(question).encode()}, *then]
        sent = []

        async def receive():
            if not messages:
                await asyncio.Event().wait()  # the client sends nothing more
            return messages.pop(0)

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": f"/{path}", "query_string": b""}
        fields = {"host": "localhost", "content-type": "application/json"} | headers
        fields = [(name.encode(), value.encode()) for name, value in fields.items() if value]
        await app(scope | {"headers": fields}, receive, send)
        return sent[0]["status"], json.loads(sent[1]["body"] or "null")

    async def answers():
        return await asyncio.gather(*map(answer, questions))

    with ThreadPoolExecutor(1) as pool:  # asyncio.run fails where Playwright's event loop runs
        found = pool.submit(lambda: asyncio.run(answers())).result()
    return found[0] if len(found) == 1 else found


@pytest.mark.slow
def test_a_search_returns_the_best_images_with_their_cosine_similarities(index, theirs, tmp_path):
    status, found = ask(create_app({}, *open_index(index, "cpu")), "search", {"text": "a ship"})
    names = {os.path.basename(hit["path"]): hit for hit in found}
    assert status == 200 and names.keys() == {"chelsea.png", "rocket.png", "coffee.png"}
    assert [hit["score"] for hit in found] == sorted((h["score"] for h in found), reverse=True)
    for name, hit in names.items():
        picture = Image.fromarray(getattr(skimage.data, name.removesuffix(".png"))())
        with torch.no_grad():
            output = theirs["everyday"].output(picture, ["a ship"])
        cosine = (output.image_embeds @ output.text_embeds.T).item()
        assert hit["score"] == pytest.approx(cosine, abs=1e-5)
        assert max(pixels_in(hit["picture"]).shape[:2]) == 224


def test_a_search_lists_a_deleted_image_with_a_blank_picture(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    line = ["embed", tmp_path / "red.png", "--out", tmp_path / "i", "--model", "everyday"]
    assert main(list(map(str, line))) == 0
    find, searcher = open_index(str(tmp_path / "i"), "cpu")
    assert searcher == "everyday"
    (tmp_path / "red.png").unlink()
    ((path, _, picture),) = find("a ship")
    assert path.endswith("red.png") and picture.size == (1, 1)


def test_questions_are_answered_one_at_a_time():
    """The hooks of one question must not see the tensors of another question."""
    inside, two = [], threading.Event()

    def find(text):
        inside.append(text)
        if len(inside) == 2:
            two.set()
        two.wait(0.2)
        inside.remove(text)
        return []

    answers = ask(create_app({}, find), "search", {"text": "a"}, {"text": "b"})
    assert answers == [(200, []), (200, [])] and not two.is_set()


@pytest.mark.slow
def test_questions_are_still_answered_one_at_a_time_after_a_timeout(monkeypatch):
    """A timeout cannot stop the thread that computes the answer, so the next question waits."""
    monkeypatch.setattr(serve, "MAX_SECONDS", 0.2)
    inside, most, go = [], [], threading.Event()

    def find(text):
        inside.append(text)
        most.append(len(inside))
        go.wait(0.3)
        inside.remove(text)
        return []

    app = create_app({}, find)
    assert [ask(app, "search", {"text": text})[0] for text in "abc"] == [503, 503, 503]
    go.set()
    monkeypatch.setattr(serve, "MAX_SECONDS", 60)
    assert ask(app, "search", {"text": "d"}) == (200, []) and max(most) == 1


def test_a_question_whose_client_has_disconnected_is_not_answered():
    asked = []
    gone = {"type": "http.disconnect"}
    app = create_app({}, lambda text: asked.append(text) or [])
    ask(app, "search", {"text": "a"}, then=[gone])
    assert asked == []
    ask(app, "search", {"text": "a"})
    assert asked == ["a"]


@pytest.mark.slow
def test_the_content_security_policy_allows_requests_only_to_this_server(server):
    with urllib.request.urlopen(server.url) as answer:
        policy, page = answer.headers["content-security-policy"], answer.read().decode()
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules == {
        "default-src": "'none'",
        "script-src": "'unsafe-inline'",
        "style-src": "'unsafe-inline'",
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    assert page.startswith("<!doctype html>") and "<title>" in page


def encoded(kind):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, kind)
    return "data:;base64," + base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_the_server_reads_the_usual_image_formats(kind):
    assert read_picture(encoded(kind)).size == (8, 8)


@pytest.mark.parametrize("kind", ["EPS", "PPM", "JPEG2000", "PDF"])
def test_the_error_for_an_unsupported_format_lists_the_supported_formats(kind):
    """Pillow would start Ghostscript to read EPS."""
    with pytest.raises(
        ImageError, match="not an image.* page reads JPEG, PNG, WEBP, GIF, BMP, TIFF$"
    ):
        read_picture(encoded(kind))


@pytest.mark.slow
@pytest.mark.parametrize(
    "path, question, message",
    [
        ("classify", b"\xff", "utf-8"),
        ("classify", b"[1, 2]", "unknown request"),
        ("classify", {"model": "other"}, "has no model 'other': reload the page"),
        # a question may have an image of 20 MB in base64, and a million bytes of text
        ("classify", b"x" * (20_000_000 * 4 // 3 + 1_000_000), "Expecting value"),
        ("classify", b"x" * (20_000_000 * 4 // 3 + 1_000_001), "larger than 20 MB"),
        ("explain", {"method": "smoothgrad", "label": "a"}, "smoothgrad"),
        ("explain", {"method": "head", "label": "a", "layer": 4, "head": 0}, "no head 0"),
        ("explain", {"method": "head", "label": "a", "layer": 0, "head": 3}, "no head 3"),
    ],
)
def test_questions_that_the_page_never_asks_are_an_error(server, path, question, message):
    if path == "explain":
        picture = write_picture(Image.new("RGB", (9, 9)))
        question |= {"model": "shapes", "picture": picture, "templates": ["{}"]}
    status, answer = server.post(path, question)
    answer = json.loads(answer)["error"]
    assert status == 400 and message in answer and "\n" not in answer


def test_a_search_without_an_index_is_an_error():
    status, answer = ask(create_app({}), "search", {"text": "a cat"})
    assert status == 400 and "no index to search" in answer["error"]


@pytest.mark.parametrize(
    "headers, status",
    [
        ({}, 200),
        ({"content-type": "application/json; charset=utf-8"}, 200),
        ({"origin": "http://localhost", "sec-fetch-site": "same-origin"}, 200),
        ({"content-type": "text/plain"}, 400),
        ({"content-type": ""}, 400),
        ({"origin": "http://evil.example"}, 400),
        ({"origin": "http://localhost:9999"}, 400),
        ({"origin": "null"}, 400),
        ({"sec-fetch-site": "cross-site"}, 400),
        ({"sec-fetch-site": "same-site"}, 400),
    ],
)
def test_a_request_from_another_site_is_not_answered(headers, status):
    asked = []
    app = create_app({}, lambda text: asked.append(text) or [])
    assert ask(app, "search", {"text": "a"}, **headers)[0] == status
    assert asked == ["a"] * (status == 200)


@pytest.mark.parametrize(
    "question, message",
    [
        ({"text": "a" * 1001}, "text: a text has more than 1,000 characters"),
        ({"text": ["a"] * 201}, "201 text; expected at most 200"),
        ({"text": "a", "labels": ["b", "a" * 1001]}, "labels: a text has more than 1,000"),
    ],
)
def test_a_question_with_too_long_or_too_many_texts_is_an_error(question, message):
    status, answer = ask(create_app({}, lambda text: []), "search", question)
    assert status == 400 and message in answer["error"]


def test_an_image_with_too_many_pixels_is_an_error_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(serve, "open_image", None)
    for side in (7072, 15000):
        picture = io.BytesIO()
        Image.new("1", (side, side)).save(picture, "PNG")
        url = "data:;base64," + base64.b64encode(picture.getvalue()).decode()
        with pytest.raises(ImageError, match="pixels"):
            read_picture(url)


def test_the_server_limits_how_many_questions_wait_and_how_long(monkeypatch):
    go = threading.Event()
    monkeypatch.setattr(serve, "MAX_WAITING", 2)
    monkeypatch.setattr(serve, "MAX_SECONDS", 0.2)
    app = create_app({}, lambda text: go.wait(1) and [])
    answers = ask(app, "search", *[{"text": "a"}] * 4)
    assert [status for status, _ in answers] == [503] * 4
    said = [answer["error"] for _, answer in answers]
    assert said.count("too many requests at once") == 2
    assert said.count("no answer within 0.2 seconds") == 2


def test_the_server_closes_idle_connections_and_does_not_log_lost_connections(monkeypatch, capfd):
    monkeypatch.setattr(serve, "IDLE_SECONDS", 0.1)
    listening = listen(0)
    config = uvicorn.Config(
        create_app({}, lambda text: []),
        log_config=None,  # a log_config would close pytest's streams
        log_level="warning",
        lifespan="off",
        http=serve.Impatient,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    address = listening.getsockname()
    for start in (b"", b"POST /search HTTP/1.1\r\nHost: localhost\r\n"):
        with socket.create_connection(address) as idle:
            idle.sendall(start)
            idle.settimeout(30)
            assert idle.recv(100) == b""  # the server has closed the connection
    with socket.create_connection(address) as gone:
        head = b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        gone.sendall(head + b"Content-Length: 999\r\n\r\n{")
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive() and capfd.readouterr().err == ""


@pytest.mark.slow
def test_the_server_accepts_connections_from_only_this_machine(server):
    """The server listens only on 127.0.0.1, which other machines cannot reach. A connection to
    127.0.0.2 must fail."""
    port = int(server.url.rpartition(":")[2])
    with socket.socket() as other, pytest.raises(OSError):
        other.connect(("127.0.0.2", port))
    with socket.create_connection(("127.0.0.1", port)):
        pass


@pytest.mark.slow
def test_the_server_refuses_a_request_with_another_host_name(server):
    status, answer = server.post("about", {}, Host="evil.example")
    assert status == 400 and "examples" not in answer
    for host in ("127.0.0.1", "localhost"):
        assert server.post("about", {}, Host=host)[0] == 200


def test_a_round_trip_through_a_data_url_does_not_change_an_image(coffee):
    upright = read_picture("data:;base64," + base64.b64encode(coffee.read_bytes()).decode())
    assert upright.size == (400, 600)
    assert np.array_equal(np.asarray(read_picture(write_picture(upright))), np.asarray(upright))


def search(page, text):
    page.fill("#query", text)
    page.press("#query", "Enter")
    page.wait_for_selector("#found img")


@pytest.mark.slow
def test_the_page_shows_the_results_of_a_search(page):
    search(page, "a photo of a cup of coffee.")
    assert "by everyday, the model that made the index" in page.inner_text("main #search")
    assert page.locator("#found li").count() == 3
    assert "coffee.png" in page.inner_text("#found li:first-child")
    assert page.complaints == []


@pytest.mark.slow
def test_the_server_writes_no_file_and_connects_to_no_computer(server, tmp_path):
    """The log lists each write and each connection that the server made in the tests above."""
    done = server.log.read_text().splitlines()
    # torch's compiler makes an empty temporary folder when it is imported.
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


@pytest.mark.slow
def test_control_c_ends_the_server_after_it_has_answered_all_requests(server, servers):
    picture = write_picture(Image.new("RGB", (9, 9)))
    question = {"model": "shapes", "picture": picture, "templates": ["{}"], "label": "a star"}
    body = json.dumps(question | {"method": "attention"}).encode()
    connections = []
    for _ in range(2):
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        connection.putrequest("POST", "/explain")
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", str(len(body)))
        connection.putheader("Expect", "100-continue")
        connection.endheaders()
        # "100 Continue" means that the server now waits for the body of this request.
        assert connection.sock.recv(len(CONTINUE), socket.MSG_WAITALL) == CONTINUE
        connections.append(connection)
    servers.remove(server)
    with ThreadPoolExecutor() as pool:
        ended = pool.submit(server.end)
        for connection in connections:
            connection.send(body)
            with connection.getresponse() as answer:
                assert answer.status == 200 and json.load(answer)["text"] == "a star"
            connection.close()
        status, err = ended.result()
    assert status in (0, 130) and err == ""


CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


def test_a_port_in_use_or_out_of_range_is_an_error(capsys):
    with listen(None) as first, listen(None) as second:
        port = first.getsockname()[1]
        assert first.getsockname()[0] == "127.0.0.1"
        assert 8400 <= port < second.getsockname()[1]
        assert main(["serve", "--model", "nonsense", "--port", str(port)]) == 2
        assert main(["serve", "--model", "nonsense", "--port", "70000"]) == 2
    taken, impossible = capsys.readouterr().err.splitlines()
    assert taken.startswith(f"miniclip: error: port {port} of 127.0.0.1") and "Without" in taken
    assert impossible.startswith("miniclip: error: port is 70000")


def test_serve_without_its_extra_says_which_extra_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "miniclip.page.serve")
    assert main(["serve", "--model", "shapes"]) == 2
    assert "miniclip[demo]" in capsys.readouterr().err
