"""Tests that enter by the doors."""
