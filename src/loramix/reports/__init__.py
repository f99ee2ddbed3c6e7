"""Tables and pages drawn from finished runs. Reads folders only; no torch."""
