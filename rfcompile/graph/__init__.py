"""A model as a graph: how it is captured, printed, compared, and rewritten by passes."""
