"""Tables for the terminal."""


def print_table(table):
    """Print a table of `rich`, in full where the output is no terminal."""
    from rich.console import Console

    console = Console()
    Console(width=None if console.is_terminal else 140).print(table)
