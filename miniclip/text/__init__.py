"""What the tokenizer needs beside its idea: Unicode tables, the fast merge, learning, and words."""
