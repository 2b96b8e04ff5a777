"""The face world: people drawn from named parameters."""
