"""Reference and proposal log-probs: cached in a sidecar, from a frozen model, or from a lagged copy."""
