"""Rewrites of modules, one folder for each method; ``protocol.py`` says what a rewrite is."""
