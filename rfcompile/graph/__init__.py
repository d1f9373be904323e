"""A model as a graph: how it is captured and printed, and how passes rewrite it."""
