"""The page of `miniclip serve`: page.html in the browser, and serve.py, which answers it."""
