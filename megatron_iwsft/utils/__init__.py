"""Files, command lines: what every layer uses."""
