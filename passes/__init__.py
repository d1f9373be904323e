"""Graph rewrites, one a file; open this file to see which run and in what order."""

if __name__ != "rfcompile.passes":
    # A second copy under another name would hold other objects than the first: its rewrites
    # would silently match nothing.
    raise ImportError(f"passes/ was imported as {__name__!r}; import it as 'rfcompile.passes'")
