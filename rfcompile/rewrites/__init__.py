"""Rewrites of modules, one folder a method; ``protocol.py`` says what a rewrite is."""
