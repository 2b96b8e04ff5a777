"""One task per file: its request and its pipeline."""
