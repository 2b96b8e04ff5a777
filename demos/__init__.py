"""The browser demo: a tab per pipeline, a control per field of its request."""
