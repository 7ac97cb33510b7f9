"""Manifests of all shapes, and what each rule makes of them."""
