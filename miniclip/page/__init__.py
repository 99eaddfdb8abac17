"""The page of `miniclip serve`."""
