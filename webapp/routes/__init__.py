"""The doors: one file each, and what every answer has."""
