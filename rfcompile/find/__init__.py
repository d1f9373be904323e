"""What a graph has where: read-only analyses, shared by the passes and the rewrites."""
