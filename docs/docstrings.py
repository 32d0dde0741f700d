"""Docstrings for the site: their examples are code."""

import re

import griffe


class Examples(griffe.Extension):
    """Name a docstring's section `Example:` as the parser knows it, `Examples:`.

    Under any other name the lines that start with `>>>` would be quotations.
    """

    def on_object(self, *, obj, **kwargs):
        """Called for each object when it is loaded."""
        if obj.docstring is not None:
            value = obj.docstring.value
            obj.docstring.value = re.sub(
                r"^( *)Example:$", r"\1Examples:", value, flags=re.MULTILINE
            )
