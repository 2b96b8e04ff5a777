"""Restoring damaged faces: the published networks under their own key names, and a model of damage."""
