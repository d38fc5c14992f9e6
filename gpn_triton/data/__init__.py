"""Spike data: files and made sets to event stores, splits, and batches of binned counts."""
