"""A model as a graph: captured, printed, compared; where its nodes come from; how passes run."""
