"""Takes what a run found and gives it as data, text and pages; never runs, opens or scores anything."""
