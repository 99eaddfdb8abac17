"""The page of `miniclip serve`: page.html runs in the browser, and serve.py answers its questions.

With `pip install -e '.[demo]'`,

    miniclip serve --model everyday shapes --index index.safetensors

serves a page that only this machine can open. Drop an image there and type labels: the page shows
which label fits and where the model sees it. It can also show a single head, and search an index.
No file is written, and nothing is loaded from other servers.
"""
