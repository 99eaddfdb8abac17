"""The page of `miniclip serve`: page.html in the browser, and serve.py, which answers it.

With `pip install -e '.[demo]'`,

    miniclip serve --model everyday shapes --index index.safetensors

opens a page that only this machine can open: drop a picture, type labels, see which label fits and
where the model sees it, look at one head, search the index. The page writes no file and loads
nothing from elsewhere.
"""
