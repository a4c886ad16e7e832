"""Measurements of a real Milepost, side by side with their floors: run on demand, never pass or fail."""
