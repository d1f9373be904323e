"""Polynomial attention, and what the attentions of a model compute."""
