"""The page of `miniclip serve`: page.html in the browser, and serve.py, which answers it.

With `pip install -e '.[demo]'`,

    miniclip serve --model everyday shapes --index index.safetensors

opens a page for this machine alone: drop a picture, type labels, see which fits and where it is
seen, look at one head of one layer, search the index. Nothing is written, or fetched from
elsewhere.
"""
