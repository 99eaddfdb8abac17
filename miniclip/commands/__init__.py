"""The `miniclip` command. Each file holds one command: its arguments, what it runs, its table.

main.py builds the parser and turns errors into exit status; shared.py has what commands share.
"""
