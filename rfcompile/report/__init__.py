"""Reports on what was done: as data, as text, as JSON and as a page."""
