"""Fusion units: layers through which tasks see each other's features."""
