"""One way to make it you per file; found by listing the folder."""
