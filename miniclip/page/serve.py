"""`miniclip serve`: a page to try models on, in a browser on the same machine.

page.html loads no other file, and talks only to this server, in JSON. In the JSON,
uploaded and returned images are `data:` URLs, so no upload is written to disk. The numbers come
from `zeroshot` and `retrieval`, and the maps from `lens`.
"""

import asyncio
import base64
import io
import json
import socket
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from miniclip import lens
from miniclip.checkpoint import Loaded
from miniclip.errors import ImageError
from miniclip.exhibits import LABELS, photographs
from miniclip.files.pictures import no_warnings, open_image
from miniclip.transform import to_rgb
from miniclip.world.localise import questions
from miniclip.zeroshot.classifier import TEMPLATE, ZeroShotClassifier, find_templates

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.routing import Route
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError:
    raise ValueError("the page needs Starlette: pip install 'miniclip[demo]'") from None

HOST = "127.0.0.1"
FIRST_PORT = 8400
MAX_BYTES = 20_000_000  # of an uploaded image
MAX_PIXELS = 50_000_000  # of an uploaded image; decoding needs over 10 bytes of memory per pixel
MAX_LABELS, MAX_CHARACTERS = 200, 1000  # labels in a question, characters in a text
MAX_WAITING = 16  # questions at once: one is being answered, the others wait
MAX_SECONDS = 60  # for receiving a question, and again for answering it
IDLE_SECONDS = 30  # after this time, a connection that asks nothing is closed
TYPES = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow may start programs for other types
SIDE = 448  # the page shows the crop that the model sees with at least this many pixels a side
THUMBNAIL = (224, 224)  # the largest size of a search result, in pixels

# This header tells the browser to load nothing from other servers.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

Find = Callable[[str], list[tuple[str, float, Image.Image]]]


def open_index(path: str, device: str) -> tuple[Find, str]:
    """Return a function that searches an index, and the name of the model that made the index. The
    function takes a text and returns [(path, cosine, image), ...], with the best image first."""
    from miniclip.retrieval.index import Index, embed_query

    index = Index.load(path)
    encoder = index.load_encoder(device=device)

    def find(text: str) -> list[tuple[str, float, Image.Image]]:
        hits = index.search(embed_query(encoder, [text]))
        return [(hit.path, hit.score, open_hit(hit.path)) for hit in hits]

    def open_hit(path: str) -> Image.Image:
        try:
            return to_rgb(index.open(path))
        except ImageError:  # the file has moved or changed: show its name and score anyway
            return Image.new("RGB", (1, 1))

    return find, index.encoder.model


