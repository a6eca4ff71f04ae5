"""One file per format: read and write."""
