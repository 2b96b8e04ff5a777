"""A system in a dozen lines: ``python -m facegen.demos.examples.photomaker me.jpg``."""
