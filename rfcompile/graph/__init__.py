"""A model as a graph: captured, printed; where its nodes come from; how passes run."""
