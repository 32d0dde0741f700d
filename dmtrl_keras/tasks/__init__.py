"""Layers of T tasks on the grouped layout."""
