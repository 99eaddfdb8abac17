"""Faults of the commands, of what they print and draw, of zero-shot, retrieval, page, transform."""

from slip import Slip

FLAGS = "tests/test_flags.py"
CLI = "tests/test_cli.py"
SERVE = "tests/test_serve.py"
RETRIEVAL = "tests/test_retrieval.py"
ZEROSHOT = "tests/test_zeroshot.py"
TRANSFORM = "tests/test_transform.py"
FIGURES = "tests/test_figures.py"
PACKAGE = "tests/test_package.py"

SLIPS = [
    # A flag is dropped on the way to the call.
    Slip(
        "classify ignores --revision.",
        """device=args.device, reference=args.reference, revision=args.revision
    )
    templates = args.template""",
        """device=args.device, reference=args.reference
    )
    templates = args.template""",
        f"{FLAGS} -k 'revision and classify'",
    ),
    Slip(
        "classify ignores --reference.",
        """device=args.device, reference=args.reference, revision=args.revision
    )
    templates = args.template""",
        """device=args.device, revision=args.revision
    )
    templates = args.template""",
        f"{FLAGS} -k 'reference and classify'",
    ),
    Slip(
        "classify ignores --device.",
        """device=args.device, reference=args.reference, revision=args.revision
    )
    templates = args.template""",
        """reference=args.reference, revision=args.revision
    )
    templates = args.template""",
        f"{FLAGS} -k 'device and classify'",
    ),
    Slip(
        "classify ignores --template.",
        "templates = args.template or [TEMPLATE]",
        "templates = [TEMPLATE]",
        f"{FLAGS} -k template",
    ),
    Slip(
        "classify averages the last template only.",
        "templates = args.template or [TEMPLATE]",
        "templates = (args.template or [TEMPLATE])[-1:]",
        f"{FLAGS} -k template",
    ),
    Slip(
        "info ignores --revision.",
        "CLIPConfig.from_pretrained(args.model, revision=args.revision)",
        "CLIPConfig.from_pretrained(args.model)",
        f"{FLAGS} -k 'revision and info'",
    ),
    Slip(
        "tokenize ignores --reference.",
        "args.model, reference=args.reference, revision=args.revision\n    )\n    stages",
        "args.model, revision=args.revision\n    )\n    stages",
        f"{FLAGS} -k 'reference and tokenize'",
    ),
    Slip(
        "tokenize ignores --revision.",
        "args.model, reference=args.reference, revision=args.revision\n    )\n    stages",
        "args.model, reference=args.reference\n    )\n    stages",
        f"{FLAGS} -k 'revision and tokenize'",
    ),
    Slip(
        "parity ignores --revision.",
        "parity.load_pair(name, args.against, revision=args.revision)",
        "parity.load_pair(name, args.against)",
        f"{FLAGS} -k 'revision and parity'",
    ),
    Slip(
        "parity ignores --dtype.",
        "parity.compare(*pair, dtype=getattr(torch, args.dtype), device=args.device)",
        "parity.compare(*pair, device=args.device)",
        f"{FLAGS} -k 'dtype and parity'",
    ),
    Slip(
        "parity ignores --device.",
        "parity.compare(*pair, dtype=getattr(torch, args.dtype), device=args.device)",
        "parity.compare(*pair, dtype=getattr(torch, args.dtype))",
        f"{FLAGS} -k 'device and parity'",
    ),
    Slip(
        "convert ignores --revision.",
        """        tokenizer=args.tokenizer,
        revision=args.revision,
""",
        """        tokenizer=args.tokenizer,
""",
        f"{FLAGS} -k 'revision and convert'",
    ),
    Slip(
        "convert ignores --tokenizer.",
        """        tokenizer=args.tokenizer,
        revision=args.revision,
""",
        """        revision=args.revision,
""",
        f"{FLAGS} -k convert",
    ),
    Slip(
        "eval ignores --reference.",
        """device=args.device, reference=args.reference, revision=args.revision
    )
    classifier = ZeroShotClassifier(model, tokenizer, images.labels""",
        """device=args.device, revision=args.revision
    )
    classifier = ZeroShotClassifier(model, tokenizer, images.labels""",
        f"{FLAGS} -k 'reference and eval'",
    ),
    Slip(
        "eval of the drawn world ignores reference and revision.",
        """reference=args.reference, revision=args.revision)
    scores = score(*loaded)""",
        """)
    scores = score(*loaded)""",
        f"{FLAGS} -k 'reference and drawn'",
    ),
    Slip(
        "eval ignores --batch.",
        "evaluate(classifier, transform, images, args.batch)",
        "evaluate(classifier, transform, images)",
        f"{FLAGS} -k batches",
    ),
    Slip(
        "eval ignores --labels.",
        "read_lines(args.labels) if args.labels else None",
        "None",
        f"{CLI} -k labels_from_a_file",
    ),
    Slip(
        "explain ignores --reference.",
        """reference=args.reference, revision=args.revision)
    methods =""",
        """revision=args.revision)
    methods =""",
        f"{FLAGS} -k 'reference and explain'",
    ),
    Slip(
        "explain --score ignores --revision.",
        """reference=args.reference, revision=args.revision)
    found = localise""",
        """reference=args.reference)
    found = localise""",
        f"{FLAGS} -k 'revision and explain'",
    ),
    Slip(
        "explain --score ignores --device.",
        """load(args.model, device=args.device, reference=args.reference, revision=args.revision)
    found = localise""",
        """load(args.model, reference=args.reference, revision=args.revision)
    found = localise""",
        f"{FLAGS} -k 'device and explain'",
    ),
    Slip(
        "explain scores 100 scenes unless told otherwise.",
        "scenes = 200 if args.scenes is None",
        "scenes = 100 if args.scenes is None",
        f"{FLAGS} -k scenes",
    ),
    Slip(
        "explain uses rollout unless told otherwise.",
        'else args.method or ["relevance"]',
        'else args.method or ["rollout"]',
        f"{FLAGS} -k relevance",
    ),
    Slip(
        "embed ignores --dtype.",
        """            dtype=getattr(torch, args.dtype),
            reference""",
        """            reference""",
        f"{FLAGS} -k dtype",
    ),
    Slip(
        "embed ignores --revision when it loads.",
        """            reference=args.reference,
            revision=args.revision,
""",
        """            reference=args.reference,
""",
        f"{FLAGS} -k 'revision and embed'",
    ),
    Slip(
        "embed ignores --reference.",
        """            reference=args.reference,
            revision=args.revision,
""",
        """            revision=args.revision,
""",
        f"{FLAGS} -k 'reference and embed'",
    ),
    Slip(
        "The index does not know the revision that was asked for.",
        "lasting_name(args.model, args.revision)",
        "lasting_name(args.model)",
        f"{FLAGS} -k commit",
    ),
    Slip(
        "embed ignores --batch and --workers.",
        "encoder, damage, args.batch, args.workers)",
        "encoder, damage)",
        f"{FLAGS} -k 'batches or workers'",
    ),
    Slip(
        "embed leaves out what is damaged.",
        "encoder, damage, args.batch, args.workers)",
        "encoder, (), args.batch, args.workers)",
        f"{FLAGS} -k damaged",
    ),
    Slip(
        "embed --time ignores --workers.",
        "throughput(loaded, pictures, args.batch, args.workers)",
        "throughput(loaded, pictures, args.batch)",
        f"{FLAGS} -k workers",
    ),
    Slip(
        "search ignores --minus-image.",
        "args.image, args.minus, args.minus_image)",
        "args.image, args.minus)",
        f"{FLAGS} -k search",
    ),
    Slip(
        "search ignores --device.",
        "index.load_encoder(args.model, args.device)",
        "index.load_encoder(args.model)",
        f"{FLAGS} -k 'device and search'",
    ),
    Slip(
        "search ignores -k.",
        "index.search(query, args.k)",
        "index.search(query)",
        f"{FLAGS} -k twelve",
    ),
    Slip(
        "search shows ten pictures unless told otherwise.",
        '"-k", type=int, default=12',
        '"-k", type=int, default=10',
        f"{FLAGS} -k twelve",
    ),
    Slip(
        "A sheet's title adds what was taken away.",
        '" - ".join([plus, *args.minus, *args.minus_image])',
        '" + ".join([plus, *args.minus, *args.minus_image])',
        f"{FLAGS} -k title",
    ),
    Slip(
        "serve ignores --device for the index.",
        "open_index(args.index, args.device) if args.index",
        'open_index(args.index, "cpu") if args.index',
        f"{FLAGS} -k serve",
    ),
    Slip(
        "serve ignores --device for its models.",
        "{name: load(name, device=args.device) for name",
        "{name: load(name) for name",
        f"{FLAGS} -k 'device and serve'",
    ),
    Slip(
        "serve ignores --port.",
        "with listen(args.port) as socket",
        "with listen(None) as socket",
        f"{SERVE} -k taken",
    ),
    Slip(
        "bench ignores --dtype.",
        """        dtype=getattr(torch, args.dtype),
        compile=args.compile,
""",
        """        compile=args.compile,
""",
        f"{FLAGS} -k bench",
    ),
    Slip(
        "bench ignores --compile.",
        """        dtype=getattr(torch, args.dtype),
        compile=args.compile,
""",
        """        dtype=getattr(torch, args.dtype),
""",
        f"{FLAGS} -k bench",
    ),
    Slip(
        "bench ignores --batch.",
        "        batch=args.batch,\n    )\n    measured_with",
        "    )\n    measured_with",
        f"{FLAGS} -k bench",
    ),
    Slip(
        "train ignores --config.",
        "args.recipe, args.config, overrides, device)",
        "args.recipe, None, overrides, device)",
        f"{FLAGS} -k recipe",
    ),
    Slip(
        "train ignores --device.",
        "args.recipe, args.config, overrides, device)",
        "args.recipe, args.config, overrides)",
        f"{FLAGS} -k 'device and train'",
    ),
    Slip(
        "train ignores a flag that is 0 or off.",
        "overrides = {name: value for name, value in asked.items() if value is not None}",
        "overrides = {name: value for name, value in asked.items() if value}",
        f"{FLAGS} -k recipe",
    ),
    Slip(
        "train has no flag for the seed.",
        "for entry in fields(Recipe):",
        "for entry in fields(Recipe)[:-1]:",
        f"{FLAGS} -k recipe",
    ),
    Slip(
        "The default model is another of OpenAI's.",
        'DEFAULT_MODEL = "openai/clip-vit-base-patch32"',
        'DEFAULT_MODEL = "openai/clip-vit-base-patch16"',
        f"{FLAGS} -k 'openais and tokenize'",
    ),
    # What a command prints, and how it ends.
    Slip(
        "A bar is half as long as it should be.",
        'bar = "█" * round(probability * longest_bar)',
        'bar = "█" * round(probability * longest_bar / 2)',
        f"{CLI} -k prints",
    ),
    Slip(
        "classify prints a share as it is and not in percent.",
        "{probability:7.1%} {bar}",
        "{probability:7.1f} {bar}",
        f"{CLI} -k prints",
    ),
    Slip(
        "A confusion is shown as a share of the predicted class.",
        "{count:8,}{count / images[true]:10.1%}",
        "{count:8,}{count / max(images[predicted], 1):10.1%}",
        f"{CLI} -k prints",
    ),
    Slip(
        "top-5 is shown as top-1.",
        'f"top-5      {result.top5:.2%}"',
        'f"top-5      {result.top1:.2%}"',
        f"{CLI} -k prints",
    ),
    Slip(
        "The table of classes is sorted the other way round.",
        "key=lambda i: -accuracy[i] if images[i] else 1)",
        "key=lambda i: accuracy[i] if images[i] else 1)",
        f"{CLI} -k prints",
    ),
    Slip(
        "Confusions are of the wrong class in JSON.",
        '{"true": folders[true], "predicted": folders[predicted], "images": images}',
        '{"true": folders[predicted], "predicted": folders[true], "images": images}',
        f"{CLI} -k prints",
    ),
    Slip(
        "Two accuracies of the drawn world change places.",
        '("    of left and right", scores.left_right, "50 %")',
        '("    of left and right", scores.above_below, "50 %")',
        f"{CLI} -k drawn_world",
    ),
    Slip(
        "The chance of one in 64 is said to be 6.4 %.",
        '("the same: pairs never seen in training", scores.unseen, "1.6 %")',
        '("the same: pairs never seen in training", scores.unseen, "6.4 %")',
        f"{CLI} -k drawn_world",
    ),
    Slip(
        "The share of the slower half is of the faster one.",
        "found.together / min(found.decoding, found.encoding)",
        "found.together / max(found.decoding, found.encoding)",
        f"{CLI} -k how_fast",
    ),
    Slip(
        "The table of methods has its halves exchanged.",
        "{a.method:<17}{shares(a)}{shares(b)}",
        "{a.method:<17}{shares(b)}{shares(a)}",
        f"{CLI} -k scores_the_methods",
    ),
    Slip(
        "The spread is the smallest of all.",
        'spread = max(share for row in found["spread"]',
        'spread = min(share for row in found["spread"]',
        f"{CLI} -k scores_the_methods",
    ),
    Slip(
        "info prints multiply-adds of one part twice.",
        "multiply_adds = sum(row.multiply_adds for row in chosen)",
        "multiply_adds = sum(row.multiply_adds for row in chosen[1:])",
        f"{CLI} -k info_counts",
    ),
    Slip(
        "The numbers of parity's table are one column off.",
        "for number in row[1:-2])",
        "for number in row[2:-1])",
        f"{FLAGS} -k parity",
    ),
    Slip(
        "parity ends with 0 although the models differ.",
        "return int(report.first is not None)",
        "return 0",
        "tests/test_parity.py -k 'command and fork'",
    ),
    Slip(
        "An image that cannot be read leaves the exit status 0.",
        """            complain(error)
            status = 2
""",
        """            complain(error)
""",
        f"{CLI} -k bad_image",
    ),
    Slip(
        "Ctrl-C gives the exit status of an error.",
        "return 130",
        "return 1",
        f"{CLI} -k control_c",
    ),
    Slip(
        "A closed pipe is an error.",
        """        sys.stdout = None
        return 0
""",
        """        sys.stdout = None
        return 2
""",
        f"{CLI} -k enough",
    ),
    Slip(
        "An error has all its lines.",
        'text = text.partition("\\n")[0]\n    print(',
        "pass\n    print(",
        f"{CLI} -k first_line",
    ),
    Slip(
        "Names are printed as they are.",
        'return "".join(c if c.isprintable() else',
        'return "".join(c if True else',
        f"{CLI} -k 'escaped or prints'",
    ),
    Slip(
        "A long label is cut one character short.",
        'else text[: width - 1] + "…"\n',
        'else text[: width - 2] + "…"\n',
        f"{CLI} -k prints",
    ),
    Slip(
        "A picture's name is looked at after the work.",
        """        if getattr(args, "plot", None):
            check_figure(args.plot)
""",
        "",
        f"{CLI} -k before_the_work",
    ),
    Slip(
        "The demo has a picture of another scene in each run.",
        "random = Random(index)",
        "random = Random()",
        f"{CLI} -k demo_draws",
    ),
    Slip(
        "No false caption of the demo's scene has another colour.",
        'for word in ("colour", "shape")]',
        'for word in ("shape", "shape")]',
        f"{CLI} -k demo_draws",
    ),
    # What is loaded
    Slip(
        "What is loaded is in training mode.",
        "        return model.eval()\n\n    def save_pretrained",
        "        return model.train()\n\n    def save_pretrained",
        f"{PACKAGE} -k ready",
    ),
    Slip(
        "A public name is missing.",
        '    "ContextLengthError",\n',
        "",
        f"{PACKAGE} -k public",
    ),
    # The page
    Slip(
        "An upload may have 30 MB.",
        "MAX_BYTES = 20_000_000",
        "MAX_BYTES = 30_000_000",
        f"{SERVE} -k 'know or never'",
    ),
    Slip(
        "The page reads EPS files.",
        '"BMP", "TIFF")',
        '"BMP", "TIFF", "EPS")',
        f"{SERVE} -k formats",
    ),
    Slip(
        "The page reads no WEBP files.",
        '("JPEG", "PNG", "WEBP",',
        '("JPEG", "PNG",',
        f"{SERVE} -k formats",
    ),
    Slip(
        "The page may load pictures from anywhere.",
        "img-src data:;",
        "img-src *;",
        f"{SERVE} -k policy",
    ),
    Slip(
        "Any name of this machine is answered.",
        "allowed_hosts=[HOST, ",
        'allowed_hosts=["*", ',
        f"{SERVE} -k another_site",
    ),
    Slip(
        "The server listens to other machines.",
        "socket.create_server((HOST, candidate))",
        'socket.create_server(("", candidate))',
        f"{SERVE} -k 'taken or only_this'",
    ),
    Slip(
        "Questions are answered at the same time.",
        "async with one_at_a_time:",
        "async with asyncio.Lock():",
        f"{SERVE} -k one_at_a_time",
    ),
    Slip(
        "A question that nobody waits for is answered.",
        "if await request.is_disconnected():",
        "if False:",
        f"{SERVE} -k nobody_waits",
    ),
    Slip(
        "The heat map is of the last sentence.",
        'find_templates(asked["templates"])[0].replace',
        'find_templates(asked["templates"])[-1].replace',
        f"{SERVE} -k heat",
    ),
    Slip(
        "The heat map is by relevance whatever is asked for.",
        '[text], loaded, asked["method"])[0]',
        "[text], loaded)[0]",
        f"{SERVE} -k heat",
    ),
    Slip(
        "Layer and head change places.",
        'pixels, asked["layer"], asked["head"])[0]',
        'pixels, asked["head"], asked["layer"])[0]',
        f"{SERVE} -k heat",
    ),
    Slip(
        "The warmest patch is the mean patch.",
        '"warmest": heat.max().item()',
        '"warmest": heat.mean().item()',
        f"{SERVE} -k heat",
    ),
    Slip(
        "The picture on the page has half the pixels.",
        "SIDE = 448",
        "SIDE = 224",
        f"{SERVE} -k 'heat or scores'",
    ),
    Slip(
        "What was found is shown at half the size.",
        "THUMBNAIL = (224, 224)",
        "THUMBNAIL = (112, 112)",
        f"{SERVE} -k best_pictures",
    ),
    Slip(
        "The colours of heat are in another order.",
        'HEAT_COLOURS = ("#000004", "#bc3754", "#fcffa4")',
        'HEAT_COLOURS = ("#000004", "#fcffa4", "#bc3754")',
        f"{SERVE} -k 'heat or know'",
    ),
    Slip(
        "Cold places hide the picture.",
        "lambda h: 90 + h // 2",
        "lambda h: 180 + h // 4",
        f"{SERVE} -k heat",
    ),
    # Zero-shot
    Slip(
        "The mean of the prompts is not normalised.",
        "return unit_norm(prompt_embeds.unflatten(0, (len(labels), -1)).mean(dim=1))",
        "return prompt_embeds.unflatten(0, (len(labels), -1)).mean(dim=1)",
        ZEROSHOT,
    ),
    Slip(
        "The usual template has no full stop.",
        'TEMPLATE = "a photo of a {}."',
        'TEMPLATE = "a photo of a {}"',
        f"{FLAGS} -k template",
    ),
    Slip(
        "One letter of ImageNet's templates is another.",
        '"a photo of the hard to see {}."',
        '"a photo of the hard to sea {}."',
        f"{ZEROSHOT} -k published",
    ),
    Slip(
        "top-5 looks at four labels.",
        "logits.topk(min(5, count))",
        "logits.topk(min(4, count))",
        f"{ZEROSHOT} -k top5",
    ),
    Slip(
        "True and predicted classes change places.",
        "confusion.index_put_((true, best[:, 0]),",
        "confusion.index_put_((best[:, 0], true),",
        f"{ZEROSHOT} -k confusions",
    ),
    Slip(
        "Numbered folders are sorted as text.",
        "found.sort(key=lambda folder: (int(folder.name), folder.name))",
        "found.sort()",
        f"{ZEROSHOT} -k 'name_the_classes or sorted'",
    ),
    Slip(
        "Hidden files are images.",
        "return not hidden and path.is_file()",
        "return path.is_file()",
        f"{ZEROSHOT} -k hidden",
    ),
    Slip(
        "Reading ahead goes one picture too far.",
        "if len(waiting) > ahead:",
        "if len(waiting) > ahead + 1:",
        f"{ZEROSHOT} -k ahead",
    ),
    Slip(
        "The reading threads are as many as torch has, whatever was asked for.",
        "ThreadPoolExecutor(threads or torch.get_num_threads())",
        "ThreadPoolExecutor(torch.get_num_threads())",
        f"{ZEROSHOT} {RETRIEVAL} -k 'ahead or workers or threads'",
    ),
    # Retrieval
    Slip(
        "The search trusts float32.",
        "rounding = (width + 2) * torch.finfo(torch.float32).eps * query.norm().item()",
        "rounding = 0.0",
        f"{RETRIEVAL} -k 'exact or any_length'",
    ),
    Slip(
        "Of equal scores the last comes first.",
        "order = scores.argsort(descending=True, stable=True)[:k]",
        "order = len(scores) - 1 - scores.flip(0).argsort(descending=True, stable=True)[:k]",
        f"{RETRIEVAL} -k equals",
    ),
    Slip(
        "A part has 500 pictures.",
        "PART = 512",
        "PART = 500",
        f"{RETRIEVAL} -k killed",
    ),
    Slip(
        "A build continues parts of another model.",
        "return encoder._asdict() | {\n        \"transform\": repr",
        "return {\n        \"transform\": repr",
        f"{RETRIEVAL} -k another_build",
    ),
    Slip(
        "A build continues parts of another transform.",
        '"transform": repr(encoder.transform),\n        "device"',
        '"transform": "",\n        "device"',
        f"{RETRIEVAL} -k another_build",
    ),
    Slip(
        "A build continues parts that were made in another folder.",
        '"pictures": sha256(listed).hexdigest(),\n        "folder": os.getcwd(),',
        '"pictures": sha256(listed).hexdigest(),',
        f"{RETRIEVAL} -k another_build",
    ),
    Slip(
        "An index takes the place of any file.",
        "Index.load(out)  # an older index is replaced, and nothing else is",
        "pass",
        f"{RETRIEVAL} -k takes_the_place",
    ),
    Slip(
        "A query is not of length 1.",
        "    return unit_norm(query)\n",
        "    return query\n",
        f"{RETRIEVAL} -k 'sum_and_the_difference'",
    ),
    Slip(
        "Embeddings that are not finite are kept.",
        "if not x.isfinite().all():",
        "if False:",
        f"{RETRIEVAL} -k no_number",
    ),
    Slip(
        "The fingerprint does not know the dtype.",
        "{name} {tuple(tensor.shape)} {tensor.dtype}\\n",
        "{name} {tuple(tensor.shape)}\\n",
        f"{RETRIEVAL} -k fingerprint",
    ),
    Slip(
        "A search may use another transform than the index.",
        "if found.transform != self.encoder.transform:",
        "if False:",
        f"{RETRIEVAL} -k names_both",
    ),
    Slip(
        "A query is embedded with transformers' reference, whatever the index has.",
        "            reference=made_by.transform.reference,\n",
        "",
        f"{RETRIEVAL} -k as_it_was_made",
    ),
    Slip(
        "A query is embedded in float32, whatever the index has.",
        "            dtype=getattr(torch, made_by.dtype),\n            reference=made_by",
        "            reference=made_by",
        f"{RETRIEVAL} -k as_it_was_made",
    ),
    Slip(
        "A query is embedded by the newest commit.",
        "revision=None if name else made_by.revision,",
        "revision=None,",
        f"{FLAGS} -k commit",
    ),
    Slip(
        "A tar's pictures are not turned upright.",
        "return open_image(io.BytesIO(data))",
        "return Image.open(io.BytesIO(data))",
        f"{RETRIEVAL} -k in_a_tar_is",
    ),
    Slip(
        "A name in the index is looked for in the working folder.",
        "return open_picture(os.path.join(self.folder, path))",
        "return open_picture(path)",
        f"{RETRIEVAL} -k any_folder",
    ),
    Slip(
        "embed ignores the number of workers.",
        "read_ahead(decode, chain(*parts), 2 * batch, workers)",
        "read_ahead(decode, chain(*parts), 2 * batch)",
        f"{RETRIEVAL} -k threads",
    ),
    Slip(
        "A sheet keeps the beginning of a long name.",
        "fitting(hit.path, font, TILE, keep_end=True)",
        "fitting(hit.path, font, TILE)",
        f"{RETRIEVAL} -k long_name",
    ),
    Slip(
        "The scores on a sheet are one row off.",
        'f"{i + 1}   {hit.score:.3f}"',
        'f"{i}   {hit.score:.3f}"',
        f"{RETRIEVAL} -k long_name",
    ),
    # The transform
    Slip(
        "The mean of OpenAI's blue is off by a little.",
        "OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)",
        "OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821173)",
        f"{TRANSFORM} -k 'published or every_mode'",
    ),
    Slip(
        "OpenAI's crop rounds down too.",
        "left, top = (round(m / 2) if m > 0",
        "left, top = (m // 2 if m > 0",
        f"{TRANSFORM} -k crop",
    ),
    Slip(
        "Transparent pixels are laid on black.",
        'Image.new("RGBA", image.size, "white")',
        'Image.new("RGBA", image.size, "black")',
        f"{TRANSFORM} -k every_mode",
    ),
    Slip(
        "The largest image is a pixel too small.",
        "if size * new_long > MAX_PIXELS:",
        "if size * new_long >= MAX_PIXELS:",
        f"{TRANSFORM} -k most_pixels",
    ),
    Slip(
        "The files of another step's settings are read.",
        '(field in _FIXED or field.startswith("do_"))',
        "(field in _FIXED)",
        f"{TRANSFORM} -k cannot_be_followed",
    ),
    Slip(
        "A picture is not turned upright.",
        "ImageOps.exif_transpose(image, in_place=True)",
        "image.load()",
        f"{TRANSFORM} -k upright",
    ),
    # Pictures of results
    Slip(
        "The shares of confusions are of the predicted class.",
        "result.confusion.double() / result.images.clamp(min=1)[:, None]",
        "result.confusion.double() / result.images.clamp(min=1)[None, :]",
        FIGURES,
    ),
    Slip(
        "A share in the matrix of confusions is a tenth of itself.",
        'f"{share[i, j]:.0%}"[:-1]',
        'f"{share[i, j] / 10:.0%}"[:-1]',
        FIGURES,
    ),
    Slip(
        "The bars of frequent confusions are upside down.",
        "mistakes = result.mistakes()[:most][::-1]",
        "mistakes = result.mistakes()[:most]",
        FIGURES,
    ),
    Slip(
        "The bars of labels show logits.",
        "[s.probability for s in best]",
        "[s.logit for s in best]",
        FIGURES,
    ),
    Slip(
        "The curve of the loss shows the learning rate.",
        '"loss": ("loss", BLUE)',
        '"lr": ("loss", BLUE)',
        FIGURES,
    ),
    Slip(
        "The ratios of bench begin at 0.",
        "axes.barh(y, median - 1, left=1,",
        "axes.barh(y, median, left=0,",
        FIGURES,
    ),
    Slip(
        "Whiskers reach from the median to the quartiles' distance from 0.",
        "xerr=[[median - lower], [upper - median]]",
        "xerr=[[lower], [upper]]",
        FIGURES,
    ),
    Slip(
        "The map of a method says another's unit.",
        '"occlusion": "{} of the cosine lost"',
        '"occlusion": "{} of the attention"',
        FIGURES,
    ),
    Slip(
        "A map that reads no text does not say so.",
        'blind = "; whatever the text" if method in BLIND else ""',
        'blind = ""',
        FIGURES,
    ),
    Slip(
        "Five maps stand side by side.",
        "MOST_COLUMNS = 4",
        "MOST_COLUMNS = 5",
        FIGURES,
    ),
    Slip(
        "No difference is drawn where small ones are.",
        "NOTHING = 1e-17",
        "NOTHING = 1e-12",
        FIGURES,
    ),
]  # fmt: skip
