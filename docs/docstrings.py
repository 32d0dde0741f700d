"""Docstrings for the site: their examples are code."""

import re
import textwrap

import griffe


class Examples(griffe.Extension):
    """Docstrings as the parser of the site wants them.

    What follows `Example:`, to the end, is an indented section `Examples:`, since the lines
    that start with `>>>` would otherwise be quotations.
    """

    def on_object(self, *, obj, **kwargs):
        """Called for each object when it is loaded."""
        if obj.docstring is None:
            return
        text, *example = re.split(r"^Example:$", obj.docstring.value, flags=re.MULTILINE)
        # The names of arguments that are described together, on one line.
        text = re.sub(
            r"^    \w+(,\s+[*\w]+)+:",
            lambda names: "    " + " ".join(names[0].split()),
            text,
            flags=re.MULTILINE,
        )
        if example:
            example = textwrap.indent(example[0].strip("\n"), " " * 4)
            text = f"{text}Examples:\n{example}"
        obj.docstring.value = text
