"""The `miniclip` command. Each file has one subcommand: its arguments, its work and its output.

main.py builds the parser and turns errors into an exit status. shared.py has common functions.
"""
