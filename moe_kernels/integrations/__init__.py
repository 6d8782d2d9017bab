"""Doors to libraries that are imported only when asked for."""