def create_app(
    models: Mapping[str, Loaded], find: Find | None = None, searcher: str = ""
) -> Starlette:
    """Make the server of the page with these `models`. `find` searches an index. `searcher` is the
    name of the model that made the index."""

    def find_model(name: str) -> Loaded:
        if name not in models:  # the page may be older than the server
            raise ValueError(f"this server has no model {name!r}: reload the page")
        return models[name]

    def about(asked: dict[str, Any]) -> dict[str, Any]:
        return {
            "models": {name: describe_model(loaded) for name, loaded in models.items()},
            "methods": [*lens.METHODS, "head"],
            "blind": [*lens.BLIND, "head"],
            "colours": lens.HEAT_COLOURS,
            "examples": examples(),
            "searcher": searcher,
            "max_bytes": MAX_BYTES,
        }

    def classify(asked: dict[str, Any]) -> dict[str, Any]:
        """Return the crop that the model sees, and a score for each label."""
        loaded, picture = find_model(asked["model"]), read_picture(asked["picture"])
        templates = find_templates(asked["templates"])
        classifier = ZeroShotClassifier(*loaded[:2], asked["labels"], templates)
        (scores,) = classifier.rank(loaded.transform([picture]))
        seen = write_picture(enlarged(picture, loaded))
        return {"seen": seen, "scores": [score._asdict() for score in scores]}

    def explain(asked: dict[str, Any]) -> dict[str, Any]:
        """Return a heat map for a label, or for one head if the method is "head"."""
        loaded, picture = find_model(asked["model"]), read_picture(asked["picture"])
        text = find_templates(asked["templates"])[0].replace("{}", asked["label"])
        if asked["method"] == "head":
            pixels = loaded.transform([picture]).to(loaded.model.logit_scale.device)
            heat = (
                lens.head_map(loaded.model, pixels, asked["layer"], asked["head"])[0].float().cpu()
            )
        else:
            heat = lens.text_maps(picture, [text], loaded, asked["method"])[0]
        return {
            "text": text,
            "warmest": heat.max().item(),
            "heat": write_picture(lens.overlay(enlarged(picture, loaded), heat)),
        }

    def search(asked: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the images of the index that fit a text best."""
        if find is None:
            raise ValueError("there is no index to search: start `miniclip serve` with --index")
        return [
            {"path": path, "score": score, "picture": write_picture(ImageOps.contain(p, THUMBNAIL))}
            for path, score, p in find(asked["text"])
        ]

    one_at_a_time = asyncio.Lock()  # so that hooks never see the tensors of another question
    one_thread = ThreadPoolExecutor(1)  # after a timeout, it may still compute the last answer

    waiting: set[asyncio.Task[Response]] = set()

    def route(answer: Callable[[dict[str, Any]], Any]) -> Route:
        def work(body: bytes) -> Response:
            return JSONResponse(answer(check_question(json.loads(body))))

        async def in_turn(request: Request, body: bytes) -> Response:
            async with one_at_a_time:
                if await request.is_disconnected():  # the page no longer waits for this answer
                    return Response()
                return await asyncio.get_running_loop().run_in_executor(one_thread, work, body)

        async def endpoint(request: Request) -> Response:
            try:
                check_origin(request)
                body = await asyncio.wait_for(read_body(request), MAX_SECONDS)
                if len(waiting) >= MAX_WAITING:
                    return JSONResponse({"error": "too many requests at once"}, status_code=503)
                task = asyncio.create_task(in_turn(request, body))
                waiting.add(task)
                task.add_done_callback(waiting.discard)
                try:
                    return await asyncio.wait_for(asyncio.shield(task), MAX_SECONDS)
                finally:
                    task.cancel()  # after a timeout, the task may still be waiting
            except ClientDisconnect:
                return Response()
            except asyncio.TimeoutError:
                message = f"no answer within {MAX_SECONDS} seconds"
                return JSONResponse({"error": message}, status_code=503)
            except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
                known = isinstance(error, (ValueError, RuntimeError))
                message = str(error) if known else "unknown request: reload the page"
                message = message.partition("\n")[0].replace(", or use truncate=True in Python", "")
                return JSONResponse({"error": message}, status_code=400)

        return Route(f"/{answer.__name__}", endpoint, methods=["POST"])

    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    home = Route("/", lambda _: HTMLResponse(page, headers={"content-security-policy": POLICY}))
    return Starlette(
        routes=[home, *map(route, (about, classify, explain, search))],
        # Refuse other host names: another site's name may point to this machine (DNS rebinding).
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])],
    )


def describe_model(loaded: Loaded) -> dict[str, Any]:
    """Return the side of a model's images in pixels, and the number of heads of each layer."""
    heads = loaded.model.config.vision.per_layer("heads")
    return {"size": loaded.transform.crop_size, "heads": heads}


def examples() -> list[dict[str, Any]]:
    """Return a photograph (if the `demo` extra is installed) and a drawn scene. Each comes with the
    name of a model for such images, and with true and false labels."""
    asked = questions(3)
    scene = {
        "name": "a drawn scene",
        "model": "shapes",
        "labels": [question.phrase for question in asked],
        "templates": ["{}"],
        "picture": write_picture(asked[0].picture),
    }
    try:
        name, picture = next(iter(photographs().items()))
    except ValueError:
        return [scene]
    photograph = {
        "name": name,
        "model": "everyday",
        "labels": LABELS,
        "templates": [TEMPLATE],
        "picture": write_picture(picture),
    }
    return [photograph, scene]


def check_origin(request: Request) -> None:
    """Raise ValueError if the request comes from a page of another site.

    The browser writes the page's site into the headers. A browser sends JSON to another site only
    after a preflight request, which this server does not answer.
    """
    origin, headers = f"http://{request.headers.get('host')}", request.headers
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ValueError("expected a request of the type application/json")
    from_here = headers.get("sec-fetch-site", "same-origin") == "same-origin"
    if not from_here or headers.get("origin", origin) != origin:
        raise ValueError("the request comes from another site; expected the page of this server")


def check_question(asked: dict[str, Any]) -> dict[str, Any]:
    """Return the question. Raises ValueError for too many texts, or for a text that is too long."""
    for name, value in asked.items():
        texts = value if isinstance(value, list) else [value]
        if len(texts) > MAX_LABELS:
            raise ValueError(f"{len(texts):,} {name}; expected at most {MAX_LABELS}")
        if name != "picture" and any(len(str(text)) > MAX_CHARACTERS for text in texts):
            raise ValueError(f"{name}: a text has more than {MAX_CHARACTERS:,} characters")
    return asked


async def read_body(request: Request) -> bytes:
    """Read the body of a request. Raises ValueError if the body is too large."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        # In base64, an image takes 4/3 as many bytes. The texts may take 1 MB.
        if len(body) > MAX_BYTES * 4 // 3 + 1_000_000:
            raise ValueError(f"the image is larger than {MAX_BYTES // 10**6} MB")
    return bytes(body)


def read_picture(url: str) -> Image.Image:
    """Decode the first frame of the image in a data: URL, turned upright. Raises ImageError."""
    file = io.BytesIO(base64.b64decode(url.partition(",")[2]))
    too_many = ImageError(f"the image has more than {MAX_PIXELS:,} pixels: make it smaller")
    try:
        with suppress(OSError, SyntaxError), no_warnings, Image.open(file, formats=TYPES) as header:
            if header.width * header.height > MAX_PIXELS:
                raise too_many
        return open_image(file, TYPES)
    except Image.DecompressionBombError:
        raise too_many from None
    except ImageError as error:
        if error is too_many:
            raise
        reason = str(error).rstrip(".").replace(" that Pillow reads", "")
        raise ImageError(f"{reason}. The page reads {', '.join(TYPES)}") from None


def write_picture(picture: Image.Image) -> str:
    """Encode an image as a data: URL."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def enlarged(picture: Image.Image, loaded: Loaded) -> Image.Image:
    """The crop of an image that the model sees, enlarged to at least SIDE pixels along a side."""
    return lens.seen(picture, loaded.transform, -(-SIDE // loaded.transform.crop_size))


def listen(port: int | None) -> socket.socket:
    """Listen on the loopback address, at `port` or at the first free port from FIRST_PORT.

    Raises ValueError if no port can be used.
    """
    if port is not None and not 0 <= port < 2**16:
        raise ValueError(f"port is {port}; expected 1 to 65535, or 0 for any free port")
    for candidate in range(FIRST_PORT, FIRST_PORT + 100) if port is None else [port]:
        try:
            return socket.create_server((HOST, candidate))
        except OSError as error:
            reason = error.strerror
    raise ValueError(
        f"port {candidate} of {HOST} cannot be used: {reason}. Without --port, a free port is used"
    )


class Impatient(H11Protocol):
    """Close a connection if no question arrives. uvicorn waits forever for a first question."""

    def connection_made(self, transport: Any) -> None:
        """Schedule the first check of the connection."""
        super().connection_made(transport)
        self.loop.call_later(IDLE_SECONDS, self.close_if_idle)

    def close_if_idle(self) -> None:
        """Close the connection, or check again later if a question is being answered."""
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
        elif not self.transport.is_closing():
            self.loop.call_later(IDLE_SECONDS, self.close_if_idle)


def serve_until_interrupted(app: Starlette, listening: socket.socket) -> None:
    """Serve until Ctrl-C. Then answer the waiting questions, and raise KeyboardInterrupt."""
    # No log_config: uvicorn's own config would close the log handlers of other libraries.
    config = uvicorn.Config(
        app, log_config=None, log_level="warning", lifespan="off", http=Impatient
    )
    uvicorn.Server(config).run(sockets=[listening])
