"""Read-only analyses of a graph, shared by the passes and the rewrites of modules."""
