"""How a change reaches ten thousand pages."""
