"""From the records of a run to its figures, verdict and pages."""
