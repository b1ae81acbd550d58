"""Adapters: one module for each kind of target."""
