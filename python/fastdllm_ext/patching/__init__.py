"""Patching of models that are already loaded: one file a family, and the registry of them."""
