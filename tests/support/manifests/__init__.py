"""Manifests of all shapes, and what each rule says about them."""
