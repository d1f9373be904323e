"""What was done: reports as data, as text, as JSON and as a page."""
