"""Gets responses and gives per-item values of metrics; never sees a model."""
