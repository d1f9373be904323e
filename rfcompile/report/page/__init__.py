"""Pages: a report as one HTML file, with the model as boxes, a table of sites, and plots."""
